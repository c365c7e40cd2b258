"""PostgreSQL through psycopg 3, sync and async.

Locking: a second INSERT of a key waits on the first one's row until that transaction ends, so the winner's commit decides
about a duplicate, never a guess. `ON CONFLICT (the three columns) DO NOTHING` tells our primary key from every
other unique index. The wait is limited by lock_timeout, which is saved and restored around the claim, so the handler finds the
session's own setting again. Under REPEATABLE READ and SERIALIZABLE a concurrent duplicate is 40001, once.

BEGIN, limit and claim travel as one simple-query string, with values quoted by libpq: one round trip. A pipeline took
nearly three times as long. A simple string leaves no prepared statement behind, so it works behind pgbouncer too.

An aborted transaction answers COMMIT with ROLLBACK and no error: only the driver's transaction status shows it.

Durability is decided when COMMIT is executed, by the value of `synchronous_commit` at that moment. A handler, an administrator or
another program behind a pooler may have turned it off since we last looked. So a statement that turns it on, if it is off,
travels with our COMMIT. With a claim in a transaction of the caller, it travels with the claim, because the caller sends that
COMMIT.
"""

import asyncio
import os
import socket
from collections.abc import Callable, Generator, Iterable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from selectors import EVENT_READ, DefaultSelector
from typing import Any, Final, NamedTuple
from weakref import WeakKeyDictionary

import psycopg
from psycopg import AsyncClientCursor, AsyncConnection, ClientCursor, errors, generators
from psycopg.pq import Escaping, ExecStatus, TransactionStatus
from sqlalchemy import Connection, Insert, Update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.util import await_only

from exactly_once.claim import ClaimRow, ExistingClaim
from exactly_once.database.connections.pooler import LINK, Link
from exactly_once.database.dialects.contract import LEARNT, ClaimBusy, ErrorKind, Gone, State, Trace, Trail
from exactly_once.database.dialects.firsthand import varies
from exactly_once.database.dialects.keywords import Read, reader
from exactly_once.database.dialects.statements import POSTGRESQL
from exactly_once.database.errors import contended
from exactly_once.database.errors.drivers_own import original
from exactly_once.database.errors.whose import mark_origin
from exactly_once.database.owner import savepoint_of
from exactly_once.errors import ConfigurationError, Misuse

__all__ = [
    "AS_OUR_USER",
    "BOUND",
    "BOUND_IN_OPEN",
    "CLAIM",
    "DURABLE",
    "EXECUTE",
    "IN_OUR_NAME",
    "KNOWN",
    "LOOK",
    "OWN_ROLE",
    "PostgreSQL",
    "Seen",
    "bounded",
    "busy_of",
    "driver_of",
    "ignore_driver_begin",
    "note_driver_begin",
    "opened",
    "opening",
    "send",
    "template",
]

