"""What earlier runs of a message under a lease left behind on MySQL and MariaDB, found in their trace rows.

A run's own COMMIT deletes its trace row. So a committed trace row was committed by something else. An uncommitted one may
still be committed: a CALL goes on after its client is gone, because the server notices that only when it answers.
So the row names the server's session, and we ask the server whether that session is at work. An idle session can commit nothing
by itself. Called by `mysql`.
"""

from functools import lru_cache
from typing import Any, Final

from exactly_once.database.dialects.contract import TraceState
from exactly_once.database.mysql_committed import see_committed, see_uncommitted

__all__ = ["trace_state_of"]

_OF: Final = (
    "WHERE consumer_group = UNHEX(%s) AND handler = UNHEX(%s) AND business_key = UNHEX(%s) AND status = 2 LIMIT "
)
# Sessions of the same user are visible without any right. A row of an earlier release names no session.
AT_WORK: Final = (
    "SELECT EXISTS (SELECT 1 FROM information_schema.PROCESSLIST AS theirs WHERE theirs.COMMAND <> 'Sleep'"  # noqa: S608  (constants alone)
    " AND theirs.ID = CAST(CONVERT(trace.result USING ascii) AS UNSIGNED) AND theirs.ID <> CONNECTION_ID())"
    " FROM {steps} AS trace " + _OF + "1000"
)
COMMITTED: Final = "SELECT 1 FROM {steps} " + _OF + "1"  # noqa: S608


def trace_state_of(dbapi: Any, steps: str, named: tuple[str, ...]) -> TraceState:
    """Say what was left under a key.

    Args:
        dbapi: The driver's connection, in no transaction or in one that the caller will roll back; it stays so.
        steps: Our table of steps.
        named: The key, as digits.
    """
    cursor = dbapi.cursor()
    try:
        see_uncommitted(dbapi)
        cursor.execute(_in(AT_WORK, steps), named)
        at_work = cursor.fetchall()
        if not at_work:
            return TraceState.NONE
        dbapi.rollback()
        # Asked last: a session that was at work before, and is not now, has committed or never will.
        see_committed(dbapi)
        cursor.execute(_in(COMMITTED, steps), named)
        committed = cursor.fetchone() is not None
    finally:
        cursor.close()
    if committed:
        return TraceState.COMMITTED
    return TraceState.RUNNING if any(int(each) for (each,) in at_work) else TraceState.NONE


@lru_cache(maxsize=32)
def _in(statement: str, steps: str) -> str:
    """Computed once for each database: with leases in Redis each message asks."""
    return statement.replace("{steps}", steps)
