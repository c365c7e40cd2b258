"""What an error of PostgreSQL means: another run has the key, the server cannot work now, or this statement was refused.

Errors are known by their SQLSTATE, never by their text. Asks no server. Called by `postgresql` and what stands around it.
"""

from typing import Final

import psycopg
from psycopg import errors
from sqlalchemy.exc import TimeoutError as PoolTimeout

from exactly_once.database.dialects.contract import ClaimBusy, ErrorKind
from exactly_once.database.errors import contended
from exactly_once.database.errors.drivers_own import original

__all__ = ["READ_ONLY", "PostgreSQLErrors", "busy_of"]

_CANCELED: Final = "57014"  # query_canceled: statement_timeout, or somebody's pg_cancel_backend
# Classes of an ERROR after which the transaction is certainly gone. 40003 says itself that it does not know.
_REFUSING_CLASSES: Final = frozenset({"21", "22", "23", "25", "2B", "40", "42", "44", "54", "55", "P0", "HV"})
READ_ONLY: Final = "25006"
_NO_DATABASE: Final = "3D000"
# Errors that say that the server cannot work now, for any message.
_UNAVAILABLE: Final = frozenset(
    {
        READ_ONLY,  # read_only_sql_transaction: a standby, or default_transaction_read_only
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


class PostgreSQLErrors:
    """The part of the dialect that reads errors; see `Dialect`."""

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

    def no_room(self, error: BaseException) -> bool:
        return _sqlstate(error) == _DISK_FULL

    def locked(self, error: BaseException) -> bool:
        return False

    def gave_up(self, error: BaseException) -> bool:
        return False  # the driver has no such limit

    def timed_out(self, error: BaseException) -> bool:
        return _sqlstate(error) == _CANCELED

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


def _sqlstate(error: BaseException) -> str | None:
    own = original(error)  # an attribute of another exception may be anything
    return own.sqlstate if isinstance(own, errors.Error) else None
