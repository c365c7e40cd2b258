"""SQLite through the standard library's sqlite3 and through aiosqlite.

Locking: one writer for the whole database. BEGIN IMMEDIATE takes the writer's place before the claim, so handlers run one at a
time. BUSY says nothing about our key, because another key waits in the same way; so it is waited for, and
never means "in progress".
We send the BEGIN on the driver: in Python's default (legacy) mode the driver begins by itself too late, at the
first INSERT, and then as a reader that must upgrade.

`ON CONFLICT ROLLBACK`, a full disk and a few other errors roll the whole transaction back inside a statement, so the
driver's flag is read after each statement. Calls on the driver itself are not seen, and after a rollback there the driver begins
another transaction by itself. A savepoint that is set after our BEGIN disappears exactly when that transaction does. It is
released with COMMIT.
"""

import sqlite3
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from datetime import UTC
from functools import cached_property
from typing import Any, Final

from sqlalchemy import Connection, Insert, Update
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.util import await_only

from exactly_once.claim import ClaimRow, ExistingClaim
from exactly_once.database.dialects.contract import ErrorKind, Gone, State, Trace, TraceState
from exactly_once.database.dialects.keywords import Read, reader
from exactly_once.database.dialects.schema_lookup import FoundIn
from exactly_once.database.dialects.statements import SQLITE
from exactly_once.database.errors.contended import SQLITE as SQLITE_CONTENDED
from exactly_once.database.errors.drivers_own import original
from exactly_once.errors import ConfigurationError

__all__ = ["BEGIN", "CLAIM", "KNOWN", "RELEASE", "SAVEPOINT", "SQLite"]

BEGIN: Final = "BEGIN IMMEDIATE"
# One name for all, so that the driver can reuse the prepared statement: a connection is in one transaction of ours at a time.
SAVEPOINT: Final = "SAVEPOINT exactly_once_transaction"
RELEASE: Final = "RELEASE SAVEPOINT exactly_once_transaction"
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

_READ: Final = reader(SQLITE)
_UNDER_WAY: Final = "_exactly_once_under_way"
_PRIMARY: Final = 0xFF  # extended result codes carry the primary code in their low byte
# Errors that say that the database cannot be used now, for any message.
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


# https://www.sqlite.org/pragma.html#pragma_synchronous: with a write-ahead log NORMAL waits for the disk at checkpoints alone
_OFF: Final = 0
_NORMAL: Final = 1


def _is_wal(cursor: Any) -> bool:
    cursor.execute("PRAGMA journal_mode")
    return bool(cursor.fetchone()[0] == "wal")


