"""MySQL and MariaDB through PyMySQL and asyncmy.

Locking: InnoDB lets a second INSERT of a key wait on the first one's row lock. The loser gets errno 1062 and *keeps a
shared lock* on the row, so it rolls back at once. A deadlock (1213) rolls the whole transaction back, claim included,
and the next statement silently begins another: `lost` tells the watch, because a plain COMMIT would keep effects without a
claim. Most DDL commits the open transaction implicitly. A lock wait that timed out (1205) undoes only its statement,
unless innodb_rollback_on_timeout is on.

The wait is in whole seconds on these servers. MariaDB limits the one statement. MySQL knows only the session's setting,
so there the limit applies to the handler's own lock waits too.

The driver's flag says that a transaction is open, not that it is ours: a stored procedure can commit, begin another, or
swallow the deadlock that rolled ours back. Two witnesses tell. First, a savepoint that is set with the claim disappears exactly
when the claim's transaction does. It is released with COMMIT: an earlier release would also release the handler's own savepoints.
Second, the claim is written *unfinished*, and its own attempt changes it to *consumed* with COMMIT. If a process
is killed after a hidden commit, the row says so. Under a lease the claim was committed before, and another row is the witness
(`Trace`). There is one more savepoint around a CALL, so that the error can name that CALL. On MariaDB each of these travels in
a compound statement with one that is sent anyway. MySQL has no such statement, and each costs a round trip. If a transaction
was lost, and the driver's own cursor committed another in its place, neither witness shows it. If MariaDB keeps a binary log,
that log does (`LOGGED`).

A handler may have changed to another role (SET ROLE) without rights to our tables. We learn that from a denied statement, which
does nothing to a transaction: we set our own role, and send the statement again. So other handlers pay nothing for it.

Both drivers read the rest of an answer only with the next statement. A procedure can fail after its first rows, so its answer is
read to its end before a statement of ours. Else its error would be taken for ours (`read_out`).

asyncmy sends several statements in one text. If a later one of them calls a procedure that commits, we see that only after
the first result is closed.

Keys are VARBINARY: compared byte by byte, neither case nor trailing spaces are folded. They are sent as hexadecimal digits: a
session that was left in another character set, or in NO_BACKSLASH_ESCAPES, would read a driver's escaped text as another key.
"""

import re
import socket
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from datetime import UTC
from functools import cached_property
from math import ceil
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, Insert, Update
from sqlalchemy.exc import DBAPIError

from exactly_once.claim import ClaimRow, ExistingClaim
from exactly_once.database.dialects.contract import (
    LEARNT,
    Gone,
    State,
    Trace,
    TraceState,
    steps_of,
)
from exactly_once.database.dialects.keywords import Read, reader
from exactly_once.database.dialects.mysql_errors import (
    CONNECTION_GONE,
    DENIED,
    DUPLICATE,
    ENDS_TRANSACTION,
    LOCK_WAIT,
    NO_SAVEPOINT,
    NO_SUCH_TABLE,
    UNSURE,
    MySQLErrors,
    busy_of,
    errno,
)
from exactly_once.database.dialects.mysql_trace import trace_state_of
from exactly_once.database.dialects.mysql_wire import (
    SessionSettings,
    bound,
    bounded_by,
    counters_of,
    digits,
    driver_of,
    identity,
    read_rest,
    refuse_autocommit,
    release,
    role_as_set,
    savepoint_of_call,
    together,
    took_another_role,
    undo,
)
from exactly_once.database.dialects.schema_lookup import FoundIn, refuse_elsewhere
from exactly_once.database.dialects.statements import MARIADB, MYSQL
from exactly_once.database.mysql_committed import see_committed
from exactly_once.database.mysql_session import END_PLAINLY, ENDS_PLAINLY, RIGHT_SESSION, SESSION_IS_RIGHT
from exactly_once.database.owner import savepoint_of
from exactly_once.errors import ConfigurationError

