"""A consumer's lane: its deliveries in hand, each settled once and extended until then; and its two threads.

The lane's settling thread settles and extends. So a settle that blocks does not delay the extending of another consumer, and no
delivery is ever extended after it was settled. The receiving thread runs the worker's `_receive`, for what is received is begun
by the worker. Never receives, runs, or decides a verdict. Called by the worker alone.

Each delivery is settled once, without a lock: only the caller that takes the delivery out of `in_hand` (`dict.pop`, one atomic
step) settles it. A run that ends after its message was given back finds nothing there and is ignored.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from queue import Empty, SimpleQueue
from threading import Thread
from time import monotonic, sleep
from typing import Final

from exactly_once.events.throttled_log import ThrottledLog
from exactly_once.outcome import Ack, RunFuture, Settlement
from exactly_once.transports.contract import Consumer, Delivery
from exactly_once.wording.steady_log import steady
from exactly_once.worker.capacity import Seat

__all__ = ["Lane", "Received"]

TURN_S: Final = 1.0
"""An idle settling thread wakes this often, to show that it is alive."""
SETTLED_AT_ONCE: Final = 1024
"""The most settlements in one `settle`. Between two settles the thread extends deliveries that are due."""
GATHER_S: Final = 0.02
"""While most messages in hand still run, a settlement waits so long for others: ten cost a broker as much as one."""
_STEP_S: Final = GATHER_S / 4
_LAST_WAIT_S: Final = 0.2
"""How long to wait at the end for a settlement whose delivery another thread has just taken out of `in_hand`."""


@dataclass(eq=False, slots=True)
class Received:
    """What one `receive` returned. Its deliveries share one time, so that no object is needed for each message."""

    received: float
    due: float
    """When the deliveries must be extended next, on the monotonic clock."""


class Lane:
    """One consumer, with its deliveries in hand and its two threads, which the worker makes.

    Args:
        consumer: The consumer.
        name: For logs and thread names.
        has_settled: Called after each `settle` with the number of deliveries: so many places are free again.
    """

    receiver: Thread
    settler: Thread

    def __init__(self, consumer: Consumer, name: str, has_settled: Callable[[int], None]) -> None:
        self.consumer, self.name, self.features = consumer, name, consumer.features
        self.seat = Seat()
        self.in_hand: dict[Delivery, Received] = {}
        self.running: dict[Delivery, RunFuture] = {}
        self.decided: SimpleQueue[tuple[Delivery, Settlement] | None] = SimpleQueue()
        self.received = self.settled = self.acked = self.redelivered = 0
        self.receiver_turned = self.settler_turned = monotonic()
        self.quiet = -1
        """The worker's `_events` when the last empty receive began."""
        self._next_look = 0.0
        self._has_settled = has_settled
        self._throttled = ThrottledLog(steady("exactly_once.worker"))

    def take(self, deliveries: Sequence[Delivery]) -> None:
        """Record what a receive returned. Called by the receiving thread under the worker's lock."""
        now = monotonic()
        batch = Received(now, now + self._third())
        self.received += len(deliveries)
        for delivery in deliveries:
            self.in_hand[delivery] = batch

    def decide(self, delivery: Delivery, settlement: Settlement) -> bool:
        """Have the delivery settled with this settlement, unless it has one already. Never blocks.

        Returns:
            True if this settlement counts.
        """
        if self.in_hand.pop(delivery, None) is None:
            return False
        self.decided.put((delivery, settlement))
        return True

    def settle(self) -> None:
        """Settle and extend, until a None in `decided` ends it. The settling thread runs only this."""
        end = inf
        while True:
            self.settler_turned = now = monotonic()
            if now >= end or (end < inf and self.received == self.settled):
                return
            wait = self._extend(now) if now >= self._next_look else max(0.0, self._next_look - now)
            try:
                first = self.decided.get(timeout=min(wait, TURN_S, max(0.0, end - now)))
            except Empty:
                continue
            self._gather()
            taken = [first]
            while len(taken) < SETTLED_AT_ONCE:
                try:
                    taken.append(self.decided.get_nowait())
                except Empty:
                    break
            if None in taken:
                end = monotonic() + _LAST_WAIT_S
            if batch := [each for each in taken if each is not None]:
                self._settle(batch)

    def _gather(self) -> None:
        """Wait a moment for more settlements, until they are a quarter of all: the other messages keep the handlers busy."""
        late = monotonic() + GATHER_S
        while 3 * (self.decided.qsize() + 1) < len(self.in_hand) and monotonic() < late:
            sleep(_STEP_S)

    def _settle(self, batch: list[tuple[Delivery, Settlement]]) -> None:
        """Give the settlements to the consumer. After a crash in here the messages come back, and their claims decide."""
        try:
            self.consumer.settle(batch)
        except BaseException as error:  # noqa: BLE001, RUF100  (this thread must not die of a client's mistake)
            self._throttled.warning(
                "settle",
                "%s could not settle %d message(s); the broker brings them again, and what is done is not repeated.",
                self.name,
                len(batch),
                error=error,
            )
        acked = sum(type(settlement) is Ack for _, settlement in batch)
        self.acked += acked
        self.redelivered += len(batch) - acked
        self.settled += len(batch)
        self._has_settled(len(batch))

    def _extend(self, now: float) -> float:
        """Extend the deliveries that were in hand for a third of their invisible time. Returns the time until the next look."""
        third = self._third()
        tick = min(third / 4, TURN_S)  # four looks in each third: at the latest extended at 5/12 of the invisible time
        self._next_look = now + tick
        # a copy, because other threads change the dict meanwhile, which would break the iteration
        due = {} if third == inf else {d: batch for d, batch in self.in_hand.copy().items() if batch.due <= now}
        if due:
            try:
                self.consumer.extend(list(due))
            except BaseException as error:  # noqa: BLE001, RUF100
                # `due` is unchanged, so the next look tries again: eight times before the broker redelivers them
                self._throttled.warning(
                    "extend", "%s could not extend %d message(s); trying again.", self.name, len(due), error=error
                )
            else:
                for batch in due.values():
                    batch.due = now + third
        return tick

    def _third(self) -> float:
        invisible = self.consumer.invisible
        return inf if invisible is None else invisible.total_seconds() / 3
