"""One attempt: claim, handle, complete, commit, consume; for one message, or for a batch of one handler in one transaction.

The same code serves sync and async: a thread calls it, or a greenlet under asyncio. A batch is all or nothing: after any failure
all its claims and effects are rolled back. Never decides on a retry, records a failure or settles: `processor` and `batch` do.

If the process dies on a line of this file before COMMIT, the database rolls back all that the attempt wrote, also the claim (a
lease runs out), and the broker's redelivery runs the message again. After COMMIT the redelivery finds the claim and is a
duplicate. If something else had committed the transaction before the crash, the redelivery finds that (MySQL and MariaDB), and
the message is *broken*.
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
from exactly_once.database.watched.session import HOME, let_go
from exactly_once.database.watched.watch import flush
from exactly_once.errors import ConfigurationError, LeaseLost, Misuse, StoreUnavailable
from exactly_once.exceptions.finishing import finish, finished
from exactly_once.guards.contract import Busy, Conflict, Consumed, Guard, HookRaised, Unfinished, Won
from exactly_once.guards.locked_out import locked_out
from exactly_once.guards.our_session import in_our_session
from exactly_once.guards.transaction import TransactionGuard
from exactly_once.processing.attempt_result import PROCESSED, AttemptContext, AttemptEnd, AttemptResult, result_of

__all__ = ["UNFINISHED", "BatchAttemptResult", "attempt", "attempt_batch"]

Translate = Callable[[BaseException], BaseException]
"""Return the exception to report in place of the one raised: for a `sys.exit` of the handler, or of a session's hook."""
CloseFailure = Callable[[Session, int], object]
"""Close the message's failure row, in the handler's transaction. Called with the session and the number of the claim."""
Others = Mapping[str, Consumed | Busy | Conflict | Unfinished]
"""The keys of a batch that this attempt did not win, each with what its claim found."""

_Claimed = tuple[Won, Sequence[ClaimRow]]
"""What was won, and the claims that COMMIT makes visible."""
_Standing = TypeVar("_Standing", bound=AttemptResult | Consumed | Unfinished | Busy | Conflict)


def attempt(
    context: AttemptContext,
    row: ClaimRow,
    handle: Callable[[Any, Won], object],
    *,
    translate: Translate,
    close_failure: CloseFailure | None = None,
    failed_before: bool = False,
) -> AttemptResult:
    """Run one message once.

    Args:
        context: The handler's.
        row: Identity and fingerprint of the message. The owner is made here.
        handle: Calls the handler, with the session that the handler gets.
        translate: Returns the exception to report in place of the one raised.
        close_failure: Closes the message's failure row, in the same transaction.
        failed_before: The message may have a failure row: `close_failure` is called for a duplicate, too.

    Returns:
        How the attempt ended. After cancellation, KeyboardInterrupt or SystemExit there is no result: the transaction is rolled
        back and the exception raised on. Only a broken transaction is recorded first: then the exception is in `stop`.

    Raises:
        ConfigurationError: The database is set up so that no claim can be trusted.
        ForkedProcess: This is a child process that the handler forked, and it returned from the handler.
    """
    row = row._replace(owner=new_owner())  # new for each attempt, or the claim of a copy would be taken for ours

    def claim(session: Session) -> _Claimed | Consumed | Unfinished | Busy | Conflict:
        found = context.guard.claim(session, row)
        if isinstance(found, Won):
            return found, (row,)
        if context.enforce:
            return found
        # enforce=False, for a trial before use: the duplicate runs and is watched as any message, but without a claim
        session.rollback()
        return Won(deferred_watch=DeferredWatch(session, context.dialect, None)), ()

    match _attempt(context, claim, lambda _, handed, won: handle(handed, won), translate, close_failure):
        case AttemptResult() as ended:
            return ended if ended.how is not AttemptEnd.BROKEN or ended.owner else replace(ended, owner=row.owner)
        case Consumed(owner):
            return _duplicate(context, close_failure if failed_before else None, owner)
        case Unfinished(owner):
            return AttemptResult(AttemptEnd.BROKEN, Misuse(UNFINISHED), owner=owner)
        case Busy(again, remaining):
            return AttemptResult(AttemptEnd.IN_PROGRESS, retry_now=again, remaining=remaining)
        case Conflict(fingerprint):
            return AttemptResult(AttemptEnd.CONFLICT, fingerprint=fingerprint)


