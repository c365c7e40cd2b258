"""Which SQLite file the handler that runs in this thread or task holds: a message run inside it would wait for its own caller.

SQLite has one writer for a whole file, and a run is that writer from its claim to its commit. A handler that calls `eo.process`
would have to end for the call to go on. SQLite itself does not see that: it waits for half a minute, and then says that the file
is locked. Known is what this thread or task began; another one that waits gets its turn. `attempt` says who holds it; `routing`
and `transports.sql` ask.
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
    # a forked child has its parent's threads by name; what it is refused is told by `fork`
    return fork.here, get_ident(), 0 if task is None else id(task), file


class holding:  # noqa: N801  (a block, written as contextlib's are)
    """Know that a handler of this thread or task, while it runs, is the writer of this database.

    No generator under @contextmanager: contextlib sets the traceback of what is raised in its block, and an exception that is a
    frozen dataclass refuses that with an error of its own, which would be taken for the handler's.
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
    """Say whether any handler of this process holds a file: else there is nothing to ask, and no engine to make for it."""
    return bool(_held)


def refuse_inside(engine: Engine, name: str) -> None:
    """Refuse to run or send a message where a handler further up holds the file.

    Args:
        engine: Of the database that would be written to.
        name: What was called.

    Raises:
        Misuse: It would wait for its own caller.
    """
    if _held and _place(engine) in _held:
        raise Misuse(
            f"{name} was called in a handler that holds {redacted(engine.url)}: SQLite has one writer for the whole file, so it"
            " would wait for its own caller. Send the message with a producer once this handler has returned, or call the"
            " function itself with the session you are given."
        )
