"""How groups form, how large they are, and what several handlers of one delivery say together."""

from concurrent.futures import CancelledError, ThreadPoolExecutor
from datetime import timedelta
from threading import Barrier
from types import SimpleNamespace
from typing import cast

import pytest

from exactly_once import Message, Outcome
from exactly_once.executor.batching import (
    FIRST,
    FIRST_CALM,
    LEAST,
    LONGEST,
    LONGEST_LIST,
    MOST_CALM,
    Batching,
    BatchSize,
)
from exactly_once.executor.fanout import Parts
from exactly_once.executor.future import SmallFuture
from exactly_once.outcome import Ack, Redeliver, Result, WaitForStore
from exactly_once.processing.batch import BatchProcessor
from exactly_once.transports.contract import Features

FEATURES = Features(redelivers=True, counts_attempts=True)
SOON = timedelta(milliseconds=1)
SAID = Result(Outcome.PROCESSED, Ack())


def batching(batch: int = 3, linger: timedelta = timedelta(0)) -> Batching:
    handler = SimpleNamespace(plan=SimpleNamespace(batch=batch, linger=linger, in_lists=False))
    return Batching(cast(BatchProcessor, handler))


def add(waiting: Batching, number: int) -> tuple[bool, SmallFuture]:
    future = SmallFuture()
    return waiting.add(Message("orders", str(number).encode()), FEATURES, future), future


def taken(waiting: Batching) -> list[bytes | None]:
    return [one.message.body for one in waiting.take()]


def test_a_group_is_what_waits_in_the_order_it_came_and_no_more_than_allowed() -> None:
    waiting = batching()
    assert [add(waiting, number)[0] for number in range(5)] == [True, False, False, False, False]
    assert taken(waiting) == [b"0", b"1", b"2"]
    assert taken(waiting) == [b"3", b"4"]


def test_whoever_finds_nothing_ends_and_the_next_message_begins_again() -> None:
    waiting = batching()
    add(waiting, 1)
    assert taken(waiting) == [b"1"]
    assert add(waiting, 2)[0] is False, "somebody is still taking"
    assert taken(waiting) == [b"2"]
    assert taken(waiting) == []
    assert add(waiting, 3)[0] is True


def test_what_was_given_back_meanwhile_does_not_run() -> None:
    waiting = batching()
    _, first = add(waiting, 1)
    _, second = add(waiting, 2)
    assert first.cancel()
    assert taken(waiting) == [b"2"]
    assert not second.cancel(), "it runs"


def test_only_the_first_message_waits_for_others_and_never_for_a_full_group() -> None:
    waiting = batching(batch=2, linger=timedelta(seconds=5))
    assert waiting.pause_s() == 0
    add(waiting, 1)
    assert 4 < waiting.pause_s() <= 5
    add(waiting, 2)
    assert waiting.pause_s() == 0


def grown(size: BatchSize, groups: int, took: timedelta = SOON) -> list[int]:
    found = []
    for _ in range(groups):
        size.ended(size.now, took, deadlocked=False)
        found.append(size.now)
    return found


def test_a_worker_begins_with_small_groups_and_doubles_them() -> None:
    size = BatchSize(100)
    assert size.now == FIRST
    assert grown(size, 5) == [2 * FIRST, 4 * FIRST, 8 * FIRST, 100, 100]
    assert BatchSize(2).now == 2


def test_a_group_that_was_not_full_says_nothing_of_larger_ones() -> None:
    size = BatchSize(100)
    size.ended(FIRST - 1, SOON, deadlocked=False)
    assert size.now == FIRST