__all__ = [
    "BEGIN",
    "CLAIM",
    "COMMITS",
    "FINISH",
    "FINISH_MANY",
    "KEY",
    "KNOWN",
    "LOGGED",
    "LOGS",
    "PREPARE",
    "READ",
    "RIGHT",
    "TRACE",
    "TRACE_STANDS",
    "UNTRACE",
    "MySQL",
]

CLAIM: Final = (
    "INSERT INTO {table} (consumer_group, handler, business_key, status, message_id, message_content, fingerprint,"
    " retry_times, owner, born_at, created_at, consumed_at) VALUES"
    " (UNHEX(%s), UNHEX(%s), UNHEX(%s), {status}, CONVERT(UNHEX(%s) USING utf8mb4), UNHEX(%s), UNHEX(%s), %s, %s, %s,"
    " UTC_TIMESTAMP(6), UTC_TIMESTAMP(6))"
)
FINISH: Final = (
    "UPDATE {table} SET status = 1"
    " WHERE consumer_group = UNHEX(%s) AND handler = UNHEX(%s) AND business_key = UNHEX(%s) AND owner = %s AND status = 2"
)
# Looks up each key on the whole primary key: with IN the server may read, and wait for, all rows of the handler.
FINISH_MANY: Final = (
    "UPDATE ({keys}) AS wanted STRAIGHT_JOIN {table} AS ours FORCE INDEX (PRIMARY)"
    " ON ours.consumer_group = UNHEX(%s) AND ours.handler = UNHEX(%s) AND ours.business_key = wanted.business_key"
    " SET ours.status = 1 WHERE ours.owner = %s AND ours.status = 2"
)
KEY: Final = "SELECT UNHEX(%s) AS business_key"
# Under a lease the handler's transaction contains no claim, but this row.
TRACE: Final = (
    "INSERT INTO {steps} (consumer_group, handler, business_key, step, ordinal, status, result, attempt, token, created_at)"
    " VALUES (UNHEX(%s), UNHEX(%s), UNHEX(%s), UNHEX(%s), -1, 2, CONNECTION_ID(), %s, %s, UTC_TIMESTAMP(6))"
)
UNTRACE: Final = (
    "DELETE FROM {steps}"
    " WHERE consumer_group = UNHEX(%s) AND handler = UNHEX(%s) AND business_key = UNHEX(%s) AND step = UNHEX(%s)"
)
TRACE_STANDS: Final = (
    "SELECT 1 FROM {steps}"
    " WHERE consumer_group = UNHEX(%s) AND handler = UNHEX(%s) AND business_key = UNHEX(%s) AND step = UNHEX(%s) LIMIT 1"
)
# Our own number: SIGNAL's default is 1644, which any trigger may raise.
_MISSED: Final = 21644
_FINISHED: Final = f"IF ROW_COUNT() <> {{count}} THEN SIGNAL SQLSTATE '45000' SET MYSQL_ERRNO = {_MISSED}; END IF"
# Travels with the statement that begins a transaction of ours. `begin_ours` and the claim with a lease check for themselves.
RIGHT: Final = f"IF NOT ({SESSION_IS_RIGHT}) THEN {RIGHT_SESSION}; END IF"
# For `logged_since`, on MariaDB: the last commit of this session in the binary log, and whether the log has any of its commits.
LOGGED: Final = (
    "SET @exactly_once_logs = IF(@@last_gtid <> @exactly_once_last, 1, @exactly_once_logs),"
    " @exactly_once_last = @@last_gtid"
)
# As bytes: see `mysql_session.put_right`. NULL if the log has shown no commit of this session, or is off for it.
LOGS: Final = (
    "SELECT CAST(IF(@exactly_once_logs AND @@sql_log_bin, @@last_gtid <> @exactly_once_last, NULL) AS BINARY) LIMIT 1"
)
# So that it sees what is committed now, not an older snapshot of the caller's transaction.
_LOCKING: Final = " LOCK IN SHARE MODE"
KNOWN: Final = (
    "SELECT status, fingerprint, CAST(owner AS BINARY) FROM {table}"  # noqa: S608  (constants alone)
    " WHERE consumer_group = UNHEX(%s) AND handler = UNHEX(%s) AND business_key = UNHEX(%s) LIMIT 1" + _LOCKING
)
BEGIN: Final = "START TRANSACTION"
# Each SELECT has a LIMIT: else sql_select_limit applies, which an earlier user may have left in the session.
PREPARE: Final = (
    "SELECT VERSION(), @@innodb_rollback_on_timeout, @@sql_mode, @@completion_type, @@log_bin, DATABASE()"
    "/*!80000 , CURRENT_ROLE()*//*M!100005 , CURRENT_ROLE()*//*M!100100 , @@max_statement_time*/ LIMIT 1"
)
LIMIT: Final = "SELECT @@max_statement_time LIMIT 1"
# Counters that change with each commit of this session: they count statements that may commit. The binary log would
# be cheaper, but lacks commits that are kept out of it. MySQL has these counters in no table, and SHOW cannot add them up.
COMMITS: Final = (
    "{read} WHERE VARIABLE_NAME LIKE 'Com\\_%' AND VARIABLE_NAME NOT LIKE 'Com\\_show\\_%'"
    " AND VARIABLE_NAME NOT LIKE 'Com\\_stmt\\_%' AND VARIABLE_NAME NOT IN ('Com_select', 'Com_insert', 'Com_insert_select',"
    " 'Com_update', 'Com_update_multi', 'Com_delete', 'Com_delete_multi', 'Com_replace', 'Com_replace_select',"
    " 'Com_call_procedure', 'Com_savepoint', 'Com_release_savepoint', 'Com_rollback_to_savepoint', 'Com_rollback',"
    " 'Com_signal', 'Com_resignal', 'Com_get_diagnostics', 'Com_compound_sql', 'Com_do', 'Com_execute_sql',"
    " 'Com_execute_immediate', 'Com_prepare_sql', 'Com_dealloc_sql', 'Com_empty_query'){limit}"
)
READ: Final = {
    "MariaDB": "SELECT SUM(VARIABLE_VALUE) FROM information_schema.SESSION_STATUS",
    "MySQL": "SHOW SESSION STATUS",
}

