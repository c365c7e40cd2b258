"""The states of a failure row, and what they mean for others: who waits behind it, and whom its broker has forgotten. Pure."""

from datetime import timedelta
from typing import Final

from sqlalchemy import ColumnElement, FromClause, and_, or_

from exactly_once.database.server_clock import utcnow
from exactly_once.failures.failure import NO_PROPERTIES

__all__ = ["CLOSED", "OPEN", "RESOLVABLE", "RUNNABLE", "blocking", "overdue"]

OPEN: Final = ("retrying", "waiting", "requeued", "dead", "broken")
RUNNABLE: Final = ("retrying", "waiting", "requeued")
RESOLVABLE: Final = (*RUNNABLE, "dead")
CLOSED: Final = ("resolved", "discarded")
_OVERDUE: Final = timedelta(hours=13)
"""No broker is asked for a longer delay than 12 hours: for a longer delay the pump is the owner."""


def blocking(t: FromClause, *, after_dead_wait: bool) -> ColumnElement[bool]:
    """The condition for rows that later messages of the same ordering key wait for.

    These are rows that run again by themselves, redelivered by the broker or taken by the pump. With `after_dead_wait` also rows
    that a person must decide: dead, broken, and *waiting* without a due time, whose COMMIT was never answered.
    """
    if after_dead_wait:
        return t.c.state.in_(OPEN)
    return and_(t.c.state.in_(RUNNABLE), or_(t.c.state != "waiting", t.c.next_attempt_at.is_not(None)))


def overdue(t: FromClause) -> ColumnElement[bool]:
    """The condition for rows that the broker was to redeliver, and has not for longer than any broker waits.

    Another program of the consumer group processed the message (a Java listener, which writes nothing here), or no worker ran, or
    the broker has given up. The rows do not show which, and closing a row that was not processed would lose it: a person decides.

    A *waiting* row without a due time is not the broker's: its COMMIT was never answered, so it was kept whole for a person, and
    acknowledged. Only a message whose body the database did not take stays with its broker.
    """
    return and_(
        or_(t.c.state == "retrying", and_(t.c.state == "waiting", t.c.properties == NO_PROPERTIES)),
        t.c.next_attempt_at.is_(None),
        t.c.last_failed_at < utcnow(-_OVERDUE.total_seconds()),
    )
