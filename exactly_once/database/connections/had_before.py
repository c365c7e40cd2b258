"""Whether a connection of a pool was had by anybody but us: only from one that was not is anything learnt, or believed.

Whoever had it before, a handler or other code of the program on the same engine, may have left a role, a mode, a time limit or a
character set in it. Learnt from there, it would be taken for what this server is, and messages be blamed for it. Found out by
two events of the pool, at no round trip. Who looks for another connection believes one that was made since the look began,
whoever had it meanwhile: a hook of the application's that writes in a session of its own as ours is rolled back has each before
us, and the look would not end. Called by `dialects.firsthand`, which offers it to whoever claims, and by the broker in a table.
"""

from itertools import count
from typing import Any, Final

from sqlalchemy import Connection, Engine
from sqlalchemy.pool import ConnectionPoolEntry

from exactly_once.database.connections.pool_below import end_what_is_thrown_away, is_known
from exactly_once.database.connections.pooler import is_pooled
from exactly_once.database.in_memory import in_memory
from exactly_once.database.listeners import listen

__all__ = ["is_firsthand", "is_lent", "is_made", "is_new", "kept_firsthand", "moment", "watch_pool"]

_FIRSTHAND: Final = "exactly_once.firsthand"
"""In the `info` of a connection that nobody has given back yet, but we."""
_BY_US: Final = "exactly_once.by_us"
_MADE: Final = "exactly_once.made"
"""In the `info` of a connection: the moment it was made."""
_LENT: Final = (
    16  # more connections than poolers mostly have to a server for one program: then the next one is believed
)
_moments = count(1)


def watch_pool(engine: Engine) -> None:
    """Know from here on who has had this engine's connections; once a pool. Those it has already are not known."""
    if _made not in tuple(engine.pool.dispatch.connect):  # a pool made anew has the listeners of the one before
        listen(engine, "connect", _made)
        listen(engine, "checkin", _given_back)
        end_what_is_thrown_away(engine)


def _made(dbapi: Any, record: ConnectionPoolEntry) -> None:
    if is_known(dbapi, record):
        return
    record.info[_FIRSTHAND] = True
    record.info[_MADE] = moment()


def _given_back(dbapi: Any, record: ConnectionPoolEntry) -> None:
    info = record.info
    if _FIRSTHAND in info and not info.pop(_BY_US, False):
        del info[_FIRSTHAND]


def moment() -> int:
    """Return what tells which connections were made later; before a look for another connection begins."""
    return next(_moments)


def is_firsthand(connection: Connection, since: int | None = None) -> bool:
    """Say whether nobody had this connection before, but we; or whether it was made since that moment.

    Behind a pooler that says nothing of the server's; there one is believed that was made some moments later.
    """
    return is_new(connection, since) and not is_lent(connection, since)


def is_new(connection: Connection, since: int | None) -> bool:
    """Say the same of the connection to whatever is at its other end."""
    if _FIRSTHAND in connection.info or (since is not None and is_made(connection, since)):
        return True
    if in_memory(connection.engine):
        return True
    watch_pool(connection.engine)  # the next one of a pool that nobody has told us of is known
    return False


def is_lent(connection: Connection, since: int | None) -> bool:
    """Behind a pooler a new connection has one of the server's that strangers had; but a look for another one must end."""
    return is_pooled(connection) and (since is None or not is_made(connection, since + _LENT))


def kept_firsthand(connection: Connection) -> None:
    """Say that it is used for something of ours alone, which leaves nothing in it."""
    if _FIRSTHAND in connection.info:
        connection.info[_BY_US] = True


def is_made(connection: Connection, since: int) -> bool:
    """Say whether this connection was made since that moment; or that there is no other one to look for, in memory."""
    made: int = connection.info.get(_MADE, 0)
    return made > since or in_memory(connection.engine)
