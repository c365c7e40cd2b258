"""A pool of psycopg's below SQLAlchemy's: there `close()` gives the session back, and what is thrown away comes again.

It is made so: `create_engine("postgresql+psycopg://", creator=pool.getconn, poolclass=NullPool)`, of a pool with
`close_returns=True`, as psycopg's documentation says. A session that a handler has changed would go on to the next one, with
its role and its path. It is ended here, and then given back: the pool sees that, and makes another one.

Source: https://www.psycopg.org/psycopg3/docs/advanced/pool.html, "Integration with other connection pools".
Called by `had_before`, which watches the pools of an engine.
"""

from inspect import isawaitable
from typing import Any, Final
from weakref import WeakKeyDictionary

from sqlalchemy import Engine
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.util import await_only

from exactly_once.database.listeners import listen

__all__ = ["end_what_is_thrown_away", "is_known"]

_THROWN_AWAY: Final = "exactly_once.thrown_away"
_had: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()
"""What was known of each driver's connection when it was given back: SQLAlchemy makes a record anew each time."""


def end_what_is_thrown_away(engine: Engine) -> None:
    """Have sessions end that SQLAlchemy invalidates; those that it only gives back go on."""
    if engine.dialect.driver.startswith("psycopg"):
        listen(engine, "invalidate", _end)
        listen(engine, "soft_invalidate", _mark)
        listen(engine, "close", _close)


def is_known(dbapi: Any, record: ConnectionPoolEntry) -> bool:
    """Say of a connection that SQLAlchemy has just got whether it had it before, and put back what was known of it then."""
    known = _had.get(_driver(dbapi)) if _pool_of(dbapi) is not None else None
    if known is None:
        return False
    record.info.update(known)
    return True


def _mark(dbapi: Any, record: ConnectionPoolEntry, error: BaseException | None) -> None:
    record.info[_THROWN_AWAY] = True


def _close(dbapi: Any, record: ConnectionPoolEntry) -> None:
    if record.info.pop(_THROWN_AWAY, False):
        _end(dbapi)
        return
    if _pool_of(dbapi) is not None:
        _had[_driver(dbapi)] = dict(record.info)


def _end(dbapi: Any, *_: object) -> None:
    driver, pool = _driver(dbapi), _pool_of(dbapi)
    if pool is None:
        return
    driver.pgconn.finish()
    # here: of one that is finished close() does nothing, and the pool would miss it
    given_back = pool.putconn(driver)
    if isawaitable(given_back):
        await_only(given_back)


def _pool_of(dbapi: Any) -> Any:
    driver = _driver(dbapi)
    return getattr(driver, "_pool", None) if hasattr(driver, "pgconn") else None


def _driver(dbapi: Any) -> Any:
    return getattr(dbapi, "driver_connection", None) or getattr(dbapi, "_connection", dbapi)
