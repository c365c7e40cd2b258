"""What an error of MySQL or MariaDB means: another run has the key, the server cannot work now, or this statement was refused.

Errors are known by their number, never by their text. Asks no server. Called by `mysql` and what stands around it.
"""

from typing import Any, Final

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from exactly_once.database.dialects.contract import ClaimBusy, ErrorKind
from exactly_once.database.errors import contended
from exactly_once.database.errors.drivers_own import original
from exactly_once.exceptions.drivers import is_drivers

__all__ = [
    "CONNECTION_GONE",
    "DENIED",
    "DUPLICATE",
    "ENDS_TRANSACTION",
    "LOCK_WAIT",
    "NO_SAVEPOINT",
    "NO_SUCH_TABLE",
    "UNSURE",
    "MySQLErrors",
    "busy_of",
    "errno",
]

NO_SAVEPOINT: Final = 1305
DUPLICATE: Final = 1062
NO_SUCH_TABLE: Final = 1146
LOCK_WAIT: Final = 1205
_CUT: Final = 1969  # MariaDB's max_statement_time; MySQL's limit is for SELECT alone
_DEADLOCK: Final = 1213
_CHANGED: Final = 1020  # MariaDB's innodb_snapshot_isolation: the row changed since this transaction's snapshot
# Errors that say that the server cannot work now, for any message. Some may concern one statement alone, so a failure
# counts as an outage only after a look.
_UNAVAILABLE: Final = frozenset(
    {
        3,  # EE_WRITE: error writing a file
        20,  # EE_DISK_FULL
        1021,  # ER_DISK_FULL
        1026,  # ER_ERROR_ON_WRITE
        1030,  # the storage engine's number (28: no space) is in the text alone
        1037,  # ER_OUTOFMEMORY
        1040,  # ER_CON_COUNT_ERROR: too many connections
        1041,  # ER_OUT_OF_RESOURCES
        1047,  # a cut-off Galera node answers everything like this
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
        1820,  # ER_MUST_CHANGE_PASSWORD: it has expired, and each statement is refused
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
# On a database, a table, a column.
DENIED: Final = frozenset({1044, 1142, 1143})
# MariaDB's max_statement_time, MySQL's max_execution_time.
_TIMED_OUT: Final = frozenset({_CUT, 3024})
_NO_ROOM: Final = frozenset({3, 20, 1021, 1026, 1030, 1114})
# ER_CANNOT_CONVERT_CHARACTER, ER_TRUNCATED_WRONG_VALUE_FOR_FIELD (for a text: characters that the column lacks), and MySQL's
# ER_CANNOT_CONVERT_STRING.
_UNSTORABLE: Final = frozenset({1366, 1977, 3854})
# After these we do not know whether COMMIT happened: shutting down, interrupted, killed, the connection ended.
UNSURE: Final = frozenset({1053, 1077, 1079, 1152, 1158, 1159, 1160, 1161, 1184, 1317, 1927, 4031})
CONNECTION_GONE: Final = (ConnectionError, TimeoutError, EOFError)
# Without ER_QUERY_INTERRUPTED: KILL QUERY undoes its statement alone.
ENDS_TRANSACTION: Final = frozenset({_DEADLOCK, _CHANGED, 1927, 2006, 2013, 2055})


def busy_of(error: BaseException, *, lost: bool = False) -> ClaimBusy | None:
    """Return ClaimBusy if an error of a claim means that another run holds the key; a claim waits for nothing else."""
    code = errno(error)
    if code == _CUT:
        return ClaimBusy(again=False, lost=lost, cut=True)
    return ClaimBusy(again=code != LOCK_WAIT, lost=lost) if code in contended.MYSQL else None


class MySQLErrors:
    """The part of the dialect that reads errors; see `Dialect`."""

    def error_kind(self, error: BaseException) -> ErrorKind:
        if isinstance(error, PoolTimeout):
            return ErrorKind.UNAVAILABLE
        code = errno(error)
        if code is None:
            gone = isinstance(error, CONNECTION_GONE) or (
                isinstance(error, DBAPIError) and error.connection_invalidated
            )
            gone = gone or _is_closed(error)
            return ErrorKind.UNAVAILABLE if gone else ErrorKind.UNKNOWN
        if code in contended.MYSQL:
            return ErrorKind.TRANSIENT
        if code in _UNAVAILABLE:
            return ErrorKind.UNAVAILABLE
        return ErrorKind.REFUSED if 1000 <= code < 2000 or code >= 3000 else ErrorKind.UNKNOWN

    def no_table(self, error: BaseException) -> bool:
        return errno(error) == NO_SUCH_TABLE

    def no_room(self, error: BaseException) -> bool:
        return errno(error) in _NO_ROOM

    def locked(self, error: BaseException) -> bool:
        return False

    def gave_up(self, error: BaseException) -> bool:
        # The driver's error replaces that of the socket or of the loop, which is its context.
        return errno(error) == 2013 and isinstance(original(error).__context__, TimeoutError)

    def timed_out(self, error: BaseException) -> bool:
        return errno(error) in _TIMED_OUT

    def unstorable(self, error: BaseException) -> bool:
        return errno(error) in _UNSTORABLE

    def gives_no_more(self, error: BaseException) -> bool:
        return errno(error) in (1040, 1203, 1226)  # too many connections in all, or of this user; a limit of this user

    def hopeless(self, error: BaseException) -> bool:
        return errno(error) in (1044, 1045, 1049, 1698)  # access denied, unknown database


def _is_closed(error: BaseException) -> bool:
    """A driver reports 0, and no more, for a connection that it closed when it was lost; so a rollback hides the loss."""
    origin = original(error)
    return type(origin).__name__ == "InterfaceError" and getattr(origin, "args", ())[:1] == (0,)


def errno(error: BaseException) -> int | None:
    """Return the number of a driver's error. An application's exception with a number, such as KeyError(1213), has none."""
    origin = original(error)
    if not is_drivers(origin):
        return None
    args: tuple[Any, ...] = getattr(origin, "args", ())
    return (args[0] or None) if args and isinstance(args[0], int) else None
