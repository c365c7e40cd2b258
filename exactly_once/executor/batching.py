"""Forms batches of the deliveries that wait for one handler on one database. Never opens or runs anything.

A batch is what waits now. It is never larger than `batch=`, and its first message waits for others no longer than `linger`.
One batch runs at a time: two would block each other on the rows that they lock. What waits meanwhile becomes the next batch.
Called by `executor`.
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
"""A batch of calls that takes longer is followed by smaller batches. Its rows stay locked all that time: processes that share
rows wait less for smaller batches, and beside so much work a commit costs little anyway."""
LONGEST_LIST: Final = timedelta(seconds=1)
"""The same for a handler that takes lists: it sends a few statements, which lock the rows as long as they run."""
FIRST: Final = 8
"""Messages in a worker's first batch. The size then doubles until it is too large."""
LEAST: Final = 1
FIRST_CALM: Final = 128
"""How many batches without a deadlock must pass after the first deadlock before the size grows again."""
MOST_CALM: Final = 4096
_GROWTH: Final = 1.1
_LOOK_S: Final = 0.0002
"""How long messages are read between two checks for the server's answer. A message that takes longer is read to its end."""


@dataclass(slots=True, eq=False)
class Queued:
    """A delivery that waits for its batch."""

    message: Message
    features: Features
    future: SmallFuture
    since: float
    read: Member | None = None


class BatchSize:
    """Decides how many messages the next batch takes: more after each good batch, fewer after a deadlock or a slow batch.

    A deadlock costs about a second, and growing again at once would meet the next one. So a number of batches must pass without a
    deadlock before the size grows. Each deadlock doubles that number; it starts anew once the size is back at the largest.

    Args:
        most: The size of the largest batch.
        longest: How long a batch may take.

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
        """How many messages the next batch may have."""
        return int(self._size)

    def ended(self, messages: int, took: timedelta, *, deadlocked: bool) -> None:
        """Adapt the size to a batch that ended: halve it after a deadlock, cut it to fit the time, else let it grow."""
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
    """The deliveries that wait for one handler on one database.

    Args:
        handler: The handler. Its plan gives the largest batch, and how long a message waits for others.
    """

    def __init__(self, handler: BatchProcessor) -> None:
        self.handler = handler
        self.size = BatchSize(handler.plan.batch or 1, LONGEST_LIST if handler.plan.in_lists else LONGEST)
        self._linger_s = handler.plan.linger.total_seconds()
        self._waiting: deque[Queued] = deque()
        self._taking = False
        self._lock = Lock()

    def add(self, message: Message, features: Features, future: SmallFuture) -> bool:
        """Add a delivery. True: the caller must start taking batches, because nobody takes them now."""
        with self._lock:
            self._waiting.append(Queued(message, features, future, monotonic()))
            first, self._taking = not self._taking, True
        return first

    def pause_s(self) -> float:
        """How long to wait before taking the next batch. 0: take it now."""
        waiting = self._waiting
        if not waiting or len(waiting) >= self.size.now:
            return 0.0
        return max(0.0, waiting[0].since + self._linger_s - monotonic())

    def take(self) -> list[Queued]:
        """Return the next batch, oldest first, without deliveries that were given back meanwhile.

        Empty: nothing waits, and the caller must stop taking batches. The next `add` returns True, so that taking starts again.
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
        """Return the batch for its handler, with each message read."""
        read = self.handler.member
        return [one.read or read(one.message, one.features) for one in batch]

    def read_ahead(self) -> Iterator[None]:
        """Read the messages of the next batch while the server is busy. Yields now and then, so that its answer is noticed."""
        with self._lock:
            coming = list(islice(self._waiting, self.size.now))
        look_at = monotonic() + _LOOK_S
        for one in coming:
            if one.read is None:
                made = self.handler.member(one.message, one.features)
                if made.work.row is not None:  # not a failed read: its error keeps frames alive, and so this batch
                    one.read = made
            if monotonic() > look_at:
                yield
                look_at = monotonic() + _LOOK_S
