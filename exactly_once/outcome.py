"""What became of a message: `Outcome` for the caller, a verdict for the worker that has the delivery. Data only.

`Ack` and `Redeliver` go on to the transport; each delivery is settled exactly once. `WaitForStore` and `WaitForKey` never reach
a transport: the worker keeps the delivery, renews its invisibility and runs it again, so that waiting does not
use up the broker's delivery attempts. `WaitForStore` waits for a store, and nothing is received meanwhile. `WaitForKey` waits
for another run of this one key, and everything else goes on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum
from typing import Any, NoReturn, Protocol

__all__ = [
    "Ack",
    "HandlerOutcome",
    "Outcome",
    "Redeliver",
    "Result",
    "RunFuture",
    "Settlement",
    "Verdict",
    "WaitForKey",
    "WaitForStore",
]


class Outcome(Enum):
    """What became of a message. A consumer loop only has to check `acknowledge`.

    Example:
        >>> Outcome.DUPLICATE.acknowledge
        True
        >>> Outcome.UNKNOWN.acknowledge
        False
    """

    PROCESSED = "processed"
    """The handler ran and its transaction committed."""
    DUPLICATE = "duplicate"
    """The key was consumed before; nothing ran."""
    DEAD = "dead"
    """Kept whole in the failure store until a person decides; the broker may forget it."""
    NOT_MINE = "not mine"
    """No handler of this application takes it."""
    IN_PROGRESS = "in progress"
    """Another run holds the key right now; ask again later."""
    FAILED = "failed"
    """The handler failed and nothing was committed; it will be tried again."""
    UNKNOWN = "unknown"
    """It is not known whether the commit succeeded; the redelivery finds out."""
    WAITING = "waiting"
    """Nothing ran: the store did not answer, or an older message of the same ordering key comes first."""

    @property
    def acknowledge(self) -> bool:
        """True when the broker may forget the message."""
        return self in _FINISHED

    def __bool__(self) -> NoReturn:
        # Any other Enum is true: `if eo.process(message): acknowledge()` would lose every message that failed.
        raise TypeError(
            "An Outcome is neither true nor false: FAILED too would be acknowledged. Write: if outcome.acknowledge:"
        )


_FINISHED = frozenset({Outcome.PROCESSED, Outcome.DUPLICATE, Outcome.DEAD, Outcome.NOT_MINE})


@dataclass(frozen=True, slots=True)
class Ack:
    """Finished: processed, duplicate, or kept whole in the failure store."""


@dataclass(frozen=True, slots=True)
class Redeliver:
    """Not finished: deliver it again, not before `delay`."""

    delay: timedelta = timedelta(0)


@dataclass(frozen=True, slots=True)
class WaitForStore:
    """Not run, because the database named `store` does not answer: keep it until the database does."""

    store: str


Settlement = Ack | Redeliver


@dataclass(frozen=True, slots=True)
class WaitForKey:
    """Not finished, because another run holds its key, or because nothing could be written down: run it again after `again`.

    After `longest` carry out `then` instead.

    `longest` counts from the moment when it was first kept, not from its receive: a delivery that was behind others has
    not yet waited for its own key. Each run that keeps it gives all three values again, so that `then` knows how long the
    other run may still last. Zero means no waiting: `then` at once.
    """

    again: timedelta
    longest: timedelta
    then: Settlement


Verdict = Settlement | WaitForStore | WaitForKey
"""What the worker is to do with a delivery."""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a delivery, and what the worker must do. Every run ends with one."""

    outcome: Outcome
    verdict: Verdict
    raises: BaseException | None = None
    """What must be raised in a loop of the caller, once all handlers of the message have run."""
    in_handler: bool = False
    """The handler itself reported in progress, because it claims a part or takes a lock; the message's own key was free."""
    handlers: Sequence["HandlerOutcome"] = field(default=(), compare=False)
    """The outcome for each handler that takes it and has ended; filled in by the executor."""


HandlerOutcome = tuple[str, Outcome]
"""A handler's name, and the outcome of a message for it."""


class RunFuture(Protocol):
    """The future result of a run: a `concurrent.futures.Future`, or an object with the same methods."""

    def add_done_callback(self, callback: Callable[[Any], object], /) -> None:
        """Call this with the future when the run has ended; at once if it has."""

    def cancel(self) -> bool:
        """Keep the run from beginning, or stop it, if that is possible."""

    def exception(self) -> BaseException | None:
        """Return the exception of a run that has ended."""

    def result(self) -> Result:
        """Return the result of a run that has ended; raise its exception."""
