"""From the claim to the end of COMMIT, and what an attempt that did not get there says of itself; for one message or a group.

Where a process dies on a line of this file, the database rolls back everything the attempt wrote, the claim included (a
lease runs out), and the broker's redelivery runs it again; after COMMIT was executed the redelivery finds the claim and is
a duplicate.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from typing import Any

from sqlalchemy.orm import Session

from exactly_once.dialects import ClaimRow, Dialect, Trouble
from exactly_once.errors import LeaseLost, StoreUnavailable
from exactly_once.guards import Guard, Won
from exactly_once.guards.watch import Left, let_go

__all__ = ["PROCESSED", "Ended", "How", "Open", "run"]

Open = Callable[[], tuple[Session, Any]]
"""Make a session: the one the core speaks to, and the one the handler is handed (the same, or the AsyncSession around it)."""


class How(Enum):
    """How an attempt ended."""

    PROCESSED = "processed"
    DUPLICATE = "duplicate"
    IN_PROGRESS = "in progress"
    CONFLICT = "conflict"
    """The key is known under another payload."""
    FAILED = "failed"
    """The handler's fault; nothing was committed."""
    TRANSIENT = "transient"
    """Deadlock and the like, or the connection was lost before COMMIT; nothing was committed, worth trying at once."""
    UNKNOWN = "unknown"
    """COMMIT was sent, its answer never came, and the row is not there (yet)."""
    BROKEN = "broken"
    """The handler committed behind our back: a redelivery would be taken for a duplicate. For a person."""
    AWAY = "away"
    """The database does not answer."""
    LOST = "lost"
    """Another run has taken the message over; nothing of this one is recorded."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How an attempt ended, and with what."""

    how: How
    error: BaseException | None = None
    fingerprint: bytes = b""
    again: bool = False
    remaining: timedelta | None = None
    """How long another run's lease goes on."""
    kept: bool = False
    """What the claim stands for may have happened: it is not let go of."""


PROCESSED = Ended(How.PROCESSED)


def run(
    open_session: Open,
    session: Session,
    guard: Guard,
    dialect: Dialect,
    rows: Sequence[ClaimRow],
    won: Won,
    handle: Callable[[], object],
    also: Callable[[Session, int], object] | None,
) -> Ended:
    """From the claim to the end of the COMMIT, and what follows it."""
    try:
        handle()
        if also is not None:
            if won.watch is not None:
                won.watch.check(session)
            also(session, 1 if won.held is None else won.held.attempt)
        session.flush()
        guard.complete(session, won)
    except Exception as error:
        return _failed(dialect, won, error)
    watch = won.watch
    if watch is not None:
        misuse = watch.verify(session)
        if misuse is not None or watch.lost is not None:
            return _failed(dialect, won, misuse)
        watch.committing()
        try:
            session.commit()
        except Exception as error:
            if watch.left is not Left.NOT:
                return _failed(dialect, won, error)
            watch.end(session)
            return _look_up(open_session, guard, rows, _commit_failed(dialect, error))
    try:
        guard.consume(won)
    except StoreUnavailable as error:
        return Ended(How.AWAY, error, kept=True)
    except LeaseLost as error:
        return Ended(How.LOST, error)
    except Exception as error:  # committed, and not known to be marked: the redelivery finds out
        return Ended(How.UNKNOWN, error, kept=True)
    return PROCESSED


def _failed(dialect: Dialect, won: Won, error: BaseException | None) -> Ended:
    """Say how an attempt ended that never reached COMMIT; what the watch saw weighs more than what was raised."""
    watch = won.watch
    if watch is not None:
        if watch.left is Left.BROKEN:
            return Ended(How.BROKEN, watch.error)
        if watch.lost is not None:
            # the server threw the transaction away (a deadlock): whatever the handler made of that error, try again
            return Ended(How.TRANSIENT, watch.lost)
        if watch.left is Left.REFUSED:
            return Ended(How.FAILED, watch.error)  # also when the handler swallowed it, or wrapped it in its own
    assert error is not None
    if isinstance(error, LeaseLost):
        return Ended(How.LOST, error)
    if won.late is not None and isinstance(error, StoreUnavailable):
        return Ended(How.AWAY, error)  # of a step, or of the session's first statement
    if isinstance(error, (OSError, EOFError)):
        # a network error of the handler's own; the database's is in `lost`, or comes wrapped
        return Ended(How.FAILED, error)
    match dialect.trouble(error):
        case Trouble.TRANSIENT | Trouble.UNAVAILABLE:
            return Ended(How.TRANSIENT, error)
        case _:
            return Ended(How.FAILED, error)


def _commit_failed(dialect: Dialect, error: Exception) -> Ended:
    match dialect.trouble(error):
        case Trouble.TRANSIENT:
            return Ended(How.TRANSIENT, error)
        case Trouble.REFUSED:
            return Ended(How.FAILED, error)
        case _:
            return Ended(How.UNKNOWN, error, kept=True)


def _look_up(open_session: Open, guard: Guard, rows: Sequence[ClaimRow], ended: Ended) -> Ended:
    """After a COMMIT that raised: all our rows there means that all is done. Else nothing is proven, and `ended` stands.

    One row of a group says nothing of the others: it may be of a copy that waited for our key and committed it alone. Of
    one message alone that is as good. A COMMIT still on its way is safe: the redelivery's claim waits for it and then finds
    the row. A refusal is looked up too, for what was raised may come from a hook of the user's that ran after the server
    had committed.
    """
    session, _ = open_session()
    try:
        return PROCESSED if all(guard.consumed(session, row) for row in rows) else ended
    except StoreUnavailable as error:
        return Ended(How.AWAY, error, kept=True)
    except Exception:  # a look-up that fails leaves the outcome what it was: unknown
        return ended
    finally:
        let_go(session)
