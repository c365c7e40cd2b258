"""The contract with whatever remembers claims: what a claim can come back with, and the verbs around a handler.

Called in a thread, or in SQLAlchemy's greenlet under asyncio: never async itself. Called by `attempt`, and by
`processor` for a message that has no delivery left.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

from sqlalchemy.orm import Session

from exactly_once.claim import ClaimRow
from exactly_once.guards.lease.contract import HeldLease

if TYPE_CHECKING:
    from exactly_once.database.watched.deferred_watch import DeferredWatch
    from exactly_once.database.watched.watch import Watch
    from exactly_once.redis.lock import RedisLock

__all__ = ["Busy", "Claim", "Conflict", "Consumed", "Guard", "HookRaised", "OpenOurs", "Unfinished", "Won"]

OpenOurs = Callable[[], tuple[Session, Any]]
"""Make a session of our own, beside the handler's."""


@dataclass(eq=False, slots=True)
class Won:
    """The key is ours.

    `watch` sees that the handler does not end the transaction: from the claim on, or `deferred_watch`, from the session's first
    statement on. `held` is the lease, `lock` the lock, where that is what makes the key ours.
    """

    first_watch: "Watch | None" = None
    late: "DeferredWatch | None" = None
    held: HeldLease | None = None
    lock: "RedisLock | None" = None

    @property
    def watch(self) -> "Watch | None":
        """The watch, once there is a transaction."""
        return self.first_watch if self.late is None else self.late.watch


@dataclass(frozen=True, slots=True)
class Consumed:
    """Done before: acknowledge. `owner` is the attempt whose claim it is, where it is known."""

    owner: str | None = None


@dataclass(frozen=True, slots=True)
class Unfinished:
    """The claim of `owner` was committed by something else than its attempt: what it stands for is done in part. For a person."""

    owner: str


@dataclass(frozen=True, slots=True)
class Busy:
    """Another run holds it. `again`: one more try at once may already see how that run ended. `remaining`: of its lease."""

    again: bool = False
    remaining: timedelta | None = None


@dataclass(frozen=True, slots=True)
class Conflict:
    """Consumed before under another payload, whose fingerprint this is."""

    fingerprint: bytes


Claim = Won | Consumed | Busy | Conflict | Unfinished


class HookRaised(Exception):
    """A hook of the application's session raised what is no `Exception`, before the claim was sent. It is the message's failure.

    Args:
        error: What it raised.
    """

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error


class Guard(Protocol):
    """Decides whether a message may run, and makes that decision part of what the handler commits."""

    def claim(self, session: Session, row: ClaimRow) -> Claim:
        """Take the key before user code runs.

        After `Won` the session is in the transaction the handler will use; after anything else in none.

        Raises:
            StoreUnavailable: The store does not answer; nothing was claimed, as far as is known.
        """

    def complete(self, session: Session, won: Won) -> Consumed | None:
        """The last statement of the handler's transaction before its COMMIT, where there is something to write in it.

        Returns:
            None; or `Consumed`, where another run has committed this message's effects: nothing may be committed then.

        Raises:
            LeaseLost: The key is not ours any more; nothing may be committed.
        """

    def consume(self, won: Won) -> None:
        """After the COMMIT, mark what lies outside that transaction as consumed.

        Raises:
            LeaseLost: Another run has taken the message over.
            StoreUnavailable: It is not marked: the message must not be acknowledged, and its lease not be let go.
        """

    def end(self, won: Won) -> None:
        """The run has ended, however: nothing keeps its key alive any more."""

    def release(self, won: Won, *, broken: bool = False) -> bool:
        """After the rollback, let others have the key; False if it is another's already. Never raises: it runs out by itself.

        Args:
            won: What was claimed.
            broken: The handler committed behind our back: nobody is to have it before a person has looked.
        """

    def look(self, open_ours: OpenOurs, row: ClaimRow) -> Consumed | Unfinished | None:
        """Look once, in a session of ours, what stands under this key with this payload.

        Raises:
            StoreUnavailable: The store does not answer.
        """
