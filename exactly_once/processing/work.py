"""One message for one handler, read: the value that goes down to the attempt. A `Result` comes back up. Data only."""

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
    """The message as the handler's plan reads it."""
    row: ClaimRow | None
    """The claim to write. None: the message cannot be read."""
    features: Features
    """What the source of the delivery can do."""
    pumped: bool = False
    """The message comes from the failure store."""
    callers_loop: bool = False
    """The caller is a consumer loop that is not ours; no retry is scheduled."""
    on_our_thread: bool = False
    """The caller is in an event loop, and this thread is ours, not the caller's."""


@dataclass(slots=True, eq=False)
class Member:
    """One message of a batch, and what became of it."""

    work: Work
    result: Result | BaseException | None = None
    """An exception if `Processor.run` raised it for this message (cancellation and the like)."""
    called: bool = False

    def unchanged(self, plan: Plan) -> Reading:
        """Return what the handler is called with. Read anew for a second call: the first may have changed the body."""
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
    """The database rolled the batch back because of a deadlock. Smaller batches, or `batch_order=`, collide less often."""