CLAIM: Final = (
    "INSERT INTO {table} (consumer_group, handler, business_key, status, message_id, message_content, fingerprint,"
    " retry_times, owner, born_at, created_at, consumed_at) VALUES"
    " ({group}, {handler}, {key}, 1, {message_id}, {content}, {fingerprint},"
    " {retry_times}, {owner}, {born_at}, clock_timestamp(), clock_timestamp())"
    " ON CONFLICT (consumer_group, handler, business_key) DO NOTHING"
)
EXECUTE: Final = (
    "EXECUTE {name}({group}, {handler}, {key}, {message_id}, {content}, {fingerprint},"
    " {retry_times}, {owner}, {born_at})"
)
TYPES: Final = "text, text, text, text, bytea, bytea, integer, text, timestamptz"
# In a transaction of our own we know the session's setting; in one that is already open, the setting may be another.
BOUND: Final = ("SET LOCAL lock_timeout = {wait_ms};", ";SET LOCAL lock_timeout = {own_wait}")
BOUND_IN_OPEN: Final = (
    (
        "SELECT set_config('exactly_once.lock_timeout', current_setting('lock_timeout'), true),"
        " set_config('lock_timeout', '{wait_ms}', true);"
    ),
    ";SELECT set_config('lock_timeout', current_setting('exactly_once.lock_timeout'), true)",
)
LOOK: Final = (
    "SELECT setting, reset_val, current_setting('role'), current_setting('synchronous_commit'),"
    " current_setting('statement_timeout'),"
    # Of this user in this database, of this user, of the database, of all; pg_settings does not show it.
    " (SELECT substr(given, 6) FROM pg_db_role_setting, unnest(setconfig) AS given WHERE given LIKE 'role=%'"
    " AND (setrole = 0 OR setrole = (SELECT oid FROM pg_roles WHERE rolname = session_user))"
    " AND (setdatabase = 0 OR setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database()))"
    " ORDER BY setrole = 0, setdatabase = 0 LIMIT 1)"
    " FROM pg_settings WHERE name = 'lock_timeout'"
)
LIMIT: Final = "SELECT pg_catalog.current_setting('statement_timeout')"
_LENT_LIMIT: Final = b"ROLLBACK;BEGIN;SELECT setting <> reset_val FROM pg_settings WHERE name = 'statement_timeout'"
# A role that the handler has set (by SET LOCAL ROLE, or by a function) is not ours.
IN_OUR_NAME: Final = (
    (
        "SELECT pg_catalog.set_config('exactly_once.role', pg_catalog.current_setting('role'), true),"
        " pg_catalog.set_config('role', {role}, true);"
    ),
    ";SELECT pg_catalog.set_config('role', pg_catalog.current_setting('exactly_once.role'), true)",
)
# The same if the handler has also set another user for its session. Setting the user resets the role, so the user comes first.
AS_OUR_USER: Final = (
    (
        "SELECT pg_catalog.set_config('exactly_once.role', pg_catalog.current_setting('role'), true),"
        " pg_catalog.set_config('session_authorization', {user}, true), pg_catalog.set_config('role', {role}, true);"
    ),
    (
        ";SELECT pg_catalog.set_config('session_authorization', {theirs}, true),"
        " pg_catalog.set_config('role', pg_catalog.current_setting('exactly_once.role'), true)"
    ),
)
# If the application sets a role for each transaction, our role is the one with which this transaction began. It
# is read with BEGIN and kept in this process: a value kept in a setting would be lost by the handler's RESET ALL.
OWN_ROLE: Final = "SELECT pg_catalog.current_setting('role');"
# For a statement with keys: the handler may have set another client encoding for its own statements.
IN_UTF8: Final = (
    b"SELECT pg_catalog.set_config('client_encoding', 'UTF8', true)",
    b";SELECT pg_catalog.set_config('client_encoding', '%s', true)",
)
# Stronger values stay, and so do `local` and `remote_write`: they keep acknowledged commits when this server stops.
DURABLE: Final = (
    "SELECT pg_catalog.set_config('synchronous_commit', 'on', true)"
    " WHERE pg_catalog.current_setting('synchronous_commit') = 'off';"
)
KNOWN: Final = (
    "SELECT status, encode(fingerprint, 'hex'), owner FROM {table}"
    " WHERE consumer_group = {group} AND handler = {handler} AND business_key = {key}"
)

_VALUES: Final = (
    "group", "handler", "key", "message_id", "content", "fingerprint", "retry_times", "owner", "born_at"
)  # fmt: skip
_UTF8: Final = frozenset({b"UTF8", b"UNICODE"})
# After these we do not know whether COMMIT happened: the connection ended, or the error is not the server's.
_UNSURE: Final = ("08", "40003", "57P", "58")
_NOTICED_S: Final = 1.0  # seconds; who waits for a connection that is cut sees it at once
_LOOKS: Final = 50
_READ: Final = reader(POSTGRESQL)
_READ_ESCAPED: Final = reader(POSTGRESQL._replace(backslash=True))
_STATES: Final = {
    TransactionStatus.IDLE: State.IDLE,
    TransactionStatus.ACTIVE: State.BUSY,
    TransactionStatus.INTRANS: State.OPEN,
    TransactionStatus.INERROR: State.ABORTED,
    TransactionStatus.UNKNOWN: State.ABORTED,
}
_CANCELED: Final = "57014"  # query_canceled: statement_timeout, or somebody's pg_cancel_backend
# Classes of an ERROR after which the transaction is certainly gone. 40003 says itself that it does not know.
_REFUSING_CLASSES: Final = frozenset({"21", "22", "23", "25", "2B", "40", "42", "44", "54", "55", "P0", "HV"})
_READ_ONLY: Final = "25006"
_NO_DATABASE: Final = "3D000"
_MADE_READ_ONLY: Final = (
    "The handler made its transaction read only (SET TRANSACTION READ ONLY, or set_config('transaction_read_only', ...)), and"
    " what we write with its COMMIT was refused: that an earlier failure is settled, or that its lease or step is done. Nothing"
    " was committed. Take that statement out of the handler; what may only read belongs in a session of its own."
)
# Errors that say that the server cannot work now, for any message.
_UNAVAILABLE: Final = frozenset(
    {
        _READ_ONLY,  # read_only_sql_transaction: a standby, or default_transaction_read_only
        _NO_DATABASE,  # invalid_catalog_name: being restored, or a wrong name (see `hopeless`)
        "57P01",  # admin_shutdown
        "57P02",  # crash_shutdown
        "57P03",  # cannot_connect_now
        "57P04",  # database_dropped
        "57P05",  # idle_session_timeout
    }
)
# connection_exception; insufficient_resources: disk, memory, connections, a configured limit; system_error: reading, writing.
_UNAVAILABLE_CLASSES: Final = frozenset({"08", "53", "58"})
_DISK_FULL: Final = "53100"
# untranslatable_character; character_not_in_repertoire.
_UNSTORABLE: Final = frozenset({"22P05", "22021"})