# A plain COMMIT, whatever completion_type says.
_COMMIT: Final = "COMMIT AND NO CHAIN NO RELEASE"
# Flags of the protocol's OK packet.
_IN_TRANSACTION: Final = 1  # SERVER_STATUS_IN_TRANS
_NO_BACKSLASH_ESCAPES: Final = 512  # SERVER_STATUS_NO_BACKSLASH_ESCAPES
# A bit that the protocol does not use, which has 16: the server's next answer clears it, and an error leaves it.
_MARKED: Final = 1 << 24
_ENDLESS_S: Final = 31_536_000  # the driver waits without a limit


class _Mark(NamedTuple):
    """The driver's last result at a time when nothing was open."""

    result: Any


class MySQL(MySQLErrors):
    """See the module."""

    name = "mysql"
    asks_around_calls = True
    embedded = False
    learns = True

    def __init__(self, table: Callable[[], str], found_in: FoundIn, *, durable: bool, kept_as: str) -> None:
        self._table, self._found_in, self.kept_as = table, found_in, kept_as

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

    @cached_property
    def _tracing(self) -> tuple[str, str]:
        steps = steps_of(self.table)
        return TRACE.replace("{steps}", steps), UNTRACE.replace("{steps}", steps)

    @cached_property
    def _trace_stands(self) -> str:
        return TRACE_STANDS.replace("{steps}", steps_of(self.table))

    def _finishing(self, owner: str, rows: Sequence[ClaimRow], trace: Trace | None) -> tuple[str, list[Any]]:
        """Return the statement that completes this attempt's claims or deletes its trace, and its values. Empty for neither."""
        if trace is not None:
            return self._tracing[1], [*identity(trace.row), digits(trace.name)]
        if not rows:
            return "", []
        if len(rows) == 1:
            return FINISH.replace("{table}", self.table), [*identity(rows[0]), owner]
        group, handler, _ = identity(rows[0])
        keys = [digits(row.key) for row in rows]
        text = FINISH_MANY.replace("{table}", self.table).replace("{keys}", " UNION ALL ".join([KEY] * len(keys)))
        return text, [*keys, group, handler, owner]

    def learn(self, dbapi: Any) -> tuple[Any, ...]:
        cursor = dbapi.cursor()
        try:
            cursor.execute(PREPARE)
            return tuple(cursor.fetchone())
        finally:
            cursor.close()

    def prepare(self, dbapi: Any, info: MutableMapping[Any, Any], *, wait_ms: int, varies: bool = False) -> None:
        refuse_autocommit(dbapi)
        limit_s = getattr(driver_of(dbapi), "_read_timeout", None)
        patience_s = _ENDLESS_S if limit_s is None else max(0, ceil(limit_s) - 1)
        seconds = min(max(1, -(-wait_ms // 1000)), patience_s)
        told = info.get(LEARNT)
        version, rollback_on_timeout, modes, completion, log_bin, database, *more = told or self.learn(dbapi)
        if told is not None and not varies:
            refuse_elsewhere(self._found_in, database)
        cursor = dbapi.cursor()
        try:
            if "STRICT" not in str(modes):
                raise ConfigurationError(
                    "sql_mode has no STRICT_TRANS_TABLES: the server would cut long values in silence."
                    " Type: SET GLOBAL sql_mode = CONCAT(@@sql_mode, ',STRICT_TRANS_TABLES')"
                )
            if "NO_BACKSLASH_ESCAPES" in str(modes) and hasattr(driver_of(dbapi), "_proto"):
                raise ConfigurationError(
                    "sql_mode has NO_BACKSLASH_ESCAPES, and asyncmy escapes bytes with backslashes all the same: what a handler"
                    " puts into a BLOB would be stored otherwise. Take it out of sql_mode for this connection."
                )
            is_mariadb = "MariaDB" in str(version)
            if not is_mariadb:
                cursor.execute(f"SET SESSION innodb_lock_wait_timeout = {max(1, seconds):d}")
            if completion != ENDS_PLAINLY:
                cursor.execute(END_PLAINLY)  # the value with which the server, or init_connect, begins each session
        finally:
            cursor.close()
        grammar = (MARIADB if is_mariadb else MYSQL)._replace(
            ansi_quotes="ANSI" in str(modes), version=_version(str(version))
        )
        compound = is_mariadb and "ORACLE" not in str(modes)  # Oracle mode has another grammar
        info[self.kept_as] = SessionSettings(
            bound=bounded_by(seconds) if is_mariadb else "",
            patience_s=patience_s,
            rollback_on_timeout=bool(rollback_on_timeout),
            compound=compound,
            right=(RIGHT, LOGGED) if compound and int(log_bin) else (RIGHT,) if compound else (),
            commits=COMMITS.replace("{read}", READ["MariaDB" if is_mariadb else "MySQL"]).replace(
                "{limit}", " LIMIT 1" if is_mariadb else ""
            ),
            limit=more[1:],
            role=role_as_set(more[0], is_mariadb=is_mariadb) if more else "",
            readers=(reader(grammar._replace(backslash=False)), reader(grammar._replace(backslash=True))),
        )

    def settings_changed(self, dbapi: Any, info: MutableMapping[Any, Any]) -> bool:
        return False  # we send and read digits and bytes, which no character set or mode changes

    def claim(
        self, dbapi: Any, info: MutableMapping[Any, Any], row: ClaimRow, *, wait_ms: int, savepoint: bool
    ) -> bool:
        refuse_autocommit(dbapi)
        seen: SessionSettings = info[self.kept_as]
        # With a savepoint the caller commits, and cannot set the claim to consumed later.
        insert = bound(seen, wait_ms) + self._claim.replace("{status}", "1" if savepoint else "2")
        values = (
            *identity(row), digits(row.message_id), digits(row.content), row.fingerprint.hex(), row.attempt - 1, row.owner,
            None if row.born_at is None else row.born_at.astimezone(UTC).replace(tzinfo=None),
        )  # fmt: skip
        name = savepoint_of(row.owner)
        cursor = dbapi.cursor()
        try:
            try:
                if savepoint:
                    together(cursor, seen, f"SAVEPOINT {name}", insert, f"RELEASE SAVEPOINT {name}", values=values)
                else:
                    together(cursor, seen, *seen.right, insert, f"SAVEPOINT {name}", values=values)
            except Exception as error:
                code = errno(error)
                lost = savepoint and not undo(cursor, name)
                if code == DUPLICATE and not lost:
                    return False
                if (busy := busy_of(error, lost=lost)) is not None:
                    raise busy from error
                raise
            return True
        finally:
            cursor.close()

    def begin(self, dbapi: Any, info: MutableMapping[Any, Any], owner: str, trace: Trace | None = None) -> None:
        seen: SessionSettings = info[self.kept_as]
        # START TRANSACTION would commit what a hook of the application has already written in this transaction.
        first = [BEGIN] if self.state(dbapi) is State.IDLE else []
        values: list[Any] = []
        if trace is not None:
            first.append(seen.bound + self._tracing[0])  # a DELETE of old steps may hold a lock that this waits for
            values = [*identity(trace.row), digits(trace.name), trace.attempt, trace.token]
        cursor = dbapi.cursor()
        try:
            together(cursor, seen, *seen.right, *first, f"SAVEPOINT {savepoint_of(owner)}", values=values)
        finally:
            cursor.close()

    def commit(
        self,
        dbapi: Any,
        info: MutableMapping[Any, Any],
        owner: str,
        rows: Sequence[ClaimRow],
        trace: Trace | None,
        send_commit: Callable[[], None],
    ) -> None:
        seen: SessionSettings = info[self.kept_as]
        release = f"RELEASE SAVEPOINT {savepoint_of(owner)}"
        finish, values = self._finishing(owner, rows, trace)
        count = len(rows) + (trace is not None)
        cursor = dbapi.cursor()
        try:
            if seen.compound:
                # A crash before the server has read this: all is rolled back. A crash after: all is done.
                finished = (finish, _FINISHED.replace("{count}", str(count))) if finish else ()
                try:
                    together(cursor, seen, release, *finished, _COMMIT, values=values)
                except Exception as error:
                    if not took_another_role(cursor, seen, error):
                        raise
                    # The savepoint existed, and is released. The statements after it were not executed.
                    together(cursor, seen, *finished, _COMMIT, values=values)
                return
            cursor.execute(release)
            if finish:
                try:
                    cursor.execute(finish, values)
                except Exception as error:
                    if not took_another_role(cursor, seen, error):
                        raise
                    cursor.execute(finish, values)
                count -= cursor.rowcount
        except Exception as error:
            if errno(error) in (NO_SAVEPOINT, _MISSED):
                raise Gone from error
            raise
        finally:
            cursor.close()
        if count:
            raise Gone
        send_commit()

    def cut(self, dbapi: Any) -> None:
        sock = getattr(dbapi, "_sock", None)  # the other driver wakes its waiters when it is closed
        if sock is not None:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def intact(self, dbapi: Any, info: MutableMapping[Any, Any], owner: str) -> bool | None:
        self._pass_over(dbapi)
        return release(dbapi, savepoint_of(owner))

    def rows_as(self, dbapi: Any) -> tuple[Any, ...]:
        driver = driver_of(dbapi)
        return (driver.cursorclass if driver is dbapi else driver._cursor_cls,)  # noqa: SLF001  (PyMySQL's, asyncmy's)

    def make_rows(self, dbapi: Any, rows_as: tuple[Any, ...]) -> None:
        driver = driver_of(dbapi)
        setattr(driver, "cursorclass" if driver is dbapi else "_cursor_cls", *rows_as)

    def read_out(self, dbapi: Any) -> bool:
        return read_rest(driver_of(dbapi), streams=False)

    def _pass_over(self, dbapi: Any) -> None:
        """Read the rest of a statement whose error does not matter any more: it must not be taken for our statement's."""
        with suppress(Exception):
            read_rest(driver_of(dbapi), streams=True)

    def before_call(self, dbapi: Any, info: MutableMapping[Any, Any], owner: str) -> Any:
        self.read_out(dbapi)
        seen: SessionSettings = info[self.kept_as]
        cursor = dbapi.cursor()
        try:
            together(cursor, seen, f"SAVEPOINT {savepoint_of_call(owner)}", seen.commits)
            return counters_of(cursor)
        except Exception as error:
            if errno(error) in (1142, 1143, NO_SUCH_TABLE):  # no right to the server's counters, or there are none
                return None
            raise
        finally:
            cursor.close()

    def after_call(self, dbapi: Any, info: MutableMapping[Any, Any], owner: str, *, drop: bool) -> bool | None:
        result = driver_of(dbapi)._result  # noqa: SLF001
        if result is not None and (result.has_next or result.unbuffered_active):
            if not drop:
                return None
            self.read_out(dbapi)
        return release(dbapi, savepoint_of_call(owner))

    def committed_since(self, dbapi: Any, info: MutableMapping[Any, Any], before: Any) -> bool | None:
        if before is None:
            return None
        self._pass_over(dbapi)
        seen: SessionSettings = info[self.kept_as]
        cursor = dbapi.cursor()
        try:
            cursor.execute(seen.commits)
            return bool(counters_of(cursor) != before)
        finally:
            cursor.close()

    def logged_since(self, dbapi: Any, info: MutableMapping[Any, Any], trace: Trace | None) -> bool | None:
        seen: SessionSettings = info[self.kept_as]
        if LOGGED not in seen.right:
            return None
        self._pass_over(dbapi)
        cursor = dbapi.cursor()
        try:
            cursor.execute(LOGS)
            told = cursor.fetchone()[0]
            if told is None or trace is None:
                return None if told is None else told == b"1"
            # Of this session itself, so no older snapshot hides it.
            cursor.execute(self._trace_stands, [*identity(trace.row), digits(trace.name)])
            return told == b"1" or cursor.fetchone() is not None
        finally:
            cursor.close()

    def server_session(self, dbapi: Any) -> object:
        # The driver makes a new tuple at each connect. Its number alone could come again on another server.
        thread_id: object = driver_of(dbapi).server_thread_id
        return thread_id

    def position(self, dbapi: Any) -> Any:
        driver = driver_of(dbapi)
        driver.server_status |= _MARKED
        return _Mark(driver._result)  # noqa: SLF001

    def sent_since(self, dbapi: Any, position: Any) -> bool:
        driver = driver_of(dbapi)
        if not driver.server_status & _MARKED:
            return True
        # asyncmy does not take over a status of 0: then the result tells. After an error there is no result.
        return driver._result is not None and driver._result is not position.result  # noqa: SLF001

    def read_claim(self, dbapi: Any, row: ClaimRow, *, end: bool, wait: bool = True) -> ExistingClaim | None:
        if not wait:
            see_committed(dbapi)
        cursor = dbapi.cursor()
        try:
            text = self._known if wait else self._known.removesuffix(_LOCKING)
            cursor.execute(text, identity(row))
            found = cursor.fetchone()
        finally:
            cursor.close()
            if end:
                dbapi.rollback()  # the refused INSERT left a shared lock on the row, for which pruning would wait
        if found is None:
            return None
        status, fingerprint, owner = found
        return ExistingClaim(int(status), bytes(fingerprint), None if owner is None else owner.decode())

    def trace_state(self, dbapi: Any, row: ClaimRow) -> TraceState:
        return trace_state_of(dbapi, steps_of(self.table), identity(row))

    def state(self, dbapi: Any) -> State:
        driver = driver_of(dbapi)
        if not driver.server_status & _IN_TRANSACTION:
            return State.IDLE
        waits = getattr(getattr(driver, "_proto", None), "_read_waiter", None)  # of asyncmy: a task awaits an answer
        if waits is not None or (driver._result is not None and driver._result.unbuffered_active):  # noqa: SLF001
            return State.BUSY
        # asyncmy takes over a new status only if it is not 0, and a COMMIT or ROLLBACK that is sent as text answers 0. The
        # last result has it. With the protocol's older end of a result, rows come without a status, and 0 says nothing.
        result = driver._result if getattr(driver, "_deprecate_eof", False) else None  # noqa: SLF001
        ended = result is not None and not result.server_status & _IN_TRANSACTION
        return State.IDLE if ended else State.OPEN

    def refused(self, dbapi: Any, error: BaseException) -> bool:
        code = errno(error)
        if code is None or (code >= 2000 and code < 3000) or code in UNSURE:
            return False
        # The server still answers; `end` rolls back what is open.
        cursor = dbapi.cursor()
        try:
            cursor.execute("DO 0")
        except Exception:  # any error: we do not know
            return False
        finally:
            cursor.close()
        return True

    def in_our_name(self, connection: Connection, statement: Insert | Update, values: Mapping[str, Any]) -> int:
        seen: SessionSettings | None = connection.info.get(self.kept_as)

        def executed() -> int:
            # preserve_rowcount: without it the driver forgets the row count of an INSERT, and says -1.
            return connection.execute(statement, values, execution_options={"preserve_rowcount": True}).rowcount

        try:
            return executed()
        except DBAPIError as error:
            if seen is None or errno(error) not in DENIED:
                raise
            dbapi: Any = connection.connection.dbapi_connection
            cursor = dbapi.cursor()
            try:
                theirs = took_another_role(cursor, seen, error)
                if not theirs:
                    raise
                try:
                    return executed()
                finally:
                    cursor.execute(theirs)
            finally:
                cursor.close()

    def limit_was_left(self, dbapi: Any, info: MutableMapping[Any, Any]) -> bool:
        cursor = dbapi.cursor()
        try:
            cursor.execute(LIMIT)
            return cursor.fetchone()[0] not in (0, *info[self.kept_as].limit)
        except ValueError:  # the session may have a result character set in which a number cannot be read
            return True
        finally:
            cursor.close()

    def lost(self, dbapi: Any, info: MutableMapping[Any, Any], error: BaseException) -> bool:
        code = errno(error)
        if code is None:
            return isinstance(error, CONNECTION_GONE)  # a broken connection, as asyncmy's streams raise it
        return code in ENDS_TRANSACTION or (code == LOCK_WAIT and info[self.kept_as].rollback_on_timeout)

    def read(self, dbapi: Any, info: MutableMapping[Any, Any], statement: str) -> Read:
        plain, escaped = info[self.kept_as].readers
        read: Callable[[str], Read] = plain if driver_of(dbapi).server_status & _NO_BACKSLASH_ESCAPES else escaped
        return read(statement)


def _version(text: str) -> int:
    """Return a server's version in the form of executable comments: 101106 for 10.11.6; 0 if it cannot be read."""
    found = re.match(r"(?:5\.5\.5-)?(\d+)\.(\d+)\.(\d+)", text)
    return int(found[1]) * 10_000 + int(found[2]) * 100 + int(found[3]) if found else 0
