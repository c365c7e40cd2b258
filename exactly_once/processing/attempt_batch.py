"""One attempt at a group of messages of one handler: one claim for all, their handlers on one session, one COMMIT.

All or nothing: whatever fails, every claim and effect of the group is rolled back, and `processing.batch` decides what runs
again in smaller groups or alone. A process that dies here leaves nothing of the group, or after COMMIT all of it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from sqlalchemy.orm import Session

from exactly_once import fork
from exactly_once.claim import ClaimRow
from exactly_once.database.dialects.contract import Dialect
from exactly_once.database.owner import new_owner
from exactly_once.database.watched.watch import Watch, let_go
from exactly_once.errors import ConfigurationError, StoreUnavailable
from exactly_once.guards.contract import Busy, Conflict, Consumed, HookRaised, Unfinished
from exactly_once.guards.transaction import TransactionGuard
from exactly_once.processing.ending import AttemptEnd, AttemptResult, Open, run

__all__ = ["BatchAttemptResult", "attempt_batch"]

_BUSY = AttemptResult(AttemptEnd.IN_PROGRESS)
_NONE_WON = AttemptResult(AttemptEnd.DUPLICATE)
_NOTHING_KEPT = (AttemptEnd.FAILED, AttemptEnd.TRANSIENT, AttemptEnd.REFUSED, AttemptEnd.IN_PROGRESS)
"""Of these nothing is written down for the group: its messages would only be tried again."""


@dataclass(frozen=True, slots=True)
class BatchAttemptResult:
    """How a group's attempt ended, and which of its keys were not ours."""

    ended: AttemptResult
    """Of the messages that were ours, all alike. DUPLICATE: none was; IN_PROGRESS: some key is held, and none was claimed."""
    others: Mapping[str, Consumed | Busy | Conflict | Unfinished] = field(default_factory=dict)


def attempt_batch(
    open_session: Open,
    open_ours: Open,
    guard: TransactionGuard,
    dialect: Dialect,
    rows: Sequence[ClaimRow],
    handle: Callable[[Session, Any, Mapping[str, object], Watch], object],
    *,
    told: Callable[[BaseException], BaseException],
    foreign: Callable[[BaseException], bool],
    patient: bool = True,
    meanwhile: Iterable[object] = (),
) -> BatchAttemptResult:
    """Run a group once.

    Args:
        open_session: Makes the session.
        open_ours: Makes one for what is asked beside the handler.
        guard: Decides which of them may run.
        dialect: Says what the database's errors mean.
        rows: Identity and fingerprint of each message; each key once, sorted by key.
        handle: Calls the handler for the messages that may run: given the session, what the handler is handed of it, the
            keys that may not, and what watches the transaction.
        told: Gives what is told of an exception in its place.
        foreign: Says whether an error of a database came from another one, of the handler's own.
        patient: Wait a moment for keys that another run holds; else not at all.
        meanwhile: Work to do while the server answers the claim, a step for each element.

    Returns:
        How it ended. Cancellation, KeyboardInterrupt and SystemExit are no endings: rolled back, and raised on (once a broken
        transaction is written down: then they are in `stop`).

    Raises:
        ConfigurationError: The database is set up so that no claim can be trusted.
        ForkedProcess: We are in a child that the handler forked, and that came back from it.
    """
    process = fork.here
    session, handed = open_session()
    watch = None
    try:
        try:
            claim = guard.claim_batch(session, rows, owner=new_owner(), patient=patient, meanwhile=meanwhile)
        except StoreUnavailable as error:
            return BatchAttemptResult(AttemptResult(AttemptEnd.AWAY, error))
        except ConfigurationError:
            raise  # of the program or the server, not of these messages
        except HookRaised as hook:
            session.invalidate()
            return BatchAttemptResult(AttemptResult(AttemptEnd.FAILED, told(hook.error)))
        except Exception as error:
            return BatchAttemptResult(AttemptResult(AttemptEnd.FAILED, error))
        except BaseException:
            session.invalidate()  # cut off in the middle of a statement: its connection is not used again
            raise
        if claim is None:
            return BatchAttemptResult(_BUSY)
        won, others = claim.won, claim.others
        if won is None:
            return BatchAttemptResult(_NONE_WON, others)
        watch = won.watch
        assert watch is not None
        call = partial(handle, session, handed, others, watch)
        ended = run(open_ours, session, guard, dialect, watch.rows, won, call, None, told, foreign)
        if ended.how is AttemptEnd.STOPPED:
            assert ended.error is not None
            raise ended.error
        if ended.stop is not None and ended.how in _NOTHING_KEPT:
            raise ended.stop
        return BatchAttemptResult(ended, others)
    finally:
        if process is not fork.here:
            raise fork.inside()
        if watch is not None:
            watch.end(session)
        else:
            let_go(session)
