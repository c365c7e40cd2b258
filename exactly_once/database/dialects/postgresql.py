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

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import cached_property
from hashlib import sha256
from typing import Any, Final, NamedTuple
from weakref import WeakKeyDictionary

import psycopg
from psycopg import AsyncClientCursor, AsyncConnection, ClientCursor, errors
from psycopg.pq import Escaping, TransactionStatus
from sqlalchemy import Connection, Insert, Update
from sqlalchemy.exc import DBAPIError

from exactly_once.claim import ClaimRow, ExistingClaim
from exactly_once.database.connections.pooler import LINK, Link
from exactly_once.database.dialects.contract import LEARNT, Gone, State, Trace, TraceState
from exactly_once.database.dialects.firsthand import varies
from exactly_once.database.dialects.keywords import Read, reader
from exactly_once.database.dialects.postgresql_errors import READ_ONLY, PostgreSQLErrors, busy_of
from exactly_once.database.dialects.postgresql_pooler import look
from exactly_once.database.dialects.postgresql_settings import (
    DURABLE,
    SessionSettings,
    limits,
    text_in_theirs,
    text_of_our_begin,
)
from exactly_once.database.dialects.postgresql_wire import (
    cut,
    driver_begun,
    driver_of,
    encoding_of,
    ignore_driver_begin,
    note_driver_begin,
    refuse_autocommit,
    send,
    speaks_utf8,
    template,
    user_of,
)
from exactly_once.database.dialects.schema_lookup import FoundIn, refuse_elsewhere
from exactly_once.database.dialects.statements import POSTGRESQL
from exactly_once.database.errors.drivers_own import original
from exactly_once.database.errors.whose import mark_origin
from exactly_once.database.owner import savepoint_of
from exactly_once.errors import ConfigurationError, Misuse

__all__ = ["CLAIM", "EXECUTE", "KNOWN", "LOOK", "TYPES", "PostgreSQL"]

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
LOOK: Final = (
    "SELECT setting, reset_val, current_setting('role'), current_setting('synchronous_commit'),"
    " current_setting('statement_timeout'),"
    # Of this user in this database, of this user, of the database, of all; pg_settings does not show it.
    " (SELECT substr(given, 6) FROM pg_db_role_setting, unnest(setconfig) AS given WHERE given LIKE 'role=%'"
    " AND (setrole = 0 OR setrole = (SELECT oid FROM pg_roles WHERE rolname = session_user))"
    " AND (setdatabase = 0 OR setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database()))"
    " ORDER BY setrole = 0, setdatabase = 0 LIMIT 1),"
    " (SELECT nspname FROM pg_namespace AS known JOIN pg_class AS found ON found.relnamespace = known.oid"
    " WHERE found.oid = to_regclass('message_idempotent'))"
    " FROM pg_settings WHERE name = 'lock_timeout'"
)
LIMIT: Final = "SELECT pg_catalog.current_setting('statement_timeout')"
_LENT_LIMIT: Final = b"ROLLBACK;BEGIN;SELECT setting <> reset_val FROM pg_settings WHERE name = 'statement_timeout'"
# For a statement with keys: the handler may have set another client encoding for its own statements.
IN_UTF8: Final = (
    b"SELECT pg_catalog.set_config('client_encoding', 'UTF8', true)",
    b";SELECT pg_catalog.set_config('client_encoding', '%s', true)",
)
KNOWN: Final = (
    "SELECT status, encode(fingerprint, 'hex'), owner FROM {table}"
    " WHERE consumer_group = {group} AND handler = {handler} AND business_key = {key}"
)

_VALUES: Final = (
    "group", "handler", "key", "message_id", "content", "fingerprint", "retry_times", "owner", "born_at"
)  # fmt: skip
# After these we do not know whether COMMIT happened: the connection ended, or the error is not the server's.
_UNSURE: Final = ("08", "40003", "57P", "58")
_READ: Final = reader(POSTGRESQL)
_READ_ESCAPED: Final = reader(POSTGRESQL._replace(backslash=True))
_STATES: Final = {
    TransactionStatus.IDLE: State.IDLE,
    TransactionStatus.ACTIVE: State.BUSY,
    TransactionStatus.INTRANS: State.OPEN,
    TransactionStatus.INERROR: State.ABORTED,
    TransactionStatus.UNKNOWN: State.ABORTED,
}
_MADE_READ_ONLY: Final = (
    "The handler made its transaction read only (SET TRANSACTION READ ONLY, or set_config('transaction_read_only', ...)), and"
    " what we write with its COMMIT was refused: that an earlier failure is settled, or that its lease or step is done. Nothing"
    " was committed. Take that statement out of the handler; what may only read belongs in a session of its own."
)


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
    schema: bytes | None
    """Where its search path finds our tables."""
    open: bool
    """It was in a transaction that others had begun, so it may have reported what they set for that transaction alone."""