def busy_of(error: errors.Error) -> ClaimBusy | None:
    """Return ClaimBusy if an error of a claim means that another run holds the key; a claim waits for nothing else."""
    if error.sqlstate == _CANCELED:
        return ClaimBusy(again=False, cut=True)
    return ClaimBusy(again=error.sqlstate != "55P03") if error.sqlstate in contended.POSTGRESQL else None


class _Learnt(NamedTuple):
    """What a connection reported; None if the server has no such value."""

    waits: bytes | None
    waits_by_default: bytes | None
    role: bytes | None
    role_by_default: bytes | None
    """The role with which a session of this user begins (ALTER ROLE ... SET role); behind a pooler any session
    may be the next."""
    durable: bytes | None
    limit: bytes | None
    encoding: bytes | None
    open: bool
    """It was in a transaction that others had begun, so it may have reported what they set for that transaction alone."""


@dataclass(slots=True)
class Seen:
    """What a connection reported when we first saw it."""

    own_wait: bytes
    role: bytes
    """The role for what we write in our name, as the server reads it."""
    user: bytes | None
    """The session's user as the server reports it; None if it does not."""
    prepared: bool
    encoding: bytes | None
    """The client encoding at that time."""
    limit: bytes | None
    """The longest that a statement may take."""
    settings: bytes
    """Sent with BEGIN: see `Link.settings`, and `vary`."""
    varies: bool = False
    """Role and lock limit differ between transactions: each transaction keeps those it began with, and finds them again."""

    def vary(self) -> None:
        """Do not use the learnt role and lock limit any more: the application sets them for each transaction."""
        if not self.varies:
            self.varies, self.role, self.settings = True, _ROLE_NOW, self.settings + _OWN_ROLE

    def begins(self, driver: Any, first: bytes, results: Sequence[Any]) -> None:
        """Learn from the answers the role with which the transaction began, which is our role in it.

        Args:
            driver: The driver's connection.
            first: What was sent first, as returned by `opening` or `opened`.
            results: The answers.
        """
        if self.varies:
            answer = results[
                first.count(b";") - 1
            ]  # no string sent with BEGIN contains ";"; this is its last statement
            self.role = Escaping(driver.pgconn).escape_literal(answer.get_value(0, 0) or b"none")
            self.user = _user(driver)

    def as_ours(self, driver: Any) -> tuple[bytes, bytes]:
        """Return what goes before and after a statement that we write in our name in the handler's transaction."""
        if self.varies and _replaced(driver):  # it did not begin with a claim: its present role is ours
            return _IN_OUR_NAME[0] % _ROLE_NOW, _IN_OUR_NAME[1]
        theirs = _user(driver)
        if theirs == self.user or theirs is None or self.user is None:
            return _IN_OUR_NAME[0] % self.role, _IN_OUR_NAME[1]
        quote = Escaping(driver.pgconn).escape_literal
        return _AS_OUR_USER[0] % (quote(self.user), self.role), _AS_OUR_USER[1] % quote(theirs)


