"""What several handlers of one delivery say with one voice, and what of it is counted."""

from collections.abc import Sequence
from datetime import timedelta
from queue import SimpleQueue
from threading import Event, Lock
from time import sleep
from typing import Any

import pytest

from exactly_once.events.run_ended import OutcomeCounts, RunEnded
from exactly_once.executor.executor import Executor
from exactly_once.executor.fanout import combine
from exactly_once.message import Message
from exactly_once.outcome import Ack, Outcome, Redeliver, Result, RunFuture, Verdict, WaitForKey, WaitForStore
from exactly_once.transports.contract import Delivery
from tests.unit.worker.worker_doubles import FEATURES


def seconds(number: float) -> timedelta:
    return timedelta(seconds=number)


def told(outcome: Outcome, said: Verdict) -> Result:
    return Result(outcome, said)


KEEP = WaitForKey(seconds(0.5), seconds(5), Redeliver(seconds(50)))
PROCESSED, DUPLICATE = told(Outcome.PROCESSED, Ack()), told(Outcome.DUPLICATE, Ack())
STORED, DEAD = told(Outcome.FAILED, Ack()), told(Outcome.DEAD, Ack())
UNRECORDED = told(Outcome.FAILED, Redeliver(seconds(5)))
AWAY = told(Outcome.WAITING, WaitForStore("eu"))
KEPT = told(Outcome.IN_PROGRESS, KEEP)


def both_ways(*each: Result) -> Result:
    one, other = combine(each), combine(each[::-1])
    assert one.outcome is other.outcome
    assert one.verdict == other.verdict
    return one


def test_one_handler_says_it_alone_and_none_acknowledges() -> None:
    assert combine([KEPT]) is KEPT
    assert combine([]) == told(Outcome.NOT_MINE, Ack())


def test_a_store_that_does_not_answer_wins_over_all() -> None:
    for other in (KEPT, UNRECORDED, PROCESSED, STORED):
        assert both_ways(AWAY, other).verdict == WaitForStore("eu")


def test_the_soonest_redelivery_wins() -> None:
    assert both_ways(UNRECORDED, told(Outcome.WAITING, Redeliver(seconds(2))), PROCESSED).verdict == Redeliver(
        seconds(2)
    )


def test_what_is_kept_wins_over_what_is_finished() -> None:
    assert both_ways(KEPT, PROCESSED, DUPLICATE) == KEPT


def test_a_redelivery_wins_over_what_is_kept() -> None:
    assert both_ways(KEPT, UNRECORDED, PROCESSED).verdict == UNRECORDED.verdict
    late = told(Outcome.WAITING, Redeliver(seconds(99)))
    assert both_ways(KEPT, late).verdict == late.verdict, "even one that is later than the next look"


@pytest.mark.parametrize("stored", [STORED, DEAD, told(Outcome.WAITING, Ack())], ids=["failed", "dead", "waiting"])
def test_looking_again_runs_no_handler_whose_failure_is_stored(stored: Result) -> None:
    assert both_ways(KEPT, stored, PROCESSED).verdict == KEEP.then


def test_of_two_that_keep_the_least_patient_decides_and_no_ones_message_is_acknowledged() -> None:
    other = told(Outcome.IN_PROGRESS, WaitForKey(seconds(2), seconds(3), Redeliver(seconds(20))))
    careless = told(Outcome.IN_PROGRESS, WaitForKey(seconds(2), seconds(3), Ack()))
    assert both_ways(KEPT, other).verdict == WaitForKey(seconds(0.5), seconds(3), Redeliver(seconds(20)))
    assert both_ways(KEPT, careless).verdict == WaitForKey(seconds(0.5), seconds(3), Redeliver(seconds(50)))


class Handler:
    """As much of a `Processor` as the executor touches; `is_async` puts it on the loop."""

    def __init__(self, looks: Sequence[Result], is_async: bool) -> None:
        self.plan: Any = type("Plan", (), {"name": "h", "is_async": is_async, "concurrency": None})
        self._looks = iter(looks)

    def run(self, *_: Any, **__: Any) -> Result:
        return next(self._looks)