@pytest.mark.parametrize("most", [2, 100, 10_000])
def test_a_size_is_halved_by_a_deadlock_and_grows_back_slowly(most: int) -> None:
    size = BatchSize(most)
    grown(size, 20)
    size.ended(most, SOON, deadlocked=True)
    assert size.now == max(LEAST, most // 2)
    for _ in range(30):
        size.ended(most, SOON, deadlocked=True)
    assert size.now == LEAST
    sizes = grown(size, MOST_CALM + 200)
    assert sizes == sorted(sizes)
    assert sizes[FIRST_CALM] == LEAST, "and not at once: the next deadlock would be there"
    assert sizes[-1] == most


def test_a_size_that_is_back_at_its_most_forgets_its_deadlocks() -> None:
    size = BatchSize(4)
    waits = []
    for _ in range(2):
        size.ended(4, SOON, deadlocked=True)
        groups = 0
        while size.now < 4:
            grown(size, 1)
            groups += 1
        waits.append(groups)
    assert waits[0] == waits[1] >= FIRST_CALM


@pytest.mark.parametrize("longest", [LONGEST, LONGEST_LIST])
def test_a_slow_group_is_followed_by_one_that_fits_and_grows_again_soon(longest: timedelta) -> None:
    size = BatchSize(1000, longest)
    grown(size, 20)
    size.ended(1000, 4 * longest, deadlocked=False)
    assert size.now == 250
    assert grown(size, 1) == [275]
    size.ended(10, 100 * longest, deadlocked=False)
    assert size.now == LEAST


def parts(number: int) -> tuple[Parts, list[Result], list[BaseException]]:
    ended: list[Result] = []
    failed: list[BaseException] = []
    return Parts(number, ended.append, failed.append), ended, failed


def ended_with(result: Result | BaseException | None) -> SmallFuture:
    part = SmallFuture()
    if result is None:
        part.cancel()
    elif isinstance(result, BaseException):
        part.set_exception(result)
    else:
        part.set_result(result)
    return part


def test_what_is_to_come_calls_back_once_whoever_ends_it() -> None:
    for end in ("before", "after"):
        seen: list[object] = []
        pending = SmallFuture()
        assert pending.set_running_or_notify_cancel()
        if end == "before":
            pending.set_result(SAID)
        pending.add_done_callback(seen.append)
        if end == "after":
            pending.set_result(SAID)
        assert seen == [pending]
        assert (pending.result(), pending.exception(), pending.done(), pending.cancelled()) == (
            SAID,
            None,
            True,
            False,
        )
        assert not pending.cancel()


def test_what_has_not_begun_can_be_cancelled_and_never_begins() -> None:
    seen: list[object] = []
    pending = SmallFuture()
    pending.add_done_callback(seen.append)
    assert pending.cancel()
    assert pending.cancel(), "twice is once"
    assert seen == [pending]
    assert not pending.set_running_or_notify_cancel()
    assert pending.done()
    with pytest.raises(CancelledError):
        pending.result()


def test_what_broke_raises_it() -> None:
    pending = SmallFuture()
    pending.set_running_or_notify_cancel()
    pending.set_exception(KeyError("broke"))
    assert isinstance(pending.exception(), KeyError)
    with pytest.raises(KeyError):
        pending.result()


def test_begin_and_cancel_at_the_same_moment_have_one_winner() -> None:
    with ThreadPoolExecutor(2) as threads:
        for _ in range(500):
            pending, meet = SmallFuture(), Barrier(2)

            def begin(pending: SmallFuture = pending, meet: Barrier = meet) -> bool:
                meet.wait()
                return pending.set_running_or_notify_cancel()

            def cancel(pending: SmallFuture = pending, meet: Barrier = meet) -> bool:
                meet.wait()
                return pending.cancel()

            assert [threads.submit(begin), threads.submit(cancel)][0].result() is not pending.cancelled()


DONE = Result(Outcome.PROCESSED, Ack())


def test_a_delivery_ends_when_its_last_handler_has() -> None:
    together, ended, failed = parts(2)
    together.ended(ended_with(DONE))
    assert not ended
    together.ended(ended_with(Result(Outcome.FAILED, Redeliver(SOON))))
    assert ended == [Result(Outcome.FAILED, Redeliver(SOON))]
    assert not failed


def test_a_store_that_is_away_for_one_of_them_holds_the_delivery() -> None:
    together, ended, _ = parts(2)
    together.ended(ended_with(Result(Outcome.WAITING, WaitForStore("default"))))
    together.ended(ended_with(DONE))
    assert ended == [Result(Outcome.WAITING, WaitForStore("default"))]


@pytest.mark.parametrize("broken", [RuntimeError("broke"), None])
def test_a_handler_that_broke_or_was_cancelled_keeps_the_delivery_from_being_acknowledged(
    broken: BaseException | None,
) -> None:
    together, ended, failed = parts(2)
    together.ended(ended_with(broken))
    together.ended(ended_with(DONE))
    assert not ended
    assert [type(each) for each in failed] == [CancelledError if broken is None else RuntimeError]