class PostgreSQL:
    """See the module."""

    name = "postgresql"
    asks_around_calls = False
    embedded = False
    learns = True

    def __init__(self, table: Callable[[], str], *, durable: bool, kept_as: str) -> None:
        self._table, self.durable, self.kept_as = table, DURABLE.encode() if durable else b"", kept_as
        self._compiled: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

    @cached_property
    def table(self) -> str:
        """See `Dialect.table`."""
        return self._table()

    @cached_property
    def _claim(self) -> bytes:
        return template(CLAIM.replace("{table}", self.table), _VALUES)

    @cached_property
    def _known(self) -> bytes:
        return template(KNOWN.replace("{table}", self.table), ("group", "handler", "key"))

    @cached_property
    def _prepared(self) -> tuple[bytes, bytes]:
        """Return the statements that prepare the claim and that execute it."""
        text = CLAIM.replace("{table}", self.table)
        for number, value in enumerate(_VALUES, 1):
            text = text.replace("{" + value + "}", f"${number}")
        # The name is a hash of the text: behind a pooler another program's statement of this name is the same statement.
        name = "exactly_once_" + sha256(text.encode()).hexdigest()[:16]
        return f"PREPARE {name}({TYPES}) AS {text}".encode(), template(EXECUTE.replace("{name}", name), _VALUES)

    def learn(self, dbapi: Any) -> "_Learnt":
        driver = driver_of(dbapi)
        begin = driver.pgconn.transaction_status == TransactionStatus.IDLE
        results = send(driver, b"BEGIN;" + LOOK.encode() + b";ROLLBACK" if begin else LOOK.encode())
        told = [results[1 if begin else 0].get_value(0, n) for n in range(6)]
        waits, waits_by_default, role, durable, limit, role_by_default = told
        return _Learnt(waits, waits_by_default, role, role_by_default, durable, limit, _encoding(driver), not begin)

    def prepare(self, dbapi: Any, info: MutableMapping[Any, Any], *, wait_ms: int, varies: bool = False) -> None:
        from exactly_once.database.dialects.postgresql_pooler import look

        driver = driver_of(dbapi)
        _refuse_autocommit(driver)
        # For a connection that was made before we saw its engine. From here on neither psycopg nor we prepare statements on it.
        link = info.get(LINK) or look(dbapi, info)
        told: _Learnt | None = info.get(LEARNT)
        encoding = _encoding(driver)
        if not _speaks_utf8(encoding) and encoding != b"SQL_ASCII":
            raise ConfigurationError(
                f"The connection's client_encoding is {(encoding or b'?').decode()}; business keys are compared as UTF-8."
                " Take client_encoding out of the engine's connect_args, or set it to utf8."
            )
        learnt = told or self.learn(dbapi)
        begin = driver.pgconn.transaction_status == TransactionStatus.IDLE
        varies = varies or learnt.open
        durable = self.durable if varies else b"SET LOCAL synchronous_commit = on;"
        seen = info[self.kept_as] = Seen(
            # DEFAULT, so that it follows the server's configuration.
            own_wait=b"DEFAULT" if link.pooled or learnt.waits == learnt.waits_by_default else b"%s" % learnt.waits,
            role=Escaping(driver.pgconn).escape_literal(
                (learnt.role_by_default if link.pooled else learnt.role) or b"none"
            ),
            user=_user(driver),
            prepared=begin and driver.prepare_threshold is not None and self._is_prepared(driver),
            encoding=learnt.encoding,
            limit=learnt.limit,
            settings=link.settings + (durable if learnt.durable == b"off" and self.durable else b""),
        )
        if varies:
            seen.vary()

    def strange(self, dbapi: Any, info: MutableMapping[Any, Any]) -> bool:
        driver = driver_of(dbapi)
        return bool(driver.autocommit) or _encoding(driver) != info[self.kept_as].encoding

    def _is_prepared(self, driver: Any) -> bool:
        try:
            send(driver, self._prepared[0])
        except errors.DuplicatePreparedStatement:
            return True  # a pooler's server connection, on which another client prepared it first
        except errors.Error as error:
            if error.sqlstate is None:
                raise
            return False  # no table, or no right to it: the claim itself reports that
        return True

    def claim(
        self, dbapi: Any, info: MutableMapping[Any, Any], row: ClaimRow, *, wait_ms: int, savepoint: bool
    ) -> bool:
        driver = driver_of(dbapi)
        _refuse_autocommit(driver)
        pgconn = driver.pgconn
        seen: Seen = info[self.kept_as]
        begin = pgconn.transaction_status == TransactionStatus.IDLE
        quote = Escaping(pgconn).escape_literal
        values = (
            quote(row.group.encode()),
            quote(row.handler.encode()),
            quote(row.key.encode()),
            b"NULL" if row.message_id is None else quote(row.message_id.encode()),
            b"NULL" if row.content is None else b"decode('%s', 'hex')" % row.content.hex().encode(),
            b"decode('%s', 'hex')" % row.fingerprint.hex().encode(),
            b"%d" % (row.attempt - 1),
            quote(row.owner.encode()),
            b"NULL" if row.born_at is None else quote(row.born_at.isoformat().encode()),
        )
        save, release = (b"", b"")
        if savepoint:  # with this attempt's name: the caller, or another of its claims, may use any other name
            name = savepoint_of(row.owner).encode()
            save, release = b"SAVEPOINT %s;" % name, b";RELEASE SAVEPOINT %s" % name
        durable = self.durable if savepoint else b""
        begins = first = opening(driver, seen) if begin else b"" if savepoint else opened(seen)
        if begin and not seen.varies:
            first += durable + save + _BOUND % wait_ms
            last = _UNBOUND % seen.own_wait + release
        else:
            first += durable + save + _BOUND_IN_OPEN % wait_ms
            last = _UNBOUND_IN_OPEN + release
        # A prepared statement belongs to the connection. In a transaction that is already open, a missing one would abort it.
        prepared = begin and seen.prepared
        text = first + (self._prepared[1] if prepared else self._claim) % values + last
        try:
            try:
                results = send(driver, text)
            except errors.InvalidSqlStatementName:
                # DEALLOCATE ALL, DISCARD ALL, or a pooler that gave us another server connection: the plain text works, too.
                seen.prepared = False
                send(driver, b"ROLLBACK")
                results = send(driver, first + self._claim % values + last)
        except errors.Error as error:
            busy = busy_of(error)
            if busy is None:
                raise
            if savepoint:
                send(driver, b"ROLLBACK TO SAVEPOINT %s" % savepoint_of(row.owner).encode())
            raise busy from error
        if not savepoint:
            note_driver_begin(driver)
            seen.begins(driver, begins, results)
        elif begin:
            ignore_driver_begin(driver)
        return bool(results[-3 if savepoint else -2].command_tuples)

    def begin(self, dbapi: Any, info: MutableMapping[Any, Any], owner: str, trace: Trace | None = None) -> None:
        driver = driver_of(dbapi)
        seen: Seen = info[self.kept_as]
        if driver.pgconn.transaction_status != TransactionStatus.IDLE:  # a hook of the application has sent something
            seen.vary()
        begins = opening(driver, seen)
        results = send(driver, begins)
        note_driver_begin(driver)
        seen.begins(driver, begins, results)

    def commit(
        self,
        dbapi: Any,
        info: MutableMapping[Any, Any],
        owner: str,
        rows: Sequence[ClaimRow],
        trace: Trace | None,
        send_commit: Callable[[], None],
    ) -> None:
        driver = driver_of(dbapi)
        if _replaced(driver):
            raise Gone
        # Not the driver's own COMMIT: the statement that makes it durable travels with it. After a crash before
        # the answer, a look-up tells.
        send(driver, self.durable + b"COMMIT")

    def cut(self, dbapi: Any) -> None:
        driver = driver_of(dbapi)
        # Not closed: closing a descriptor wakes none of its waiters.
        with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(driver.pgconn.socket)) as cut:
            cut.shutdown(socket.SHUT_RDWR)
        if isinstance(driver, AsyncConnection):
            await_only(_until_noticed(driver))
        elif driver.lock.acquire(timeout=_NOTICED_S):
            driver.lock.release()

    def intact(self, dbapi: Any, info: MutableMapping[Any, Any], owner: str) -> bool | None:
        # No procedure or function can end the transaction block in which it is called (2D000); a call on the driver can.
        return False if _replaced(driver_of(dbapi)) else None

    def rows_as(self, dbapi: Any) -> tuple[Any, ...]:
        driver = driver_of(dbapi)
        return driver.row_factory, driver.cursor_factory, driver.server_cursor_factory

    def make_rows(self, dbapi: Any, rows_as: tuple[Any, ...]) -> None:
        driver = driver_of(dbapi)
        driver.row_factory, driver.cursor_factory, driver.server_cursor_factory = rows_as

    def read_out(self, dbapi: Any) -> bool:
        return False  # the driver reads an answer to its end

    def before_call(self, dbapi: Any, info: MutableMapping[Any, Any], owner: str) -> Any:
        raise NotImplementedError

    def after_call(self, dbapi: Any, info: MutableMapping[Any, Any], owner: str, *, drop: bool) -> bool | None:
        raise NotImplementedError

    def committed_since(self, dbapi: Any, info: MutableMapping[Any, Any], before: Any) -> bool | None:
        return None

    def logged_since(self, dbapi: Any, info: MutableMapping[Any, Any], trace: Trace | None) -> bool | None:
        return None

    def trail(self, dbapi: Any, row: ClaimRow) -> Trail:
        return Trail.NONE  # no procedure commits a transaction that it did not begin

    def server_session(self, dbapi: Any) -> object:
        return None  # the driver does not reconnect

    def mark(self, dbapi: Any) -> Any:
        return True

    def sent_since(self, dbapi: Any, mark: Any) -> bool:
        return _replaced(driver_of(dbapi))

    def read_claim(self, dbapi: Any, row: ClaimRow, *, end: bool, wait: bool = True) -> ExistingClaim | None:
        driver = driver_of(dbapi)
        quote = Escaping(driver.pgconn).escape_literal
        text = self._known % (quote(row.group.encode()), quote(row.handler.encode()), quote(row.key.encode()))
        result = send(driver, text + b";ROLLBACK" if end else text)[0]
        if not result.ntuples:
            return None
        status, fingerprint, owner = (result.get_value(0, column) for column in range(3))
        return ExistingClaim(
            int(status or b"0"), bytes.fromhex((fingerprint or b"").decode()), owner.decode() if owner else None
        )

    def state(self, dbapi: Any) -> State:
        driver = driver_of(dbapi)
        state = _STATES[driver.pgconn.transaction_status]
        return State.CLOSED if state is State.ABORTED and driver.closed and not driver.broken else state

    def error_kind(self, error: BaseException) -> ErrorKind:
        if isinstance(error, PoolTimeout):
            return ErrorKind.UNAVAILABLE
        origin = original(error)
        if not isinstance(origin, psycopg.Error):
            return ErrorKind.UNKNOWN
        code = origin.sqlstate
        if code is None:
            # Without SQLSTATE no server answered: psycopg lost the connection, or never had one.
            return ErrorKind.UNAVAILABLE if isinstance(origin, psycopg.OperationalError) else ErrorKind.UNKNOWN
        if code in contended.POSTGRESQL:
            return ErrorKind.TRANSIENT
        if code in _UNAVAILABLE or code[:2] in _UNAVAILABLE_CLASSES:
            return ErrorKind.UNAVAILABLE
        if code[:2] in _REFUSING_CLASSES and code != "40003":
            return ErrorKind.REFUSED
        return ErrorKind.UNKNOWN

    def no_table(self, error: BaseException) -> bool:
        return isinstance(error, (errors.UndefinedTable, errors.InvalidSchemaName))

    def refused(self, dbapi: Any, error: BaseException) -> bool:
        origin = original(error)
        if not isinstance(origin, psycopg.Error) or origin.sqlstate is None or origin.sqlstate.startswith(_UNSURE):
            return False  # a pooler answers 08P01 although its server may have committed
        idle = driver_of(dbapi).pgconn.transaction_status == TransactionStatus.IDLE
        return idle and origin.diag.severity_nonlocalized == "ERROR"

    def in_our_name(self, connection: Connection, statement: Insert | Update, values: Mapping[str, Any]) -> int:
        driver = driver_of(connection.connection.dbapi_connection)
        compiled = self._compiled.get(statement)
        if compiled is None:
            compiled = self._compiled[statement] = statement.compile(dialect=connection.dialect)
        text, given = str(compiled), compiled.construct_params(values)
        first, last = b"", list[bytes]()
        if not driver.autocommit:  # in autocommit it is a statement by itself, in no handler's transaction
            if self.kept_as not in connection.info:  # after a duplicate: nothing was claimed on this connection
                used = connection.connection.dbapi_connection
                self.prepare(used, connection.info, wait_ms=0, varies=varies(connection))
            seen: Seen = connection.info[self.kept_as]
            first, behind = seen.as_ours(driver)
            last = [behind]
        cursor = (AsyncClientCursor if isinstance(driver, AsyncConnection) else ClientCursor)(driver)
        try:
            if not _speaks_utf8(spoken := _encoding(driver)):
                # The handler has set another encoding. Needs a round trip of its own: the server reads a whole
                # text in one encoding.
                send(driver, IN_UTF8[0] if last else IN_UTF8[0].replace(b"true", b"false"))
                last += [IN_UTF8[1] % (spoken or b"")] if last else []
            # One round trip, with values as literals: several statements in one text have no parameters.
            written = cursor.mogrify(text, given).encode()
            results = send(driver, self.durable + first + written + b"".join(last))
        except errors.Error as error:
            link: Link | None = connection.info.get(LINK)
            if error.sqlstate == _READ_ONLY and _may_write(driver, pooled=link is not None and link.pooled):
                raise Misuse(_MADE_READ_ONLY) from error
            told = DBAPIError.instance(text, None, error, psycopg.Error, dialect=connection.dialect)
            mark_origin(told, connection.dialect)  # SQLAlchemy has not seen this error
            raise told from error
        return int(results[-1 - len(last)].command_tuples or 0)

    def no_room(self, error: BaseException) -> bool:
        return _sqlstate(error) == _DISK_FULL

    def locked(self, error: BaseException) -> bool:
        return False

    def gave_up(self, error: BaseException) -> bool:
        return False  # the driver has no such limit

    def timed_out(self, error: BaseException) -> bool:
        return _sqlstate(error) == _CANCELED

    def limit_was_left(self, dbapi: Any, info: MutableMapping[Any, Any]) -> bool:
        if info[LINK].pooled:
            # A stranger's limit is any that a session does not begin with. Left open, so that the pooler
            # throws the connection away.
            return bool(send(driver_of(dbapi), _LENT_LIMIT)[-1].get_value(0, 0) == b"t")
        results = send(driver_of(dbapi), b"ROLLBACK;" + LIMIT.encode())
        # 0: the session has no limit, so it was a hook's, by SET LOCAL.
        return results[-1].get_value(0, 0) not in (b"0", info[self.kept_as].limit)

    def unstorable(self, error: BaseException) -> bool:
        return _sqlstate(error) in _UNSTORABLE

    def gives_no_more(self, error: BaseException) -> bool:
        # libpq does not say why. But if a server answered, or nobody listens, an older connection reports that at once, too.
        origin = original(error)
        return isinstance(origin, psycopg.OperationalError) and not isinstance(origin, errors.ConnectionTimeout)

    def hopeless(self, error: BaseException) -> bool:
        from exactly_once.database.dialects.postgresql_refusal import why

        origin = original(error)
        code: str = origin.sqlstate or why(origin)
        if code == _NO_DATABASE or not code:
            return bool(code)
        return code not in _UNAVAILABLE and code[:2] not in _UNAVAILABLE_CLASSES

    def lost(self, dbapi: Any, info: MutableMapping[Any, Any], error: BaseException) -> bool:
        return False  # an error aborts the transaction, and the status says so until it is rolled back

    def read(self, dbapi: Any, info: MutableMapping[Any, Any], statement: str) -> Read:
        # The server reports each change of it. A string that ends elsewhere than we believe could hide a COMMIT.
        conforming = driver_of(dbapi).pgconn.parameter_status(b"standard_conforming_strings")
        return (_READ if conforming == b"on" else _READ_ESCAPED)(statement)


