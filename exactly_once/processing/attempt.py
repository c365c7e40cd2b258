"""One attempt: claim, handle, complete, commit, consume. Written once: a thread calls it, and under asyncio a greenlet does.

It never decides on a retry, records no failure and settles nothing; `processor` does, from how the attempt ended. What a crash
does: see `ending`.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from sqlalchemy.orm import Session

from exactly_once import fork
from exactly_once.claim import ClaimRow
from exactly_once.database.dialects.contract import Dialect, ErrorKind
from exactly_once.database.owner import new_owner
from exactly_once.database.watched.deferred_watch import DeferredWatch
from exactly_once.database.watched.watch import let_go
from exactly_once.errors import ConfigurationError, Misuse, StoreUnavailable
from exactly_once.exceptions.finishing import finish, finished
from exactly_once.guards.contract import Busy, Conflict, Consumed, Guard, HookRaised, Unfinished, Won
from exactly_once.guards.our_session import in_our_session
from exactly_once.processing.ending import AttemptEnd, AttemptResult, Open, run

__all__ = ["UNFINISHED", "AttemptEnd", "AttemptResult", "attempt"]


def attempt(
    open_session: Open,
    open_ours: Open,
    guard: Guard,
    dialect: Dialect,
    row: ClaimRow,
    handle: Callable[[Any, Won], object],
    *,
    told: Callable[[BaseException], BaseException],
    foreign: Callable[[BaseException], bool],
    also: Callable[[Session, int], object] | None = None,
    failed_before: bool = False,
    enforce: bool = True,
) -> AttemptResult:
    """Run one message once.

    Args:
        open_session: Makes the session.
        open_ours: Makes one for what is written and asked beside the handler.
        guard: Decides whether it may run.
        dialect: Says what the database's errors mean.
        row: Identity and fingerprint of the message; the owner is made here.
        handle: Calls the handler with the session it is handed.
        told: Gives what is told of an exception in its place: an exit that is nobody's to ask for. Hooks exit, too.
        foreign: Says whether an error of a database came from another one, of the handler's own.
        also: Something more to write in the same transaction, after the handler; called with the session and the number of
            the claim.
        failed_before: It may have a failure row: `also` is written for a duplicate, too.
        enforce: False runs duplicates all the same, and says that it did.

    Returns:
        How it ended. Cancellation, KeyboardInterrupt and SystemExit are no endings: rolled back, and raised on (once a broken
        transaction is written down: then they are in `stop`).

    Raises:
        ConfigurationError: The database is set up so that no claim can be trusted.
        ForkedProcess: We are in a child that the handler forked, and that came back from it.
    """
    row = row._replace(owner=new_owner())  # this attempt's alone, or a copy's claim would pass for ours
    process = fork.here
    session, handed = open_session()
    won: Won | None = None
    rows: tuple[ClaimRow, ...] = (row,)
    ended: AttemptResult | None = None
    try:
        try:
            claim = guard.claim(session, row)
        except StoreUnavailable as error:
            return AttemptResult(AttemptEnd.AWAY, error)
        except ConfigurationError:
            raise  # an engine in AUTOCOMMIT and the like: counting it as this message's failure would park them all
        except HookRaised as hook:
            session.invalidate()
            return AttemptResult(AttemptEnd.FAILED, told(hook.error))
        except Exception as error:
            return AttemptResult(AttemptEnd.FAILED, error)
        except BaseException:
            session.invalidate()  # cut off in the middle of a statement: its connection is not used again
            raise
        match claim:
            case Won():
                won = claim
            case _ if not enforce:
                # how a team looks before it trusts: run as any other, and watched as any other, only under no claim
                session.rollback()
                won, rows = Won(late=DeferredWatch(session, dialect, None)), ()
            case Consumed(owner):
                return _duplicate(session, open_ours, dialect, also if failed_before else None, owner)
            case Unfinished(owner):
                return AttemptResult(AttemptEnd.BROKEN, Misuse(UNFINISHED), owner=owner)
            case Busy(again, remaining):
                return AttemptResult(AttemptEnd.IN_PROGRESS, again=again, remaining=remaining)
            case Conflict(fingerprint):
                return AttemptResult(AttemptEnd.CONFLICT, fingerprint=fingerprint)
        assert won is not None
        ended = run(open_ours, session, guard, dialect, rows, won, lambda: handle(handed, won), also, told, foreign)
        if not rows and ended.how is AttemptEnd.PROCESSED:
            ended = replace(ended, again=True)
    finally:
        if process is not fork.here:
            raise fork.inside()  # before anything else: session, claim and lease are the parent's to end
        if won is not None:
            guard.end(won)  # first, and it waits for nothing: what follows may be cancelled again
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
                    finished(partial(guard.release, won))
    released = True
    if ended.how is not AttemptEnd.PROCESSED and not ended.kept:
        # after the session's end: its transaction may hold the lock on our own row
        released, cancelled = finish(partial(guard.release, won, broken=ended.how is AttemptEnd.BROKEN))
        ended = ended.stopped_by(cancelled)
    match ended.how:
        case AttemptEnd.STOPPED:
            assert ended.error is not None
            raise ended.error
        case AttemptEnd.BROKEN:
            return ended if ended.owner is not None else replace(ended, owner=row.owner)
        case _:
            return ended if released else AttemptResult(AttemptEnd.LOST, ended.error, stop=ended.stop)


def _duplicate(
    session: Session,
    open_ours: Open,
    dialect: Dialect,
    also: Callable[[Session, int], object] | None,
    owner: str | None,
) -> AttemptResult:
    """Nothing runs; a failure row of this message, if there may be one, is closed."""
    if also is not None:
        let_go(session)  # it is the handler's, with its hooks; and it may hold the only connection

        def close(ours: Session) -> None:
            also(ours, 1)
            ours.commit()

        try:
            in_our_session(open_ours, dialect, close)
        except Exception as error:
            match dialect.error_kind(error):
                case ErrorKind.UNAVAILABLE:
                    return AttemptResult(AttemptEnd.AWAY, error)
                case ErrorKind.TRANSIENT:
                    return AttemptResult(AttemptEnd.TRANSIENT, error)
                case _:
                    return AttemptResult(AttemptEnd.FAILED, error)
    return AttemptResult(AttemptEnd.DUPLICATE, owner=owner)


UNFINISHED = (
    "The claim of an earlier attempt stands, and that attempt never finished: something committed its transaction before it"
    " ended (a procedure, or a call on the driver), and then the process died or lost the database. What the handler had"
    " written until then is there, and the rest is missing."
)
