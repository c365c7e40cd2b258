"""Makes a read on MySQL and MariaDB see committed rows alone, whatever isolation level the session or the engine has.

Called before each such read by `dialects.mysql`, `guards.lease.sql`, `failures.due` and `transports.sql`.
"""

from typing import Any, Final

__all__ = ["COMMITTED_ALONE", "see_committed", "see_uncommitted"]

COMMITTED_ALONE: Final = "SET TRANSACTION ISOLATION LEVEL READ COMMITTED"
"""Sent before a read on MySQL and MariaDB, so that it sees committed rows alone. A session or an engine may be READ UNCOMMITTED.
It would show a claim that is rolled back later, and the message would be acknowledged as a duplicate.
Nothing is written in that transaction: a server that writes its binary log in statements refuses that (errno 1665)."""

_UNCOMMITTED_TOO: Final = "SET TRANSACTION ISOLATION LEVEL READ UNCOMMITTED"
_IN_A_TRANSACTION: Final = 1568
_ROLLBACK: Final = "ROLLBACK AND NO CHAIN NO RELEASE"


def see_committed(dbapi: Any) -> None:
    """Let the next transaction see committed rows alone.

    Args:
        dbapi: The driver's connection.
    """
    _say(dbapi, COMMITTED_ALONE)


def see_uncommitted(dbapi: Any) -> None:
    """Let the next transaction see uncommitted rows, too.

    Args:
        dbapi: The driver's connection.
    """
    _say(dbapi, _UNCOMMITTED_TOO)


def _say(dbapi: Any, level: str) -> None:
    """Set the isolation level of the next transaction. The server refuses that inside a transaction.

    A listener of the application, such as one that pings at checkout, may have begun a transaction. Only the
    server knows: for rows that PyMySQL reads, the driver gets no status. So that transaction is rolled back, as it would be
    after the read; a SET does not belong to it. Or the session's `completion_type` has begun one, and must
    not begin another now.
    """
    cursor = dbapi.cursor()
    try:
        try:
            cursor.execute(level)
        except Exception as error:
            if error.args[:1] != (_IN_A_TRANSACTION,):
                raise
            cursor.execute(_ROLLBACK)
            cursor.execute(level)
    finally:
        cursor.close()
