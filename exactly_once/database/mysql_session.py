"""What anybody may have set in a session of MySQL or MariaDB, and what no statement of ours can go by: its clock, its ends.

All functions of the time follow `SET timestamp`, as tests and imports send it, but SYSDATE. By a wrong clock a lease that runs is
over, and its message runs a second time beside it; a retry is due in years. Where the server runs with --sysdate-is-now, the two
are one, and nothing is seen.

With `completion_type` CHAIN each COMMIT and ROLLBACK of a driver begins another transaction at once: the look that comes next is
refused in it (errno 1568), and so is each after it. With RELEASE it ends the connection, which the pool keeps all the same.

So whoever goes by either looks first, with the claim, or at the head of a transaction of ours: no round trip more.
"""

from typing import Final

from sqlalchemy import Connection

__all__ = ["ENDS_PLAINLY", "END_PLAINLY", "RIGHT_SESSION", "SESSION_IS_RIGHT", "put_right"]

ENDS_PLAINLY: Final = "NO_CHAIN"
"""`@@completion_type` where COMMIT and ROLLBACK do no more than their names say."""
END_PLAINLY: Final = f"SET completion_type = '{ENDS_PLAINLY}'"
SESSION_IS_RIGHT: Final = f"ABS(TIMESTAMPDIFF(SECOND, NOW(), SYSDATE())) <= 5 AND @@completion_type = '{ENDS_PLAINLY}'"
"""The few seconds are for a server that stood still between the two."""
RIGHT_SESSION: Final = f"{END_PLAINLY}, timestamp = DEFAULT"


def put_right(connection: Connection) -> None:
    """Look, in a round trip of its own, and put right what somebody has set."""
    # as bytes: a session may be left in a character set of results in which the driver reads no number
    if connection.exec_driver_sql(f"SELECT CAST({SESSION_IS_RIGHT} AS BINARY) LIMIT 1").scalar() != b"1":
        connection.exec_driver_sql(RIGHT_SESSION)
