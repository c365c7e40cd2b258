"""Throws away asyncio connections that outlive their event loop, before they are used: with `asyncio.run` for each message, say.

A loop at rest, neither closed nor running, counts as ended: nobody may ever run it again. If it runs again,
it gets new connections.

The streams of asyncmy belong to the loop they were opened in. Connections of psycopg and aiosqlite do not; but the queue of
any pool in which a task waited belongs to that task's loop, too. So a pool is for one loop at a time, as SQLAlchemy says
(https://docs.sqlalchemy.org/en/20/orm/extensions/asyncio.html). A program with several loops at once gets an error
that says what to do. Called by the store, for its engine and each new loop.
"""

import asyncio
from contextlib import suppress
from socket import SHUT_RDWR
from time import time
from typing import Any
from weakref import WeakSet

from sqlalchemy import Engine
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.pool import NullPool, QueuePool

from exactly_once.database.listeners import listen
from exactly_once.wording.redaction import redacted

__all__ = ["is_of_several", "keep_apart", "leave", "why_not_several"]

_BOUND = ("asyncmy",)
_KEPT: "WeakSet[Engine]" = WeakSet()


def keep_apart(engine: Engine) -> None:
    """Keep connections of another loop out of this engine's checkouts."""
    if engine.dialect.driver in _BOUND and engine not in _KEPT:
        _KEPT.add(engine)
        listen(engine, "checkout", _of_this_loop)
        listen(engine, "close", _closes)


def leave(engine: Engine) -> None:
    """Begin with a new pool after a loop has ended, or is at rest, if a task may have waited in the old pool."""
    pool = engine.pool
    # Only if it was full: the first connection of a new pool is opened behind a lock of one loop, and two loops may
    # need it at once.
    if isinstance(pool, QueuePool) and pool.overflow() >= 0:  # it was full
        engine.dispose(close=False)  # without closing: closing takes time, and others use the engine meanwhile
        pool.dispose()
    elif engine.dialect.driver in _BOUND:
        # Older connections are closed at their next checkout, before pool_pre_ping uses them. There is no public method for it.
        pool._invalidate_time = time()  # noqa: SLF001


def why_not_several(engine: Engine) -> str | None:
    """Say what to do about several loops at once. None for NullPool, in which nobody waits and no connection is kept."""
    if isinstance(engine.pool, NullPool):
        return None
    return (
        f"The AsyncEngine {redacted(engine.url)} is used in two event loops at once, and its pool is for one: under load it"
        " answers 'bound to a different event loop', or a wait lasts until pool_timeout. Messages then wait, and none is lost."
        " Give each loop an engine and an ExactlyOnce of its own, or: create_async_engine(..., poolclass=NullPool)"
    )


def is_of_several(error: BaseException) -> bool:
    """Say whether Python raised this because two loops wait in one pool. Read from its text: it decides only about a hint."""
    met: BaseException | None = error
    while met is not None:
        if isinstance(met, RuntimeError) and "different event loop" in str(met):
            return True
        met = met.__cause__ or met.__context__
    return False


def _of_this_loop(dbapi: Any, record: Any, fairy: Any) -> None:
    if _of_another_loop(dbapi):
        _end(dbapi)
        raise DisconnectionError("a connection of another event loop")


def _closes(dbapi: Any, record: Any) -> None:
    """Runs before the pool closes it: a connection of another loop cannot be awaited."""
    if _of_another_loop(dbapi):
        _end(dbapi)


def _of_another_loop(dbapi: Any) -> bool:
    driver = dbapi.driver_connection
    # The public name, without underscore, raises outside of a loop.
    return not isinstance(driver, _Forgotten) and driver.loop is not asyncio._get_running_loop()  # noqa: SLF001


def _end(dbapi: Any) -> None:
    """End another loop's connection."""
    driver, dbapi._connection = dbapi._connection, _Forgotten()  # noqa: SLF001  (or the pool would close it from here)
    if not driver.loop.is_running():
        # Close the socket here: else the server keeps the connection until the loop runs again, or until garbage collection.
        with suppress(Exception):  # closed already; or another kind of loop, which closes its sockets itself
            driver._transport.get_extra_info("socket").shutdown(SHUT_RDWR)  # noqa: SLF001  (no public name)
    try:
        driver.loop.call_soon_threadsafe(driver.close)  # only its own loop may touch it
    except RuntimeError:  # the loop has ended
        with suppress(RuntimeError):  # the first close() raises on an ended loop, but marks it as closing
            driver.close()
        driver.close()


class _Forgotten:
    """Replaces a connection of another loop while the pool throws it away."""

    async def ensure_closed(self) -> None: ...

    def close(self) -> None: ...
