"""Which SQLite file the running handler of this thread or task holds. A message that runs inside it would wait
for its own caller.

SQLite has one writer for a whole file, and a run is that writer from its claim to its commit. If its handler calls `eo.process`,
the call waits for the handler, and the handler for the call. SQLite does not detect that: it waits for half a minute, then says
that the file is locked. We know only what this thread or task began; other threads and tasks get their turn. `processing.attempt`
records who holds the file; `executor.callers_loop` and `transports.sql` ask.
"""

import asyncio
from threading import get_ident
from typing import Final

from sqlalchemy import Engine

from exactly_once import fork
from exactly_once.errors import Misuse
from exactly_once.wording.redaction import redacted

__all__ = ["anyone_holds", "holding", "refuse_inside"]

_Place = tuple[object, int, int, str]
_held: Final[set[_Place]] = set()


def _place(engine: Engine) -> _Place | None:
    file = engine.url.database
    if engine.dialect.name != "sqlite" or not file or file == ":memory:":
        return None
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no loop runs in this thread
        task = None
    # A forked child has its parent's thread ids; `fork` reports what the child is refused.
    return fork.here, get_ident(), 0 if task is None else id(task), file


class holding:  # noqa: N801  (a block, written as contextlib's are)
    """Record that a handler of this thread or task is the writer of this database while it runs.

    Not a generator under @contextmanager: contextlib sets the traceback of an exception that is raised in its
    block. An exception that is a frozen dataclass refuses that with an error of its own, which would look like the handler's.
    """

    __slots__ = ("_place",)

    def __init__(self, engine: Engine | None) -> None:
        place = None if engine is None else _place(engine)
        self._place = None if place in _held else place

    def __enter__(self) -> None:
        if self._place is not None:
            _held.add(self._place)

    def __exit__(self, *_: object) -> None:
        if self._place is not None:
            _held.discard(self._place)


def anyone_holds() -> bool:
    """Say whether any handler of this process holds a file. If not, no engine has to be made in order to ask."""
    return bool(_held)


def refuse_inside(engine: Engine, name: str) -> None:
    """Refuse to run or send a message inside a handler that holds the file.

    Args:
        engine: The database that would be written to.
        name: The function that was called.

    Raises:
        Misuse: The call would wait for its own caller.
    """
    if _held and _place(engine) in _held:
        raise Misuse(
            f"{name} was called in a handler that holds {redacted(engine.url)}: SQLite has one writer for the whole file, so it"
            " would wait for its own caller. Send the message with a producer once this handler has returned, or call the"
            " function itself with the session you are given."
        )
