"""Deliveries whose key another run holds: kept in hand, and run again when each one's moment has come.

One thread, from the first that is kept until none is left: a worker that keeps nothing has none. Never receives, never
settles, never redelivers: a look spends no delivery attempt. What is kept is unsettled, so it is extended like all that
is in hand, and nothing behind it of its ordering key is handed out. Called by the worker.

How long one was kept goes with it into its run and back, and is written down nowhere: an outage in between, which says
`WaitForStore`, begins its patience anew, and nothing has to be tidied up behind one that is settled.
"""

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from threading import Condition, Thread
from time import monotonic

from exactly_once.outcome import WaitForKey
from exactly_once.transports.contract import Delivery
from exactly_once.worker.in_hand import InHand
from exactly_once.worker.outages import Parked

__all__ = ["BusyKeys"]


class BusyKeys:
    """What waits for another run to end.

    Args:
        run_again: Starts the run of a delivery, told when it was first kept; blocks for no run.
        changed: The worker's condition; `keep` and `give_up` are called with its lock held.
        stopping: Whether the worker stops; it then takes over what waits.
    """

    def __init__(
        self,
        run_again: Callable[[InHand, Delivery, float], None],
        changed: Condition,
        stopping: Callable[[], bool],
    ) -> None:
        self._run_again, self._changed, self._stopping = run_again, changed, stopping
        # when it is due, a number that no other has (deliveries do not compare), whose, what, since when
        self._heap: list[tuple[float, int, InHand, Delivery, float]] = []
        self._numbers = count()
        self._turning = False

    def keep(self, keep: WaitForKey, unsettled: InHand, delivery: Delivery, since: float | None) -> bool:
        """Keep a delivery until its next look.

        Args:
            keep: What its run said.
            unsettled: Whose it is.
            delivery: What is kept.
            since: When it was first kept, on the monotonic clock; None: now.

        Returns:
            False where its patience is over; `keep.then` is to be done.
        """
        now = monotonic()
        since = now if since is None else since
        end = since + keep.longest.total_seconds()
        if now >= end:
            return False
        # the last look is at the end itself, however far apart they are
        due = min(now + keep.again.total_seconds(), end)
        heappush(self._heap, (due, next(self._numbers), unsettled, delivery, since))
        if not self._turning:
            Thread(target=self._turn, daemon=True, name="kept").start()
            self._turning = True
        elif self._heap[0][3] is delivery:
            self._changed.notify_all()  # due before the one it waits for
        return True

    @property
    def number(self) -> int:
        """How many are kept at this moment."""
        return len(self._heap)

    def give_up(self) -> Parked:
        """Return all that waits, and forget it: the worker stops."""
        waiting: Parked = {delivery: unsettled for _, _, unsettled, delivery, _ in sorted(self._heap)}
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
                _, _, unsettled, delivery, since = heappop(self._heap)
            # a `stop` right here does not find it among what is kept: it has this run, as any other, finish or gives it back
            self._run_again(unsettled, delivery, since)
