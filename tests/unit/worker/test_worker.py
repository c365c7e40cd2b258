"""The worker: receive, run, settle, extend, stop."""

import logging
import tracemalloc
from asyncio import CancelledError
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from threading import Event, Thread
from time import monotonic, sleep
from typing import Any

import pytest

from exactly_once.message import Message
from exactly_once.outcome import Ack, Redeliver, Result, Settlement
from exactly_once.transports.contract import Consumer, Delivery, Features
from exactly_once.worker import lane
from exactly_once.worker.worker import Run, Worker
from tests.unit.worker.worker_doubles import FEATURES, Hand, InHand, Shelf, done, ended
from tests.waiting import until

MS = timedelta(milliseconds=1)
SECOND = timedelta(seconds=1)


def ack(delivery: Delivery, features: Features) -> Future[Result]:
    return done(Ack())


def slow() -> Result:
    sleep(0.0005)
    return ended(Ack())


def numbered(count: int) -> list[bytes]:
    return [b"%d" % n for n in range(count)]


@contextmanager
def working(consumers: Sequence[Consumer], run: Run, **options: Any) -> Iterator[Worker]:
    defaults: dict[str, Any] = {"capacity": 8, "drain_timeout": SECOND, "poll": 20 * MS}
    worker = Worker(consumers, run, **(defaults | options))
    worker.start()
    try:
        yield worker
    finally:
        worker.stop()


# -- receive, run, settle ------------------------------------------------------------------------------------------


def test_what_is_received_runs_and_is_settled_with_its_verdict() -> None:
    shelf = Shelf([b"good", b"bad"])

    def run(delivery: Delivery, features: Features) -> Future[Result]:
        assert features is FEATURES
        failed = delivery.message.body == b"bad" and delivery.message.attempt == 1
        return done(Redeliver(30 * MS) if failed else Ack())

    with working([shelf], run) as worker:
        until(lambda: len(shelf.settled) == 3, "all is settled")
        worker.drain(5 * SECOND)
        counts = worker.counts
    assert [(m.body, type(v)) for m, v in shelf.settled] == [(b"good", Ack), (b"bad", Redeliver), (b"bad", Ack)]
    assert (counts.received, counts.acked, counts.redelivered, counts.in_hand) == (3, 2, 1, 0)


def test_settles_are_grouped() -> None:
    shelf = Shelf(numbered(400), settle_s=0.01)
    with working([shelf], ack, capacity=100) as worker:
        worker.drain(5 * SECOND)
    assert len(shelf.settled) == 400
    assert shelf.calls.count("settle") < 100


def test_a_verdict_waits_for_others_while_most_of_what_is_in_hand_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane, "GATHER_S", 60.0)
    shelf, hand = Shelf(numbered(40)), Hand()
    with working([shelf], hand, capacity=60, drain_timeout=5 * SECOND):
        until(lambda: len(hand.begun) == 40, "all are in hand")
        for _, future in hand.begun[:10]:
            assert shelf.settled == []
            future.set_result(ended(Ack()))
        until(lambda: len(shelf.settled) == 10, "a quarter is settled")
        assert shelf.calls == ["settle"]
        for _, future in hand.begun[10:]:
            future.set_result(ended(Ack()))
        until(lambda: len(shelf.settled) == 40, "and the last without waiting for what never comes")


def test_a_nearly_full_worker_asks_for_several_at_once() -> None:
    shelf, hand = Shelf(numbered(30)), Hand()
    with working([shelf], hand, capacity=16, drain_timeout=0 * SECOND):
        until(lambda: len(hand.begun) == 15, "1, 2, 4 and 8 are in hand")
        at = len(shelf.receives)
        for number in range(2):
            hand.begun[number][1].set_result(ended(Ack()))
        until(lambda: len(shelf.settled) == 2 and len(shelf.receives) > at + 3, "they are settled, and it turns on")
        assert {limit for _, limit in shelf.receives[at:]} == {0}  # three places of sixteen are no reason to ask
        hand.begun[2][1].set_result(ended(Ack()))
        until(lambda: len(hand.begun) == 19, "four are")
        assert [limit for _, limit in shelf.receives[at:] if limit] == [4]


def test_capacity_is_never_exceeded_over_three_consumers_with_slow_settles() -> None:
    in_hand = InHand()
    shelves = [Shelf(numbered(150), settle_s=0.003, in_hand=in_hand) for _ in range(3)]
    with ThreadPoolExecutor(4) as pool, working(shelves, lambda d, f: pool.submit(slow), capacity=7) as worker:
        worker.drain(20 * SECOND)
    assert [len(shelf.settled) for shelf in shelves] == [150, 150, 150]
    assert 3 < in_hand.most <= 7


