"""Says whether another transaction was in the way: a deadlock, or a lock wait that took too long.

Such an error says nothing about the connection. Called by `transports.sql`; the dialects use the numbers, too.
"""

from typing import Final

from exactly_once.database.errors.drivers_own import original
from exactly_once.exceptions.drivers import is_drivers

__all__ = ["MYSQL", "POSTGRESQL", "SQLITE", "is_contended"]

POSTGRESQL: Final = frozenset({"40001", "40P01", "55P03"})
"""serialization_failure; deadlock_detected; lock_not_available."""
MYSQL: Final = frozenset({1205, 1213, 1020})
"""A lock wait that timed out; a deadlock; MariaDB's innodb_snapshot_isolation: the row changed since the snapshot."""
SQLITE: Final = frozenset({5, 6})  # SQLITE_BUSY, SQLITE_LOCKED
_PRIMARY: Final = 0xFF  # extended result codes carry the primary one in their low byte


def is_contended(error: BaseException) -> bool:
    """Say whether the driver's error behind this error means contention."""
    own = original(error)
    if not is_drivers(own):
        return False
    sqlite = getattr(own, "sqlite_errorcode", None)
    if sqlite is not None:
        return sqlite & _PRIMARY in SQLITE
    state = getattr(own, "sqlstate", None)
    return state in POSTGRESQL if state is not None else bool(own.args) and own.args[0] in MYSQL