@dataclass(frozen=True, slots=True)
class BatchAttemptResult:
    """How a batch's attempt ended, and which of its keys it did not win."""

    ended: AttemptResult
    """One result for all messages won. DUPLICATE: none was won. IN_PROGRESS: another run holds a key, and none was claimed."""
    others: Others = field(default_factory=dict)


def attempt_batch(
    context: AttemptContext,
    rows: Sequence[ClaimRow],
    handle: Callable[[Session, Any, Others, Won], object],
    *,
    translate: Translate,
    patient: bool = True,
    meanwhile: Iterable[object] = (),
) -> BatchAttemptResult:
    """Run a batch once. Its handler is under the transaction guard.

    Args:
        context: The handler's.
        rows: Identity and fingerprint of each message; each key once, sorted by key.
        handle: Calls the handler for the messages that may run. Its arguments: the session, the session as the handler gets it,
            the keys that may not run, and what was won.
        translate: Returns the exception to report in place of the one raised.
        patient: Wait a moment for keys that another run holds. False: do not wait.
        meanwhile: Work to do while the server executes the claim; one step for each element.

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

    ended = _attempt(context, claim, lambda session, handed, won: handle(session, handed, others, won), translate, None)
    assert isinstance(ended, AttemptResult)
    if ended.stop is not None and ended.how in _NOTHING_KEPT:
        raise ended.stop
    return BatchAttemptResult(ended, others)


_BUSY: Final = AttemptResult(AttemptEnd.IN_PROGRESS)
_NONE_WON: Final = AttemptResult(AttemptEnd.DUPLICATE)
_NOTHING_KEPT: Final = (AttemptEnd.FAILED, AttemptEnd.TRANSIENT, AttemptEnd.REFUSED, AttemptEnd.IN_PROGRESS)
"""Ends after which nothing is recorded of a batch: its messages are only tried again."""


def _attempt(
    context: AttemptContext,
    claim: Callable[[Session], _Claimed | _Standing],
    handle: Callable[[Session, Any, Won], object],
    translate: Translate,
    close_failure: CloseFailure | None,
) -> AttemptResult | _Standing:
    """Claim and run. A claim that was not won is returned as it is."""
    process = fork.here
    session, handed = context.open_session()
    won: Won | None = None
    ended: AttemptResult | None = None
    try:
        claimed = _claimed(session, claim, translate)
        if not isinstance(claimed, tuple):
            return claimed
        won, rows = claimed
        ended = _to_commit(context, session, rows, won, lambda: handle(session, handed, won), translate, close_failure)
        if not rows and ended.how is AttemptEnd.PROCESSED:
            ended = replace(ended, ran_anyway=True)
    finally:
        if process is not fork.here:
            raise fork.inside()  # before anything else: only the parent may end its session, claim and lease
        if won is not None:
            context.guard.end(won)  # first, because it waits for nothing: the next lines may be cancelled again
        used = None if won is None else won.deferred_watch or won.watch
        try:
            if used is not None:
                used.end(session)
            else:
                let_go(session)
        finally:
            # cancelled, interrupted or exiting: release the key, so that others need not wait for it
            if won is not None and ended is None:
                with suppress(Exception):
                    finished(partial(context.guard.release, won))
    released = True
    if ended.how is not AttemptEnd.PROCESSED and not ended.keep_lease:
        # only after the session's end: its transaction may hold the lock on our own row
        released, cancelled = finish(partial(context.guard.release, won, broken=ended.how is AttemptEnd.BROKEN))
        ended = ended.stopped_by(cancelled)
    if ended.how is AttemptEnd.STOPPED:
        assert ended.error is not None
        raise ended.error
    if ended.how is AttemptEnd.BROKEN or released:
        return ended
    return AttemptResult(AttemptEnd.LOST, ended.error, stop=ended.stop)


def _claimed(
    session: Session, claim: Callable[[Session], _Claimed | _Standing], translate: Translate
) -> _Claimed | AttemptResult | _Standing:
    try:
        return claim(session)
    except StoreUnavailable as error:
        return AttemptResult(AttemptEnd.AWAY, error)
    except ConfigurationError:
        raise  # the program or the server is wrong (an engine in AUTOCOMMIT): as a failure it would park every message
    except HookRaised as hook:
        session.invalidate()
        return AttemptResult(AttemptEnd.FAILED, translate(hook.error))
    except Exception as error:
        return AttemptResult(AttemptEnd.FAILED, error)
    except BaseException:
        session.invalidate()  # interrupted in the middle of a statement: the connection must not be used again
        raise


def _to_commit(
    context: AttemptContext,
    session: Session,
    rows: Sequence[ClaimRow],
    won: Won,
    handle: Callable[[], object],
    translate: Translate,
    close_failure: CloseFailure | None,
) -> AttemptResult:
    """Handle, complete, commit, consume."""
    guard, dialect = context.guard, context.dialect
    process, ended = fork.here, PROCESSED
    try:
        if won.deferred_watch is not None:
            won.deferred_watch.begin()
        # a handler under a lease locks the file with its first write, and nothing tells us when that happens
        with holding(session.info.get(HOME)) if dialect.embedded and won.deferred_watch is None else nullcontext():
            handle()
        if won.watch is not None:
            won.watch.returned(session)
        if won.deferred_watch is not None:
            won.deferred_watch.check()
        if close_failure is not None:
            if won.watch is not None:
                won.watch.check(session)
            close_failure(session, 1 if won.held is None else won.held.attempt)
        flush(session)
        if (consumed := guard.complete(session, won)) is not None:
            return AttemptResult(AttemptEnd.DUPLICATE, owner=consumed.owner)
        if (watch := won.watch) is not None:
            watch.check(session)
            watch.committing()
            type(session).commit(session)  # a handler may have replaced `session.commit`, for a library that commits
            watch.confirm()
    except BaseException as error:
        if process is not fork.here:
            raise fork.inside() from error  # a child that the handler forked: only the parent may end all this
        # only for a claim's transaction, which locks the file from the claim on: under a lease it begins later, and may only read
        if dialect.embedded and won.deferred_watch is None and (watch := won.watch) is not None and not watch.sent:
            error = locked_out(error, watch.connection) or error
        # shielded: a second cancellation in here would skip the ROLLBACK, and nobody would notice what was committed
        ended, cancelled = finish(partial(result_of, context, session, rows, won, translate(error)))
        ended = ended.stopped_by(cancelled)
        if ended.how is not AttemptEnd.PROCESSED:
            return ended
    return _consumed(guard, won, ended)


def _consumed(guard: Guard, won: Won, ended: AttemptResult) -> AttemptResult:
    """After COMMIT: mark the message as consumed outside that transaction, where a lease is kept elsewhere."""
    try:
        if ended is PROCESSED:
            guard.consume(won)
        else:
            finish(partial(guard.consume, won))
    except StoreUnavailable as error:
        return AttemptResult(AttemptEnd.AWAY, error, keep_lease=True, stop=ended.stop)
    except LeaseLost as error:
        return AttemptResult(AttemptEnd.LOST, error, stop=ended.stop)
    except Exception as error:  # committed, but perhaps not marked as consumed: the redelivery finds out
        return AttemptResult(AttemptEnd.UNKNOWN, error, keep_lease=True, stop=ended.stop)
    return ended


def _duplicate(context: AttemptContext, close_failure: CloseFailure | None, owner: str | None) -> AttemptResult:
    """Nothing ran. If the message may have a failure row, that row is closed."""
    if close_failure is not None:

        def close(ours: Session) -> None:
            close_failure(ours, 1)
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
