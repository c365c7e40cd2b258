"""Whose connection an error of a database came through: one that an engine of the store's made, or another.

A handler may have databases of its own. What one of them says when it is away, full or read only is what the store would say, by
class and by code. So it is told by where it was raised: SQLAlchemy's connection stands there, or the driver's. Of the driver's
it is remembered which engine made them. What shows neither came from elsewhere: `psycopg.connect()` of the handler's own, say.

A wrong answer: "elsewhere" costs a message one failure, and not even that while the store is away, for then none can be
written. "Ours" holds the message, uncounted and for ever. So where nothing is to be seen it came from elsewhere. That is so of
raw use of our own connection through `sqlite3` and below SQLAlchemy's layer of asyncmy, which are compiled and show nothing.

Asked on the way of errors alone. `guards.listening` names the engines, and `store` asks.
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

__all__ = ["came_through", "is_of", "watch_made"]

_OF: Final = "exactly_once_dialect"
"""Where an error keeps the dialect of the engine that raised it: SQLAlchemy's own say nothing of it."""
_MADE: Final[WeakKeyDictionary[Any, Dialect]] = WeakKeyDictionary()
"""The drivers' connections, and whose engine made them: all that share a dialect are one database."""
# where a cursor of a driver's keeps its connection; and what SQLAlchemy puts around those of an async driver
_CONNECTION_IN: Final = {"sqlalchemy": ("_connection",)}
_CONNECTION: Final = ("_conn", "connection")


def watch_made(engine: Engine) -> None:
    """Remember from here on the connections that this engine makes."""
    dialect = engine.dialect

    def made(dbapi: Any, record: ConnectionPoolEntry) -> None:
        with suppress(TypeError):  # a driver whose connections cannot be referred to weakly
            _MADE[record.driver_connection] = dialect

    listen(engine, "connect", made)


def is_of(error: BaseException, dialect: Dialect) -> None:
    """Say of an error that is about to be raised that it is of this engine's connection."""
    vars(error)[_OF] = dialect


def came_through(error: BaseException, engines: Sequence[Engine]) -> bool:
    """Say whether an error came out of one of these engines, or out of a connection that one of them made.

    Args:
        error: What was raised; of a group, each by itself.
        engines: Those of one database; they are listened to.
    """
    dialect = vars(error).get(_OF) or _last_in(error)
    # of a pool that had no connection free no event tells
    return any(dialect is engine.dialect for engine in engines) or unreached(error, engines)


def _last_in(error: BaseException) -> Dialect | None:
    """Whose connection was used last on the way to where it was raised: a hook of ours may have asked elsewhere."""
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
    with suppress(
        Exception
    ):  # nothing of that name, or nothing that is a connection; and a property may raise anything
        return _MADE.get(user if name is None else getattr(user, name))
    return None
