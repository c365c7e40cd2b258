"""Before a look on MySQL and MariaDB: only what is committed is to be seen, whatever the session or the engine was left in.

Called by whatever looks, `mysql`, `leases.sql` and `failures.due`, and by the broker in a table.
"""

from typing import Any, Final

__all__ = ["COMMITTED_ALONE", "see_committed", "see_uncommitted"]

COMMITTED_ALONE: Final = "SET TRANSACTION ISOLATION LEVEL READ COMMITTED"
"""Before a look on MySQL and MariaDB: it shows what is committed alone. A session that was left, or an engine that was made,
READ UNCOMMITTED would show a claim that is then rolled back, and the message would be acknowledged as a duplicate.
Nothing is written in that transaction: where the server writes its binary log in statements it refuses that (errno 1665)."""

_UNCOMMITTED_TOO: Final = "SET TRANSACTION ISOLATION LEVEL READ UNCOMMITTED"
_IN_A_TRANSACTION: Final = 1568
_ROLLBACK: Final = "ROLLBACK AND NO CHAIN NO RELEASE"


def see_committed(dbapi: Any) -> None:
    """Have the next transaction see what is committed alone.

    Args:
        dbapi: The driver's connection.
    """
    _say(dbapi, COMMITTED_ALONE)


def see_uncommitted(dbapi: Any) -> None:
    """Have the next transaction see what may be committed, too.

    Args:
        dbapi: The driver's connection.
    """
    _say(dbapi, _UNCOMMITTED_TOO)


def _say(dbapi: Any, level: str) -> None:
    """Say it to the server, outside any transaction, for it is refused inside one.

    A listener of the user's, such as one that pings as a connection is taken, may have begun one. The server alone knows: of
    rows that PyMySQL reads it is told no status. That transaction is rolled back, as it would be after a look; a SET is no
    part of it. Or the session's `completion_type` has begun it, which is to begin no other one now.
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
