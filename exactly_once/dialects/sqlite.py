"""SQLite through the standard library's sqlite3 and through aiosqlite.

Locking: one writer for the whole database. BEGIN IMMEDIATE takes that place before the claim, so handlers run one at a
time; BUSY says nothing about our key (another key waits just the same) and is waited for, never called "in progress".
The BEGIN is sent by us on the driver: in Python's default (legacy) mode the driver begins by itself too late, at the
first INSERT, and then as a reader that must upgrade.

`ON CONFLICT ROLLBACK`, a full disk and a few other errors roll the whole transaction back inside a statement, so the
driver's flag is read after each one.
"""

import sqlite3
from collections.abc import MutableMapping
from datetime import UTC
from typing import Any, Final

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from exactly_once.dialects import ClaimRow, Known, State, Trouble
from exactly_once.dialects.keywords import refused
from exactly_once.errors import ConfigurationError

__all__ = ["BEGIN", "CLAIM", "KNOWN", "SQLite"]

BEGIN: Final = "BEGIN IMMEDIATE"
CLAIM: Final = (
    "INSERT INTO {table} (consumer_group, handler, business_key, status, message_id, message_content, fingerprint,"
    " retry_times, owner, born_at, created_at, consumed_at) VALUES"
    " (?, ?, ?, 1, ?, ?, ?, ?, ?, ?, strftime('%Y-%m-%d %H:%M:%f', 'now') || '000',"
    " strftime('%Y-%m-%d %H:%M:%f', 'now') || '000')"
    " ON CONFLICT (consumer_group, handler, business_key) DO NOTHING"
)
KNOWN: Final = (
    "SELECT status, fingerprint, owner FROM {table} WHERE consumer_group = ? AND handler = ? AND business_key = ?"
)

_PRIMARY: Final = 0xFF  # extended result codes carry the primary one in their low byte
# what says that the database cannot be worked with now, whichever message asks
_UNAVAILABLE: Final = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_READONLY,
    }
)
_NO_ROOM: Final = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR})


class SQLite:
    """See the module."""

    name = "sqlite"

    def __init__(self, table: str) -> None:
        self.table = table
        self._claim = CLAIM.replace("{table}", table)
        self._known = KNOWN.replace("{table}", table)

    def prepare(self, dbapi: Any, info: MutableMapping[Any, Any], *, wait_ms: int) -> None:
        driver = _driver(dbapi)
        if getattr(driver, "autocommit", None) in (True, False) or driver.isolation_level is None:
            # autocommit=False begins by itself before us; True and isolation_level None keep a claim without its effects
            raise ConfigurationError(
                "The SQLite connection does not use the driver's default transaction mode. Take autocommit= and"
                " isolation_level= out of the engine's arguments."
            )
        cursor = dbapi.cursor()
        try:
            cursor.execute("PRAGMA synchronous")
            if cursor.fetchone()[0] == 0:
                cursor.execute("PRAGMA synchronous = FULL")  # OFF loses acknowledged commits when the machine stops
        finally:
            cursor.close()
        info[self] = True

    def claim(
        self, dbapi: Any, info: MutableMapping[Any, Any], row: ClaimRow, *, wait_ms: int, savepoint: bool
    ) -> bool:
        cursor = dbapi.cursor()
        try:
            if not _driver(dbapi).in_transaction:
                cursor.execute(BEGIN)
            born = None if row.born_at is None else row.born_at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")
            cursor.execute(
                self._claim,
                (
                    row.group,
                    row.handler,
                    row.key,
                    row.message_id,
                    row.content,
                    row.fingerprint,
                    row.attempt - 1,
                    row.owner,
                    born,
                ),
            )
            return bool(cursor.rowcount)
        finally:
            cursor.close()

    def begin(self, dbapi: Any, info: MutableMapping[Any, Any]) -> None:
        cursor = dbapi.cursor()
        cursor.execute(BEGIN)
        cursor.close()

    def known(self, dbapi: Any, row: ClaimRow, *, end: bool) -> Known | None:
        cursor = dbapi.cursor()
        try:
            cursor.execute(self._known, (row.group, row.handler, row.key))
            found = cursor.fetchone()
        finally:
            cursor.close()
            if end:
                dbapi.rollback()
        return None if found is None else Known(int(found[0]), bytes(found[1]), found[2])

    def state(self, dbapi: Any) -> State:
        return State.OPEN if _driver(dbapi).in_transaction else State.IDLE

    def trouble(self, error: BaseException) -> Trouble:
        if isinstance(error, PoolTimeout):
            return Trouble.UNAVAILABLE
        origin = error.orig if isinstance(error, DBAPIError) else error
        code = getattr(origin, "sqlite_errorcode", None)
        if code is None:
            return Trouble.UNKNOWN
        return Trouble.UNAVAILABLE if code & _PRIMARY in _UNAVAILABLE else Trouble.REFUSED

    def no_table(self, error: BaseException) -> bool:
        # its code is that of any wrong statement, and its text is always English
        return isinstance(error, sqlite3.OperationalError) and "no such table" in str(error)

    def no_room(self, error: BaseException) -> bool:
        code = getattr(getattr(error, "orig", error), "sqlite_errorcode", None)
        return code is not None and code & _PRIMARY in _NO_ROOM

    def unstorable(self, error: BaseException) -> bool:
        return False  # it takes any text that Python can encode

    def hopeless(self, error: BaseException) -> bool:
        # a folder that is not there does not come by waiting
        return getattr(getattr(error, "orig", error), "sqlite_errorcode", None) == sqlite3.SQLITE_CANTOPEN

    def lost(self, dbapi: Any, info: MutableMapping[Any, Any], error: BaseException) -> bool:
        return not _driver(dbapi).in_transaction

    def refuses(self, statement: str) -> str | None:
        return refused(statement, False)


def _driver(dbapi: Any) -> Any:
    """The sqlite3 connection, or aiosqlite's connection, which shows the same attributes."""
    return getattr(dbapi, "driver_connection", None) or dbapi
