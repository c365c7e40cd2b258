"""Decides how an attempt ended that raised before its end, for one message or a batch.

Whatever ended the handler (an exception, a cancellation, a request to end the process), two questions follow. Was the handler
still in the transaction it was given? If that is not known, does this attempt's claim stand in the database? If the claim
stands, something other than our COMMIT has committed it, and the attempt is *broken*.

Never runs a handler and never commits. Called by `attempt` alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import Enum
from typing import Any

from sqlalchemy.orm import Session

from exactly_once.claim import ClaimRow
from exactly_once.database.dialects.contract import Dialect, ErrorKind
from exactly_once.database.watched.misuse_texts import DOUBTFUL
from exactly_once.database.watched.transaction_end import BrokenTransaction, LostTransaction, TransactionEnd
from exactly_once.database.watched.watch import Watch
from exactly_once.errors import ConfigurationError, InProgress, LeaseLost, Misuse, RefusedResult, StoreUnavailable
from exactly_once.exceptions.leaves import leaves
from exactly_once.exceptions.stops import stops
from exactly_once.exceptions.words import words_of
from exactly_once.guards.contract import Consumed, Guard, Unfinished, Won

__all__ = ["PROCESSED", "AttemptContext", "AttemptEnd", "AttemptResult", "Open", "result_of"]

Open = Callable[[], tuple[Session, Any]]
"""Make a session. Returns the session that the core uses, and what the handler gets: the same, or its AsyncSession."""


@dataclass(frozen=True, slots=True)
class AttemptContext:
    """What all attempts of one handler on one database share. Made once, at start."""

    open_session: Open
    """Makes the session of the handler."""
    open_ours: Open
    """Makes a session for our own statements beside the handler."""
    guard: Guard
    """Decides whether a message may run."""
    dialect: Dialect
    """Classifies the database's errors."""
    of_another_database: Callable[[BaseException], bool]
    """Whether a database error came from another database, which the handler uses by itself."""
    enforce: bool = True
    """False: duplicates run all the same, and are logged."""


class AttemptEnd(Enum):
    """How an attempt ended."""

    PROCESSED = "processed"
    DUPLICATE = "duplicate"
    IN_PROGRESS = "in progress"
    CONFLICT = "conflict"
    """The key is known with another payload."""
    FAILED = "failed"
    """The handler raised. Nothing was committed."""
    TRANSIENT = "transient"
    """A deadlock or the like, or the connection was lost before COMMIT. Nothing was committed; it can be repeated at once."""
    UNKNOWN = "unknown"
    """COMMIT was sent, its answer never came, and the row is not there (yet)."""
    BROKEN = "broken"
    """Something other than our COMMIT committed: a redelivery would be taken for a duplicate. A person decides."""
    AWAY = "away"
    """The database does not answer."""
    LOST = "lost"
    """Another run has taken the message over. Nothing of this run is recorded."""
    REFUSED = "refused"
    """The handler returned a value, which nobody reads: the handler is wrong, not the message. Nothing was committed."""
    STOPPED = "stopped"
    """Cancelled, interrupted or exiting. Nothing was committed, and nothing is recorded."""


@dataclass(frozen=True, slots=True)
class AttemptResult:
    """How an attempt ended, and what is known about that end."""

    how: AttemptEnd
    error: BaseException | None = None
    fingerprint: bytes = b""
    retry_now: bool = False
    """For IN_PROGRESS: the server threw this run away, and the key may be free."""
    ran_anyway: bool = False
    """For PROCESSED: it was a duplicate, and ran because the handler does not enforce."""
    remaining: timedelta | None = None
    """How long the lease of another run still lasts."""
    keep_lease: bool = False
    """The effects may have happened: the lease is not released."""
    owner: str | None = None
    """The owner of the claim. DUPLICATE or BROKEN: of the claim that stands. AWAY: of a claim that may stand."""
    block: bool = False
    """For BROKEN: write the claim if none stands, because a copy would repeat what was committed."""
    stop: BaseException | None = None
    """Raise this on, after everything is recorded."""
    answered: bool = False
    """The server refused our COMMIT and still answers: check the server before believing what the error says of it."""

    def stopped_by(self, error: BaseException | None) -> "AttemptResult":
        """Return the same result with this exception as `stop`, unless it has one."""
        return self if error is None or self.stop is not None else replace(self, stop=error)


