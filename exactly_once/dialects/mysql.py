"""MySQL and MariaDB through PyMySQL and asyncmy.

Locking: InnoDB lets a second INSERT of a key wait on the first one's row lock; the loser gets errno 1062 and *keeps a
shared lock* on the row, so it rolls back at once. A deadlock (1213) throws the whole transaction away, claim included,
and the next statement silently begins another: `lost` tells the watch, for COMMIT alone would keep effects without a
claim. Most DDL commits the open transaction on its way. A lock wait that timed out (1205) undoes its statement only,
unless innodb_rollback_on_timeout is on.

The wait is in whole seconds on these servers. MariaDB bounds the one statement; MySQL knows only the session's setting,
so there the bound holds for the handler's own lock waits too.

asyncmy sends several statements in one text. A procedure that commits, called behind the first of them, is seen only once
that first one's result was closed.

Keys are VARBINARY: compared byte by byte, neither case nor trailing spaces are folded.
"""

from collections.abc import MutableMapping
from datetime import UTC
from typing import Any, Final

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from exactly_once.dialects import ClaimBusy, ClaimRow, Known, State, Trouble
from exactly_once.dialects.keywords import refused
from exactly_once.errors import ConfigurationError

__all__ = ["BEGIN", "BOUND", "CLAIM", "DUPLICATE", "KNOWN", "LOCK_WAIT", "TRANSIENT", "MySQL", "errno"]

CLAIM: Final = (
    "INSERT INTO {table} (consumer_group, handler, business_key, status, message_id, message_content, fingerprint,"
    " retry_times, owner, born_at, created_at, consumed_at) VALUES"
    " (%s, %s, %s, 1, %s, %s, %s, %s, %s, %s, UTC_TIMESTAMP(6), UTC_TIMESTAMP(6))"
)
BOUND: Final = "SET STATEMENT innodb_lock_wait_timeout = {seconds} FOR "
# locking, so that it sees what is committed now and not an older snapshot of the caller's transaction
KNOWN: Final = (
    "SELECT status, fingerprint, owner FROM {table}"
    " WHERE consumer_group = %s AND handler = %s AND business_key = %s LOCK IN SHARE MODE"
)
BEGIN: Final = "START TRANSACTION"
PREPARE: Final = "SELECT VERSION(), @@innodb_rollback_on_timeout, @@sql_mode, @@autocommit"

