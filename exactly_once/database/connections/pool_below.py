"""A psycopg pool below SQLAlchemy: there `close()` returns the session to the pool, so a session thrown away would come back.

An application makes it so: `create_engine("postgresql+psycopg://", creator=pool.getconn, poolclass=NullPool)`, with a pool of
`close_returns=True`, as psycopg's documentation says. A session that a handler changed would go on to the next handler, with
its role and its search path. This module ends the session, and then returns it: the pool notices, and makes another one.

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
"""What was known of each driver connection when it was returned: SQLAlchemy makes a new record each time."""


def end_what_is_thrown_away(engine: Engine) -> None:
    """End sessions that SQLAlchemy invalidates. Sessions that it only returns stay open."""
    if engine.dialect.driver.startswith("psycopg"):
        listen(engine, "invalidate", _end)
        listen(engine, "soft_invalidate", _mark)
        listen(engine, "close", _close)


def is_known(dbapi: Any, record: ConnectionPoolEntry) -> bool:
    """Say whether SQLAlchemy had this connection before, and restore what was known of it then."""
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
    # Here: close() does nothing on a finished connection, and the pool would wait for it.
    given_back = pool.putconn(driver)
    if isawaitable(given_back):
        await_only(given_back)


def _pool_of(dbapi: Any) -> Any:
    driver = _driver(dbapi)
    return getattr(driver, "_pool", None) if hasattr(driver, "pgconn") else None


def _driver(dbapi: Any) -> Any:
    return getattr(dbapi, "driver_connection", None) or getattr(dbapi, "_connection", dbapi)
