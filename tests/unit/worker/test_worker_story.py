"""The whole of it once: sent twice, failing, ordered, stopped twice; each effect happens once and in its order."""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from itertools import count
from random import Random
from threading import Lock, Thread
from time import sleep

import pytest

from exactly_once.message import Message
from exactly_once.outcome import Ack, Redeliver, Result, Settlement
from exactly_once.transports.contract import Consumer, Delivery, Features, Subscription, Surroundings
from exactly_once.transports.memory import forget
from exactly_once.transports.registry import transport_from
from exactly_once.worker.worker import Worker
from tests.unit.worker.worker_doubles import ended
from tests.waiting import until

MS = timedelta(milliseconds=1)
KEYS, EACH = 20, 15
_names = count()

Start = Callable[[Delivery, Features], Future[Result]]


class Ledger:
    """What a guarded handler would leave in a database: a claim and an effect, together."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._random = Random(7)
        self.effects: defaultdict[str, list[int]] = defaultdict(list)
        self.claimed: set[bytes] = set()
        self.failed = self.duplicates = 0
        self._fails = set(Random(11).sample(range(KEYS * EACH), KEYS * EACH // 10))

    def pause_s(self) -> float:
        with self._lock:
            return self._random.random() * 0.003

    def commit(self, message: Message) -> Settlement:
        body = message.body or b""
        number = int(body)
        with self._lock:
            if body in self.claimed:
                self.duplicates += 1
                return Ack()
            if number in self._fails:
                self._fails.remove(number)
                self.failed += 1
                return Redeliver(20 * MS)
            self.claimed.add(body)
            self.effects[message.ordering_key or ""].append(number)
            return Ack()


@contextmanager
def on_threads(ledger: Ledger) -> Iterator[Start]:
    def handle(delivery: Delivery) -> Result:
        sleep(ledger.pause_s())
        return ended(ledger.commit(delivery.message))

    with ThreadPoolExecutor(8) as pool:
        yield lambda delivery, features: pool.submit(handle, delivery)


@contextmanager
def on_a_loop(ledger: Ledger) -> Iterator[Start]:
    async def handle(delivery: Delivery) -> Result:
        await asyncio.sleep(ledger.pause_s())
        return ended(ledger.commit(delivery.message))

    loop = asyncio.new_event_loop()
    thread = Thread(target=loop.run_forever)
    thread.start()
    try:
        yield lambda delivery, features: asyncio.run_coroutine_threadsafe(handle(delivery), loop)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class SlowToSettle:
    """A consumer whose every settle takes 5 ms: in between, nobody may be handed a follower."""

    def __init__(self, inner: Consumer) -> None:
        self.inner = inner

    @property
    def features(self) -> Features:
        return self.inner.features

    @property
    def invisible(self) -> timedelta | None:
        return self.inner.invisible

    def settle(self, verdicts: Sequence[tuple[Delivery, Settlement]]) -> None:
        sleep(0.005)
        self.inner.settle(verdicts)

    def receive(self, limit: int, wait: timedelta) -> Sequence[Delivery]:
        return self.inner.receive(limit, wait)

    def extend(self, deliveries: Sequence[Delivery]) -> None:
        self.inner.extend(deliveries)

    def stop(self) -> None:
        self.inner.stop()

    def close(self) -> None:
        self.inner.close()


@pytest.mark.parametrize("drain_timeout", [0 * MS, 2000 * MS], ids=["stopped hard", "stopped gently"])
@pytest.mark.parametrize("runner", [on_threads, on_a_loop])
def test_300_messages_sent_twice_with_failures_and_two_stops_have_300_effects_in_order(
    runner: Callable[[Ledger], AbstractContextManager[Start]], drain_timeout: timedelta
) -> None:
    name, ledger = f"story-{next(_names)}", Ledger()
    transport = transport_from(f"memory://{name}", Surroundings())
    subscriptions = [Subscription("orders", ordered=True)]
    messages = [Message("orders", b"%d" % number, ordering_key=f"key-{number % KEYS}") for number in range(KEYS * EACH)]
    transport.producer().send([*messages, *messages])
    try:
        with runner(ledger) as run:
            for goal in (100, 200, 300):
                consumers = [SlowToSettle(each) for each in transport.subscribe("g", subscriptions)]
                worker = Worker(consumers, run, capacity=16, drain_timeout=drain_timeout, poll=50 * MS)
                worker.start()
                until(lambda: len(ledger.claimed) >= goal, f"{goal} effects", 30)  # noqa: B023  (called in here only)
                if goal == 300:
                    worker.drain(timedelta(seconds=30))
                worker.stop()
                assert worker.counts.in_hand == 0
    finally:
        forget(name)
    assert ledger.failed == 30
    assert ledger.duplicates >= 300
    assert ledger.effects == {f"key-{key}": list(range(key, KEYS * EACH, KEYS)) for key in range(KEYS)}
