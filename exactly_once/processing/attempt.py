"""One attempt: claim, handle, complete, commit, consume; for one message, or for a batch of one handler in one transaction.

Written once: a thread calls it, and under asyncio a greenlet does. A batch is all or nothing: whatever fails, every claim and
effect of it is rolled back. Never decides on a retry, records no failure and settles nothing: `processor` and `batch` do.

Where a process dies on a line of this file, the database rolls back everything the attempt wrote, the claim included (a
lease runs out), and the broker's redelivery runs it again; after COMMIT was executed the redelivery finds the claim and is
a duplicate. Where something else had committed the transaction before the crash, the redelivery finds that (MySQL and MariaDB)
and the message is *broken*.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final, TypeVar

from sqlalchemy.orm import Session

from exactly_once import fork
from exactly_once.claim import ClaimRow
from exactly_once.database.connections.one_writer import holding
from exactly_once.database.dialects.contract import ErrorKind
from exactly_once.database.owner import new_owner
from exactly_once.database.watched.deferred_watch import DeferredWatch
from exactly_once.database.watched.watch import HOME, flush, let_go
from exactly_once.errors import ConfigurationError, LeaseLost, Misuse, StoreUnavailable
from exactly_once.exceptions.finishing import finish, finished
from exactly_once.guards.contract import Busy, Conflict, Consumed, Guard, HookRaised, Unfinished, Won
from exactly_once.guards.locked_out import locked_out
from exactly_once.guards.our_session import in_our_session
from exactly_once.guards.transaction import TransactionGuard
from exactly_once.processing.attempt_result import PROCESSED, AttemptContext, AttemptEnd, AttemptResult, result_of

__all__ = ["UNFINISHED", "BatchAttemptResult", "attempt", "attempt_batch"]

Tell = Callable[[BaseException], BaseException]
"""Give what is told of an exception in its place: an exit that is nobody's to ask for. Hooks of a session exit, too."""
Also = Callable[[Session, int], object]
"""Write something more in the handler's transaction, behind it; called with the session and the number of the claim."""
Others = Mapping[str, Consumed | Busy | Conflict | Unfinished]
"""The keys of a batch that are not ours, and what stands under each."""

_Claimed = tuple[Won, Sequence[ClaimRow]]
"""What was won, and the claims that COMMIT will make known."""
_Standing = TypeVar("_Standing", bound=AttemptResult | Consumed | Unfinished | Busy | Conflict)


def attempt(
    context: AttemptContext,
    row: ClaimRow,
    handle: Callable[[Any, Won], object],
    *,
    told: Tell,
    also: Also | None = None,
    failed_before: bool = False,
) -> AttemptResult:
    """Run one message once.

    Args:
        context: The handler's.
        row: Identity and fingerprint of the message; the owner is made here.
        handle: Calls the handler with the session it is handed.
        told: Gives what is told of an exception in its place.
        also: Something more to write in the same transaction.
        failed_before: It may have a failure row: `also` is written for a duplicate, too.

    Returns:
        How it ended. Cancellation, KeyboardInterrupt and SystemExit are no ends: rolled back, and raised on (once a broken
        transaction is written down: then they are in `stop`).

    Raises:
        ConfigurationError: The database is set up so that no claim can be trusted.
        ForkedProcess: We are in a child that the handler forked, and that came back from it.
    """
    row = row._replace(owner=new_owner())  # this attempt's alone, or a copy's claim would pass for ours

    def claim(session: Session) -> _Claimed | Consumed | Unfinished | Busy | Conflict:
        found = context.guard.claim(session, row)
        if isinstance(found, Won):
            return found, (row,)
        if context.enforce:
            return found
        # how a team looks before it trusts: run as any other, and watched as any other, only under no claim
        session.rollback()
        return Won(late=DeferredWatch(session, context.dialect, None)), ()

    match _attempt(context, claim, lambda _, handed, won: handle(handed, won), told, also):
        case AttemptResult() as ended:
            return ended if ended.how is not AttemptEnd.BROKEN or ended.owner else replace(ended, owner=row.owner)
        case Consumed(owner):
            return _duplicate(context, also if failed_before else None, owner)
        case Unfinished(owner):
            return AttemptResult(AttemptEnd.BROKEN, Misuse(UNFINISHED), owner=owner)
        case Busy(again, remaining):
            return AttemptResult(AttemptEnd.IN_PROGRESS, again=again, remaining=remaining)
        case Conflict(fingerprint):
            return AttemptResult(AttemptEnd.CONFLICT, fingerprint=fingerprint)


