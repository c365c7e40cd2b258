"""How an attempt ended: said by one that did not come to its end, for one message or a batch.

Whatever ends a handler (an exception, a cancellation, a request to end the process), two questions follow. Was its
transaction still the one it was given? If nobody can say so, does this attempt's claim stand in the database? If it
does, something else than our COMMIT has committed it, and the attempt is *broken*.

Never runs a handler and never commits; called by `attempt` alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import Enum
from typing import Any

from sqlalchemy.orm import Session

from exactly_once.claim import ClaimRow
from exactly_once.database.dialects.contract import Dialect, ErrorKind
from exactly_once.database.watched.watch import DOUBTFUL, BrokenTransaction, LostTransaction, TransactionEnd, Watch
from exactly_once.errors import InProgress, LeaseLost, Misuse, RefusedResult, StoreUnavailable
from exactly_once.exceptions.leaves import leaves
from exactly_once.exceptions.stops import stops
from exactly_once.exceptions.words import words_of
from exactly_once.guards.contract import Consumed, Guard, Unfinished, Won

__all__ = ["PROCESSED", "AttemptContext", "AttemptEnd", "AttemptResult", "Open", "result_of"]

Open = Callable[[], tuple[Session, Any]]
"""Make a session: the one the core speaks to, and the one the handler is handed (the same, or the AsyncSession around it)."""


@dataclass(frozen=True, slots=True)
class AttemptContext:
    """What all attempts of one handler on one database have in common; made once, at start."""

    open_session: Open
    """Makes the session of the handler."""
    open_ours: Open
    """Makes a session for what is written and asked beside the handler."""
    guard: Guard
    """Decides whether a message may run."""
    dialect: Dialect
    """Says what the database's errors mean."""
    is_foreign: Callable[[BaseException], bool]
    """Says whether an error of a database came from another one, of the handler's own."""
    enforce: bool = True
    """False runs duplicates all the same, and says that it did."""


class AttemptEnd(Enum):
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
    """The transaction was committed behind our back: a redelivery would be taken for a duplicate. For a person."""
    AWAY = "away"
    """The database does not answer."""
    LOST = "lost"
    """Another run has taken the message over; nothing of this one is recorded."""
    REFUSED = "refused"
    """The handler returned an answer, which nobody reads: it is wrong, and not the message. Nothing was committed."""
    STOPPED = "stopped"
    """Cancelled, interrupted, told to exit: nothing was committed, and nothing is recorded."""


@dataclass(frozen=True, slots=True)
class AttemptResult:
    """How an attempt ended, and with what."""

    how: AttemptEnd
    error: BaseException | None = None
    fingerprint: bytes = b""
    again: bool = False
    remaining: timedelta | None = None
    """How long another run's lease goes on."""
    kept: bool = False
    """What the claim stands for may have happened: it is not let go of."""
    owner: str | None = None
    """Whose claim stands under the key, of a duplicate; whose may stand, where it could not be learnt; of a broken one."""
    block: bool = False
    """Of a broken one: its claim is to be written where none stands, for a copy would repeat what was committed."""
    stop: BaseException | None = None
    """To be raised on, once what is to be written is written."""
    answered: bool = False
    """The server refused our COMMIT and still answers: what the error says of the server is not believed without a look."""

    def stopped_by(self, error: BaseException | None) -> "AttemptResult":
        """Return the same, with what is to be raised on if nothing is yet."""
        return self if error is None or self.stop is not None else replace(self, stop=error)


PROCESSED = AttemptResult(AttemptEnd.PROCESSED)


def result_of(
    context: AttemptContext, session: Session, rows: Sequence[ClaimRow], won: Won, error: BaseException
) -> AttemptResult:
    """Say how an attempt ended that raised; what was seen of its transaction weighs more than what was raised.

    Args:
        context: The handler's.
        session: Its session, whose transaction is ended here.
        rows: The claims that COMMIT would have made known.
        won: What was claimed.
        error: What was raised, as it is told.
    """
    watch = won.watch
    if watch is None:
        return _raised(context, won, error)
    if watch.committed and watch.left is not TransactionEnd.BROKEN:
        # a hook of the user's, behind the server's answer: it is done
        return AttemptResult(AttemptEnd.STOPPED, error, kept=True) if stops(error) else PROCESSED
    unsure = watch.sent and not watch.refused and not watch.committed
    if not watch.sent:
        watch.ask()
    why = watch.why(error)
    watch.end(session)
    if unsure:
        # where the connection's end decides it, no lease is kept: to let go of one waits for that, and changes no finished claim
        found = _look_up(context, rows, AttemptResult(AttemptEnd.UNKNOWN, error, kept=not context.dialect.embedded))
        return found.stopped_by(error if stops(error) else None)
    ended = _seen(context, won, watch, error, why)
    if ended.how is not AttemptEnd.BROKEN and watch.rows and not watch.whole:
        ended = _stands(context, watch, ended)
    if watch.doubtful and ended.how is not AttemptEnd.BROKEN:
        # no claim is known to stand, and a procedure may have rolled ours back and committed its own: a copy would repeat it
        return _broken(Misuse(DOUBTFUL), watch.owner, _stop_of(ended), block=True)
    return ended