def _may_write(driver: Any, *, pooled: bool) -> bool:
    """Say whether the server and the session may write. Since PostgreSQL 14 the server reports it without being asked.

    A pooler does not report it for the server connection that it lends, which a stranger may have changed. There we ask
    in another transaction on the same connection. It is left open, because the pooler throws away a connection that
    is given up so.
    """
    if pooled:
        if driver.autocommit:
            return False  # autocommit: a statement by itself, in which no handler has set anything
        return bool(send(driver, b"ROLLBACK;BEGIN;SHOW transaction_read_only")[-1].get_value(0, 0) == b"off")
    names = (b"in_hot_standby", b"default_transaction_read_only")
    return all(driver.pgconn.parameter_status(name) == b"off" for name in names)


def _encoding(driver: Any) -> bytes | None:
    """Return this connection's client encoding. The server reports each change of it, so this asks nothing."""
    told: bytes | None = driver.pgconn.parameter_status(b"client_encoding")
    return told


def _user(driver: Any) -> bytes | None:
    """Return the session's user. The server reports it like the encoding; a pooler need not forward it."""
    told: bytes | None = driver.pgconn.parameter_status(b"session_authorization")
    return told


def _speaks_utf8(encoding: bytes | None) -> bool:
    return (
        encoding in _UTF8 or (encoding or b"").upper().replace(b"-", b"") in _UTF8
    )  # a pooler repeats what the client wrote


