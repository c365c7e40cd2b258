"""What is between a connection and its PostgreSQL server: nothing, or a pooler, which shares few server connections among many.

Behind a transaction pooler nothing belongs to a session: the next transaction may use another server
connection, and a stranger gets ours. A statement that was prepared by name is missing there, or is a stranger's. A setting
would bind the stranger. So we prepare nothing by name, and send settings with BEGIN, for one transaction. What a stranger left
(a mode, a role, a time limit) ends only with the server connection. A pooler throws a server connection away if its client
disappears in a transaction: so after a failure of ours we close the connection before it is rolled back. This module has the
data for that. It asks the server nothing: `dialects.postgresql_pooler` does, once for each connection, and `beginning` uses it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import URL, Connection

from exactly_once.errors import ConfigurationError
from exactly_once.wording.text import escaped

__all__ = ["IDLE_MS", "LINK", "SAID", "Link", "is_pooled", "prepare_threshold"]

IDLE_MS: Final = 600_000
"""Milliseconds after which the server ends an idle transaction: a program that vanished keeps its locks no longer."""
LINK: Final = "exactly_once.link"
"""The key in a connection's `info` of its `Link`, once that is known."""
SAID: Final = "exactly_once.database.connections.pooler"
"""The key that is True if the program's setting says that there is a pooler."""


@dataclass(frozen=True, slots=True)
class Link:
    """How a connection reaches its server."""

    pooled: bool
    """Through a pooler: session state does not stay ours."""
    settings: bytes
    """The SET LOCAL that go with BEGIN of each transaction of ours, if the session cannot keep them; else empty."""
    begin: Callable[[Any], None]
    """Sends BEGIN on the driver's connection, with these settings and a durable commit, in one round trip."""


def is_pooled(connection: Connection) -> bool:
    """Say whether a connection reaches its server through a pooler, as far as we know."""
    link: Link | None = connection.info.get(LINK)
    return link is not None and link.pooled


def prepare_threshold(url: URL) -> dict[str, int | None]:
    """Read `?prepare_threshold=` of a URL: after how many uses psycopg prepares a statement, or `none`. Empty if not there.

    SQLAlchemy would pass it on as text, with which psycopg cannot count.

    Raises:
        ConfigurationError: It is neither a number nor `none`.
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