class PostgreSQL(PostgreSQLErrors):
    """See the module."""

    name = "postgresql"
    asks_around_calls = False
    embedded = False
    learns = True

    def __init__(self, table: Callable[[], str], found_in: FoundIn, *, durable: bool, kept_as: str) -> None:
        self._table, self._found_in, self.kept_as = table, found_in, kept_as
        self.durable = DURABLE.encode() if durable else b""
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
        told = [results[1 if begin else 0].get_value(0, n) for n in range(7)]
        waits, waits_by_default, role, durable, limit, role_by_default, schema = told
        return _Learnt(
            waits, waits_by_default, role, role_by_default, durable, limit, encoding_of(driver), schema, not begin
        )

    def prepare(self, dbapi: Any, info: MutableMapping[Any, Any], *, wait_ms: int, varies: bool = False) -> None:
        driver = driver_of(dbapi)
        refuse_autocommit(driver)
        # For a connection that was made before we saw its engine. From here on neither psycopg nor we prepare statements on it.
        link = info.get(LINK) or look(dbapi, info)
        told: _Learnt | None = info.get(LEARNT)
        encoding = encoding_of(driver)
        if not speaks_utf8(encoding) and encoding != b"SQL_ASCII":
            raise ConfigurationError(
                f"The connection's client_encoding is {(encoding or b'?').decode()}; business keys are compared as UTF-8."
                " Take client_encoding out of the engine's connect_args, or set it to utf8."
            )
        learnt = told or self.learn(dbapi)
        begin = driver.pgconn.transaction_status == TransactionStatus.IDLE
        varies = varies or learnt.open
        if told is not None and not varies and not link.pooled:
            refuse_elsewhere(self._found_in, None if told.schema is None else told.schema.decode())
        durable = self.durable if varies else b"SET LOCAL synchronous_commit = on;"
        seen = info[self.kept_as] = SessionSettings(
            # DEFAULT, so that it follows the server's configuration.
            own_wait=b"DEFAULT" if link.pooled or learnt.waits == learnt.waits_by_default else b"%s" % learnt.waits,
            role=Escaping(driver.pgconn).escape_literal(
                (learnt.role_by_default if link.pooled else learnt.role) or b"none"
            ),
            user=user_of(driver),
            prepared=begin and driver.prepare_threshold is not None and self._is_prepared(driver),
            encoding=learnt.encoding,
            limit=learnt.limit,
            settings=link.settings + (durable if learnt.durable == b"off" and self.durable else b""),
        )
        if varies:
            seen.vary()

    def settings_changed(self, dbapi: Any, info: MutableMapping[Any, Any]) -> bool:
        driver = driver_of(dbapi)
        return bool(driver.autocommit) or encoding_of(driver) != info[self.kept_as].encoding

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
        refuse_autocommit(driver)
        pgconn = driver.pgconn
        seen: SessionSettings = info[self.kept_as]
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
        begins = first = text_of_our_begin(driver, seen) if begin else b"" if savepoint else text_in_theirs(seen)
        limit, unlimit = limits(seen, wait_ms, begins=begin)
        first += durable + save + limit
        last = unlimit + release
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
        seen: SessionSettings = info[self.kept_as]
        if driver.pgconn.transaction_status != TransactionStatus.IDLE:  # a hook of the application has sent something
            seen.vary()
        begins = text_of_our_begin(driver, seen)
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
        if driver_begun(driver):
            raise Gone
        # Not the driver's own COMMIT: the statement that makes it durable travels with it. After a crash before
        # the answer, a look-up tells.
        send(driver, self.durable + b"COMMIT")

    def cut(self, dbapi: Any) -> None:
        cut(driver_of(dbapi))

    def intact(self, dbapi: Any, info: MutableMapping[Any, Any], owner: str) -> bool | None:
        # No procedure or function can end the transaction block in which it is called (2D000); a call on the driver can.
        return False if driver_begun(driver_of(dbapi)) else None

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

    def trace_state(self, dbapi: Any, row: ClaimRow) -> TraceState:
        return TraceState.NONE  # no procedure commits a transaction that it did not begin

    def server_session(self, dbapi: Any) -> object:
        return None  # the driver does not reconnect

    def position(self, dbapi: Any) -> Any:
        return True

    def sent_since(self, dbapi: Any, position: Any) -> bool:
        return driver_begun(driver_of(dbapi))

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
            seen: SessionSettings = connection.info[self.kept_as]
            first, behind = seen.as_ours(driver)
            last = [behind]
        cursor = (AsyncClientCursor if isinstance(driver, AsyncConnection) else ClientCursor)(driver)
        try:
            if not speaks_utf8(spoken := encoding_of(driver)):
                # The handler has set another encoding. Needs a round trip of its own: the server reads a whole
                # text in one encoding.
                send(driver, IN_UTF8[0] if last else IN_UTF8[0].replace(b"true", b"false"))
                last += [IN_UTF8[1] % (spoken or b"")] if last else []
            # One round trip, with values as literals: several statements in one text have no parameters.
            written = cursor.mogrify(text, given).encode()
            results = send(driver, self.durable + first + written + b"".join(last))
        except errors.Error as error:
            link: Link | None = connection.info.get(LINK)
            if error.sqlstate == READ_ONLY and _may_write(driver, pooled=link is not None and link.pooled):
                raise Misuse(_MADE_READ_ONLY) from error
            translated = DBAPIError.instance(text, None, error, psycopg.Error, dialect=connection.dialect)
            mark_origin(translated, connection.dialect)  # SQLAlchemy has not seen this error
            raise translated from error
        return int(results[-1 - len(last)].command_tuples or 0)

    def limit_was_left(self, dbapi: Any, info: MutableMapping[Any, Any]) -> bool:
        if info[LINK].pooled:
            # A stranger's limit is any that a session does not begin with. Left open, so that the pooler
            # throws the connection away.
            return bool(send(driver_of(dbapi), _LENT_LIMIT)[-1].get_value(0, 0) == b"t")
        results = send(driver_of(dbapi), b"ROLLBACK;" + LIMIT.encode())
        # 0: the session has no limit, so it was a hook's, by SET LOCAL.
        return results[-1].get_value(0, 0) not in (b"0", info[self.kept_as].limit)

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
