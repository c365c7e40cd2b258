"""The clock of a session of MySQL or MariaDB, which anybody may have set: `SET timestamp`, as tests and imports do.

All functions of the time follow it but SYSDATE. By a wrong clock a lease that runs is over, and its message runs a second time
beside it; a retry is due in years. So whoever goes by the time looks first: with the claim, or at the head of a transaction that
writes a time down. Where the server runs with --sysdate-is-now, the two are one, and nothing is seen.
"""

from typing import Final

from sqlalchemy import Connection

__all__ = ["CLOCK_IS_RIGHT", "RIGHT_CLOCK", "put_right"]

CLOCK_IS_RIGHT: Final = "ABS(TIMESTAMPDIFF(SECOND, NOW(), SYSDATE())) <= 5"
"""The few seconds are for a server that stood still between the two."""
RIGHT_CLOCK: Final = "SET timestamp = DEFAULT"


def put_right(connection: Connection) -> None:
    """Look, in a round trip of its own, and put the session's clock right where somebody has set it."""
    # as bytes: a session may be left in a character set of results in which the driver reads no number
    if connection.exec_driver_sql(f"SELECT CAST({CLOCK_IS_RIGHT} AS BINARY) LIMIT 1").scalar() != b"1":
        connection.exec_driver_sql(RIGHT_CLOCK)
