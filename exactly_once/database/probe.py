"""Looks whether a database can do what we need: a row is written, a duplicate is recognised, characters are there.

Each writes under a name that is no application's, and rolls back. Called by `store`, the start-up check and `doctor`.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from os import urandom
from typing import Any, Final
from uuid import uuid4

from sqlalchemy import Connection, Table, insert

from exactly_once.claim import ClaimRow
from exactly_once.database.dialects.contract import Dialect
from exactly_once.database.owner import new_owner
from exactly_once.database.schema import CONSUMING
from exactly_once.database.watched.session import elsewhere
from exactly_once.errors import ConfigurationError

__all__ = ["ROOM_ROWS", "claims_twice", "lacking_characters", "try_to_write"]

# 6 MiB in InnoDB's pages: InnoDB grows a table by up to 4 MiB, so writing 6 MiB takes space from the disk. Each row fits into a
# page: where the disk was full, rolling back a larger value crashed the server.
ROOM_ROWS: Final = 800
_ROOM_BYTES: Final = 7000


def try_to_write(connection: Connection, claims: Table, *, rows: int = 1) -> None:
    """Insert claims of a random group, and roll them back."""
    now = datetime.now(UTC)
    content = urandom(_ROOM_BYTES) if rows > 1 else None  # random: a server may compress a pattern to nothing
    values = [
        {
            "consumer_group": "exactly_once",
            "handler": "look",
            "business_key": uuid4().hex,
            "status": CONSUMING,
            "fingerprint": b"",
            "message_content": content,
            "created_at": now,
        }
        for _ in range(rows)
    ]
    connection.execute(insert(claims), values)
    connection.rollback()


def claims_twice(dialect: Dialect, open_session: Callable[[], tuple[Any, Any]], group: str) -> tuple[bool, bool]:
    """Claim one key twice, and roll back. Returns (True, False) where we understand the driver's answer.

    If we did not recognise a driver's duplicate-key error, every duplicate would run, and nobody would notice.
    """
    session, _ = open_session()
    row = ClaimRow(group, "exactly-once doctor", uuid4().hex, b"", owner=new_owner())
    try:
        connection = session.connection()
        if (wrong := elsewhere(session, connection)) is not None:
            raise ConfigurationError(wrong)
        dbapi, info = connection.connection.dbapi_connection, connection.info
        dialect.prepare(dbapi, info, wait_ms=1000)
        first = dialect.claim(dbapi, info, row, wait_ms=1000, savepoint=True)
        return first, dialect.claim(dbapi, info, row, wait_ms=1000, savepoint=True)
    finally:
        session.rollback()
        session.close()


def lacking_characters(name: str, characters: str) -> str:
    """Say what it means that the database's own character set lacks characters."""
    if characters == "SQL_ASCII":
        return (
            f"The database {name!r} is in SQL_ASCII: it takes bytes for text and checks nothing. We write UTF-8; other programs"
            " may not. Better: a database in UTF8."
        )
    return (
        f"The database {name!r} is in {characters}, which lacks characters. A message whose key has one is kept as dead and"
        " never run; in other texts of ours it is escaped. Better: a database in UTF8."
    )
