"""What goes into a group of deliveries, and what comes out of it. Data only; `processing.batch` tells their story."""

from collections.abc import Sequence
from dataclasses import dataclass

from exactly_once.claim import ClaimRow
from exactly_once.handlers.plan import Plan, Reading
from exactly_once.message import Message
from exactly_once.processing.recording import Result
from exactly_once.transports.contract import Features

__all__ = ["BatchResults", "Member"]


@dataclass(frozen=True, slots=True)
class BatchResults:
    """What became of each delivery of a group, in the order given."""

    told: Sequence[Result | BaseException]
    """An exception where the run of a single message ended in it, as `Processor.run` ends: cancelled and the like."""
    deadlocked: bool
    """The database threw it away for another's sake: smaller groups, or `batch_order=`, get into each other's way less."""


@dataclass(slots=True, eq=False)
class Member:
    """One delivery of a group, read."""

    message: Message
    features: Features
    reading: Reading
    row: ClaimRow | None
    told: Result | BaseException | None = None
    called: bool = False

    def unchanged(self, plan: Plan) -> Reading:
        """Return what the handler is called with; read anew for the second call, for the first may have changed the body."""
        if self.called:
            self.reading = plan.read(self.message)
        self.called = True
        return self.reading