_IN_TRANSACTION: Final = 1  # SERVER_STATUS_IN_TRANS of the protocol's OK packet
DUPLICATE: Final = 1062
_NO_SUCH_TABLE: Final = 1146
LOCK_WAIT: Final = 1205
_DEADLOCK: Final = 1213
_CHANGED: Final = 1020  # MariaDB's innodb_snapshot_isolation: the row changed since this transaction's snapshot
TRANSIENT: Final = frozenset({LOCK_WAIT, _DEADLOCK, _CHANGED})
# what says that the server cannot work now, whichever message asks; some of it may be of one statement alone, so a failure
# is taken for an outage only after a look
_UNAVAILABLE: Final = frozenset(
    {
        3,  # EE_WRITE: error writing a file
        20,  # EE_DISK_FULL
        1021,  # ER_DISK_FULL
        1026,  # ER_ERROR_ON_WRITE
        1030,  # ER_GET_ERRNO: the storage engine's own number (28: no space) stands in the text alone
        1037,  # ER_OUTOFMEMORY
        1040,  # ER_CON_COUNT_ERROR: too many connections
        1041,  # ER_OUT_OF_RESOURCES
        1047,  # ER_UNKNOWN_COM_ERROR: a Galera node that is cut off answers so to everything
        1049,  # ER_BAD_DB_ERROR: being restored, or a wrong name (see `hopeless`)
        1053,  # ER_SERVER_SHUTDOWN
        1077,  # ER_NORMAL_SHUTDOWN
        1079,  # ER_SHUTDOWN_COMPLETE
        1114,  # ER_RECORD_FILE_FULL: InnoDB's answer to a full disk; also a MEMORY table that is full
        1129,  # ER_HOST_IS_BLOCKED: after many connections that were cut
        1135,  # ER_CANT_CREATE_THREAD
        1152,  # ER_ABORTING_CONNECTION
        1158,  # ER_NET_READ_ERROR
        1159,  # ER_NET_READ_INTERRUPTED
        1160,  # ER_NET_ERROR_ON_WRITE
        1161,  # ER_NET_WRITE_INTERRUPTED
        1184,  # ER_NEW_ABORTING_CONNECTION
        1203,  # ER_TOO_MANY_USER_CONNECTIONS
        1206,  # ER_LOCK_TABLE_FULL: no memory for one more lock
        1226,  # ER_USER_LIMIT_REACHED
        1290,  # ER_OPTION_PREVENTS_STATEMENT: read_only
        1317,  # ER_QUERY_INTERRUPTED
        1637,  # ER_TOO_MANY_CONCURRENT_TRXS: no undo slot is free
        1792,  # ER_CANT_EXECUTE_IN_READ_ONLY_TRANSACTION
        1836,  # ER_READ_ONLY_MODE
        1874,  # ER_INNODB_READ_ONLY
        1927,  # ER_CONNECTION_KILLED
        2002,  # CR_CONNECTION_ERROR
        2003,  # CR_CONN_HOST_ERROR
        2006,  # CR_SERVER_GONE_ERROR
        2013,  # CR_SERVER_LOST
        2014,  # CR_COMMANDS_OUT_OF_SYNC
        2055,  # CR_SERVER_LOST_EXTENDED
        3032,  # ER_SERVER_OFFLINE_MODE
        3168,  # ER_SERVER_ISNT_AVAILABLE
        3169,  # ER_SESSION_WAS_KILLED
        4031,  # ER_CLIENT_INTERACTION_TIMEOUT
    }
)
_NO_ROOM: Final = frozenset({3, 20, 1021, 1026, 1030, 1114})
# ER_CANNOT_CONVERT_CHARACTER, ER_TRUNCATED_WRONG_VALUE_FOR_FIELD (of a text: characters the column lacks), and MySQL's
# ER_CANNOT_CONVERT_STRING
_UNSTORABLE: Final = frozenset({1366, 1977, 3854})
_GONE: Final = (ConnectionError, TimeoutError, EOFError)
_LOST: Final = frozenset({_DEADLOCK, _CHANGED, 1317, 1927, 2006, 2013, 2055})