PROCESSED = AttemptResult(AttemptEnd.PROCESSED)


def result_of(
    context: AttemptContext, session: Session, rows: Sequence[ClaimRow], won: Won, error: BaseException
) -> AttemptResult:
    """Decide how an attempt ended that raised. What was seen of its transaction counts more than what was raised.

    Args:
        context: The handler's.
        session: The handler's session. Its transaction is ended here.
        rows: The claims that COMMIT would have made visible.
        won: What was claimed.
        error: What was raised, in the form to report.
    """
    watch = won.watch
    if watch is None:
        failed = None if won.deferred_watch is None else won.deferred_watch.failed
        if failed is not None and _is_of_the_server(failed) and not stops(error):
            error = failed  # whatever the handler made of it
        return _raised(context, won, error)
    if watch.committed and watch.left is not TransactionEnd.BROKEN:
        # a hook of the user's raised after the server confirmed COMMIT: the message is processed
        return AttemptResult(AttemptEnd.STOPPED, error, keep_lease=True) if stops(error) else PROCESSED
    unsure = watch.sent and not watch.refused and not watch.committed
    if not watch.sent:
        watch.ask()
    why = watch.why(error)
    watch.end(session)
    if unsure:
        # embedded: the end of the connection decides the COMMIT. So a lease may be released: that waits for this end, and
        # changes no finished claim
        found = _look_up(
            context, rows, AttemptResult(AttemptEnd.UNKNOWN, error, keep_lease=not context.dialect.embedded)
        )
        return found.stopped_by(error if stops(error) else None)
    ended = _seen(context, won, watch, error, why)
    if ended.how is not AttemptEnd.BROKEN and watch.rows and not watch.whole:
        ended = _stands(context, watch, ended)
    if watch.doubtful and ended.how is not AttemptEnd.BROKEN:
        # no claim was found, but a procedure may have rolled ours back and committed its own work: a copy would repeat that
        return _broken(Misuse(DOUBTFUL), watch.owner, _stop_of(ended), block=True)
    return ended


def _seen(context: AttemptContext, won: Won, watch: Watch, error: BaseException, why: BaseException) -> AttemptResult:
    """Decide by what the watch saw first, then by what was raised."""
    stop = error if stops(error) else None
    if watch.left is TransactionEnd.BROKEN:
        return _broken(watch.error or error, watch.owner, stop, block=watch.replaced or not watch.rows)
    if stop is not None:
        return AttemptResult(AttemptEnd.STOPPED, stop)
    ended = _raised(context, won, why)
    return replace(ended, answered=watch.refused) if why is error else ended


def _raised(context: AttemptContext, won: Won, error: BaseException) -> AttemptResult:
    """Decide by what was raised alone.

    The exceptions of an exception group are judged one by one. A broken transaction, then a lost lease, counts more than all
    others. An error of the handler's own counts more than a deadlock or a store that is away.
    """
    if stops(error):
        return AttemptResult(AttemptEnd.STOPPED, error)
    ends = [_raised_alone(context, won, each) for each in leaves(error)]
    if len(ends) == 1 and (ends[0].error is error or isinstance(error, LostTransaction)):
        return ends[0]
    for how in (AttemptEnd.BROKEN, AttemptEnd.LOST):
        if (found := next((each for each in ends if each.how is how), None)) is not None:
            return found
    if any(each.how is AttemptEnd.FAILED for each in ends):
        return AttemptResult(AttemptEnd.FAILED, error)
    return next((each for each in ends if each.how is AttemptEnd.AWAY), ends[0])