def test_idle_consumers_do_not_starve_a_busy_one() -> None:
    idle, busy = [Shelf(), Shelf(), Shelf()], Shelf(numbered(400))
    began = monotonic()
    with working([*idle, busy], ack, capacity=8, poll=5 * SECOND):
        until(lambda: len(busy.settled) == 400, "the busy one is through", 4.0)
    assert monotonic() - began < 4.0


def test_consumers_that_outnumber_the_places_take_turns() -> None:
    idle, busy = [Shelf(), Shelf()], Shelf(numbered(10))
    with working([*idle, busy], ack, capacity=1, poll=5 * SECOND):
        until(lambda: len(busy.settled) == 10, "the busy one had its turns", 4.5)


def test_two_busy_consumers_share() -> None:
    one, two = Shelf(numbered(3000), settle_s=0.001), Shelf(numbered(3000), settle_s=0.001)
    with working([one, two], ack, capacity=4):
        until(lambda: len(one.settled) + len(two.settled) > 600, "some are settled")
        fewest = min(len(one.settled), len(two.settled))
    assert fewest > 150


def test_a_full_worker_keeps_its_sessions_alive() -> None:
    shelf, hand = Shelf(numbered(5)), Hand()
    with working([shelf], hand, capacity=2, drain_timeout=0 * SECOND):
        until(lambda: len(hand.begun) == 2, "it is full")
        at = len(shelf.receives)
        until(lambda: len(shelf.receives) > at + 3, "it asks for nothing")
        assert {limit for _, limit in shelf.receives[at:]} == {0}


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3), CancelledError()])
def test_a_run_that_breaks_has_its_message_brought_again(error: BaseException) -> None:
    shelf = Shelf([b"a"])

    def run(delivery: Delivery, features: Features) -> Future[Result]:
        if delivery.message.attempt > 1:
            return done(Ack())
        future: Future[Result] = Future()
        future.set_exception(error)
        return future

    with working([shelf], run):
        until(lambda: len(shelf.settled) == 2, "it was brought again")
    assert [type(v) for _, v in shelf.settled] == [Redeliver, Ack]


def test_a_run_that_cannot_begin_or_ends_without_a_verdict_is_brought_again() -> None:
    shelf = Shelf([b"raises", b"none", b"cancelled"])

    def run(delivery: Delivery, features: Features) -> Future[Any]:
        if delivery.message.body == b"raises":
            raise RuntimeError("cannot schedule new futures after shutdown")
        future: Future[Any] = Future()
        if delivery.message.body == b"none":
            future.set_result(None)
        else:
            future.cancel()
        return future

    with working([shelf], run):
        until(lambda: len(shelf.settled) == 3, "all have a verdict")
    assert [type(v) for _, v in shelf.settled] == [Redeliver] * 3


def test_a_consumer_that_cannot_receive_is_tried_again_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    shelf, errors = Shelf([b"a"]), iter([OSError("refused"), CancelledError(), SystemExit(1)])

    def fail() -> None:
        for error in errors:
            raise error

    shelf.on_receive = fail
    with working([shelf], ack) as worker:
        until(lambda: shelf.settled, "it received after all")
        assert worker.stuck(SECOND) == []
    lines = [record for record in caplog.records if "could not receive" in record.message]
    assert len(lines) == 1
    assert "Traceback" in lines[0].message
    assert "OSError: refused" in lines[0].message


def test_a_settle_that_raises_does_not_end_the_settling(caplog: pytest.LogCaptureFixture) -> None:
    shelf, errors = Shelf([b"a", b"b"]), iter([OSError("broken pipe")])

    def fail() -> None:
        for error in errors:
            raise error

    shelf.on_settle = fail
    with working([shelf], ack, capacity=1) as worker:
        until(lambda: len(shelf.settled) == 1, "the second is settled")
        until(lambda: not worker.counts.in_hand, "the first is no longer counted as in hand")
    assert "could not settle 1 message" in caplog.text


# -- extend --------------------------------------------------------------------------------------------------------