class MySQL:
    """See the module."""

    name = "mysql"

    def __init__(self, table: str) -> None:
        self.table = table
        self._claim = CLAIM.replace("{table}", table)
        self._known = KNOWN.replace("{table}", table)

    def prepare(self, dbapi: Any, info: MutableMapping[Any, Any], *, wait_ms: int) -> None:
        seconds = max(1, -(-wait_ms // 1000))
        cursor = dbapi.cursor()
        try:
            cursor.execute(PREPARE)
            version, rollback_on_timeout, modes, autocommit = cursor.fetchone()
            if autocommit:
                raise ConfigurationError(
                    "The engine is in AUTOCOMMIT: a claim would be kept although its handler failed, and the message"
                    " lost. Take isolation_level='AUTOCOMMIT' off the engine given to exactly_once."
                )
            if "STRICT" not in str(modes):
                raise ConfigurationError(
                    "sql_mode has no STRICT_TRANS_TABLES: the server would cut long values in silence."
                    " Type: SET GLOBAL sql_mode = CONCAT(@@sql_mode, ',STRICT_TRANS_TABLES')"
                )
            bounds_one_statement = "MariaDB" in str(version)
            if not bounds_one_statement:
                cursor.execute(f"SET SESSION innodb_lock_wait_timeout = {seconds:d}")
        finally:
            cursor.close()
        bound = BOUND.replace("{seconds}", f"{seconds:d}") if bounds_one_statement else ""
        info[self] = (bound + self._claim, bool(rollback_on_timeout), bound)

    def claim(
        self, dbapi: Any, info: MutableMapping[Any, Any], row: ClaimRow, *, wait_ms: int, savepoint: bool
    ) -> bool:
        text = info[self][0]
        values = (
            row.group.encode(), row.handler.encode(), row.key.encode(), row.message_id, row.content, row.fingerprint,
            row.attempt - 1, row.owner, None if row.born_at is None else row.born_at.astimezone(UTC).replace(tzinfo=None),
        )  # fmt: skip
        cursor = dbapi.cursor()
        try:
            if savepoint:
                cursor.execute("SAVEPOINT exactly_once")
            try:
                cursor.execute(text, values)
            except Exception as error:
                code = errno(error)
                if savepoint and code != _DEADLOCK:
                    cursor.execute("ROLLBACK TO SAVEPOINT exactly_once")
                if code == DUPLICATE:
                    return False
                if code in TRANSIENT:
                    raise ClaimBusy(again=code != LOCK_WAIT) from error
                raise
            return True
        finally:
            cursor.close()

    def begin(self, dbapi: Any, info: MutableMapping[Any, Any]) -> None:
        cursor = dbapi.cursor()
        cursor.execute(BEGIN)
        cursor.close()

    def known(self, dbapi: Any, row: ClaimRow, *, end: bool) -> Known | None:
        cursor = dbapi.cursor()
        try:
            cursor.execute(self._known, (row.group.encode(), row.handler.encode(), row.key.encode()))
            found = cursor.fetchone()
        finally:
            cursor.close()
            if end:
                dbapi.rollback()  # the refused INSERT left a shared lock on the row; pruning would wait for it
        if found is None:
            return None
        status, fingerprint, owner = found
        return Known(int(status), bytes(fingerprint), owner)

    def state(self, dbapi: Any) -> State:
        driver = getattr(dbapi, "driver_connection", None) or dbapi
        if not driver.server_status & _IN_TRANSACTION:
            return State.IDLE
        # asyncmy takes over a new status only where it is not 0, and 0 is what COMMIT and ROLLBACK sent as text answer;
        # the last result has it. Without the newer end of a result, rows come without a status, and 0 says nothing
        result = driver._result if getattr(driver, "_deprecate_eof", False) else None  # noqa: SLF001
        ended = result is not None and not result.server_status & _IN_TRANSACTION
        return State.IDLE if ended else State.OPEN

    def trouble(self, error: BaseException) -> Trouble:
        if isinstance(error, PoolTimeout):
            return Trouble.UNAVAILABLE
        code = errno(error)
        if code is None:
            gone = isinstance(error, _GONE) or (isinstance(error, DBAPIError) and error.connection_invalidated)
            gone = gone or _is_closed(error)
            return Trouble.UNAVAILABLE if gone else Trouble.UNKNOWN
        if code in TRANSIENT:
            return Trouble.TRANSIENT
        if code in _UNAVAILABLE:
            return Trouble.UNAVAILABLE
        return Trouble.REFUSED if 1000 <= code < 2000 or code >= 3000 else Trouble.UNKNOWN

    def no_table(self, error: BaseException) -> bool:
        return errno(error) == _NO_SUCH_TABLE

    def no_room(self, error: BaseException) -> bool:
        return errno(error) in _NO_ROOM

    def unstorable(self, error: BaseException) -> bool:
        return errno(error) in _UNSTORABLE

    def hopeless(self, error: BaseException) -> bool:
        return errno(error) in (1044, 1045, 1049, 1698)  # access denied, unknown database

    def lost(self, dbapi: Any, info: MutableMapping[Any, Any], error: BaseException) -> bool:
        code = errno(error)
        if code is None:
            return isinstance(error, _GONE)  # a broken connection as asyncmy's streams raise it
        return code in _LOST or (code == LOCK_WAIT and info[self][1])

    def refuses(self, statement: str) -> str | None:
        return refused(statement, True)


def _is_closed(error: BaseException) -> bool:
    """Both drivers say 0, and no more, of a connection they closed when it was lost; so a rollback hides what was lost."""
    origin = error.orig if isinstance(error, DBAPIError) else error
    return type(origin).__name__ == "InterfaceError" and getattr(origin, "args", ())[:1] == (0,)


def errno(error: BaseException) -> int | None:
    origin = error.orig if isinstance(error, DBAPIError) else error
    if isinstance(origin, BaseException) and origin.args and isinstance(origin.args[0], int):
        return origin.args[0] or None
    return None
