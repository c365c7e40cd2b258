"""The worker with messages whose key another run holds: kept in hand and looked at again, so that no delivery is spent."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from itertools import count, pairwise
from threading import Condition, Event
from threading import enumerate as all_threads
from time import monotonic, sleep
from typing import Any

import pytest

from exactly_once.message import Message
from exactly_once.outcome import Ack, Redeliver, Result, WaitForKey, WaitForStore
from exactly_once.transports.contract import Consumer, Delivery, Features, Subscription, Surroundings
from exactly_once.transports.memory import forget
from exactly_once.transports.registry import transport_from
from exactly_once.worker.busy_keys import BusyKeys
from exactly_once.worker.lane import Lane
from exactly_once.worker.worker import Run, Worker
from tests.unit.worker.worker_doubles import Hand, Shelf, done, ended
from tests.waiting import until

MS = timedelta(milliseconds=1)
SECOND = timedelta(seconds=1)
LATER = Redeliver(50 * SECOND)
PATIENT = WaitForKey(20 * MS, 60 * SECOND, LATER)
_names = count()


@contextmanager
def working(consumers: Sequence[Consumer], run: Run, **options: Any) -> Iterator[Worker]:
    defaults: dict[str, Any] = {"capacity": 8, "drain_timeout": SECOND, "poll": 20 * MS}
    worker = Worker(consumers, run, **(defaults | options))
    until(lambda: not threads(), "those of the last test have ended")
    worker.start()
    try:
        yield worker
    finally:
        worker.stop()


def numbered(number: int) -> list[bytes]:
    return [b"%d" % n for n in range(number)]


def threads() -> int:
    """How many threads look after what is kept."""
    return sum(thread.name == "kept" for thread in all_threads())


class Held:
    """Keys that another run holds for so many looks; the moments of the looks."""

    def __init__(self, looks: int, keep: WaitForKey = PATIENT) -> None:
        self._looks, self._keep = looks, keep
        self.seen: defaultdict[bytes, list[float]] = defaultdict(list)
        self.attempts: set[int] = set()

    def run(self, delivery: Delivery, features: Features) -> Future[Result]:
        seen = self.seen[delivery.message.body or b""]
        seen.append(monotonic())
        self.attempts.add(delivery.message.attempt)
        return done(self._keep if len(seen) <= self._looks else Ack())


# -- kept, and run again -------------------------------------------------------------------------------------------


def test_what_is_kept_runs_again_and_is_acknowledged_once() -> None:
    shelf, held = Shelf([b"a"]), Held(3)
    with working([shelf], held.run) as worker:
        worker.drain(10 * SECOND)
        counts = worker.counts
    assert [type(verdict) for _, verdict in shelf.settled] == [Ack]
    assert held.attempts == {1}, "no delivery was spent"
    assert (counts.received, counts.acked, counts.redelivered, counts.in_hand) == (1, 1, 0, 0)
    looks = held.seen[b"a"]
    assert len(looks) == 4
    assert min(later - sooner for sooner, later in pairwise(looks)) > 0.019


def test_drain_does_not_take_what_is_kept_for_rest() -> None:
    with working([Shelf([b"A-1"], topic="orders")], lambda d, f: done(PATIENT)) as worker:
        with pytest.raises(TimeoutError, match=r"1 message\(s\) in hand.*orders A-1"):
            worker.drain(200 * MS)
        assert worker.unready() is None, "everything else goes on"


def test_others_go_on_while_one_is_kept() -> None:
    shelf, hand = Shelf([b"kept", *numbered(100)]), Hand()

    def run(delivery: Delivery, features: Features) -> Future[Result]:
        return hand(delivery, features) if delivery.message.body == b"kept" else done(Ack())

    with working([shelf], run, drain_timeout=0 * SECOND):
        until(lambda: hand.begun, "it runs")
        hand.begun[0][1].set_result(ended(PATIENT))
        until(lambda: len(shelf.settled) == 100, "the others are through")
        until(lambda: len(hand.begun) == 2, "it runs again")
        assert b"kept" not in shelf.verdicts(Ack)


def test_many_kept_at_once_are_each_acknowledged_once_by_one_thread() -> None:
    shelf, seen, most = Shelf(numbered(500)), defaultdict[bytes, int](int), 0

    def run(delivery: Delivery, features: Features) -> Future[Result]:
        nonlocal most
        body = delivery.message.body or b""
        seen[body] += 1
        most = max(most, threads())
        return done(WaitForKey(int(body) % 97 * MS, 60 * SECOND, LATER) if seen[body] <= 3 else Ack())

    with working([shelf], run, capacity=1000) as worker:
        worker.drain(20 * SECOND)
    assert most == 1
    assert set(seen.values()) == {4}
    assert sorted(shelf.verdicts(Ack)) == sorted(numbered(500))
    assert len(shelf.settled) == 500


def test_the_one_that_is_due_first_runs_first_whenever_it_came() -> None:
    shelf, hand = Shelf([b"late"]), Hand()
    with working([shelf], hand, poll=60 * SECOND) as worker:  # a quiet one: no receive that ends wakes anybody
        until(lambda: hand.begun, "one runs")
        hand.begun[0][1].set_result(ended(WaitForKey(60 * SECOND, 120 * SECOND, LATER)))
        shelf.put([b"soon"])
        until(lambda: len(hand.begun) == 2, "the other runs")
        hand.begun[1][1].set_result(ended(PATIENT))
        until(lambda: len(hand.begun) == 3, "one runs again", 5)
        assert hand.bodies()[2] == b"soon"
        hand.begun[2][1].set_result(ended(Ack()))
        assert worker.stop() == 1


def test_two_that_are_due_at_the_same_moment_both_run() -> None:
    ran, changed, mine = list[Delivery](), Condition(), Lane(Shelf(), "consumer 1", lambda number: None)
    kept = BusyKeys(lambda lane, delivery, since: ran.append(delivery), changed, lambda: False)
    since, keep = monotonic(), WaitForKey(60 * SECOND, SECOND / 5, LATER)
    both = [Delivery(Message("t", body), None) for body in numbered(2)]
    with changed:
        assert all(kept.keep(keep, mine, each, since) for each in both)
    until(lambda: ran == both, "both run, in the order they were kept")


def test_what_is_kept_is_extended_in_time() -> None:
    shelf, held = Shelf([b"a"], invisible=450 * MS), Held(60)
    with working([shelf], held.run) as worker:
        until(lambda: len(shelf.extended) >= 4, "it was extended")
        worker.drain(10 * SECOND)
    assert shelf.longest < 0.45
    assert shelf.verdicts(Ack) == [b"a"]


def test_nothing_behind_a_kept_message_of_its_ordering_key_is_handed_out() -> None:
    name, hand, ran = f"kept-{next(_names)}", Hand(), list[bytes]()

    def run(delivery: Delivery, features: Features) -> Future[Result]:
        if delivery.message.body == b"first":
            return hand(delivery, features)
        ran.append(delivery.message.body or b"")
        return done(Ack())

    transport = transport_from(f"memory://{name}", Surroundings())
    bodies = {b"first": "A", b"second": "A", b"other": "B", b"another": "B"}
    transport.producer().send([Message("orders", body, ordering_key=key) for body, key in bodies.items()])
    try:
        consumers = transport.subscribe("g", [Subscription("orders", ordered=True)])
        with working(consumers, run) as worker:
            for look in range(5):
                until(lambda: len(hand.begun) > look, "it is looked at")  # noqa: B023  (called in here only)
                hand.begun[look][1].set_result(ended(PATIENT))
            until(lambda: ran == [b"other", b"another"], "another key goes on")
            until(lambda: len(hand.begun) == 6, "it is looked at once more")
            assert ran == [b"other", b"another"]
            hand.begun[5][1].set_result(ended(Ack()))
            worker.drain(10 * SECOND)
        assert ran == [b"other", b"another", b"second"]
    finally:
        forget(name)


# -- patience ------------------------------------------------------------------------------------------------------


def test_after_its_patience_it_is_settled_with_what_its_last_run_said() -> None:
    shelf, begun = Shelf([b"a"]), list[float]()

    def run(delivery: Delivery, features: Features) -> Future[Result]:
        if delivery.message.attempt > 1:
            return done(Ack())
        begun.append(monotonic())
        return done(WaitForKey(30 * MS, 200 * MS, Redeliver(len(begun) * MS)))

    with working([shelf], run) as worker:
        worker.drain(10 * SECOND)
        counts = worker.counts
    assert len(begun) >= 2
    assert [verdict for _, verdict in shelf.settled] == [Redeliver(len(begun) * MS), Ack()]
    assert 0.2 <= begun[-1] - begun[0] < 5, "it is looked at once more as it ends"
    assert (counts.redelivered, counts.acked, counts.in_hand) == (1, 1, 0)


def test_looks_further_apart_than_its_patience_do_not_lengthen_it() -> None:
    shelf, held = Shelf([b"a"]), Held(9, WaitForKey(60 * SECOND, 100 * MS, LATER))
    with working([shelf], held.run):
        until(lambda: shelf.settled, "it is settled", 5)
    assert [verdict for _, verdict in shelf.settled] == [LATER]
    assert len(held.seen[b"a"]) == 2


def test_no_patience_is_settled_at_once() -> None:
    shelf, held = Shelf([b"a"]), Held(9, WaitForKey(20 * MS, 0 * SECOND, LATER))
    with working([shelf], held.run):
        until(lambda: shelf.settled, "it is settled")
    assert [verdict for _, verdict in shelf.settled] == [LATER]
    assert len(held.seen[b"a"]) == 1


def test_what_waited_long_before_its_first_look_ended_has_all_its_patience() -> None:
    shelf, hand = Shelf([b"a"]), Hand()
    with working([shelf], hand):
        until(lambda: hand.begun, "it runs")
        began = monotonic()
        until(lambda: monotonic() > began + 0.6, "more than its patience is over")
        hand.begun[0][1].set_result(ended(WaitForKey(20 * MS, 500 * MS, LATER)))
        until(lambda: len(hand.begun) == 2, "it was kept all the same")
        assert not shelf.settled
        hand.begun[1][1].set_result(ended(Ack()))


def test_an_outage_does_not_wear_out_its_patience() -> None:
    shelf, hand, answers = Shelf([b"a"]), Hand(), Event()
    keep = WaitForKey(20 * MS, 500 * MS, LATER)
    with working([shelf], hand, answers=lambda store: answers.is_set()) as worker:
        until(lambda: hand.begun, "it runs")
        hand.begun[0][1].set_result(ended(keep))
        until(lambda: len(hand.begun) == 2, "it runs again")
        hand.begun[1][1].set_result(ended(WaitForStore("eu")))
        until(lambda: worker.counts.held == 1, "the outage begins")
        began = monotonic()
        until(lambda: monotonic() > began + 0.6, "more than its patience is over")
        answers.set()
        until(lambda: len(hand.begun) == 3, "it runs when the store answers")
        hand.begun[2][1].set_result(ended(keep))
        until(lambda: len(hand.begun) == 4, "it is kept once more")
        hand.begun[3][1].set_result(ended(Ack()))
        worker.drain(10 * SECOND)
    assert [verdict for _, verdict in shelf.settled] == [Ack()]


def test_what_is_kept_and_due_in_an_outage_waits_for_the_store() -> None:
    shelf, seen, up = Shelf([b"kept"]), defaultdict[bytes, int](int), Event()

    def run(delivery: Delivery, features: Features) -> Future[Result]:
        body = delivery.message.body or b""
        seen[body] += 1
        if body == b"kept" and seen[body] == 1:
            return done(WaitForKey(100 * MS, 60 * SECOND, LATER))
        return done(Ack() if up.is_set() else WaitForStore("eu"))

    with working([shelf], run, answers=lambda store: up.is_set()) as worker:
        until(lambda: seen[b"kept"] == 1, "one is kept")
        shelf.put([b"other"])
        until(lambda: worker.counts.held == 2, "both wait for the store")
        up.set()
        worker.drain(10 * SECOND)
    assert sorted(shelf.verdicts(Ack)) == [b"kept", b"other"]
    assert worker.counts.redelivered == 0


# -- stop ----------------------------------------------------------------------------------------------------------


def test_stop_gives_back_at_once_what_is_kept() -> None:
    shelf, held = Shelf(numbered(3)), Held(9, WaitForKey(60 * SECOND, 120 * SECOND, LATER))
    with working([shelf], held.run, drain_timeout=60 * SECOND) as worker:
        until(lambda: len(held.seen) == 3, "all are kept")
        began = monotonic()
        assert worker.stop() == 3
        assert monotonic() - began < 5
    assert [verdict for _, verdict in shelf.settled] == [Redeliver()] * 3
    assert not shelf.out
    assert shelf.calls[-1] == "close"
    until(lambda: not threads(), "its thread ends")


def test_a_run_that_would_be_kept_while_stopping_is_given_back() -> None:
    shelf, hand = Shelf([b"kept", b"runs"]), Hand()
    with working([shelf], hand, drain_timeout=60 * SECOND) as worker, ThreadPoolExecutor(1) as pool:
        until(lambda: len(hand.begun) == 2, "both run")
        futures = {delivery.message.body: future for delivery, future in hand.begun}
        futures[b"kept"].set_result(ended(WaitForKey(60 * SECOND, 120 * SECOND, LATER)))
        stop = pool.submit(worker.stop)
        until(lambda: shelf.settled, "what was kept is given back")
        futures[b"runs"].set_result(ended(PATIENT))
        assert stop.result(10) == 2
    assert [(message.body, verdict) for message, verdict in shelf.settled] == [
        (b"kept", Redeliver()),
        (b"runs", Redeliver()),
    ]


@pytest.mark.parametrize("round_", range(20))
def test_stop_while_kept_messages_run_again_settles_each_once(round_: int) -> None:
    shelf, begun = Shelf(numbered(60)), list[Delivery]()

    def look(number: int) -> Result:
        sleep(0.0005)
        return ended(Ack() if number % 7 == 0 else WaitForKey(number % 3 * MS, 20 * MS, Redeliver(5 * MS)))

    with ThreadPoolExecutor(4) as pool:

        def run(delivery: Delivery, features: Features) -> Future[Result]:
            begun.append(delivery)
            return pool.submit(look, len(begun))

        with working([shelf], run, capacity=60) as worker:
            until(lambda: len(begun) > 100, "some run again")
            sleep(0.0005 * round_)
            worker.stop()
    counts = worker.counts
    assert not shelf.out
    assert counts.received == counts.acked + counts.redelivered == len(shelf.settled)


# -- what it costs -------------------------------------------------------------------------------------------------


def test_a_worker_that_keeps_nothing_has_no_thread_for_it_and_the_last_one_kept_ends_it() -> None:
    shelf, hand = Shelf([b"a", b"b"]), Hand()
    with working([shelf], hand):
        until(lambda: len(hand.begun) == 2, "they run")
        hand.begun[0][1].set_result(ended(Ack()))
        until(lambda: shelf.settled, "one is settled")
        assert not threads()
        hand.begun[1][1].set_result(ended(WaitForKey(100 * MS, 60 * SECOND, LATER)))
        assert threads() == 1
        until(lambda: len(hand.begun) == 3, "it runs again")
        until(lambda: not threads(), "nothing is kept")
        hand.begun[2][1].set_result(ended(Ack()))
        until(lambda: len(shelf.settled) == 2, "all are settled")
