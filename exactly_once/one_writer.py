"""Which SQLite file the handler that runs in this thread or task holds: a message run inside it would wait for its own caller.

SQLite has one writer for a whole file, and a run is that writer from its claim to its commit. A handler that calls `eo.process`
would have to end for the call to go on. SQLite itself does not see that: it waits for half a minute, and then says that the file
is locked. Known is what this thread or task began; another one that waits gets its turn. `attempt` says who holds it; `routing`
and `transports.sql` ask.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Final

from sqlalchemy import Engine

from exactly_once import fork
from exactly_once.errors import Misuse
from exactly_once.redaction import redacted

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


@contextmanager
def holding(engine: Engine | None) -> Iterator[None]:
    """Know that a handler of this thread or task, while it runs, is the writer of this database."""
    place = None if engine is None else _place(engine)
    if place is None or place in _held:
        yield
        return
    _held.add(place)
    try:
        yield
    finally:
        _held.discard(place)


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
