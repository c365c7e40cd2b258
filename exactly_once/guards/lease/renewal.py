"""Renews the leases of running messages: all of a process together, after each third of their length.

Each store has one thread, which starts with the first lease and ends when there was none for a while. It learns which leases are
lost and sets `HeldLease.lost`, which the message's session and steps check. A lease past its handler's `max_run` is not renewed
any more: it runs out, another run may take the message over, and the application's hook is called. Never decides anything else.
Called by `guard`.
"""

from collections.abc import Iterable, Sequence
from datetime import timedelta
from threading import Condition, Thread
from time import monotonic
from typing import Final

from exactly_once import fork
from exactly_once.errors import StoreUnavailable
from exactly_once.events.alert import Alert, Hook, raise_alert
from exactly_once.exceptions.words import trace_of
from exactly_once.guards.lease.contract import HeldLease, LeaseStore, clock
from exactly_once.wording.steady_log import steady
from exactly_once.wording.text import escaped

__all__ = ["Renewal"]

_IDLE_S: Final = 60.0
_AGAIN_S: Final = 1.0  # a store that did not answer is asked again after this time, sooner if the lease is short
_TOGETHER: Final = 4  # a lease that is due within a quarter of the renewal interval is renewed with the others

_log = steady("exactly_once.leases")


class Renewal:
    """The leases of this process in one store.

    Args:
        store: Where they are kept. Used from a thread.
        alert: The application's hook for runs that take too long.
    """

    def __init__(self, store: LeaseStore, alert: Hook | None = None) -> None:
        self.store = store
        self._alert = alert
        self._changed = Condition()
        self._due: dict[HeldLease, float] = {}
        self._thread: Thread | None = None
        self._wakes = 0.0
        fork.tell(self)

    def forked(self) -> None:
        """Called in a process just forked: the thread and the leases belong to the parent."""
        self._changed = Condition()
        self._due, self._thread = {}, None

    def add(self, held: HeldLease) -> None:
        """Renew this lease from now on."""
        with self._changed:
            due = self._due[held] = self._next(held, monotonic())
            if self._thread is None:
                self._thread = Thread(target=self._turn, name=f"leases: {self.store.name}", daemon=True)
                self._wakes = due
                try:
                    self._thread.start()
                except RuntimeError:  # no thread can be started now: the next lease tries again
                    self._thread = None
                    raise
            elif due < self._wakes:
                self._changed.notify()

    def drop(self, held: HeldLease) -> None:
        """Renew this lease no more: its run has ended."""
        with self._changed:
            self._due.pop(held, None)

    def _next(self, held: HeldLease, now: float) -> float:
        third = held.lease.total_seconds() / 3
        return min(now + third, _end(held))

    def _turn(self) -> None:
        while True:
            with self._changed:
                now = monotonic()
                self._wakes = min(self._due.values(), default=now + _IDLE_S)
                if self._wakes > now and not self._changed.wait(self._wakes - now) and not self._due:
                    self._thread = None
                    return
                if not self._due or min(self._due.values()) > monotonic():
                    continue
                over, batches = self._taken(monotonic())
            for batch in batches:
                self._renew(batch)
            for held in over:
                # a thread of its own: the application's hook may wait, and must not delay the renewal of other leases
                Thread(target=self._overran, args=(held,), name="alert: max_run", daemon=True).start()

    def _taken(self, now: float) -> tuple[list[HeldLease], Iterable[list[HeldLease]]]:
        """Take out the leases past `max_run`, and collect those that are due soon, by length of lease."""
        over = [held for held in self._due if _end(held) <= now]
        for held in over:
            del self._due[held]
        batches: dict[timedelta, list[HeldLease]] = {}
        for held, due in self._due.items():
            if due <= now + held.lease.total_seconds() / 3 / _TOGETHER:
                batches.setdefault(held.lease, []).append(held)
        return over, batches.values()

    def _renew(self, batch: list[HeldLease]) -> None:
        asked = clock()
        again = min(_AGAIN_S, batch[0].lease.total_seconds() / 3 / _TOGETHER)
        lost: set[HeldLease] = set()
        try:
            lost = self._asked(batch)
        except StoreUnavailable as error:
            _log.warning("leases_not_renewed store=%s count=%d error=%s", self.store.name, len(batch), error)
        except Exception as error:  # this thread must not end: every lease of the process would be lost
            _log.error("leases_not_renewed store=%s count=%d\n%s", self.store.name, len(batch), trace_of(error))
        now = monotonic()
        with self._changed:
            for held in batch:
                if held not in self._due:
                    continue
                if held.ending:  # it may be completed meanwhile, which looks like a lost lease
                    self._due[held] = min(now + again, _end(held))
                elif held in lost:
                    held.lost = True
                    del self._due[held]
                    _log.warning(
                        "lease_lost store=%s handler=%s key=%s attempt=%d",
                        self.store.name,
                        held.row.handler,
                        escaped(held.row.key),
                        held.attempt,
                    )
                else:
                    # if neither renewed nor lost: its own step has locked it at this moment, or the store is away
                    self._due[held] = self._next(held, now) if held.renewed >= asked else min(now + again, _end(held))

    def _asked(self, batch: Sequence[HeldLease]) -> set[HeldLease]:
        """Renew these leases in the context of a run: an engine listener may need a tenant, and any run's tenant has the rights.

        If a listener refuses one context, the next is tried, so that the other leases are not lost.
        """
        for held in batch[:-1]:
            try:
                return set(held.context.run(self.store.renew, batch))
            except StoreUnavailable as error:
                if not error.by_application:
                    raise
        return set(batch[-1].context.run(self.store.renew, batch))

    def _overran(self, held: HeldLease) -> None:
        assert held.max_run is not None
        text = (
            f"has run for longer than max_run={held.max_run}; its lease is not renewed any more and ends within"
            f" {held.lease}, then another run may take it over. Look at what hangs, and restart this process."
        )
        raise_alert(self._alert, Alert("overrun", held.row.group, held.row.handler, held.row.key, text))


def _end(held: HeldLease) -> float:
    return float("inf") if held.max_run is None else held.began + held.max_run.total_seconds()
