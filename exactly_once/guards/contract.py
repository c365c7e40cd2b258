"""The contract of a guard: the possible answers to a claim, and the methods called around a handler.

Called in a thread, or in SQLAlchemy's greenlet under asyncio: never async itself. Called by `attempt`, and by `processor`, which
looks up a claim without a run (for a message with its last delivery, or behind others of its ordering key).
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
"""Make a session of our own, beside the handler's session."""


@dataclass(eq=False, slots=True)
class Won:
    """The key is ours.

    `first_watch` watches from the claim on that the handler does not end the transaction. `deferred_watch` does so from the
    session's first statement on. `held` is the lease, `lock` the lock, if the key was taken by one.
    """

    first_watch: "Watch | None" = None
    deferred_watch: "DeferredWatch | None" = None
    held: HeldLease | None = None
    lock: "RedisLock | None" = None

    @property
    def watch(self) -> "Watch | None":
        """The watch, once there is a transaction."""
        return self.first_watch if self.deferred_watch is None else self.deferred_watch.watch


@dataclass(frozen=True, slots=True)
class Consumed:
    """The message was consumed before: acknowledge it. `owner` is the attempt that made the claim, if known."""

    owner: str | None = None


@dataclass(frozen=True, slots=True)
class Unfinished:
    """Something other than its attempt committed the claim of `owner`: the work is done in part. A person decides."""

    owner: str


@dataclass(frozen=True, slots=True)
class Busy:
    """Another run holds the key. `again`: that run may just have ended, try once more at once. `remaining`: of its lease."""

    again: bool = False
    remaining: timedelta | None = None


@dataclass(frozen=True, slots=True)
class Conflict:
    """The key is known with another payload, which has this fingerprint."""

    fingerprint: bytes


Claim = Won | Consumed | Busy | Conflict | Unfinished


class HookRaised(Exception):
    """A hook of the application's session raised a `BaseException` before the claim was sent. The message fails with it.

    Args:
        error: What the hook raised.
    """

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error


class Guard(Protocol):
    """Decides whether a message may run, and makes that decision part of what the handler commits."""

    def claim(self, session: Session, row: ClaimRow) -> Claim:
        """Take the key before user code runs.

        After `Won` the session is in the transaction that the handler will use. After any other answer it is in none.

        Raises:
            StoreUnavailable: The store does not answer. As far as is known, nothing was claimed.
        """

    def complete(self, session: Session, won: Won) -> Consumed | None:
        """Send the last statement of the handler's transaction before its COMMIT, if the guard has one.

        Returns:
            None. Or `Consumed`, if another run has committed this message's effects: then nothing may be committed.

        Raises:
            LeaseLost: The key is no longer ours. Nothing may be committed.
        """

    def consume(self, won: Won) -> None:
        """After the COMMIT, mark the message as consumed where the claim is kept outside that transaction.

        Raises:
            LeaseLost: Another run has taken the message over.
            StoreUnavailable: It is not marked. Do not acknowledge the message, and do not release its lease.
        """

    def end(self, won: Won) -> None:
        """The run has ended in any way: stop renewing its key."""

    def release(self, won: Won, *, broken: bool = False) -> bool:
        """After the rollback, release the key. False: another run has it already. Never raises: a lease also ends by itself.

        Args:
            won: What was claimed.
            broken: Something other than our COMMIT committed: no run may have the key before a person has looked.
        """

    def look(self, open_ours: OpenOurs, row: ClaimRow) -> Consumed | Unfinished | None:
        """Look up once, in a session of our own, which claim stands under this key with this payload.

        Raises:
            StoreUnavailable: The store does not answer.
        """