def _sqlstate(error: BaseException) -> str | None:
    own = original(error)  # an attribute of another exception may be anything
    return own.sqlstate if isinstance(own, errors.Error) else None


def note_driver_begin(driver: Any) -> None:
    """From here on, show whether the driver begins a transaction: our transactions are begun by us.

    After a COMMIT or ROLLBACK on the driver itself, the driver sends BEGIN before its next statement. The transaction
    looks open, and is not ours. But the driver keeps the text of its BEGIN once it has made one. Looking there
    costs nothing; to ask the server would cost each message one more statement.
    """
    driver._begin_statement = b""  # noqa: SLF001


def ignore_driver_begin(driver: Any) -> None:
    """Mark that a transaction begun now is not one that a handler is given, so that it is not taken for a handler's."""
    driver._begin_statement = _begin(driver).rstrip(b";")  # noqa: SLF001  # what the driver itself would send


def _replaced(driver: Any) -> bool:
    return bool(driver._begin_statement)  # noqa: SLF001


def opening(driver: Any, seen: Seen) -> bytes:
    """Return the text that begins a transaction of ours on this connection."""
    _refuse_autocommit(driver)
    return _begin(driver) + seen.settings


def opened(seen: Seen) -> bytes:
    """The same if a listener or a hook of the application has begun it: what they set for it counts as its beginning."""
    seen.vary()
    return _OWN_ROLE


