"""One attempt: claim, handle, complete, commit. Written once: a thread calls it, and under asyncio a greenlet does.

It never decides on a retry, records no failure and settles nothing; `delivery` does, from how the attempt ended. Where
a process dies on a line of this file, the database rolls back everything the attempt wrote, the claim included, and the
broker's redelivery runs it again; after COMMIT was executed the redelivery finds the claim and is a duplicate.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from sqlalchemy.orm import Session

from exactly_once.dialects import ClaimRow, Dialect, Trouble
from exactly_once.errors import ConfigurationError, StoreUnavailable
from exactly_once.guards import Conflict, Consumed, Guard, InProgress, Won
from exactly_once.guards.watch import Left, Watch, let_go

__all__ = ["Ended", "How", "attempt"]

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


@dataclass(frozen=True, slots=True)
class Ended:
    """How an attempt ended, and with what."""

    how: How
    error: BaseException | None = None
    fingerprint: bytes = b""
    again: bool = False


_PROCESSED = Ended(How.PROCESSED)
_DUPLICATE = Ended(How.DUPLICATE)


def attempt(
    open_session: Open,
    guard: Guard,
    dialect: Dialect,
    row: ClaimRow,
    handle: Callable[[Any], object],
    *,
    complete: Callable[[Session], object] | None = None,
    enforce: bool = True,
) -> Ended:
    """Run one message once, in one transaction.

    Args:
        open_session: Makes the session.
        guard: Decides whether it may run.
        dialect: Says what the database's errors mean.
        row: Identity and fingerprint of the message.
        handle: Calls the handler with the session it is handed.
        complete: Something more to write in the same transaction, after the handler, also for a duplicate.
        enforce: False runs duplicates all the same, and says that it did.

    Returns:
        How it ended. Cancellation, KeyboardInterrupt and SystemExit are no endings: rolled back, and raised on.

    Raises:
        ConfigurationError: The database is set up so that no claim can be trusted.
    """
    session, handed = open_session()
    watch: Watch | None = None
    try:
        try:
            claim = guard.claim(session, row)
        except StoreUnavailable as error:
            return Ended(How.AWAY, error)
        except ConfigurationError:
            raise  # an engine in AUTOCOMMIT and the like: counting it as this message's failure would park them all
        except Exception as error:
            return Ended(How.FAILED, error)
        match claim:
            case Won(watch):
                pass
            case _ if not enforce:
                return _unguarded(session, dialect, handed, handle)
            case Consumed():
                return _duplicate(session, dialect, complete)
            case InProgress(again):
                return Ended(How.IN_PROGRESS, again=again)
            case Conflict(fingerprint):
                return Ended(How.CONFLICT, fingerprint=fingerprint)
        assert watch is not None
        try:
            handle(handed)
            if complete is not None:
                complete(session)
            session.flush()
        except Exception as error:
            return _failed(dialect, watch, error)
        misuse = watch.verify(session)
        if misuse is not None or watch.lost is not None:
            return _failed(dialect, watch, misuse)
        watch.committing()
        try:
            session.commit()
        except Exception as error:
            if watch.left is not Left.NOT:
                return _failed(dialect, watch, error)
            watch.end(session)
            return _look_up(open_session, guard, row, _commit_failed(dialect, error))
        return _PROCESSED
    finally:
        if watch is not None:
            watch.end(session)
        else:
            let_go(session)


def _failed(dialect: Dialect, watch: Watch, error: BaseException | None) -> Ended:
    """Say how an attempt ended that never reached COMMIT; what the watch saw weighs more than what was raised."""
    if watch.left is Left.BROKEN:
        return Ended(How.BROKEN, watch.error)
    if watch.lost is not None:
        # the server threw the transaction away (a deadlock): whatever the handler made of that error, try again
        return Ended(How.TRANSIENT, watch.lost)
    if watch.left is Left.REFUSED:
        return Ended(How.FAILED, watch.error)  # also when the handler swallowed it, or wrapped it in its own
    assert error is not None
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
            return Ended(How.UNKNOWN, error)


def _look_up(open_session: Open, guard: Guard, row: ClaimRow, ended: Ended) -> Ended:
    """After a COMMIT that raised: our row there means it happened. Not there proves nothing, and `ended` stands.

    A COMMIT still on its way is safe: the redelivery's claim waits for it and then finds the row. A refusal is looked up
    too, for what was raised may come from a hook of the user's that ran after the server had committed.
    """
    session, _ = open_session()
    try:
        return _PROCESSED if guard.consumed(session, row) else ended
    except StoreUnavailable as error:
        return Ended(How.AWAY, error)
    except Exception:  # a look-up that fails leaves the outcome what it was: unknown
        return ended
    finally:
        let_go(session)


def _duplicate(session: Session, dialect: Dialect, complete: Callable[[Session], object] | None) -> Ended:
    """Nothing runs; a failure row of this message, if there may be one, is closed."""
    if complete is not None:
        try:
            complete(session)
            session.commit()
        except Exception as error:
            match dialect.trouble(error):
                case Trouble.UNAVAILABLE:
                    return Ended(How.AWAY, error)
                case Trouble.TRANSIENT:
                    return Ended(How.TRANSIENT, error)
                case _:
                    return Ended(How.FAILED, error)
    return _DUPLICATE


def _unguarded(session: Session, dialect: Dialect, handed: Any, handle: Callable[[Any], object]) -> Ended:
    """Run a message that would have been refused: how a team looks before it trusts."""
    session.rollback()
    try:
        handle(handed)
        session.commit()
    except Exception as error:
        transient = dialect.trouble(error) in (Trouble.TRANSIENT, Trouble.UNAVAILABLE)
        return Ended(How.TRANSIENT if transient else How.FAILED, error)
    return Ended(How.PROCESSED, again=True)
