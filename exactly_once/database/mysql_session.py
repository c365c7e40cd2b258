"""Repairs two settings of a MySQL or MariaDB session that no statement of ours can work around: its clock
and its completion type.

`SET timestamp`, which tests and imports use, changes all time functions but SYSDATE. With a wrong clock a running lease looks
expired, and its message runs a second time in parallel; or a retry is due in years. If the server runs with --sysdate-is-now,
the two clocks are the same, and we see nothing.

With `completion_type` CHAIN each COMMIT and ROLLBACK of a driver begins another transaction at once. Our next read is refused in
it (errno 1568), and so is each read after it. With RELEASE it ends the connection, and the pool keeps that connection.

So code that depends on either checks first, together with the claim or as part of BEGIN: no extra round trip.
"""

from typing import Final

from sqlalchemy import Connection

__all__ = ["ENDS_PLAINLY", "END_PLAINLY", "RIGHT_SESSION", "SESSION_IS_RIGHT", "put_right"]

ENDS_PLAINLY: Final = "NO_CHAIN"
"""The value of `@@completion_type` with which COMMIT and ROLLBACK do nothing more."""
END_PLAINLY: Final = f"SET completion_type = '{ENDS_PLAINLY}'"
SESSION_IS_RIGHT: Final = f"ABS(TIMESTAMPDIFF(SECOND, NOW(), SYSDATE())) <= 5 AND @@completion_type = '{ENDS_PLAINLY}'"
"""A few seconds of tolerance, for a server that stood still between the two functions."""
RIGHT_SESSION: Final = f"{END_PLAINLY}, timestamp = DEFAULT"


def put_right(connection: Connection) -> None:
    """Check the session in a round trip of its own, and repair it."""
    # As bytes: the session may have a result character set in which the driver cannot read a number.
    if connection.exec_driver_sql(f"SELECT CAST({SESSION_IS_RIGHT} AS BINARY) LIMIT 1").scalar() != b"1":
        connection.exec_driver_sql(RIGHT_SESSION)
