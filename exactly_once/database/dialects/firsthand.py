"""Prepares a connection of a pool for a claim, or says that it must be thrown away, because others may have changed it.

`connections.had_before` tells who used the connection. Called by the guards, and by every module that uses a session of our own.
"""

from collections.abc import MutableMapping
from typing import Any

from sqlalchemy import Connection

from exactly_once.database.connections import forked_engines
from exactly_once.database.connections.had_before import is_lent, is_made, is_new
from exactly_once.database.dialects.contract import LEARNT, Dialect, ErrorKind
from exactly_once.database.errors.interrupted import interrupted

__all__ = ["is_changed", "ready", "varies"]


def varies(connection: Connection) -> bool:
    """Say whether listeners of the application can change this connection's settings for each transaction.

    Examples: a role for each tenant, a time limit for each kind of work. What is learnt of such a connection
    holds for one transaction.
    Asked once for each connection, so a listener that is added later counts only for connections that are made after it.
    """
    pool, engine = connection.engine.pool.dispatch, connection.engine.dispatch
    listened = (pool.checkout, pool.checkin, pool.reset, engine.engine_connect, engine.begin)
    return any(not _is_ours(listener) for listeners in listened for listener in listeners)


def _is_ours(listener: object) -> bool:
    return str(getattr(listener, "__module__", "")).partition(".")[0] == "exactly_once"


def is_changed(dialect: Dialect, connection: Connection, since: int) -> bool:
    """Say whether a connection must be thrown away before use: it has changed, or we do not know what it was before."""
    info = connection.info
    if dialect.kept_as in info:
        return dialect.settings_changed(connection.connection.dbapi_connection, info)
    return dialect.learns and LEARNT not in info and not is_new(connection, since)


def ready(dialect: Dialect, connection: Connection, *, wait_ms: int, since: int) -> bool | None:
    """Prepare a connection for a claim. Return whether others used it before; None if it must be thrown away.

    If a claim fails on a connection that others used, it is repeated on another connection. If it fails on
    a connection that nobody used, the error counts.

    Args:
        dialect: The dialect of its database.
        connection: A connection of the pool.
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
    forked_engines.register_connection(connection.engine, connection.connection)
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
    try:  # others used it, but another application of this process learnt its settings, or there are none to learn
        dialect.prepare(dbapi, info, wait_ms=wait_ms, varies=varies(connection))
    except Exception as error:
        if dialect.error_kind(error) is ErrorKind.UNAVAILABLE or interrupted(error):
            raise
        return None
    return None if dialect.settings_changed(dbapi, info) else True
