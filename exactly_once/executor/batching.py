"""Forms batches out of the deliveries that wait for one handler on one database. Opens nothing and runs nothing.

A batch is what is waiting: it is never larger than `batch=`, and its first message waits for others no longer than `linger`.
One batch at a time: two would get into each other's way on the rows they lock, and what waits meanwhile is the next batch.
The `executor` takes the batches.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from threading import Lock
from time import monotonic
from typing import Final

from exactly_once.executor.future import SmallFuture
from exactly_once.message import Message
from exactly_once.processing.batch import BatchProcessor
from exactly_once.processing.work import Member
from exactly_once.transports.contract import Features

__all__ = ["FIRST", "FIRST_CALM", "LEAST", "LONGEST", "LONGEST_LIST", "MOST_CALM", "BatchSize", "Batching", "Queued"]

LONGEST: Final = timedelta(milliseconds=50)
"""A batch of calls that takes longer is followed by smaller ones. Its rows are locked all that time: where processes share rows,
smaller batches let each other through, and a commit is already cheap beside so much work."""
LONGEST_LIST: Final = timedelta(seconds=1)
"""The same for a handler of lists: a few statements, which lock the rows for as long as they take."""
FIRST: Final = 8
"""Messages in a worker's first batch; from there the size doubles until it is too large."""
LEAST: Final = 1
FIRST_CALM: Final = 128
"""How many batches without a deadlock there must be before they grow: behind the first one."""
MOST_CALM: Final = 4096
_GROWTH: Final = 1.1
_LOOK_S: Final = 0.0002
"""So long messages are read between two looks for the server's answer; one that takes longer is read to its end."""


@dataclass(slots=True, eq=False)
class Queued:
    """A delivery that waits for its batch."""

    message: Message
    features: Features
    future: SmallFuture
    since: float
    read: Member | None = None


class BatchSize:
    """How many messages the next batch takes: more and more, fewer behind a deadlock or a slow batch.

    A deadlock costs about a second, and growing back at once would find the next one: how many batches must pass without one
    before the size grows doubles each time, until it is back at the largest.

    Args:
        most: The largest batch.
        longest: How long one may take.

    Example:
        >>> size = BatchSize(100)
        >>> size.now
        8
        >>> size.ended(8, timedelta(milliseconds=2), deadlocked=False)
        >>> size.now
        16
        >>> size.ended(16, timedelta(milliseconds=2), deadlocked=True)
        >>> size.now
        8
    """

    def __init__(self, most: int, longest: timedelta = LONGEST) -> None:
        self._most = float(most)
        self._size = min(self._most, float(FIRST))
        self._calm = self._patience = 0
        self._longest, self._growth = longest, 2.0

    @property
    def now(self) -> int:
        """How many the next batch may have."""
        return int(self._size)

    def ended(self, messages: int, took: timedelta, *, deadlocked: bool) -> None:
        """Learn from a batch: halved after a deadlock, cut to what fits into the time, else grown."""
        size = self._size
        if deadlocked:
            size = min(size, messages) / 2
            self._calm, self._growth = 0, _GROWTH
            self._patience = min(MOST_CALM, max(FIRST_CALM, 2 * self._patience))
        elif took > self._longest:
            size = min(size, messages * (self._longest / took))
            self._growth = _GROWTH
        else:
            self._calm += 1
            if messages >= int(size) and self._calm >= self._patience:
                size *= self._growth
        self._size = min(self._most, max(float(LEAST), size))
        if self._size == self._most and not deadlocked:
            self._patience = 0


class Batching:
    """What waits for one handler on one database.

    Args:
        handler: Whose; its plan says how many, and how long a message waits for others.
    """

    def __init__(self, handler: BatchProcessor) -> None:
        self.handler = handler
        self.size = BatchSize(handler.plan.batch or 1, LONGEST_LIST if handler.plan.in_lists else LONGEST)
        self._linger_s = handler.plan.linger.total_seconds()
        self._waiting: deque[Queued] = deque()
        self._taking = False
        self._lock = Lock()

    def add(self, message: Message, features: Features, future: SmallFuture) -> bool:
        """Let a delivery wait; True if somebody must begin to take batches, for nobody does."""
        with self._lock:
            self._waiting.append(Queued(message, features, future, monotonic()))
            first, self._taking = not self._taking, True
        return first

    def pause_s(self) -> float:
        """How long to wait before the next batch is taken; 0 when there is no more to wait for."""
        waiting = self._waiting
        if not waiting or len(waiting) >= self.size.now:
            return 0.0
        return max(0.0, waiting[0].since + self._linger_s - monotonic())

    def take(self) -> list[Queued]:
        """Return the next batch, oldest first, without those that were given back meanwhile.

        Empty: nothing waits, and whoever takes batches ends; the next `add` says that somebody must begin again.
        """
        batch: list[Queued] = []
        with self._lock:
            most = self.size.now
            while self._waiting and len(batch) < most:
                one = self._waiting.popleft()
                if one.future.set_running_or_notify_cancel():
                    batch.append(one)
            self._taking = bool(batch)
        return batch

    def members(self, batch: Sequence[Queued]) -> list[Member]:
        """Return a batch as its handler takes it, each message read."""
        read = self.handler.member
        return [one.read or read(one.message, one.features) for one in batch]

    def read_ahead(self) -> Iterator[None]:
        """Read what the next batch will be made of; for the time that the server is busy, which is looked at now and then."""
        with self._lock:
            coming = list(islice(self._waiting, self.size.now))
        look_at = monotonic() + _LOOK_S
        for one in coming:
            if one.read is None:
                made = self.handler.member(one.message, one.features)
                if made.work.row is not None:  # an error keeps its frames alive, and so this batch
                    one.read = made
            if monotonic() > look_at:
                yield
                look_at = monotonic() + _LOOK_S
