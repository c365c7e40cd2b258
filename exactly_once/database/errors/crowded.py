"""Says whether a pool has no connection left, and what to do about it. Asks no server, and waits for nothing.

A handler under a lease holds one connection with its session and takes a second one for a step. If such handlers hold all
connections, each waits for another to end, as long as the pool allows: 64 threads over 20 connections proceed in
waves of 30 s. The server is healthy then, so nobody should look there. Called wherever we take a connection for ourselves.
"""

from time import monotonic
from typing import Any

from sqlalchemy import Engine

__all__ = ["all_taken", "is_news", "none_free"]

_said: dict[tuple[int, int], object] = {}


def all_taken(engine: Engine) -> int | None:
    """Return the size limit of a pool whose connections are all in use; else None. Also None if the pool has no limit."""
    pool: Any = engine.pool
    most = _most(pool)
    return most if most is not None and pool.checkedout() >= most else None


def is_news(engine: Engine) -> bool:
    """Return True to one of all threads, once a minute: it then logs a line."""
    minute, mine = (id(engine.pool), int(monotonic() // 60)), object()
    if _said.setdefault(minute, mine) is not mine:  # one step for all threads, without a lock
        return False
    for earlier in [each for each in list(_said) if each[0] == minute[0] and each != minute]:
        _said.pop(earlier, None)
    return True


def none_free(engine: Engine) -> str:
    """Return the text for a pool that gave no connection in time."""
    pool: Any = engine.pool
    most = _most(pool)
    taken = "" if most is None else f": all {most} of the pool were in use"
    return (
        f"No connection was free{taken}. The database may be well: more runs at once here than there are connections, and a"
        " handler under a lease needs a second one for its steps. Nothing ran. Give create_engine(..., pool_size=) the threads of"
        " the program and 4 more; of a URL, EXACTLY_ONCE_CONCURRENCY as many as the threads."
    )


def _most(pool: Any) -> int | None:
    size, overflow = getattr(pool, "size", None), getattr(pool, "_max_overflow", -1)
    return None if size is None or overflow < 0 or not hasattr(pool, "checkedout") else size() + overflow
