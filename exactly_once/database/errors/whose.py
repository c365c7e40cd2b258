"""Which database an error came from: one whose connection an engine of the store made, or another database.

A handler may use other databases. When one of those is away, full or read-only, its error has the same class and code as an error
of the store. So we look where it was raised: that frame holds SQLAlchemy's connection, or the driver's. For a driver's connection
we remember which engine made it. If there is neither, the error came from elsewhere: from the handler's own `psycopg.connect()`,
say.

What a wrong answer costs: a wrong "elsewhere" costs a message one failure, and nothing while the store is away, when no failure
can be written. A wrong "ours" holds the message for ever, without counting. So "elsewhere" is the answer if we see nothing. That
is so for raw use of our own connection through `sqlite3`, and below SQLAlchemy's layer of asyncmy: both
are compiled, without frames.

Used after errors alone. `watched.interception` registers the engines, and `store` asks.
"""

from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import Any, Final
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Engine
from sqlalchemy.engine import Dialect
from sqlalchemy.pool import ConnectionPoolEntry

from exactly_once.database.errors.unreached import unreached
from exactly_once.database.listeners import listen
from exactly_once.exceptions.drivers import DRIVERS

__all__ = ["came_through", "mark_origin", "watch_made"]

_OF: Final = "exactly_once_dialect"
"""The attribute of an error that keeps the dialect of its engine: SQLAlchemy's own errors do not have it."""
_MADE: Final[WeakKeyDictionary[Any, Dialect]] = WeakKeyDictionary()
"""For each driver connection, the dialect of the engine that made it. All that share a dialect are one database."""
# The attributes in which a driver's cursor keeps its connection, and in which SQLAlchemy wraps those of an async driver.
_CONNECTION_IN: Final = {"sqlalchemy": ("_connection",)}
_CONNECTION: Final = ("_conn", "connection")


def watch_made(engine: Engine) -> None:
    """Remember from here on the connections that this engine makes."""
    dialect = engine.dialect

    def made(dbapi: Any, record: ConnectionPoolEntry) -> None:
        with suppress(TypeError):  # a driver whose connections allow no weak references
            _MADE[record.driver_connection] = dialect

    listen(engine, "connect", made)


def mark_origin(error: BaseException, dialect: Dialect) -> None:
    """Mark an error that is about to be raised as this engine's."""
    vars(error)[_OF] = dialect


def came_through(error: BaseException, engines: Sequence[Engine]) -> bool:
    """Say whether an error came from one of these engines, or from a connection that one of them made.

    Args:
        error: What was raised. Members of an exception group are asked one by one.
        engines: The engines of one database; we listen to them.
    """
    dialect = vars(error).get(_OF) or _last_in(error)
    # No event reports a pool without a free connection.
    return any(dialect is engine.dialect for engine in engines) or unreached(error, engines)


def _last_in(error: BaseException) -> Dialect | None:
    """Return whose connection was used last before the error: a hook of ours may have asked another database."""
    found, trace = None, error.__traceback__
    while trace is not None:
        found = _dialect_in(trace.tb_frame) or found
        trace = trace.tb_next
    return found


def _dialect_in(frame: FrameType) -> Dialect | None:
    package = str(frame.f_globals.get("__name__")).partition(".")[0]
    if package != "sqlalchemy" and package not in DRIVERS:
        return None
    user = frame.f_locals.get("self")
    if isinstance(user, Connection):
        return user.dialect
    found = _engine_of(user)
    for name in _CONNECTION_IN.get(package, _CONNECTION):
        found = found or _engine_of(user, name)
    return found


def _engine_of(user: object, name: str | None = None) -> Dialect | None:
    with suppress(Exception):  # no such attribute, or no connection; and a property may raise anything
        return _MADE.get(user if name is None else getattr(user, name))
    return None