@pytest.mark.parametrize("is_async", [False, True], ids=["thread", "loop"])
def test_a_message_is_counted_when_it_ends_and_not_each_time_it_is_looked_at(is_async: bool) -> None:
    handler: Any = Handler([KEPT, KEPT, PROCESSED], is_async)
    executor = Executor(lambda delivery: [handler], [handler.plan], threads=1)
    try:
        ended: SimpleQueue[RunFuture] = SimpleQueue()
        results = []
        for _ in range(3):
            executor.submit(Delivery(Message("t", b""), None), FEATURES).add_done_callback(ended.put)
            results.append(ended.get(timeout=10).result())
    finally:
        executor.stop()
    assert [result.verdict for result in results] == [KEEP, KEEP, Ack()]
    counts = OutcomeCounts()
    for result in results:
        counts.add(RunEnded("t", result))
    assert {name: number for name, number in counts.outcomes.items() if number} == {"processed": 1}


def test_an_outcome_is_neither_true_nor_false() -> None:
    """`if eo.process(message): acknowledge()` would acknowledge FAILED too, and the message would be lost."""
    for outcome in Outcome:
        with pytest.raises(TypeError, match=r"neither true nor false.*Write: if outcome\.acknowledge:"):
            bool(outcome)
        assert outcome.acknowledge in (True, False)


class Counting(Handler):
    """Writes down how many of it ran at once."""

    def __init__(self, name: str, *, is_async: bool, concurrency: int | None) -> None:
        super().__init__([], is_async)
        self.plan.name, self.plan.concurrency = name, concurrency
        self.most = self._now = 0
        self._lock = Lock()

    def run(self, *_: Any, **__: Any) -> Result:
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
        sleep(0.01)
        with self._lock:
            self._now -= 1
        return PROCESSED


def test_a_limit_of_a_sync_handler_holds_over_threads_and_beside_the_loop() -> None:
    """Of a topic that an async handler takes, too, a sync one runs beside the loop, and of another topic on a thread."""
    limited: Any = Counting("limited", is_async=False, concurrency=1)
    other: Any = Counting("other", is_async=True, concurrency=None)
    executor = Executor(
        lambda delivery: [limited, other] if delivery.message.topic == "both" else [limited],
        [limited.plan, other.plan],
        threads=4,
    )
    try:
        ended: SimpleQueue[RunFuture] = SimpleQueue()
        for topic in ("both", "one") * 8:
            executor.submit(Delivery(Message(topic, b""), None), FEATURES).add_done_callback(ended.put)
        assert [ended.get(timeout=10).result().outcome for _ in range(16)] == [Outcome.PROCESSED] * 16
    finally:
        executor.stop()
    assert limited.most == 1


def test_a_place_is_held_until_the_thread_beside_the_loop_has_ended() -> None:
    """Cancelled, a task ends at once, and the sync handler that it waits for goes on."""
    begun, go_on, running = Event(), Event(), [0, 0]

    class Slow(Handler):
        def run(self, *_: Any, **__: Any) -> Result:
            running[0] += 1
            running[1] = max(running)
            begun.set()
            go_on.wait(10)
            running[0] -= 1
            return PROCESSED

    slow: Any = Slow([], False)
    slow.plan.name, slow.plan.concurrency = "slow", 1
    other: Any = Counting("other", is_async=True, concurrency=None)
    executor = Executor(lambda delivery: [slow, other], [slow.plan, other.plan], threads=4)
    try:
        first = executor.submit(Delivery(Message("t", b""), None), FEATURES)
        ended: SimpleQueue[RunFuture] = SimpleQueue()
        assert begun.wait(10)
        executor.submit(Delivery(Message("t", b""), None), FEATURES).add_done_callback(ended.put)
        first.cancel()
        sleep(0.1)
        assert running[1] == 1
        go_on.set()
        assert ended.get(timeout=10).result().outcome is Outcome.PROCESSED
    finally:
        executor.stop()
    assert running[1] == 1
