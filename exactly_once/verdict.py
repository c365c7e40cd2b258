"""What the worker is told to do with a delivery. Data only.

`Ack` and `Redeliver` go on to the transport, each delivery settled exactly once. `Hold` and `Keep` never reach one: the
worker keeps the delivery in its hands, renews its invisibility and runs it again, so that waiting does not spend the
broker's delivery attempts. `Hold` waits for a store, and nothing is received meanwhile; `Keep` waits for another run of
this one key, and everything else goes on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

__all__ = ["Ack", "Ending", "Hold", "Keep", "Redeliver", "Said", "Verdict"]


@dataclass(frozen=True, slots=True)
class Ack:
    """Finished with: processed, duplicate, or kept whole in the failure store."""


@dataclass(frozen=True, slots=True)
class Redeliver:
    """Not finished with: bring it again, not before `delay`."""

    delay: timedelta = timedelta(0)


@dataclass(frozen=True, slots=True)
class Hold:
    """Not run, because the database named `store` does not answer: keep it until it does."""

    store: str


Verdict = Ack | Redeliver


@dataclass(frozen=True, slots=True)
class Keep:
    """Not run, because another run holds its key: run it again after `again`, and after `longest` do `then` instead.

    `longest` counts from the moment it was first kept, not from its receive: a delivery that stood behind others has
    waited for nothing of its own yet. Each run that keeps it says all three anew, so that `then` knows how long the
    other run may still last. Zero is no patience: `then` at once.
    """

    again: timedelta
    longest: timedelta
    then: Verdict


Said = Verdict | Hold | Keep
"""What a run may end with."""


class Ending(Protocol):
    """What a run will say, to whoever asked for it: a `concurrent.futures.Future`, or what looks like one."""

    def add_done_callback(self, callback: Callable[[Any], object], /) -> None:
        """Have this called with it when it has ended; at once if it has."""

    def cancel(self) -> bool:
        """Keep it from beginning, or stop it, where that can be."""

    def exception(self) -> BaseException | None:
        """What it broke with, of one that has ended."""

    def result(self) -> Any:
        """What it said, of one that has ended; raises what it broke with."""
