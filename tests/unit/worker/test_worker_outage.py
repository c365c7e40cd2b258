"""The worker while a store does not answer: it holds what it has, receives nothing, redelivers nothing."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from threading import Event
from time import monotonic, sleep
from typing import Any

import pytest

from exactly_once.outcome import Ack, Result, WaitForStore
from exactly_once.transports.contract import Consumer, Delivery, Features
from exactly_once.worker.worker import Worker
from tests.unit.worker.worker_doubles import Hand, Shelf, done, ended
from tests.waiting import until

MS = timedelta(milliseconds=1)
SECOND = timedelta(seconds=1)


class Database:
    """Up or down, and a `run` that needs it."""

    def __init__(self) -> None:
        self.up = True
        self.asked: list[float] = []
        self.ran: list[bytes] = []
        self.begun = 0

    def answers(self, store: str) -> bool:
        assert store == "eu"
        self.asked.append(monotonic())
        return self.up

    def run(self, delivery: Delivery, features: Features) -> Future[Result]:
        self.begun += 1
        if not self.up:
            return done(WaitForStore("eu"))
        self.ran.append(delivery.message.body or b"")
        return done(Ack())


@contextmanager
def working(
    consumers: Sequence[Consumer], run: Any, answers: Callable[[str], bool], **options: Any
) -> Iterator[Worker]:
    defaults: dict[str, Any] = {"capacity": 8, "drain_timeout": SECOND, "poll": 20 * MS}
    worker = Worker(consumers, run, answers=answers, **(defaults | options))
    worker.start()
    try:
        yield worker
    finally:
        worker.stop()


def numbered(count: int) -> list[bytes]:
    return [b"%d" % n for n in range(count)]


def test_an_outage_redelivers_nothing_and_afterwards_the_oldest_runs_first() -> None:
    database, hand = Database(), Hand()
    shelf, other = Shelf(numbered(10)), Shelf(topic="other")

    def run(delivery: Delivery, features: Features) -> Future[Result]:
        return database.run(delivery, features) if len(hand.begun) == 10 else hand(delivery, features)

    with working([shelf, other], run, database.answers, capacity=100) as worker:
        until(lambda: len(hand.begun) == 10, "ten run")
        database.up = False
        for _, future in reversed(hand.begun):
            future.set_result(ended(WaitForStore("eu")))
        until(lambda: worker.counts.held == 10, "they are held")
        assert worker.counts.outages == ("eu",)
        assert worker.unready() == "no answer from: eu"
        at = monotonic()
        for each in (shelf, other):  # the receives under way have ended
            until(lambda: each.receives[-1][0] > at and each.receives[-1][1] == 0, "it keeps its session")  # noqa: B023
        at, received = monotonic(), worker.counts.received
        shelf.put([b"10"])
        other.put([b"other"])
        until(lambda: len(database.asked) >= 3, "the store was asked")
        assert worker.counts.received == received
        for each in (shelf, other):
            assert {limit for when, limit in each.receives if when > at} == {0}, "sessions are kept alive, no more"
            assert each.settled == []
        database.up = True
        worker.drain(10 * SECOND)
        assert worker.unready() is None
        assert not worker.counts.outages
    assert database.ran[:10] == numbered(10)
    assert sorted(database.ran) == sorted([*numbered(11), b"other"])
    assert all(isinstance(verdict, Ack) for _, verdict in shelf.settled + other.settled)


def test_the_store_is_asked_less_and_less_often() -> None:
    database = Database()
    database.up = False
    with working([Shelf([b"a"])], database.run, database.answers):
        until(lambda: len(database.asked) == 4, "it was asked four times")
    gaps = [later - sooner for sooner, later in zip(database.asked, database.asked[1:], strict=False)]
    assert 0.35 < gaps[0] < gaps[1] < gaps[2] < 3


def test_a_store_that_answers_and_fails_again_is_not_asked_in_a_tight_circle() -> None:
    asked: list[float] = []

    def answers(store: str) -> bool:
        asked.append(monotonic())
        return True

    with (
        ThreadPoolExecutor(1) as pool,
        working([Shelf([b"a"])], lambda d, f: pool.submit(ended, WaitForStore("eu")), answers) as worker,
    ):
        until(lambda: len(asked) == 4, "it was asked four times")
        assert worker.counts.redelivered == 0
    assert asked[3] - asked[2] > 1.0


def test_asking_that_raises_is_no_answer(caplog: pytest.LogCaptureFixture) -> None:
    database, errors = Database(), iter([OSError("no route to host"), SystemExit(1)])
    database.up = False

    def answers(store: str) -> bool:
        for error in errors:
            raise error
        database.up = True
        return True

    with working([Shelf([b"a"])], database.run, answers) as worker:
        worker.drain(10 * SECOND)
    assert database.ran == [b"a"]
    assert "Asking the database 'eu' failed" in caplog.text


def test_what_is_held_is_extended_in_time() -> None:
    database, shelf = Database(), Shelf(numbered(3), invisible=450 * MS)
    database.up = False
    with working([shelf], database.run, database.answers) as worker:
        until(lambda: len(shelf.extended) >= 15, "each was extended five times")
        database.up = True
        worker.drain(10 * SECOND)
    assert shelf.longest < 0.45
    assert len(shelf.settled) == 3


def test_what_a_receive_under_way_brings_during_an_outage_waits_too() -> None:
    database, release = Database(), Event()
    shelf, late = Shelf(), Shelf([b"late"], topic="late")
    late.on_receive = lambda: release.wait(10)
    database.up = False
    with working([shelf, late], database.run, database.answers) as worker:
        until(lambda: late.receives, "it receives")
        shelf.put([b"a"])
        until(lambda: worker.counts.held == 1, "the outage begins")
        release.set()
        until(lambda: worker.counts.held == 2, "what it brought is held")
        assert database.begun == 1, "it was not even run"
        database.up = True
        worker.drain(10 * SECOND)
    assert sorted(database.ran) == [b"a", b"late"]


def test_stop_in_an_outage_gives_back_at_once() -> None:
    database, shelf = Database(), Shelf(numbered(5))
    database.up = False
    with working([shelf], database.run, database.answers, drain_timeout=60 * SECOND) as worker:
        until(lambda: worker.counts.held, "the outage is noticed")
        received = worker.counts.received
        began = monotonic()
        assert worker.stop() == received
        assert monotonic() - began < 5
    assert len(shelf.settled) == received
    assert not shelf.out
    assert shelf.calls[-1] == "close"


def test_stop_lets_finish_what_another_store_runs_and_gives_back_what_waits() -> None:
    shelf, hand = Shelf([b"runs", b"waits"]), Hand()
    with working([shelf], hand, lambda store: False, drain_timeout=60 * SECOND) as worker:
        until(lambda: len(hand.begun) == 2, "both run")
        futures = {delivery.message.body: future for delivery, future in hand.begun}
        futures[b"waits"].set_result(ended(WaitForStore("eu")))
        until(lambda: worker.counts.held == 1, "one waits")
        with ThreadPoolExecutor(1) as pool:
            stop = pool.submit(worker.stop)
            until(lambda: len(shelf.settled) == 1, "what waits was given back")
            futures[b"runs"].set_result(ended(Ack()))
            assert stop.result(10) == 1
    assert [(m.body, type(v).__name__) for m, v in shelf.settled] == [(b"waits", "Redeliver"), (b"runs", "Ack")]


def test_a_run_that_finds_no_store_while_stopping_is_given_back() -> None:
    shelf, hand = Shelf([b"a"]), Hand()
    with working([shelf], hand, lambda store: False, drain_timeout=60 * SECOND) as worker:
        until(lambda: hand.begun, "it runs")
        with ThreadPoolExecutor(1) as pool:
            stop = pool.submit(worker.stop)
            # not sooner: what is given back before the consumer has stopped may be received, and begun, once more
            until(lambda: shelf.stopped, "it stops")
            hand.begun[0][1].set_result(ended(WaitForStore("eu")))
            assert stop.result(10) == 1


@pytest.mark.parametrize("round_", range(20))
def test_stop_while_held_messages_are_begun_again_settles_each_once(round_: int) -> None:
    database, shelf = Database(), Shelf(numbered(60))
    database.up = False

    begun: list[Delivery] = []
    ten = Event()

    def late(delivery: Delivery, features: Features) -> Result:
        ten.wait(10)
        sleep(0.0005)
        return database.run(delivery, features).result()

    with ThreadPoolExecutor(4) as pool:

        def run(delivery: Delivery, features: Features) -> Future[Result]:
            begun.append(delivery)
            if len(begun) == 10:
                ten.set()
            return pool.submit(late, delivery, features)

        with working([shelf], run, database.answers, capacity=60) as worker:
            until(lambda: worker.counts.held > 8, "some are held")
            database.up = True
            until(lambda: database.ran, "it answers again")
            sleep(0.0005 * round_)
            worker.stop()
    assert not shelf.out
    assert worker.counts.received == len(shelf.settled)


def test_stop_begins_none_of_those_held_again() -> None:
    shelf, hand, answers = Shelf(numbered(5)), Hand(), Event()
    stops: list[Future[int]] = []
    with ThreadPoolExecutor(1) as pool:

        def run(delivery: Delivery, features: Features) -> Future[Result]:
            if answers.is_set() and not stops:
                stops.append(pool.submit(worker.stop))
                until(lambda: worker.unready() == "stopping", "it stops while the first is begun again")
            return hand(delivery, features)

        with working([shelf], run, lambda store: answers.is_set(), drain_timeout=60 * SECOND) as worker:
            until(lambda: len(hand.begun) == 5, "all run")
            for _, future in hand.begun:
                future.set_result(ended(WaitForStore("eu")))
            until(lambda: worker.counts.held == 5, "all are held")
            answers.set()
            until(lambda: len(shelf.settled) == 4, "four are given back")
            hand.begun[5][1].set_result(ended(Ack()))
            assert stops[0].result(10) == 4
    assert shelf.verdicts(Ack) == [b"0"]


def test_drain_does_not_take_an_outage_for_rest() -> None:
    database = Database()
    database.up = False
    with working([Shelf([b"a"])], database.run, database.answers) as worker:
        with pytest.raises(TimeoutError, match="No answer from: eu"):
            worker.drain(300 * MS)
        sleep(0)
        database.up = True
        worker.drain(10 * SECOND)