@dataclass(frozen=True, slots=True)
class BatchAttemptResult:
    """How a batch's attempt ended, and which of its keys were not ours."""

    ended: AttemptResult
    """Of the messages that were ours, all alike. DUPLICATE: none was; IN_PROGRESS: some key is held, and none was claimed."""
    others: Others = field(default_factory=dict)


def attempt_batch(
    context: AttemptContext,
    rows: Sequence[ClaimRow],
    handle: Callable[[Session, Any, Others, Won], object],
    *,
    told: Tell,
    patient: bool = True,
    meanwhile: Iterable[object] = (),
) -> BatchAttemptResult:
    """Run a batch once; its handler is under the transaction guard.

    Args:
        context: The handler's.
        rows: Identity and fingerprint of each message; each key once, sorted by key.
        handle: Calls the handler for the messages that may run: given the session, what the handler is handed of it, the
            keys that may not, and what was won.
        told: Gives what is told of an exception in its place.
        patient: Wait a moment for keys that another run holds; else not at all.
        meanwhile: Work to do while the server answers the claim, a step for each element.

    Returns:
        As `attempt`.

    Raises:
        ConfigurationError: As of `attempt`.
        ForkedProcess: As of `attempt`.
    """
    guard = context.guard
    assert isinstance(guard, TransactionGuard)
    others: Others = {}

    def claim(session: Session) -> _Claimed | AttemptResult:
        nonlocal others
        found = guard.claim_batch(session, rows, owner=new_owner(), patient=patient, meanwhile=meanwhile)
        if found is None:
            return _BUSY
        others = found.others
        if found.won is None:
            return _NONE_WON
        assert found.won.watch is not None
        return found.won, found.won.watch.rows

    ended = _attempt(context, claim, lambda session, handed, won: handle(session, handed, others, won), told, None)
    assert isinstance(ended, AttemptResult)
    if ended.stop is not None and ended.how in _NOTHING_KEPT:
        raise ended.stop
    return BatchAttemptResult(ended, others)


_BUSY: Final = AttemptResult(AttemptEnd.IN_PROGRESS)
_NONE_WON: Final = AttemptResult(AttemptEnd.DUPLICATE)
_NOTHING_KEPT: Final = (AttemptEnd.FAILED, AttemptEnd.TRANSIENT, AttemptEnd.REFUSED, AttemptEnd.IN_PROGRESS)
"""Of these nothing is written down for a batch: its messages would only be tried again."""


def _attempt(
    context: AttemptContext,
    claim: Callable[[Session], _Claimed | _Standing],
    handle: Callable[[Session, Any, Won], object],
    told: Tell,
    also: Also | None,
) -> AttemptResult | _Standing:
    """Claim and run; a claim that is not ours is returned as it is."""
    process = fork.here
    session, handed = context.open_session()
    won: Won | None = None
    ended: AttemptResult | None = None
    try:
        claimed = _claimed(session, claim, told)
        if not isinstance(claimed, tuple):
            return claimed
        won, rows = claimed
        ended = _to_commit(context, session, rows, won, lambda: handle(session, handed, won), told, also)
        if not rows and ended.how is AttemptEnd.PROCESSED:
            ended = replace(ended, again=True)
    finally:
        if process is not fork.here:
            raise fork.inside()  # before anything else: session, claim and lease are the parent's to end
        if won is not None:
            context.guard.end(won)  # first, and it waits for nothing: what follows may be cancelled again
        used = None if won is None else won.late or won.watch
        try:
            if used is not None:
                used.end(session)
            else:
                let_go(session)
        finally:
            # cancelled, interrupted, told to exit: others may have the key at once
            if won is not None and ended is None:
                with suppress(Exception):
                    finished(partial(context.guard.release, won))
    released = True
    if ended.how is not AttemptEnd.PROCESSED and not ended.kept:
        # after the session's end: its transaction may hold the lock on our own row
        released, cancelled = finish(partial(context.guard.release, won, broken=ended.how is AttemptEnd.BROKEN))
        ended = ended.stopped_by(cancelled)
    if ended.how is AttemptEnd.STOPPED:
        assert ended.error is not None
        raise ended.error
    if ended.how is AttemptEnd.BROKEN or released:
        return ended
    return AttemptResult(AttemptEnd.LOST, ended.error, stop=ended.stop)


