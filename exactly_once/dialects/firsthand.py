"""Whether a connection of a pool was had by anybody but us: only from one that was not is anything learnt, or believed.

Whoever had it before, a handler or other code of the program on the same engine, may have left a role, a mode, a time limit or a
character set in it. Learnt from there, it would be taken for what this server is, and messages be blamed for it. Found out by
two events of the pool, at no round trip. Who looks for another connection believes one that was made since the look began,
whoever had it meanwhile: a hook of the application's that writes in a session of its own as ours is rolled back has each before
us, and the look would not end. Called by the guards, and by whatever speaks to a database in a session of our own.
"""

from collections.abc import MutableMapping
from itertools import count
from typing import Any, Final

from sqlalchemy import Connection, Engine, event
from sqlalchemy.pool import ConnectionPoolEntry

from exactly_once.dialects import LEARNT, Dialect, Trouble
from exactly_once.fork import engines as forked_engines
from exactly_once.interrupted import interrupted
from exactly_once.pooler import is_pooled

__all__ = ["is_changed", "is_firsthand", "kept_firsthand", "moment", "ready", "varies", "watch_pool"]

_FIRSTHAND: Final = "exactly_once.firsthand"
"""In the `info` of a connection that nobody has given back yet, but we."""
_BY_US: Final = "exactly_once.by_us"
_MADE: Final = "exactly_once.made"
"""In the `info` of a connection: the moment it was made."""
_LENT: Final = 16
_moments = count(1)


def watch_pool(engine: Engine) -> None:
    """Know from here on who has had this engine's connections; once a pool. Those it has already are not known."""
    if _made not in tuple(engine.pool.dispatch.connect):  # a pool made anew has the listeners of the one before
        event.listen(engine, "connect", _made)
        event.listen(engine, "checkin", _given_back)


def _made(dbapi: Any, record: ConnectionPoolEntry) -> None:
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
    return _is_new(connection, since) and not _is_lent(connection, since)


def _is_new(connection: Connection, since: int | None) -> bool:
    if _FIRSTHAND in connection.info or (since is not None and _is_made(connection, since)):
        return True
    watch_pool(connection.engine)  # the next one of a pool that nobody has told us of is known
    return False


def _is_lent(connection: Connection, since: int | None) -> bool:
    """Behind a pooler a new connection has one of the server's that strangers had; but a look for another one must end."""
    return is_pooled(connection) and (since is None or not _is_made(connection, since + _LENT))


def kept_firsthand(connection: Connection) -> None:
    """Say that it is used for something of ours alone, which leaves nothing in it."""
    if _FIRSTHAND in connection.info:
        connection.info[_BY_US] = True


def varies(connection: Connection) -> bool:
    """Say whether listeners of the application's can set this connection anew for each transaction, by what the next one is for.

    A role of each tenant, a time limit of each kind of work: what is learnt of such a connection holds for one transaction. Asked
    once a connection, so a listener that is added later counts for those that are made after it.
    """
    pool, engine = connection.engine.pool.dispatch, connection.engine.dispatch
    listened = (pool.checkout, pool.checkin, pool.reset, engine.engine_connect, engine.begin)
    return any(not _is_ours(listener) for listeners in listened for listener in listeners)


def _is_ours(listener: object) -> bool:
    return str(getattr(listener, "__module__", "")).partition(".")[0] == "exactly_once"


def _is_made(connection: Connection, since: int) -> bool:
    made: int = connection.info.get(_MADE, 0)
    return made > since


def is_changed(dialect: Dialect, connection: Connection, since: int) -> bool:
    """Say whether a connection is to be thrown away before it is used: it is not what it was, or nobody knows what it was."""
    info = connection.info
    if dialect.kept_as in info:
        return dialect.strange(connection.connection.dbapi_connection, info)
    return dialect.learns and LEARNT not in info and not _is_new(connection, since)


def ready(dialect: Dialect, connection: Connection, *, wait_ms: int, since: int) -> bool | None:
    """Make a connection ready for a claim; say whether it was used before, and None where it is to be thrown away.

    What a connection that was used before does not take is asked for again on another one. What one that nobody had does not
    take is believed.

    Args:
        dialect: How its database is spoken to.
        connection: Of the pool.
        wait_ms: The longest that its claims wait.
        since: When the look for a connection began, see `moment`.

    Raises:
        ConfigurationError: The server, or the engine, is set up so that no claim can be trusted.
    """
    if is_changed(dialect, connection, since):
        return None
    dbapi: Any = connection.connection.dbapi_connection
    info: MutableMapping[Any, Any] = connection.info
    if dialect.kept_as in info:
        return not _is_made(connection, since) or _is_lent(connection, since)
    forked_engines.used(connection.engine, connection.connection)
    if _is_new(connection, since):
        try:
            if dialect.learns:
                info[LEARNT] = dialect.learn(dbapi)
            dialect.prepare(dbapi, info, wait_ms=wait_ms, varies=varies(connection))
        except Exception as error:
            if _is_lent(connection, since) and dialect.timed_out(error):
                return None
            raise
        return _is_lent(connection, since)
    try:  # others have had it, since another application of this process learnt from it or where there is nothing to learn
        dialect.prepare(dbapi, info, wait_ms=wait_ms, varies=varies(connection))
    except Exception as error:
        if dialect.trouble(error) is Trouble.UNAVAILABLE or interrupted(error):
            raise
        return None
    return None if dialect.strange(dbapi, info) else True