def test_what_runs_is_extended_in_time_and_what_is_quick_is_not() -> None:
    shelf, hand = Shelf([b"slow"], invisible=600 * MS), Hand()
    with working([shelf], hand):
        until(lambda: len(shelf.extended) >= 4, "it was extended")
        shelf.put([b"quick"])
        until(lambda: len(hand.begun) == 2, "the quick one runs")
        hand.begun[1][1].set_result(ended(Ack()))
        until(lambda: len(shelf.extended) >= 6, "it was extended further")
        hand.begun[0][1].set_result(ended(Ack()))
        until(lambda: len(shelf.settled) == 2, "both are settled")
    assert {message.body for _, message in shelf.extended} == {b"slow"}
    assert shelf.longest < 0.6
    gaps = [later - sooner for (sooner, _), (later, _) in zip(shelf.extended, shelf.extended[1:], strict=False)]
    assert min(gaps) > 0.15, "each third of it, not more often"


def test_an_extend_that_raises_is_tried_again_before_the_time_is_over() -> None:
    shelf, hand, errors = Shelf([b"a"], invisible=600 * MS), Hand(), iter([OSError(), OSError()])

    def fail() -> None:
        for error in errors:
            raise error

    shelf.on_extend = fail
    with working([shelf], hand):
        until(lambda: len(shelf.extended) >= 2, "it was extended")
        hand.begun[0][1].set_result(ended(Ack()))
        until(lambda: shelf.settled, "it is settled")
    assert shelf.longest < 0.6


def test_a_settle_that_blocks_delays_no_other_consumers_extending() -> None:
    blocked, release = Shelf([b"a"]), Event()
    blocked.on_settle = lambda: release.wait(10)
    shelf, hand = Shelf([b"slow"], invisible=450 * MS), Hand()

    def run(delivery: Delivery, features: Features) -> Future[Result]:
        return done(Ack()) if delivery.message.body == b"a" else hand(delivery, features)

    with working([blocked, shelf], run):
        until(lambda: "settle" in blocked.calls, "the settle blocks")
        until(lambda: len(shelf.extended) >= 5, "the other is extended all the same")
        hand.begun[0][1].set_result(ended(Ack()))
        until(lambda: shelf.settled, "the other is settled all the same")
        release.set()
    assert shelf.longest < 0.45


# -- stop ----------------------------------------------------------------------------------------------------------


def test_stop_ends_a_long_poll_and_returns_nothing_given_back() -> None:
    shelf = Shelf()
    with working([shelf], ack, poll=30 * SECOND) as worker:
        until(lambda: shelf.receives, "it waits for messages")
        began = monotonic()
        assert worker.stop() == 0
        assert monotonic() - began < 5
    assert shelf.calls == ["stop", "close"]


def test_stop_lets_what_runs_finish_and_closes_after_the_last_settle() -> None:
    shelf, hand = Shelf(numbered(3), settle_s=0.05), Hand()
    worker = Worker([shelf], hand, capacity=8, drain_timeout=10 * SECOND, poll=20 * MS)
    worker.start()
    until(lambda: len(hand.begun) == 3, "they run")
    given_back: list[int] = []
    stop = Thread(target=lambda: given_back.append(worker.stop()))
    stop.start()
    until(lambda: worker.unready() == "stopping", "it stops")
    for _, future in hand.begun:
        future.set_result(ended(Ack()))
    stop.join(10)
    assert given_back == [0]
    assert shelf.verdicts(Ack) == numbered(3)
    assert shelf.calls[-1] == "close"
    assert not shelf.out


def test_stop_gives_back_what_does_not_finish_and_ignores_what_it_says_later() -> None:
    shelf, hand = Shelf(numbered(4)), Hand()
    worker = Worker([shelf], hand, capacity=3, drain_timeout=50 * MS, poll=20 * MS)
    worker.start()
    until(lambda: len(hand.begun) == 3, "three run")
    hand.begun[1][1].set_result(ended(Ack()))
    hand.begun[0][1].set_running_or_notify_cancel()
    until(lambda: len(hand.begun) == 4, "its place was taken")
    assert worker.stop() == 3
    hand.begun[0][1].set_result(ended(Ack()))
    assert hand.begun[2][1].cancelled(), "what was given back and had not begun never begins"
    assert worker.stop() == 3, "a second stop does nothing"
    assert shelf.verdicts(Ack) == [b"1"]
    assert shelf.verdicts(Redeliver) == [b"0", b"2", b"3"], "in the order received"
    assert [verdict.delay for _, verdict in shelf.settled if isinstance(verdict, Redeliver)] == [timedelta(0)] * 3
    assert shelf.calls.count("close") == 1