def bounded(text: bytes, seen: Seen, wait_ms: int, *, begins: bool = True) -> bytes:
    """Limit the lock waits of a statement, and restore the session's own limit for the handler.

    Args:
        text: The statement.
        seen: What is known of the connection.
        wait_ms: The limit.
        begins: It is the first in a transaction of ours; else a limit may have been set in it before.
    """
    if seen.varies or not begins:
        return _BOUND_IN_OPEN % wait_ms + text + _UNBOUND_IN_OPEN
    return _BOUND % wait_ms + text + _UNBOUND % seen.own_wait


def _begin(driver: Any) -> bytes:
    """BEGIN as psycopg itself would send it on this connection."""
    level, read_only, deferrable = driver.isolation_level, driver.read_only, driver.deferrable
    if level is None and read_only is None and deferrable is None:
        return b"BEGIN;"
    words = [b"BEGIN"]
    if level is not None:
        words.append(b"ISOLATION LEVEL " + level.name.replace("_", " ").encode())
    if read_only is not None:
        words.append(b"READ ONLY" if read_only else b"READ WRITE")
    if deferrable is not None:
        words.append(b"DEFERRABLE" if deferrable else b"NOT DEFERRABLE")
    return b" ".join(words) + b";"


def template(text: str, order: tuple[str, ...]) -> bytes:
    """Turn named places into %s, after a check that they are in this `order`. Bytes formatting costs least for each message."""
    places = sorted(order, key=lambda name: text.index("{" + name + "}"))
    assert places == list(order)
    text = text.replace("%", "%%")
    for name in order:
        text = text.replace("{" + name + "}", "%s")
    return text.encode()


