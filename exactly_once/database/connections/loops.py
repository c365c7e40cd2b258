"""Connections of asyncio that outlive their event loop, as under `asyncio.run` for each message: thrown away before use.

A loop that rests, neither closed nor running, is as good as ended: nobody may ever run it again. If it does, it gets others.

asyncmy's streams belong to the loop they were opened in, and psycopg's and aiosqlite's connections do not; but the queue of
any pool that had somebody wait in it belongs to that loop, too. So a pool is for one loop at a time, as SQLAlchemy says
(https://docs.sqlalchemy.org/en/20/orm/extensions/asyncio.html): several at once are told what to do. Called by the store, for its
engine and each new loop.
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
    """Let nobody get a connection of another loop from this engine's pool."""
    if engine.dialect.driver in _BOUND and engine not in _KEPT:
        _KEPT.add(engine)
        listen(engine, "checkout", _of_this_loop)
        listen(engine, "close", _closes)


def leave(engine: Engine) -> None:
    """Begin with a new pool after a loop has ended, or rests, where somebody may have waited in the old one."""
    pool = engine.pool
    # only where it was full: a new pool opens its first connection behind a lock of one loop, and two may need it at once
    if isinstance(pool, QueuePool) and pool.overflow() >= 0:  # it was full
        engine.dispose(close=False)  # at once: closing takes its time, and others come meanwhile
        pool.dispose()
    elif engine.dialect.driver in _BOUND:
        # each that is older is closed when it is next asked for, before pool_pre_ping speaks on it; no public verb says so
        pool._invalidate_time = time()  # noqa: SLF001


def why_not_several(engine: Engine) -> str | None:
    """Say what to do about several loops at once; None where nobody waits for a connection, and none is kept."""
    if isinstance(engine.pool, NullPool):
        return None
    return (
        f"The AsyncEngine {redacted(engine.url)} is used in two event loops at once, and its pool is for one: under load it"
        " answers 'bound to a different event loop', or a wait lasts until pool_timeout. Messages then wait, and none is lost."
        " Give each loop an engine and an ExactlyOnce of its own, or: create_async_engine(..., poolclass=NullPool)"
    )


def is_of_several(error: BaseException) -> bool:
    """Say whether it is what Python raises where two loops wait in one pool. By its text: only a hint hangs on it."""
    met: BaseException | None = error
    while met is not None:
        if isinstance(met, RuntimeError) and "different event loop" in str(met):
            return True
        met = met.__cause__ or met.__context__
    return False


def _of_this_loop(dbapi: Any, record: Any, fairy: Any) -> None:
    if _foreign(dbapi):
        _end(dbapi)
        raise DisconnectionError("a connection of another event loop")


def _closes(dbapi: Any, record: Any) -> None:
    """Before the pool closes it: of another loop it cannot be awaited."""
    if _foreign(dbapi):
        _end(dbapi)


def _foreign(dbapi: Any) -> bool:
    driver = dbapi.driver_connection
    # the name without underscore raises outside of a loop
    return not isinstance(driver, _Forgotten) and driver.loop is not asyncio._get_running_loop()  # noqa: SLF001


def _end(dbapi: Any) -> None:
    """End another loop's connection."""
    driver, dbapi._connection = dbapi._connection, _Forgotten()  # noqa: SLF001  (or the pool would close it from here)
    if not driver.loop.is_running():
        # by us: the server would else have the connection until the loop runs again, or the garbage collector comes by
        with suppress(Exception):  # closed already; or a loop of another kind, which closes what is its own as it ends
            driver._transport.get_extra_info("socket").shutdown(SHUT_RDWR)  # noqa: SLF001  (no public name)
    try:
        driver.loop.call_soon_threadsafe(driver.close)  # it alone may touch it
    except RuntimeError:  # it has ended
        with suppress(RuntimeError):  # its loop cannot be told, but it is marked as closing by this
            driver.close()
        driver.close()


class _Forgotten:
    """Stands where a connection of another loop stood, while the pool throws that away."""

    async def ensure_closed(self) -> None: ...

    def close(self) -> None: ...