class SQLite:
    """See the module."""

    name = "sqlite"
    asks_around_calls = False
    embedded = True
    learns = False

    def __init__(self, table: Callable[[], str], _: FoundIn, *, durable: bool, kept_as: str) -> None:
        self._table, self._durable, self.kept_as = table, durable, kept_as

    @cached_property
    def table(self) -> str:
        """See `Dialect.table`."""
        return self._table()

    @cached_property
    def _claim(self) -> str:
        return CLAIM.replace("{table}", self.table)

    @cached_property
    def _known(self) -> str:
        return KNOWN.replace("{table}", self.table)

    def learn(self, dbapi: Any) -> None:
        """There is nothing to learn."""

    def prepare(self, dbapi: Any, info: MutableMapping[Any, Any], *, wait_ms: int, varies: bool = False) -> None:
        _refuse_autocommit(dbapi)
        driver = _driver(dbapi)
        # aiosqlite uses a thread of its own, which does not show whether it is at work. Installed once for each connection.
        if hasattr(driver, "_tx") and not hasattr(driver, _UNDER_WAY):
            setattr(driver, _UNDER_WAY, 0)
            driver._execute = _counting(driver, driver._execute)  # noqa: SLF001
        info[self.kept_as] = True

    def settings_changed(self, dbapi: Any, info: MutableMapping[Any, Any]) -> bool:
        return False

    def claim(
        self, dbapi: Any, info: MutableMapping[Any, Any], row: ClaimRow, *, wait_ms: int, savepoint: bool
    ) -> bool:
        _refuse_autocommit(dbapi)
        if not _driver(dbapi).in_transaction:
            self._begin(dbapi)
        if not savepoint:  # the caller's own commit would not check it
            _run(dbapi, SAVEPOINT)
        return self.insert(dbapi, row)

    def insert(self, dbapi: Any, row: ClaimRow) -> bool:
        """Insert a claim in the open transaction; say whether it is ours."""
        cursor = dbapi.cursor()
        try:
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
            # With an old setting of SQLite (PRAGMA count_changes) the count comes as a row.
            counted = cursor.fetchone()
            return bool(cursor.rowcount if counted is None else counted[0])
        finally:
            cursor.close()

    def begin(self, dbapi: Any, info: MutableMapping[Any, Any], owner: str, trace: Trace | None = None) -> None:
        if not _driver(dbapi).in_transaction:  # a hook of the application has written: the driver has begun by itself
            self._begin(dbapi)
        _run(dbapi, SAVEPOINT)

    def _begin(self, dbapi: Any) -> None:
        cursor = dbapi.cursor()
        try:
            self.begin_writing(cursor)
        finally:
            cursor.close()

    def begin_writing(self, cursor: Any) -> None:
        """Begin a transaction as the writer."""
        self._keep(cursor)
        cursor.execute(BEGIN)

    def _keep(self, cursor: Any) -> None:
        """Make the next commit wait for the disk. This cannot be changed inside a transaction."""
        if self._durable:
            cursor.execute("PRAGMA synchronous")
            (level,) = cursor.fetchone()
            if level == _OFF or (level == _NORMAL and _is_wal(cursor)):
                cursor.execute("PRAGMA synchronous = FULL")  # less loses acknowledged commits when the machine stops

    def commit(
        self,
        dbapi: Any,
        info: MutableMapping[Any, Any],
        owner: str,
        rows: Sequence[ClaimRow],
        trace: Trace | None,
        send_commit: Callable[[], None],
    ) -> None:
        if not _released(dbapi):
            raise Gone
        send_commit()

    def cut(self, dbapi: Any) -> None:
        driver = _driver(dbapi)
        with suppress(ValueError, sqlite3.Error):  # it is closed already
            getattr(driver, "_conn", driver).interrupt()
            if hasattr(driver, "_tx"):
                # Closing is not enough: as long as anything refers to a cursor, SQLite keeps the transaction and its lock.
                await_only(driver.rollback())

    def intact(self, dbapi: Any, info: MutableMapping[Any, Any], owner: str) -> bool | None:
        return _released(dbapi)

    def rows_as(self, dbapi: Any) -> tuple[Any, ...]:
        driver = _driver(dbapi)
        return driver.row_factory, driver.text_factory

    def make_rows(self, dbapi: Any, rows_as: tuple[Any, ...]) -> None:
        driver = _driver(dbapi)
        driver.row_factory, driver.text_factory = rows_as

    def read_out(self, dbapi: Any) -> bool:
        return False  # no statement has more than one result

    def before_call(self, dbapi: Any, info: MutableMapping[Any, Any], owner: str) -> Any:
        raise NotImplementedError

    def after_call(self, dbapi: Any, info: MutableMapping[Any, Any], owner: str, *, drop: bool) -> bool | None:
        raise NotImplementedError

    def committed_since(self, dbapi: Any, info: MutableMapping[Any, Any], before: Any) -> bool | None:
        return None

    def logged_since(self, dbapi: Any, info: MutableMapping[Any, Any], trace: Trace | None) -> bool | None:
        return None

    def trace_state(self, dbapi: Any, row: ClaimRow) -> TraceState:
        return TraceState.NONE  # nothing runs after its caller is gone

    def server_session(self, dbapi: Any) -> object:
        return None  # the driver does not reconnect

    def position(self, dbapi: Any) -> Any:
        return _driver(dbapi).total_changes

    def sent_since(self, dbapi: Any, position: Any) -> bool:
        driver = _driver(dbapi)
        return bool(driver.in_transaction or driver.total_changes != position)

    def read_claim(self, dbapi: Any, row: ClaimRow, *, end: bool, wait: bool = True) -> ExistingClaim | None:
        cursor = dbapi.cursor()
        try:
            cursor.execute(self._known, (row.group, row.handler, row.key))
            found = cursor.fetchone()
        finally:
            cursor.close()
            if end:
                dbapi.rollback()
        return None if found is None else ExistingClaim(int(found[0]), bytes(found[1]), found[2])

    def state(self, dbapi: Any) -> State:
        driver = _driver(dbapi)
        try:
            if not driver.in_transaction:
                return State.IDLE
        except (sqlite3.ProgrammingError, ValueError):  # of sqlite3, and of aiosqlite
            return State.CLOSED
        return State.BUSY if getattr(driver, _UNDER_WAY, 0) else State.OPEN

    def error_kind(self, error: BaseException) -> ErrorKind:
        if isinstance(error, PoolTimeout):
            return ErrorKind.UNAVAILABLE
        code = _code(error)
        if code is None:
            return ErrorKind.UNKNOWN
        return ErrorKind.UNAVAILABLE if code & _PRIMARY in _UNAVAILABLE else ErrorKind.REFUSED

    def no_table(self, error: BaseException) -> bool:
        # Its code is that of any wrong statement, and its text is always English.
        return isinstance(error, sqlite3.OperationalError) and "no such table" in str(error)

    def refused(self, dbapi: Any, error: BaseException) -> bool:
        # An error of COMMIT leaves the transaction open, or has rolled it back. After an I/O error part of it may be on the disk.
        code = _code(error)
        return code is not None and code & _PRIMARY != sqlite3.SQLITE_IOERR

    def in_our_name(self, connection: Connection, statement: Insert | Update, values: Mapping[str, Any]) -> int:
        dbapi = connection.connection.dbapi_connection
        if not _driver(dbapi).in_transaction:  # a statement by itself, for a lease or a step
            cursor = dbapi.cursor()  # type: ignore[union-attr]
            try:
                self._keep(cursor)
            finally:
                cursor.close()
        # preserve_rowcount: without it the driver forgets the row count of an INSERT, and says -1.
        return connection.execute(statement, values, execution_options={"preserve_rowcount": True}).rowcount

    def no_room(self, error: BaseException) -> bool:
        code = _code(error)
        return code is not None and code & _PRIMARY in _NO_ROOM

    def locked(self, error: BaseException) -> bool:
        code = _code(error)
        return code is not None and code & _PRIMARY in SQLITE_CONTENDED

    def gave_up(self, error: BaseException) -> bool:
        return False

    def timed_out(self, error: BaseException) -> bool:
        return False

    def limit_was_left(self, dbapi: Any, info: MutableMapping[Any, Any]) -> bool:
        return False

    def unstorable(self, error: BaseException) -> bool:
        return False  # it takes any text that Python can encode

    def gives_no_more(self, error: BaseException) -> bool:
        return False  # only the process's own limit exists

    def hopeless(self, error: BaseException) -> bool:
        # Waiting does not make a missing folder.
        return _code(error) == sqlite3.SQLITE_CANTOPEN

    def lost(self, dbapi: Any, info: MutableMapping[Any, Any], error: BaseException) -> bool:
        return self.state(dbapi) is State.IDLE

    def read(self, dbapi: Any, info: MutableMapping[Any, Any], statement: str) -> Read:
        return _READ(statement)


