"""What stands between a connection and its PostgreSQL: nothing, or a pooler, which lends few of the server's to many.

Behind a pooler of transactions nothing belongs to a session: the next transaction may be on another of the server's
connections, and a stranger gets ours. A name that was prepared there is missing, or is a stranger's statement; a setting
that was made there bounds the stranger. So nothing is prepared by name, and what is set is set with BEGIN, for one
transaction. What a stranger has left (a mode, a role, a time limit) goes away with the server's connection only, and a pooler
throws that one away whose client is gone in the middle of a transaction: so where something of ours fails, its connection is
closed before it is rolled back. The words for it, and that BEGIN; it asks nothing. `dialects.postgresql_pooler` finds out, once
a connection; the rooms that begin transactions of their own on PostgreSQL call `begin_bounded`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import URL, Connection
from sqlalchemy.exc import OperationalError

from exactly_once.database.mysql_session import put_right
from exactly_once.errors import ConfigurationError
from exactly_once.wording.text import escaped

__all__ = ["IDLE_MS", "LINK", "SAID", "Link", "begin_bounded", "is_pooled", "prepare_threshold"]

IDLE_MS: Final = 600_000
"""The server ends a transaction in which nothing was said for so long: a program that vanished holds its locks no longer."""
LINK: Final = "exactly_once.link"
"""A connection's `info` keeps its `Link` under this key, once it is known."""
SAID: Final = "exactly_once.database.connections.pooler"
"""And under this one True, where the program's setting says that there is a pooler."""


@dataclass(frozen=True, slots=True)
class Link:
    """How a connection reaches its server."""

    pooled: bool
    """Through a pooler: what a session would keep is not ours."""
    settings: bytes
    """The SET LOCAL that go with BEGIN of each transaction of ours, since the session cannot hold them; else empty."""
    begin: Callable[[Any], None]
    """Sends BEGIN through the driver's connection, with these settings and for a durable commit, in one round trip."""


def is_pooled(connection: Connection) -> bool:
    """Say whether a connection reaches its server through a pooler, as far as we know."""
    link: Link | None = connection.info.get(LINK)
    return link is not None and link.pooled


def begin_bounded(connection: Connection) -> None:
    """Begin the transaction of a connection that has sent nothing yet: durable, with the settings its session cannot hold.

    It takes the place of the driver's own BEGIN: no round trip more. Where the connection was never looked at, and on other
    servers than PostgreSQL, the driver begins by itself; on MySQL and MariaDB the session is looked at, for what is begun
    here writes times down.

    Raises:
        OperationalError: The connection is dead; it is thrown away.
    """
    if connection.dialect.name in ("mysql", "mariadb"):
        put_right(connection)
        return
    link: Link | None = connection.info.get(LINK)
    if link is None:
        return
    try:
        link.begin(connection.connection.dbapi_connection)
    except connection.dialect.loaded_dbapi.Error as error:
        connection.invalidate(error)  # its raw error passed SQLAlchemy by, which would hand it out again
        raise OperationalError("BEGIN", None, error, connection_invalidated=True) from error


def prepare_threshold(url: URL) -> dict[str, int | None]:
    """Read `?prepare_threshold=` of a URL: after how many times psycopg prepares a statement, or `none`; empty if not there.

    SQLAlchemy would hand it on as a text, with which psycopg cannot count.

    Raises:
        ConfigurationError: It is neither.
    """
    given = url.query.get("prepare_threshold")
    if given is None:
        return {}
    if isinstance(given, str) and given.strip().lower() == "none":
        return {"prepare_threshold": None}
    if isinstance(given, str) and given.isascii() and given.isdigit():
        return {"prepare_threshold": int(given)}
    raise ConfigurationError(
        f"prepare_threshold={escaped(str(given), 40)} in the database URL is not understood. Write a whole number, or none:"
        " then psycopg prepares no statement."
    )
