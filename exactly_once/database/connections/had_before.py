"""Tells whether anybody but us has used a pool's connection. We learn from, and trust, only a connection that nobody else used.

An earlier user, a handler or other code on the same engine, may have left a role, a mode, a time limit or a
character set in it. We would take that for the server's own setting, and blame messages for it. Two events of the
pool tell, at no round trip.

A look for another connection must end. So a connection that was made after the look began is trusted, whoever has used it since.
Without that, a hook of the application could use each new connection before us: one that opens a session whenever ours is rolled
back does. Called by `dialects.firsthand`, by the guards, `store`, `own_transaction`, `alembic.ready` and `transports.sql`.
"""

from itertools import count
from math import inf
from typing import Any, Final

from sqlalchemy import Connection, Engine
from sqlalchemy.pool import ConnectionPoolEntry

from exactly_once.database.connections.pool_below import end_what_is_thrown_away, is_known
from exactly_once.database.connections.pooler import is_pooled
from exactly_once.database.in_memory import in_memory
from exactly_once.database.listeners import listen

__all__ = ["is_firsthand", "is_lent", "is_made", "is_new", "kept_firsthand", "moment", "watch_pool"]

_FIRSTHAND: Final = "exactly_once.firsthand"
"""In the `info` of a connection that nobody but us has returned yet."""
_BY_US: Final = "exactly_once.by_us"
_MADE: Final = "exactly_once.made"
"""In the `info` of a connection: when it was made, as a number of `moment`."""
_LENT: Final = 16  # more connections than a pooler usually gives to one program; then we trust the next one
_ALWAYS: Final = inf
_moments = count(1)


def watch_pool(engine: Engine) -> None:
    """Record from here on who uses this engine's connections. Does nothing the second time. Existing connections stay unknown."""
    made = _made_in_memory if in_memory(engine) else _made
    if made not in tuple(engine.pool.dispatch.connect):  # a recreated pool has the listeners of the old one
        listen(engine, "connect", made)
        listen(engine, "checkin", _given_back)
        end_what_is_thrown_away(engine)


def _made(dbapi: Any, record: ConnectionPoolEntry) -> None:
    if is_known(dbapi, record):
        return
    record.info[_FIRSTHAND] = True
    record.info[_MADE] = moment()


def _made_in_memory(dbapi: Any, record: ConnectionPoolEntry) -> None:
    _made(dbapi, record)
    record.info[_MADE] = _ALWAYS


def _given_back(dbapi: Any, record: ConnectionPoolEntry) -> None:
    info = record.info
    if _FIRSTHAND in info and not info.pop(_BY_US, False):
        del info[_FIRSTHAND]


def moment() -> int:
    """Return a number that tells which connections were made later. Called before a look for another connection begins."""
    return next(_moments)


def is_firsthand(connection: Connection, since: int | None = None) -> bool:
    """Say whether nobody but us has used this connection, or whether it was made since that moment.

    Behind a pooler that says nothing of the server's connection. There we trust a connection that was made some moments later.
    """
    return is_new(connection, since) and not is_lent(connection, since)


def is_new(connection: Connection, since: int | None) -> bool:
    """Say the same, whether a server or a pooler is at the other end."""
    if _FIRSTHAND in connection.info or (since is not None and is_made(connection, since)):
        return True
    if in_memory(connection.engine):
        return True
    watch_pool(connection.engine)  # for the next connection of a pool that was not registered
    return False


def is_lent(connection: Connection, since: int | None) -> bool:
    """A new connection may get a used server connection behind a pooler; but a look for another one must end."""
    return is_pooled(connection) and (since is None or not is_made(connection, since + _LENT))


def kept_firsthand(connection: Connection) -> None:
    """Record that we use it for our own work, which leaves nothing in it."""
    if _FIRSTHAND in connection.info:
        connection.info[_BY_US] = True


def is_made(connection: Connection, since: int) -> bool:
    """Say whether this connection was made since that moment. True in memory, where there is no other connection to look for."""
    made: float | None = connection.info.get(_MADE)
    if made is None:  # it is older than our look at its pool
        made = connection.info[_MADE] = _ALWAYS if in_memory(connection.engine) else 0
    return made > since
