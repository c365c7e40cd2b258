"""A consumer in memory that writes down what the worker does with it. A double of the protocol, not of any broker."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from datetime import timedelta
from threading import Condition, Lock
from time import monotonic, sleep

from exactly_once.message import Message
from exactly_once.outcome import Ack, Outcome, Redeliver, Result, Settlement, Verdict
from exactly_once.transports.contract import Delivery, Features

FEATURES = Features(redelivers=True, counts_attempts=True)


class InHand:
    """Counts what several consumers handed out and the worker has not finished settling."""

    def __init__(self) -> None:
        self._lock = Lock()
        self.now = self.most = 0

    def add(self, number: int) -> None:
        with self._lock:
            self.now += number
            self.most = max(self.most, self.now)


class Shelf:
    """Hands out messages in order; `Redeliver` puts one back when its delay is over."""

    def __init__(
        self,
        bodies: Sequence[bytes] = (),
        *,
        topic: str = "t",
        invisible: timedelta | None = None,
        settle_s: float = 0.0,
        in_hand: InHand | None = None,
    ) -> None:
        self.features, self.invisible = FEATURES, invisible
        self.changed = Condition()
        self._ready: deque[tuple[float, Message]] = deque()
        self._topic, self._settle_s, self._in_hand = topic, settle_s, in_hand or InHand()
        self.put(bodies)
        self.receives: list[tuple[float, int]] = []
        """When and with which limit it was asked."""
        self.settled: list[tuple[Message, Settlement]] = []
        self.extended: list[tuple[float, Message]] = []
        self.out: dict[Delivery, float] = {}
        """Handed out, not settled; since when, or when last extended."""
        self.longest = 0.0
        """The longest that one was out without being extended or settled."""
        self.calls: list[str] = []
        self.stopped = False
        self.on_receive: Callable[[], object] = lambda: None
        self.on_extend: Callable[[], object] = lambda: None
        self.on_settle: Callable[[], object] = lambda: None

    def put(self, bodies: Sequence[bytes]) -> None:
        with self.changed:
            self._ready.extend((0.0, Message(self._topic, body, message_id=body.decode())) for body in bodies)
            self.changed.notify_all()

    def receive(self, limit: int, wait: timedelta) -> Sequence[Delivery]:
        self.receives.append((monotonic(), limit))
        self.on_receive()
        deadline = monotonic() + wait.total_seconds()
        with self.changed:
            while limit and not self.stopped:
                now = monotonic()
                if due := [entry for entry in self._ready if entry[0] <= now][:limit]:
                    for entry in due:
                        self._ready.remove(entry)
                    got = [Delivery(message, None) for _, message in due]
                    self.out.update(dict.fromkeys(got, now))
                    self._in_hand.add(len(got))
                    return got
                if now >= deadline:
                    break
                self.changed.wait(min(deadline - now, 0.01 if self._ready else 1.0))
        return []

    def settle(self, verdicts: Sequence[tuple[Delivery, Settlement]]) -> None:
        self.calls.append("settle")
        self.on_settle()
        sleep(self._settle_s)
        self._in_hand.add(-len(verdicts))
        with self.changed:
            for delivery, verdict in verdicts:
                self.settled.append((delivery.message, verdict))
                self._seen(self.out.pop(delivery))
                if isinstance(verdict, Redeliver):
                    again = replace(delivery.message, attempt=delivery.message.attempt + 1)
                    self._ready.append((monotonic() + verdict.delay.total_seconds(), again))
            self.changed.notify_all()

    def extend(self, deliveries: Sequence[Delivery]) -> None:
        self.on_extend()
        now = monotonic()
        with self.changed:
            for delivery in deliveries:
                assert delivery in self.out, "extended after it was settled"
                self._seen(self.out[delivery])
                self.out[delivery] = now
                self.extended.append((now, delivery.message))

    def stop(self) -> None:
        self.calls.append("stop")
        with self.changed:
            self.stopped = True
            self.changed.notify_all()

    def close(self) -> None:
        self.calls.append("close")

    def verdicts(self, kind: type[Ack] | type[Redeliver]) -> list[bytes]:
        """The bodies settled so, in that order."""
        return [message.body or b"" for message, verdict in self.settled.copy() if isinstance(verdict, kind)]

    def _seen(self, since: float) -> None:
        self.longest = max(self.longest, monotonic() - since)


class Hand:
    """A `run` whose futures the test completes, in the order they were begun."""

    def __init__(self) -> None:
        self.begun: list[tuple[Delivery, Future[Result]]] = []

    def __call__(self, delivery: Delivery, features: Features) -> Future[Result]:
        future: Future[Result] = Future()
        self.begun.append((delivery, future))
        return future

    def bodies(self) -> list[bytes]:
        return [delivery.message.body or b"" for delivery, _ in self.begun]


def ended(verdict: Verdict) -> Result:
    """What a run ends with that says this; the worker asks for nothing else."""
    return Result(Outcome.PROCESSED, verdict)


def done(verdict: Verdict) -> Future[Result]:
    future: Future[Result] = Future()
    future.set_result(ended(verdict))
    return future
