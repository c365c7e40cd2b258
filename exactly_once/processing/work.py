"""A message for one handler, read: the one value that goes down to the attempt; a `Result` comes back up. Data only."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from exactly_once.claim import ClaimRow
from exactly_once.handlers.plan import Plan, Reading
from exactly_once.message import Message
from exactly_once.outcome import Result
from exactly_once.transports.contract import Features

__all__ = ["BatchResults", "Member", "Work"]


class Work(NamedTuple):
    """One message for one handler. Made by `Processor.read`, and never changed."""

    message: Message
    reading: Reading
    """What the handler's plan makes of the message."""
    row: ClaimRow | None
    """What is written when its key is claimed; None of a message that cannot be read."""
    features: Features
    """What the source of the delivery can do."""
    pumped: bool = False
    """It comes from the failure store."""
    foreign: bool = False
    """A consumer loop that is not ours asks; nothing is scheduled."""
    beside: bool = False
    """It asks in an event loop, and this thread is ours."""


@dataclass(slots=True, eq=False)
class Member:
    """One message of a batch, and what became of it."""

    work: Work
    result: Result | BaseException | None = None
    """An exception where the run of a single message ended in it, as `Processor.run` ends: cancelled and the like."""
    called: bool = False

    def unchanged(self, plan: Plan) -> Reading:
        """Return what the handler is called with; read anew for the second call, for the first may have changed the body."""
        if self.called:
            self.work = self.work._replace(reading=plan.read(self.work.message))
        self.called = True
        return self.work.reading


@dataclass(frozen=True, slots=True)
class BatchResults:
    """What became of each message of a batch, in the order given."""

    results: Sequence[Result | BaseException]
    """See `Member.result`."""
    deadlocked: bool
    """The database threw it away for another's sake: smaller batches, or `batch_order=`, get into each other's way less."""
