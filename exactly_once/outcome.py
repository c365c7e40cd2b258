"""What became of a message: `Outcome` for whoever called, a verdict for the worker that has the delivery. Data only.

`Ack` and `Redeliver` go on to the transport, each delivery settled exactly once. `WaitForStore` and `WaitForKey` never reach
one: the worker keeps the delivery, renews its invisibility and runs it again, so that waiting does not spend the broker's
delivery attempts. `WaitForStore` waits for a store, and nothing is received meanwhile. `WaitForKey` waits for another run of
this one key, and everything else goes on.
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
    """What became of a message; `acknowledge` is all a consumer loop has to ask.

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
    """Kept whole in the failure store until a person decides; the broker is done with it."""
    NOT_MINE = "not mine"
    """No handler of this application wants it."""
    IN_PROGRESS = "in progress"
    """Another run holds the key right now; ask again later."""
    FAILED = "failed"
    """The handler failed and nothing was committed; it will be tried again."""
    UNKNOWN = "unknown"
    """The commit's fate could not be learnt; the redelivery finds out."""
    WAITING = "waiting"
    """Nothing ran: the store did not answer, or an older message of the same ordering key comes first."""

    @property
    def acknowledge(self) -> bool:
        """True when the broker may forget the message."""
        return self in _FINISHED

    def __bool__(self) -> NoReturn:
        # as any Enum it would be true: `if eo.process(message): acknowledge()` would lose every message that failed
        raise TypeError(
            "An Outcome is neither true nor false: FAILED too would be acknowledged. Write: if outcome.acknowledge:"
        )


_FINISHED = frozenset({Outcome.PROCESSED, Outcome.DUPLICATE, Outcome.DEAD, Outcome.NOT_MINE})


@dataclass(frozen=True, slots=True)
class Ack:
    """Finished with: processed, duplicate, or kept whole in the failure store."""


@dataclass(frozen=True, slots=True)
class Redeliver:
    """Not finished with: bring it again, not before `delay`."""

    delay: timedelta = timedelta(0)


@dataclass(frozen=True, slots=True)
class WaitForStore:
    """Not run, because the database named `store` does not answer: keep it until it does."""

    store: str


Settlement = Ack | Redeliver


@dataclass(frozen=True, slots=True)
class WaitForKey:
    """Not run, because another run holds its key: run it again after `again`, and after `longest` do `then` instead.

    `longest` counts from the moment it was first kept, not from its receive: a delivery that stood behind others has
    waited for nothing of its own yet. Each run that keeps it says all three anew, so that `then` knows how long the
    other run may still last. Zero is no patience: `then` at once.
    """

    again: timedelta
    longest: timedelta
    then: Settlement


Verdict = Settlement | WaitForStore | WaitForKey
"""What the worker is to do with a delivery."""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a delivery, and what the worker is to do: what every run ends with."""

    outcome: Outcome
    verdict: Verdict
    raises: BaseException | None = None
    """What a loop of the caller's is to be raised, once all handlers of the message have run."""
    in_handler: bool = False
    """In progress as the handler said, which claims a part or takes a lock: the message's own key was free."""
    handlers: Sequence["HandlerOutcome"] = field(default=(), compare=False)
    """What became of it for each handler that wanted it and has ended; filled in by the executor."""


HandlerOutcome = tuple[str, Outcome]
"""A handler's name, and what became of a message for it."""


class RunFuture(Protocol):
    """What a run will say, to whoever asked for it: a `concurrent.futures.Future`, or what looks like one."""

    def add_done_callback(self, callback: Callable[[Any], object], /) -> None:
        """Have this called with it when it has ended; at once if it has."""

    def cancel(self) -> bool:
        """Keep it from beginning, or stop it, where that can be."""

    def exception(self) -> BaseException | None:
        """What it broke with, of one that has ended."""

    def result(self) -> Result:
        """What it said, of one that has ended; raises what it broke with."""
