"""Whether a pool has no connection left, and what to do about it. Asks nothing of a server, and waits for nothing.

A handler under a lease holds one connection with its session and takes a second one for a step. Where all connections are held
by such handlers, each waits for another one to end, for as long as the pool lets it: 64 threads over 20 connections go on in
waves of 30 s. The server is well then, so nobody should look there. Called by whatever takes a connection for us.
"""

from time import monotonic
from typing import Any

from sqlalchemy import Engine

__all__ = ["all_taken", "is_news", "none_free"]

_said: dict[tuple[int, int], object] = {}


def all_taken(engine: Engine) -> int | None:
    """Return how many connections a pool may have, where all of them are in use; else None, also where there is no bound."""
    pool: Any = engine.pool
    most = _most(pool)
    return most if most is not None and pool.checkedout() >= most else None


def is_news(engine: Engine) -> bool:
    """Say once a minute that it is worth a line, to one of all threads."""
    minute, mine = (id(engine.pool), int(monotonic() // 60)), object()
    if _said.setdefault(minute, mine) is not mine:  # one step for all threads, without a lock
        return False
    for earlier in [each for each in list(_said) if each[0] == minute[0] and each != minute]:
        _said.pop(earlier, None)
    return True


def none_free(engine: Engine) -> str:
    """Say that a pool gave no connection in its time."""
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
