"""What one consumer handed out and is not settled yet: settles each delivery once, and keeps the rest invisible.

One `InHand` for each consumer, with one thread of its own that does both. So a settle that blocks delays no other
consumer's extending, and no delivery is ever extended after it was settled. Never receives, never runs, never decides
a verdict. Called by the worker alone.

Settled once, without a lock: whoever takes the delivery out of `held` (`dict.pop`, one atomic step) is the one whose
verdict counts; a run that ends after its message was given back finds nothing there and is ignored.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from queue import Empty, SimpleQueue
from time import monotonic, sleep
from typing import Final

from exactly_once.outcome import Ack, RunFuture, Settlement
from exactly_once.transports.contract import Consumer, Delivery
from exactly_once.wording.steady_log import steady
from exactly_once.worker.log_throttle import ThrottledLog

__all__ = ["InHand", "Received"]

TURN_S: Final = 1.0
"""A settling thread with nothing to do wakes this often, so that it can be seen to be alive."""
SETTLED_AT_ONCE: Final = 1024
"""At most this many verdicts go into one `settle`: between two settles the thread looks after what must be extended."""
GATHER_S: Final = 0.02
"""While most of what is in hand still runs, a verdict waits so long for others: to a broker ten cost as much as one."""
_STEP_S: Final = GATHER_S / 4
_LAST_WAIT_S: Final = 0.2
"""After the last give-back: how long to wait for a verdict that another thread has just taken out of `held`."""


@dataclass(eq=False, slots=True)
class Received:
    """What one `receive` returned; its deliveries share their clock, so that a message costs no object here."""

    received: float
    due: float
    """When its deliveries must be extended next, on the monotonic clock."""


class InHand:
    """The deliveries of one consumer that are in our hands.

    Args:
        consumer: Whose.
        name: For logs and thread names.
        settled: Called after each batch was settled, with its size; the worker's room grows by that much.
    """

    def __init__(self, consumer: Consumer, name: str, settled: Callable[[int], None]) -> None:
        self.consumer, self.name, self.features = consumer, name, consumer.features
        self.held: dict[Delivery, Received] = {}
        self.running: dict[Delivery, RunFuture] = {}
        self.verdicts: SimpleQueue[tuple[Delivery, Settlement] | None] = SimpleQueue()
        self.received = self.settled = self.acked = self.redelivered = 0
        self.turned = monotonic()
        self._look = 0.0
        self._settled = settled
        self._throttled = ThrottledLog(steady("exactly_once.worker"))

    def take(self, deliveries: Sequence[Delivery]) -> None:
        """Note what a receive returned; called by the receiving thread under the worker's lock."""
        now = monotonic()
        batch = Received(now, now + self._third())
        self.received += len(deliveries)
        for delivery in deliveries:
            self.held[delivery] = batch

    def finish(self, delivery: Delivery, verdict: Settlement) -> bool:
        """Have the delivery settled with this verdict, unless it has one already; blocks on nothing.

        Returns:
            True where this verdict is the one that counts.
        """
        if self.held.pop(delivery, None) is None:
            return False
        self.verdicts.put((delivery, verdict))
        return True

    def work(self) -> None:
        """Settle and extend until told to end by a None in `verdicts`; the settling thread's whole life."""
        end = inf
        while True:
            self.turned = now = monotonic()
            if now >= end or (end < inf and self.received == self.settled):
                return
            wait = self._extend(now) if now >= self._look else max(0.0, self._look - now)
            try:
                first = self.verdicts.get(timeout=min(wait, TURN_S, max(0.0, end - now)))
            except Empty:
                continue
            self._gather()
            taken = [first]
            while len(taken) < SETTLED_AT_ONCE:
                try:
                    taken.append(self.verdicts.get_nowait())
                except Empty:
                    break
            if None in taken:
                end = monotonic() + _LAST_WAIT_S
            if batch := [verdict for verdict in taken if verdict is not None]:
                self._settle(batch)

    def _gather(self) -> None:
        """Wait a moment for more verdicts, until they are a quarter of all: what is left keeps the handlers busy."""
        late = monotonic() + GATHER_S
        while 3 * (self.verdicts.qsize() + 1) < len(self.held) and monotonic() < late:
            sleep(_STEP_S)

    def _settle(self, batch: list[tuple[Delivery, Settlement]]) -> None:
        """Hand the verdicts to the consumer; after a crash in here the messages come back, and the claims decide."""
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
        acked = sum(type(verdict) is Ack for _, verdict in batch)
        self.acked += acked
        self.redelivered += len(batch) - acked
        self.settled += len(batch)
        self._settled(len(batch))

    def _extend(self, now: float) -> float:
        """Extend what has been in our hands for a third of its invisibility, and return when to look again."""
        third = self._third()
        tick = min(third / 4, TURN_S)  # looked at four times a third: the worst case is extended at 5/12 of the time
        self._look = now + tick
        # a copy, for other threads add and take away meanwhile, and a dict must not change under an iteration
        due = {} if third == inf else {d: batch for d, batch in self.held.copy().items() if batch.due <= now}
        if due:
            try:
                self.consumer.extend(list(due))
            except BaseException as error:  # noqa: BLE001, RUF100
                # `due` stays as it is: tried again at the next look, eight times before the broker brings them again
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
