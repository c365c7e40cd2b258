"""Stores that do not answer: keeps what waits for them, asks until they do, and has what waited run again.

One thread for each outage, which ends with it. Never receives, never settles, never redelivers: an outage spends no
delivery attempts. Called by the worker, which receives nothing while there is an outage.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Condition, Thread
from time import monotonic
from typing import Final

from exactly_once.transports.contract import Delivery
from exactly_once.wording.steady_log import steady
from exactly_once.worker.in_hand import InHand
from exactly_once.worker.log_throttle import ThrottledLog

__all__ = ["Outages", "Parked"]

PROBE_S: Final = (0.2, 5.0)
"""A store is asked after the first, and then after twice as long each time, up to the second."""

Parked = dict[Delivery, InHand]

_log = steady("exactly_once.worker")


@dataclass(eq=False, slots=True)
class _Outage:
    store: str
    pause: float
    waiting: Parked = field(default_factory=dict)
    ended: float = 0.0


class Outages:
    """The outages of this moment.

    Args:
        answers: Whether the store of this name answers; called in the outage's thread, may block or raise.
        run_again: Starts the runs of these deliveries; blocks for no run.
        changed: The worker's condition; `hold`, `park` and `give_up` are called with its lock held.
        stopping: Whether the worker stops; it then takes over what waits.
    """

    def __init__(
        self,
        answers: Callable[[str], bool],
        run_again: Callable[[Parked], None],
        changed: Condition,
        stopping: Callable[[], bool],
    ) -> None:
        self._answers, self._run_again, self._changed, self._stopping = answers, run_again, changed, stopping
        self._now: dict[str, _Outage] = {}
        self._last: dict[str, _Outage] = {}
        self._throttled = ThrottledLog(_log)

    def __bool__(self) -> bool:
        return bool(self._now)

    @property
    def stores(self) -> tuple[str, ...]:
        """The stores that do not answer; readable without the lock."""
        return tuple(self._now.copy())

    @property
    def held(self) -> int:
        """How many deliveries wait; readable without the lock."""
        return sum(len(outage.waiting) for outage in self._now.copy().values())

    def hold(self, store: str, delivery: Delivery, unsettled: InHand) -> None:
        """Keep a delivery until this store answers."""
        outage = self._now.get(store)
        if outage is None:
            outage = self._begin(store)
        outage.waiting[delivery] = unsettled

    def park(self, deliveries: Sequence[Delivery], unsettled: InHand) -> bool:
        """Keep what a receive brought that was under way as an outage began: running it would only ask a dead store.

        Returns:
            False where there is no outage; they are to be run.
        """
        for outage in self._now.values():
            outage.waiting.update(dict.fromkeys(deliveries, unsettled))
            return True
        return False

    def give_up(self) -> Parked:
        """Return all that waits, and forget it: the worker stops."""
        waiting: Parked = {}
        for outage in self._now.values():
            waiting |= outage.waiting
            outage.waiting = {}
        return waiting

    def _begin(self, store: str) -> _Outage:
        last = self._last.get(store)
        # one that said it was back a moment ago, and is not, is asked at its last pace
        again = last is not None and monotonic() - last.ended < PROBE_S[1]
        outage = _Outage(store, last.pause if last and again else PROBE_S[0])
        self._now[store] = self._last[store] = outage
        Thread(target=self._probe, args=(outage,), daemon=True, name=f"probe: {store}").start()
        self._throttled.warning(
            f"outage {store}",
            "The database %r does not answer. Nothing is received until it does; what is in hand is kept, and no"
            " delivery attempt is spent.",
            store,
        )
        return outage

    def _probe(self, outage: _Outage) -> None:
        began, held = monotonic(), 0
        while True:
            with self._changed:
                self._changed.wait_for(self._stopping, outage.pause)
                if self._stopping():
                    return
            outage.pause = min(2 * outage.pause, PROBE_S[1])
            if not self._answered(outage.store):
                continue
            with self._changed:
                waiting, outage.waiting = outage.waiting, {}
            held = max(held, len(waiting))
            self._run_again(waiting)
            with self._changed:
                if outage.waiting:  # gone again before all of them had begun: still the same outage
                    continue
                outage.ended = monotonic()
                del self._now[outage.store]
                self._changed.notify_all()
            _log.info(
                "The database %r answers again after %.1f s; %d held message(s) run.",
                outage.store,
                outage.ended - began,
                held,
            )
            return

    def _answered(self, store: str) -> bool:
        try:
            return self._answers(store)
        except BaseException as error:  # noqa: BLE001, RUF100  (the thread that would end the outage must not die)
            self._throttled.warning(
                f"probe {store}", "Asking the database %r failed; asking again.", store, error=error
            )
            return False
