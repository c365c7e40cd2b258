"""Makes a connection of a pool ready for a claim, or says that it is to be thrown away: others may have changed it.

Who had it is told by `had_before`, which is offered here beside it. Called by the guards, and by whatever speaks to a database
in a session of our own.
"""

from collections.abc import MutableMapping
from typing import Any

from sqlalchemy import Connection

from exactly_once.database.connections import forked as forked_engines
from exactly_once.database.connections.had_before import (
    is_firsthand,
    is_lent,
    is_made,
    is_new,
    kept_firsthand,
    moment,
    watch_pool,
)
from exactly_once.database.dialects.contract import LEARNT, Dialect, ErrorKind
from exactly_once.database.errors.interrupted import interrupted

__all__ = ["is_changed", "is_firsthand", "kept_firsthand", "moment", "ready", "varies", "watch_pool"]


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


def is_changed(dialect: Dialect, connection: Connection, since: int) -> bool:
    """Say whether a connection is to be thrown away before it is used: it is not what it was, or nobody knows what it was."""
    info = connection.info
    if dialect.kept_as in info:
        return dialect.strange(connection.connection.dbapi_connection, info)
    return dialect.learns and LEARNT not in info and not is_new(connection, since)


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
        return not is_made(connection, since) or is_lent(connection, since)
    forked_engines.used(connection.engine, connection.connection)
    if is_new(connection, since):
        try:
            if dialect.learns:
                info[LEARNT] = dialect.learn(dbapi)
            dialect.prepare(dbapi, info, wait_ms=wait_ms, varies=varies(connection))
        except Exception as error:
            if is_lent(connection, since) and dialect.timed_out(error):
                return None
            raise
        return is_lent(connection, since)
    try:  # others have had it, since another application of this process learnt from it or where there is nothing to learn
        dialect.prepare(dbapi, info, wait_ms=wait_ms, varies=varies(connection))
    except Exception as error:
        if dialect.error_kind(error) is ErrorKind.UNAVAILABLE or interrupted(error):
            raise
        return None
    return None if dialect.strange(dbapi, info) else True