def _claimed(
    session: Session, claim: Callable[[Session], _Claimed | _Standing], told: Tell
) -> _Claimed | AttemptResult | _Standing:
    try:
        return claim(session)
    except StoreUnavailable as error:
        return AttemptResult(AttemptEnd.AWAY, error)
    except ConfigurationError:
        raise  # of the program or the server (an engine in AUTOCOMMIT): counted as a failure it would park every message
    except HookRaised as hook:
        session.invalidate()
        return AttemptResult(AttemptEnd.FAILED, told(hook.error))
    except Exception as error:
        return AttemptResult(AttemptEnd.FAILED, error)
    except BaseException:
        session.invalidate()  # cut off in the middle of a statement: its connection is not used again
        raise


def _to_commit(
    context: AttemptContext,
    session: Session,
    rows: Sequence[ClaimRow],
    won: Won,
    handle: Callable[[], object],
    told: Tell,
    also: Also | None,
) -> AttemptResult:
    """Handle, complete, commit, consume."""
    guard, dialect = context.guard, context.dialect
    process, ended = fork.here, PROCESSED
    try:
        if won.late is not None:
            won.late.begin()
        # a handler under a lease holds the file from its first write on, which nobody sees
        with holding(session.info.get(HOME)) if dialect.embedded and won.late is None else nullcontext():
            handle()
        if won.late is not None:
            won.late.check()
        if also is not None:
            if won.watch is not None:
                won.watch.check(session)
            also(session, 1 if won.held is None else won.held.attempt)
        flush(session)
        if (settled := guard.complete(session, won)) is not None:
            return AttemptResult(AttemptEnd.DUPLICATE, owner=settled.owner)
        if (watch := won.watch) is not None:
            watch.check(session)
            watch.committing()
            type(session).commit(session)  # a handler may have put its own in the way, for a library that commits
            watch.confirm()
    except BaseException as error:
        if process is not fork.here:
            raise fork.inside() from error  # a child that the handler forked: all of it is the parent's to end
        # of a claim's transaction, which holds the file from the claim on; under a lease it begins later, and may only read
        if dialect.embedded and won.late is None and (watch := won.watch) is not None and not watch.sent:
            error = locked_out(error, watch.connection) or error
        # cancelled in here once more, the server would not be told to roll back, and what was committed not be noticed
        ended, cancelled = finish(partial(result_of, context, session, rows, won, told(error)))
        ended = ended.stopped_by(cancelled)
        if ended.how is not AttemptEnd.PROCESSED:
            return ended
    return _consumed(guard, won, ended)


def _consumed(guard: Guard, won: Won, ended: AttemptResult) -> AttemptResult:
    """After COMMIT: mark what lies outside that transaction."""
    try:
        if ended is PROCESSED:
            guard.consume(won)
        else:
            finish(partial(guard.consume, won))
    except StoreUnavailable as error:
        return AttemptResult(AttemptEnd.AWAY, error, kept=True, stop=ended.stop)
    except LeaseLost as error:
        return AttemptResult(AttemptEnd.LOST, error, stop=ended.stop)
    except Exception as error:  # committed, and not known to be marked: the redelivery finds out
        return AttemptResult(AttemptEnd.UNKNOWN, error, kept=True, stop=ended.stop)
    return ended


def _duplicate(context: AttemptContext, also: Also | None, owner: str | None) -> AttemptResult:
    """Nothing ran; a failure row of this message, if there may be one, is closed."""
    if also is not None:

        def close(ours: Session) -> None:
            also(ours, 1)
            ours.commit()

        try:
            in_our_session(context.open_ours, context.dialect, close)
        except Exception as error:
            match context.dialect.error_kind(error):
                case ErrorKind.UNAVAILABLE:
                    return AttemptResult(AttemptEnd.AWAY, error)
                case ErrorKind.TRANSIENT:
                    return AttemptResult(AttemptEnd.TRANSIENT, error)
                case _:
                    return AttemptResult(AttemptEnd.FAILED, error)
    return AttemptResult(AttemptEnd.DUPLICATE, owner=owner)


UNFINISHED: Final = (
    "The claim of an earlier attempt stands, and that attempt never finished: something committed its transaction before it"
    " ended (a procedure, or a call on the driver), and then the process died or lost the database. What the handler had"
    " written until then is there, and the rest is missing."
)