def _seen(context: AttemptContext, won: Won, watch: Watch, error: BaseException, why: BaseException) -> AttemptResult:
    """From what the watch saw, and then from what was raised."""
    stop = error if stops(error) else None
    if watch.left is TransactionEnd.BROKEN:
        return _broken(watch.error or error, watch.owner, stop, block=watch.replaced or not watch.rows)
    if stop is not None:
        return AttemptResult(AttemptEnd.STOPPED, stop)
    ended = _raised(context, won, why)
    return replace(ended, answered=watch.refused) if why is error else ended


def _raised(context: AttemptContext, won: Won, error: BaseException) -> AttemptResult:
    """From what was raised alone.

    A group ends as its exceptions would if all of them would end so. A broken transaction or a lost lease among them weighs more
    than the rest; a deadlock, or a store that is away, beside an error of the handler's own weighs less.
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
    if isinstance(error, BrokenTransaction):  # of a step; the handler may have been told to stop behind it
        stop = error.__cause__
        return _broken(error, None, stop if stop is not None and stops(stop) else None, block=True)
    lost = error.error if isinstance(error, LostTransaction) else None
    if isinstance(lost or error, InProgress):
        return AttemptResult(
            AttemptEnd.IN_PROGRESS, lost or error
        )  # of a part that the handler claims, or a lock: not now, no failure
    if lost is not None:
        # a statement that takes longer than the driver waits takes as long the next time; it counts
        return AttemptResult(AttemptEnd.FAILED if context.dialect.gave_up(lost) else AttemptEnd.TRANSIENT, lost)
    if isinstance(error, RefusedResult):
        return AttemptResult(AttemptEnd.REFUSED, error)
    if isinstance(error, LeaseLost):
        return AttemptResult(AttemptEnd.LOST, error)
    if won.late is not None and isinstance(error, StoreUnavailable) and not error.asked_by_handler:
        return AttemptResult(AttemptEnd.AWAY, error)  # of a step, or of the session's first statement
    if isinstance(error, (OSError, EOFError)):
        # a network error of the handler's own; the database's is in `lost`, or comes wrapped
        return AttemptResult(AttemptEnd.FAILED, error)
    match context.dialect.error_kind(error):
        case ErrorKind.UNAVAILABLE if context.is_foreign(error) and not context.dialect.locked(error):
            # it counts; and if the store is away as well, it cannot be written down, and the delivery is held. A lock is tried
            # again at once, as any server's is
            return AttemptResult(AttemptEnd.FAILED, error)
        case ErrorKind.TRANSIENT | ErrorKind.UNAVAILABLE:
            return AttemptResult(AttemptEnd.TRANSIENT, error)
        case _:
            return AttemptResult(AttemptEnd.FAILED, error)


def _broken(
    error: BaseException, owner: str | None, stop: BaseException | None, *, block: bool = False
) -> AttemptResult:
    told = Misuse(words_of(error)).with_traceback(error.__traceback__)
    return AttemptResult(AttemptEnd.BROKEN, told, owner=owner, block=block, stop=stop)


def _stands(context: AttemptContext, watch: Watch, ended: AttemptResult) -> AttemptResult:
    """After the rollback: does this attempt's claim stand all the same? Of a batch's, all stand or none does."""
    try:
        found = context.guard.look(context.open_ours, watch.rows[0])
    except StoreUnavailable as error:
        # not known, and the next claim may find it: whose it is must be remembered until then
        return AttemptResult(AttemptEnd.AWAY, error, owner=watch.owner, stop=_stop_of(ended))
    except Exception:  # whatever it is, the next claim meets it too
        return ended
    if isinstance(found, (Consumed, Unfinished)) and found.owner == watch.owner:
        said = ended.error
        told = Misuse(f"{_COMMITTED} The handler ended with {type(said).__name__}.")
        if said is not None:
            told = told.with_traceback(said.__traceback__)
        return _broken(told, watch.owner, _stop_of(ended))
    return ended


def _stop_of(ended: AttemptResult) -> BaseException | None:
    return ended.error if ended.how is AttemptEnd.STOPPED else ended.stop


def _look_up(context: AttemptContext, rows: Sequence[ClaimRow], ended: AttemptResult) -> AttemptResult:
    """After a COMMIT that nobody answered: all our rows there means that all is done. Else nothing is proven, and `ended` stands.

    One row of a batch says nothing of the others: it may be of a copy that waited for our key and committed it alone. Of
    one message alone that is as good. A COMMIT still on its way is safe: the redelivery's claim waits for it and then finds
    the row.
    """
    try:
        found = [context.guard.look(context.open_ours, row) for row in rows]
    except StoreUnavailable as error:
        return AttemptResult(AttemptEnd.AWAY, error, kept=True)
    except Exception:  # a look-up that fails leaves the outcome what it was: unknown
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
