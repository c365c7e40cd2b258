"""Handles stores that do not answer: keeps their deliveries, asks each store until it answers, and has the deliveries run again.

Each outage has one thread, which ends with it. Never receives, settles or redelivers: an outage spends no delivery attempt.
Called by the worker, which receives nothing while there is an outage.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Condition, Thread
from time import monotonic
from typing import Final

from exactly_once.events.throttled_log import ThrottledLog
from exactly_once.transports.contract import Delivery
from exactly_once.wording.steady_log import steady
from exactly_once.worker.lane import Lane

__all__ = ["Outages", "WaitingDeliveries"]

PROBE_S: Final = (0.2, 5.0)
"""The first pause before a store is asked, and the longest. Each pause is twice as long as the one before."""

WaitingDeliveries = dict[Delivery, Lane]

_log = steady("exactly_once.worker")


@dataclass(eq=False, slots=True)
class _Outage:
    store: str
    pause: float
    waiting: WaitingDeliveries = field(default_factory=dict)
    ended: float = 0.0


class Outages:
    """The present outages.

    Args:
        answers: Whether the store of this name answers. Called in the outage's thread; may block or raise.
        run_again: Starts the runs of these deliveries. Does not wait for them.
        changed: The worker's condition. `hold`, `hold_all` and `give_up` are called with its lock held.
        stopping: Whether the worker stops. The worker then takes over the waiting deliveries.
    """

    def __init__(
        self,
        answers: Callable[[str], bool],
        run_again: Callable[[WaitingDeliveries], None],
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
        """The stores that do not answer. May be read without the lock."""
        return tuple(self._now.copy())

    @property
    def held(self) -> int:
        """How many deliveries wait. May be read without the lock."""
        return sum(len(outage.waiting) for outage in self._now.copy().values())

    def hold(self, store: str, delivery: Delivery, lane: Lane) -> None:
        """Keep a delivery until this store answers."""
        outage = self._now.get(store)
        if outage is None:
            outage = self._begin(store)
        outage.waiting[delivery] = lane

    def hold_all(self, deliveries: Sequence[Delivery], lane: Lane) -> bool:
        """Keep the deliveries of a receive that was under way when an outage began: to run them would only ask a dead store.

        Returns:
            False if there is no outage: the caller must run them.
        """
        for outage in self._now.values():
            outage.waiting.update(dict.fromkeys(deliveries, lane))
            return True
        return False

    def give_up(self) -> WaitingDeliveries:
        """Return all waiting deliveries, and forget them: the worker stops."""
        waiting: WaitingDeliveries = {}
        for outage in self._now.values():
            waiting |= outage.waiting
            outage.waiting = {}
        return waiting

    def _begin(self, store: str) -> _Outage:
        last = self._last.get(store)
        # a store that answered a moment ago and is away again is asked with its last pause
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
                if outage.waiting:  # away again before all runs had begun: still the same outage
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