def _raised_alone(context: AttemptContext, won: Won, error: BaseException) -> AttemptResult:
    if isinstance(error, BrokenTransaction):  # raised by a step; its cause may be a request to stop the handler
        stop = error.__cause__
        return _broken(error, None, stop if stop is not None and stops(stop) else None, block=True)
    lost = error.error if isinstance(error, LostTransaction) else None
    if isinstance(lost or error, InProgress):
        return AttemptResult(
            AttemptEnd.IN_PROGRESS, lost or error
        )  # raised by a part that the handler claims, or by a lock: another run holds it, which is no failure
    if lost is not None:
        # a statement that took longer than the driver waits takes as long the next time, so it counts as a failure
        return AttemptResult(AttemptEnd.FAILED if context.dialect.gave_up(lost) else AttemptEnd.TRANSIENT, lost)
    if isinstance(error, RefusedResult):
        return AttemptResult(AttemptEnd.REFUSED, error)
    if _is_of_the_server(error):
        return AttemptResult(AttemptEnd.STOPPED, error)  # raised on, as the claim raises it: a failure would count
    if isinstance(error, LeaseLost):
        return AttemptResult(AttemptEnd.LOST, error)
    if won.deferred_watch is not None and isinstance(error, StoreUnavailable) and not error.asked_by_handler:
        return AttemptResult(AttemptEnd.AWAY, error)  # raised by a step, or by the session's first statement
    if isinstance(error, (OSError, EOFError)):
        # a network error of the handler's own: an error of the database is in `lost`, or wrapped
        return AttemptResult(AttemptEnd.FAILED, error)
    match context.dialect.error_kind(error):
        case ErrorKind.UNAVAILABLE if context.of_another_database(error) and not context.dialect.locked(error):
            # counts as a failure. If our store is away as well, the failure cannot be recorded, and the delivery is held. A
            # lock of another database is repeated at once, like a lock of ours
            return AttemptResult(AttemptEnd.FAILED, error)
        case ErrorKind.TRANSIENT | ErrorKind.UNAVAILABLE:
            return AttemptResult(AttemptEnd.TRANSIENT, error)
        case _:
            return AttemptResult(AttemptEnd.FAILED, error)


def _is_of_the_server(error: BaseException) -> bool:
    return isinstance(error, ConfigurationError) and error.of_the_server


def _broken(
    error: BaseException, owner: str | None, stop: BaseException | None, *, block: bool = False
) -> AttemptResult:
    misuse = Misuse(words_of(error)).with_traceback(error.__traceback__)
    return AttemptResult(AttemptEnd.BROKEN, misuse, owner=owner, block=block, stop=stop)


def _stands(context: AttemptContext, watch: Watch, ended: AttemptResult) -> AttemptResult:
    """After the rollback, ask whether this attempt's claim stands all the same. Of a batch all claims stand, or none."""
    try:
        found = context.guard.look(context.open_ours, watch.rows[0])
    except StoreUnavailable as error:
        # not known, and the next claim may find ours: remember the owner until then
        return AttemptResult(AttemptEnd.AWAY, error, owner=watch.owner, stop=_stop_of(ended))
    except Exception:  # the next claim will meet the same error
        return ended
    if isinstance(found, (Consumed, Unfinished)) and found.owner == watch.owner:
        said = ended.error
        misuse = Misuse(f"{_COMMITTED} The handler ended with {type(said).__name__}.")
        if said is not None:
            misuse = misuse.with_traceback(said.__traceback__)
        return _broken(misuse, watch.owner, _stop_of(ended))
    return ended


def _stop_of(ended: AttemptResult) -> BaseException | None:
    return ended.error if ended.how is AttemptEnd.STOPPED else ended.stop


def _look_up(context: AttemptContext, rows: Sequence[ClaimRow], ended: AttemptResult) -> AttemptResult:
    """After a COMMIT without an answer: if all our rows are there, all is processed. Else nothing is proven: return `ended`.

    One row of a batch proves nothing about the others: a copy may have waited for our key and committed it alone. For a single
    message such a row is proof enough. A COMMIT still under way is safe: the claim of the redelivery waits for it and then finds
    the row.
    """
    try:
        found = [context.guard.look(context.open_ours, row) for row in rows]
    except StoreUnavailable as error:
        return AttemptResult(AttemptEnd.AWAY, error, keep_lease=True)
    except Exception:  # the look-up failed: the outcome stays unknown
        return ended
    if rows and all(isinstance(each, Consumed) for each in found):
        return PROCESSED
    unfinished = next((each for each in found if isinstance(each, Unfinished)), None)
    if unfinished is not None:
        return _broken(Misuse(_COMMITTED), unfinished.owner, None)
    return ended


_COMMITTED = (
    "Something committed this attempt's transaction before it ended: a procedure, or a call on the driver. Its claim stands,"
    " with what the handler had written until then, and the rest is missing."
)
