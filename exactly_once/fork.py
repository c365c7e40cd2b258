"""What happens in a forked process: each owner of connections, clients, threads or locks lets go of the parent's.

Python copies these into the child, and the other end still belongs to the parent: two processes on one socket take each other's
answers, a lock that another thread held is held for ever, and the threads do not exist in the child. So an owner is told in the
child, before anything else runs there, and begins anew. Telling it sends nothing and waits for nothing. Owners are kept as weak
references, so this keeps none of them alive. `database.connections.forked_engines` owns SQLAlchemy's pools.
"""

import os
from typing import Any, Final, NoReturn, Protocol
from weakref import ref

from exactly_once.errors import ForkedProcess
from exactly_once.wording.steady_log import steady

__all__ = ["Owner", "end", "forget", "here", "inside", "pin", "tell"]

_log = steady("exactly_once.fork")


class Owner(Protocol):
    """Owns something that a child must not use."""

    def forked(self) -> None:
        """Runs in a forked child: let go of what belongs to the parent. Sends nothing, waits for nothing."""


here: object = object()
"""Stands for this process: a different object in each child. Kept by objects of one process, and compared by `is`."""

_owners: Final[set["ref[Any]"]] = set()


def tell(owner: Owner) -> None:
    """Call `owner.forked()` in every process forked from this one, as long as the owner lives.

    Before the fork call `owner.forking()` in this process, if it has that method.
    """
    import ctypes  # noqa: F401  (for `pin`: costs an import, and in a child an import could wait for a lock of the parent's)

    _owners.add(ref(owner, _owners.discard))


def forget(owner: Owner) -> None:
    """Stop telling this owner."""
    _owners.discard(ref(owner))


def pin(thing: object) -> None:
    """Keep an object of the parent for ever, also during the interpreter's exit: its end would send or unlock something
    that belongs to the parent."""
    import ctypes  # `tell` imported it

    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def inside() -> ForkedProcess:
    """Return the error for a child that was forked inside a handler, or inside any transaction with a claim."""
    return ForkedProcess(
        "This process was forked while a handler ran, or a transaction with a claim was open. Transaction, connection and"
        " message belong to the process it was forked off: here nothing was sent, committed, recorded or acknowledged, and"
        " there all goes on. Let a child end itself before it gets back to here (os._exit), or start it by subprocess or by"
        " multiprocessing's 'spawn'."
    )


def end(error: BaseException) -> NoReturn:
    """End this copy of one of our threads, and with it the child: nobody waits for it, and its loop is the parent's."""
    _log.critical("%s", error)
    os._exit(1)


def _each(verb: str) -> None:
    for known in tuple(_owners):
        told = getattr(known(), verb, None)
        if told is None:
            continue
        try:
            told()
        except Exception as error:  # the other owners must be told all the same
            _log.error("An owner could not be told of a fork (%s); going on.", type(error).__name__)


def _forking() -> None:
    _each("forking")


def _forked() -> None:
    global here  # noqa: PLW0603  (a new process is another place, and there is one moment in which it becomes one)
    here = object()
    _each("forked")


if hasattr(os, "register_at_fork"):  # without fork there is nothing to do
    os.register_at_fork(before=_forking, after_in_child=_forked)
