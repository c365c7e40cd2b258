"""Keeps deliveries in hand whose key another run holds, and has each run again when it is due.

One thread runs from the first kept delivery until none is left. Never receives, settles or redelivers: a look spends no delivery
attempt. A kept delivery is not settled, so it is extended like all in hand, and no later message of its ordering key is handed
out. Called by the worker.

The time since a delivery was first kept is passed to its run and back, and stored nowhere else. So nothing is left to clean up
when the delivery is settled. An outage in between, which returns `WaitForStore`, starts this time anew.
"""

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from threading import Condition, Thread
from time import monotonic

from exactly_once.outcome import WaitForKey
from exactly_once.transports.contract import Delivery
from exactly_once.worker.lane import Lane
from exactly_once.worker.outages import WaitingDeliveries

__all__ = ["BusyKeys"]


class BusyKeys:
    """The deliveries that wait for another run to end.

    Args:
        run_again: Starts the run of a delivery, with the time when it was first kept. Does not wait for the run.
        changed: The worker's condition. `keep` and `give_up` are called with its lock held.
        stopping: Whether the worker stops. The worker then takes over the waiting deliveries.
    """

    def __init__(
        self,
        run_again: Callable[[Lane, Delivery, float], None],
        changed: Condition,
        stopping: Callable[[], bool],
    ) -> None:
        self._run_again, self._changed, self._stopping = run_again, changed, stopping
        # due time, unique number (deliveries cannot be compared), lane, delivery, first kept at
        self._heap: list[tuple[float, int, Lane, Delivery, float]] = []
        self._numbers = count()
        self._turning = False

    def keep(self, keep: WaitForKey, lane: Lane, delivery: Delivery, since: float | None) -> bool:
        """Keep a delivery until its next look.

        Args:
            keep: The verdict of its run.
            lane: The lane of its consumer.
            delivery: The delivery to keep.
            since: When it was first kept, on the monotonic clock. None: now.

        Returns:
            False if it was kept as long as `keep.longest`: the caller must carry out `keep.then`.
        """
        now = monotonic()
        since = now if since is None else since
        end = since + keep.longest.total_seconds()
        if now >= end:
            return False
        # the last look is exactly at the end, whatever the interval is
        due = min(now + keep.again.total_seconds(), end)
        heappush(self._heap, (due, next(self._numbers), lane, delivery, since))
        if not self._turning:
            Thread(target=self._turn, daemon=True, name="kept").start()
            self._turning = True
        elif self._heap[0][3] is delivery:
            self._changed.notify_all()  # due earlier than the delivery that the thread waits for
        return True

    @property
    def number(self) -> int:
        """How many deliveries are kept now."""
        return len(self._heap)

    def give_up(self) -> WaitingDeliveries:
        """Return all waiting deliveries, and forget them: the worker stops."""
        waiting: WaitingDeliveries = {delivery: lane for _, _, lane, delivery, _ in sorted(self._heap)}
        self._heap = []
        return waiting

    def _turn(self) -> None:
        while True:
            with self._changed:
                while self._heap and not self._stopping() and (left := self._heap[0][0] - monotonic()) > 0:
                    self._changed.wait(left)
                if self._stopping() or not self._heap:
                    self._turning = False
                    return
                _, _, lane, delivery, since = heappop(self._heap)
            # a `stop` right here does not find this delivery among the kept: like any run, it finishes or is given back
            self._run_again(lane, delivery, since)
