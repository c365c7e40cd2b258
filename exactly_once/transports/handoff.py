"""Turns a client's callbacks into `receive`: makes a `Consumer` of a client that pushes messages.

A thread of the client calls `offer` with its message and waits there until the message is settled. This module never acknowledges
by itself, decides nothing about a message's content, and knows no broker. Called by the rocketmq4 transport.

The client's callback threads are the limit: each carries one message and waits with it, also while that message is
due later (`Redeliver` with a delay). So as many messages can wait as there are threads, and no more are fetched.
If the client calls back for one message of a queue at a time, waiting in place also keeps the order of a key.

A message that was in hand when a process died (see `inflight`) is handed out alone. Nothing else is in hand then, so
another death shows that this message causes it.
"""

from _thread import allocate_lock
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from heapq import heappop, heappush
from itertools import count
from queue import Empty, SimpleQueue
from threading import Lock
from time import monotonic
from typing import Final

from exactly_once.errors import BadBody
from exactly_once.message import Message
from exactly_once.outcome import Redeliver, Settlement
from exactly_once.transports.contract import Delivery
from exactly_once.transports.inflight import InFlight

__all__ = ["Handoff"]

ALONE_WITHIN_S: Final = 10.0  # how long a suspect waits for other messages to end; then it runs beside them


class _Held:
    """One message, and the client's thread that waits with it."""

    __slots__ = ("accepted", "gate", "message", "name", "place", "unread")

    def __init__(self, message: Message, unread: BadBody | None = None) -> None:
        self.message, self.unread = message, unread
        self.name = message.message_id or ""
        self.place: int | None = None  # its place in the journal, while in hand
        self.accepted = False
        self.gate = allocate_lock()
        self.gate.acquire()


class Handoff:
    """Between the client's threads and the worker's.

    Args:
        in_flight: The journal of the messages in hand.
    """

    def __init__(self, in_flight: InFlight) -> None:
        self._in_flight = in_flight
        self._lock = Lock()
        self._offered: SimpleQueue[_Held | None] = SimpleQueue()  # None wakes the receiver
        self._ready: deque[_Held] = deque()  # used by the receiver alone: taken from `_offered`, not handed out yet
        self._suspects: deque[_Held] = deque()
        self._suspect_since = 0.0
        self._later: list[tuple[float, int, _Held]] = []
        self._numbers = count()
        self._held: set[_Held] = set()
        self._in_hand = 0
        self._alone = False
        self._stopped = self._released = False

    # the client's side

    def offer(self, message: Message, unread: BadBody | None = None) -> bool:
        """Wait until the message is settled. True: acknowledge it. False: give it back. Never raises.

        Args:
            message: The received message.
            unread: Why its body could not be read.
        """
        return self._wait(_Held(message, unread), handed_out=True)

    def keep(self) -> bool:
        """Wait with a message that cannot be handed out, until `release`. Always returns False."""
        return self._wait(_Held(Message("", None)), handed_out=False)

    def _wait(self, held: _Held, *, handed_out: bool) -> bool:
        with self._lock:
            if self._released:
                return False
            self._held.add(held)
        if handed_out:
            self._offered.put(held)
        held.gate.acquire()
        return held.accepted

    @property
    def holding(self) -> int:
        """How many of the client's threads wait here."""
        return len(self._held)

    def release(self) -> None:
        """Give back everything that waits, and everything that comes from now on. Called only when that loses nothing."""
        with self._lock:
            self._released = True
            back = list(self._held)
        self._answer(back, accepted=False)

    # the worker's side

    def receive(self, limit: int, wait: timedelta) -> Sequence[Delivery]:
        """Hand out up to `limit`, waiting at most `wait` for the first."""
        until = monotonic() + wait.total_seconds()
        while limit > 0:
            self._fetch(limit, until)
            self._in_flight.look()
            chosen = self._choose(limit)
            if chosen or self._stopped or monotonic() >= until:
                return chosen
        return []

    def settle(self, settlements: Sequence[tuple[Delivery, Settlement]]) -> None:
        """Let the client's thread go, or keep it with its message until the delay has passed."""
        done: list[_Held] = []
        with self._lock:
            wake = bool(self._suspects) or self._alone
            for delivery, settlement in settlements:
                held: _Held = delivery.receipt_handle
                if held.place is None:
                    continue  # settled before; the contract says once, and a place in the journal has one owner
                self._in_flight.give(held.place)
                held.place = None
                self._in_hand -= 1
                if not isinstance(settlement, Redeliver):
                    done.append(held)
                elif not self._stopped:
                    heappush(self._later, (monotonic() + settlement.delay.total_seconds(), next(self._numbers), held))
                    wake = True
            if not self._in_hand:
                self._alone = False
        for held in done:
            self._in_flight.forget(held.name)
        self._answer(done, accepted=True)
        if wake:
            self._offered.put(None)

    def stop(self) -> None:
        """Hand out nothing more. Messages that were not handed out wait for `release`."""
        self._stopped = True
        self._offered.put(None)

    def _answer(self, those: Sequence[_Held], *, accepted: bool) -> None:
        with self._lock:
            # A message that was already given back comes again, and its claim says that it is done.
            waiting = [held for held in those if held in self._held]
            self._held.difference_update(waiting)
        for held in waiting:
            held.accepted = accepted
            held.gate.release()

    def _fetch(self, limit: int, until: float) -> None:
        """Move what is offered or due into `_ready`. Wait for the first."""
        self._bring_due()
        with self._lock:
            blocked = self._alone or bool(self._suspects)  # then only a settlement changes anything, and it wakes us
            patience = 0.0 if self._ready and not blocked else max(0.0, until - monotonic())
            if self._later:
                patience = min(patience, max(0.0, self._later[0][0] - monotonic()))
        try:
            held = self._offered.get(patience > 0, patience)
            while True:
                if held is not None:
                    self._ready.append(held)
                if len(self._ready) >= limit:
                    break
                held = self._offered.get_nowait()
        except Empty:
            pass
        self._bring_due()

    def _bring_due(self) -> None:
        with self._lock:
            while self._later and self._later[0][0] <= monotonic():
                self._ready.append(heappop(self._later)[2])

    def _choose(self, limit: int) -> list[Delivery]:
        suspected = self._in_flight.deaths
        for held in [held for held in self._ready if suspected(held.name)]:
            self._ready.remove(held)
            if not self._suspects:
                self._suspect_since = monotonic()
            self._suspects.append(held)
        with self._lock:
            if self._stopped or self._alone:
                return []
            if not self._suspects:
                return [self._hand_out(self._ready.popleft()) for _ in range(min(limit, len(self._ready)))]
            if self._in_hand and monotonic() - self._suspect_since < ALONE_WITHIN_S:
                return []
            held = self._suspects.popleft()
            self._suspect_since = monotonic()
            self._alone = True
            return [self._hand_out(held)]

    def _hand_out(self, held: _Held) -> Delivery:
        held.place = self._in_flight.take(held.name)
        self._in_hand += 1
        deaths = self._in_flight.deaths(held.name)
        message = replace(held.message, attempt=1 + deaths) if deaths else held.message
        return Delivery(message, held, unread=held.unread)
