"""Connections of asyncio that outlive their event loop, as under `asyncio.run` for each message: thrown away before use.

asyncmy's streams belong to the loop they were opened in, and psycopg's and aiosqlite's connections do not; but the queue of
any pool that had somebody wait in it belongs to that loop, too. Called by the store, for its engine and each new loop.
"""

import asyncio
from contextlib import suppress
from typing import Any
from weakref import WeakSet

from sqlalchemy import Engine
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.pool import QueuePool

from exactly_once.listeners import listen

__all__ = ["keep_apart", "leave"]

_BOUND = ("asyncmy",)
_KEPT: "WeakSet[Engine]" = WeakSet()


def keep_apart(engine: Engine) -> None:
    """Let nobody get a connection of another loop from this engine's pool."""
    if engine.dialect.driver in _BOUND and engine not in _KEPT:
        _KEPT.add(engine)
        listen(engine, "checkout", _of_this_loop)


def leave(engine: Engine) -> None:
    """Begin with a new pool after a loop has ended, where somebody may have waited in the old one."""
    pool = engine.pool
    if isinstance(pool, QueuePool) and pool.overflow() >= 0:  # it was full
        engine.dispose(close=False)  # at once: closing takes its time, and others come meanwhile
        if engine.dialect.driver not in _BOUND:
            pool.dispose()


def _of_this_loop(dbapi: Any, record: Any, fairy: Any) -> None:
    driver = dbapi.driver_connection
    loop = driver.loop
    if loop is asyncio.get_running_loop():
        return
    if loop.is_closed():
        with suppress(RuntimeError):  # it cannot be told in its loop, but is marked as closing by this
            driver.close()
        driver.close()
    else:
        # of a loop in another thread, which alone may touch it; here it is only forgotten
        loop.call_soon_threadsafe(driver.close)
        dbapi._connection = _Forgotten()  # noqa: SLF001  (or the pool would close it from this thread)
    raise DisconnectionError("a connection of another event loop")


class _Forgotten:
    """Stands where a connection of another running loop stood, while the pool throws that away."""

    async def ensure_closed(self) -> None: ...

    def close(self) -> None: ...