def test_every_delivery_is_settled_once_however_stop_meets_its_end() -> None:
    for round_ in range(30):
        shelf = Shelf(numbered(200))
        with ThreadPoolExecutor(4) as pool:
            worker = Worker(
                [shelf],
                lambda d, f: pool.submit(ended, Ack()),
                capacity=50,
                drain_timeout=round_ % 3 * MS,
                poll=20 * MS,
            )
            worker.start()
            sleep(0.0007 * round_)
            given_back = worker.stop()
        counts = worker.counts
        assert not shelf.out
        assert counts.received == counts.acked + counts.redelivered == len(shelf.settled)
        assert given_back == len(shelf.verdicts(Redeliver))
        assert len(set(shelf.verdicts(Ack))) == len(shelf.verdicts(Ack))


def test_stop_waits_no_longer_than_it_may_for_a_receive_that_never_returns() -> None:
    shelf, release = Shelf(), Event()
    shelf.on_receive = lambda: release.wait(20)
    worker = Worker([shelf], ack, capacity=1, drain_timeout=100 * MS)
    worker.start()
    until(lambda: shelf.receives, "it receives")
    began = monotonic()
    assert worker.stop() == 0
    assert monotonic() - began < 5
    release.set()


def test_stop_before_start_closes_the_consumers() -> None:
    shelf = Shelf()
    assert Worker([shelf], ack, capacity=1, drain_timeout=SECOND).stop() == 0
    assert shelf.calls == ["stop", "close"]


# -- drain, and how it is doing ------------------------------------------------------------------------------------


def test_drain_waits_for_what_messages_bring_about() -> None:
    second = Shelf(topic="second")

    def run(delivery: Delivery, features: Features) -> Future[Result]:
        number = int(delivery.message.body or b"")
        if number:
            other = second if delivery.message.topic == "first" else first
            other.put([b"%d" % (number - 1)])
        return done(Ack())

    first = Shelf([b"20"], topic="first")
    with working([second, first], run) as worker:
        worker.drain(10 * SECOND)
        assert len(first.settled) + len(second.settled) == 21


def test_drain_says_what_is_still_in_hand() -> None:
    shelf, hand = Shelf([b"A-1"], topic="orders"), Hand()
    with working([shelf], hand, drain_timeout=0 * SECOND) as worker:
        until(lambda: hand.begun, "it runs")
        with pytest.raises(TimeoutError, match=r"1 message\(s\) in hand.*orders A-1"):
            worker.drain(100 * MS)
    with pytest.raises(RuntimeError, match="before stop"):
        worker.drain(100 * MS)


def test_a_thread_that_does_not_turn_is_named_and_one_that_waits_is_not() -> None:
    shelf, release = Shelf(), Event()
    with working([shelf], ack) as worker:
        sleep(0.2)
        assert worker.stuck(150 * MS + SECOND) == []
        assert worker.unready() is None
        shelf.on_receive = lambda: release.wait(10)
        until(lambda: worker.stuck(300 * MS + SECOND), "it is found stuck")
        assert "receive: consumer 1 (Shelf)" in worker.stuck(300 * MS + SECOND)
        release.set()
        until(lambda: not worker.stuck(SECOND * 2), "it turns again")
    assert worker.unready() == "stopped"
    assert Worker([shelf], ack, capacity=1, drain_timeout=SECOND).unready() == "not started"


def test_memory_does_not_grow_with_messages() -> None:
    class Source:
        """As lean as can be, so that what is measured is the worker's."""

        features, invisible, left, message = FEATURES, 30 * SECOND, 0, Message("t", b"x")

        def receive(self, limit: int, wait: timedelta) -> Sequence[Delivery]:
            number = min(limit, self.left)
            self.left -= number
            if limit and not number:
                sleep(0.005)
            return [Delivery(self.message, None) for _ in range(number)]

        def settle(self, verdicts: Sequence[tuple[Delivery, Settlement]]) -> None: ...
        def extend(self, deliveries: Sequence[Delivery]) -> None: ...
        def stop(self) -> None: ...
        def close(self) -> None: ...

    source, log = Source(), logging.getLogger("exactly_once.worker")

    def feed(worker: Worker, number: int) -> int:
        goal = worker.counts.acked + number
        source.left = number
        until(lambda: worker.counts.acked == goal, "they are settled", 60)
        worker.drain(5 * SECOND)
        return tracemalloc.get_traced_memory()[0]

    assert log.isEnabledFor(logging.WARNING)
    tracemalloc.start()
    try:
        with working([source], ack, capacity=64) as worker:
            early = feed(worker, 10_000)
            late = feed(worker, 100_000)
    finally:
        tracemalloc.stop()
    assert late - early < 50_000, "100,000 messages may leave half a byte each"