_BOUND: Final = BOUND[0].replace("{wait_ms}", "%d").encode()
_UNBOUND: Final = template(BOUND[1], ("own_wait",))
_BOUND_IN_OPEN: Final = BOUND_IN_OPEN[0].replace("{wait_ms}", "%d").encode()
_UNBOUND_IN_OPEN: Final = BOUND_IN_OPEN[1].encode()
_IN_OUR_NAME: Final = template(IN_OUR_NAME[0], ("role",)), IN_OUR_NAME[1].encode()
_AS_OUR_USER: Final = template(AS_OUR_USER[0], ("user", "role")), template(AS_OUR_USER[1], ("theirs",))
_OWN_ROLE: Final = OWN_ROLE.encode()
_ROLE_NOW: Final = b"pg_catalog.current_setting('role')"


def driver_of(dbapi: Any) -> Any:
    """The psycopg connection below SQLAlchemy: `dbapi` itself if sync, inside the adapter if async."""
    return getattr(dbapi, "driver_connection", None) or getattr(dbapi, "_connection", dbapi)


def _refuse_autocommit(driver: Any) -> None:
    if driver.autocommit:
        raise ConfigurationError(
            "The engine is in AUTOCOMMIT: a claim would be kept although its handler failed, and the message lost."
            " Take isolation_level='AUTOCOMMIT' off the engine (or session) given to exactly_once."
        )


def send(driver: Any, text: bytes, meanwhile: Iterable[object] = ()) -> list[Any]:
    """Send one simple-query string and return a result for each of its statements. One round trip.

    Args:
        driver: psycopg's connection.
        text: The statements.
        meanwhile: Work to do while the server works: a step for each element, until the answer begins to arrive.
    """

    results: list[Any]
    if isinstance(driver, AsyncConnection):
        results = await_only(_talk(driver, text, meanwhile))
    else:
        with driver.lock:
            results = driver.wait(_sent(driver.pgconn, text, meanwhile))
    for result in results:
        if result.status == ExecStatus.FATAL_ERROR:
            raise errors.error_from_result(result, encoding="utf-8")
    return results


async def _until_noticed(driver: Any) -> None:
    """Let the task that waits for this connection notice that it is cut."""
    for _ in range(_LOOKS):
        if driver.pgconn.transaction_status != TransactionStatus.ACTIVE:
            return
        await asyncio.sleep(_NOTICED_S / _LOOKS)


def _sent(pgconn: Any, text: bytes, meanwhile: Iterable[object]) -> Generator[Any, Any, list[Any]]:
    """Send a text. The result waits for its answers."""
    pgconn.send_query(text)
    if meanwhile and not pgconn.flush():  # the whole text is sent
        # If no descriptor is free for the selector, the answer is waited for all the same.
        with suppress(OSError), DefaultSelector() as look:
            look.register(pgconn.socket, EVENT_READ)
            for _ in meanwhile:
                if look.select(0):
                    break
    answers: Generator[Any, Any, list[Any]] = generators.execute(pgconn)
    return answers


async def _talk(driver: Any, text: bytes, meanwhile: Iterable[object]) -> list[Any]:
    async with driver.lock:
        results: list[Any] = await driver.wait(_sent(driver.pgconn, text, meanwhile))
    return results