def _code(error: BaseException) -> int | None:
    """Return the code of a driver's error. An attribute of any other exception may be anything."""
    own = original(error)
    return getattr(own, "sqlite_errorcode", None) if isinstance(own, sqlite3.Error) else None


def _released(dbapi: Any) -> bool:
    """Release the attempt's savepoint. False: its transaction is gone."""
    try:
        _run(dbapi, RELEASE)
    except sqlite3.OperationalError as error:
        if "no such savepoint" not in str(
            error
        ):  # its code is that of any wrong statement, and its text is always English
            raise
        return False
    return True


def _run(dbapi: Any, statement: str) -> None:
    """Execute a statement without rows. On aiosqlite this visits the thread once, where a cursor would visit it three times."""
    driver = _driver(dbapi)
    if hasattr(driver, "execute_fetchall"):
        await_only(driver.execute_fetchall(statement))
    else:
        driver.execute(statement).close()


def _counting(driver: Any, execute: Callable[..., Any]) -> Callable[..., Any]:
    """Count the statements that run on one connection of aiosqlite, whoever sent them."""

    async def counted(*args: Any, **kwargs: Any) -> Any:
        setattr(driver, _UNDER_WAY, getattr(driver, _UNDER_WAY) + 1)
        try:
            return await execute(*args, **kwargs)
        finally:
            setattr(driver, _UNDER_WAY, getattr(driver, _UNDER_WAY) - 1)

    return counted


def _refuse_autocommit(dbapi: Any) -> None:
    driver = _driver(dbapi)
    if getattr(driver, "autocommit", None) in (True, False) or driver.isolation_level is None:
        # autocommit=False begins before we do. True, and isolation_level None, would commit a claim without its effects.
        raise ConfigurationError(
            "The SQLite connection does not use the driver's default transaction mode. Take autocommit= and"
            " isolation_level= out of the engine's arguments."
        )


def _driver(dbapi: Any) -> Any:
    """The sqlite3 connection, or aiosqlite's connection, which shows the same attributes."""
    return getattr(dbapi, "driver_connection", None) or dbapi
