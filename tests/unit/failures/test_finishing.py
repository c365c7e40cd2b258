"""What is finished although its task is cancelled: done once, to its end, and the cancellation is raised behind it."""

import asyncio
import threading
from collections.abc import Callable
from contextvars import ContextVar
from time import monotonic
from typing import Any

import pytest
from sqlalchemy.util import await_only, greenlet_spawn

from exactly_once.exceptions import finishing
from exactly_once.exceptions.finishing import finish, finished
from exactly_once.exceptions.stops import stops


def in_a_loop(do: Callable[[], Any]) -> Any:
    async def run() -> Any:
        return await greenlet_spawn(do)

    return asyncio.run(run())


def cancelled_at_each_turn(do: Callable[[], Any]) -> tuple[Any, int]:
    """Run it in a task that is cancelled at each turn of the loop; what came of that, and how often it was."""

    async def run() -> tuple[Any, int]:
        task = asyncio.create_task(greenlet_spawn(do))
        await asyncio.sleep(0)
        times = 0
        while not task.done():
            times += task.cancel(f"number {times + 1}")
            await asyncio.sleep(0)
        assert task.cancelling() == times
        try:
            return await task, times
        except BaseException as error:
            return error, times

    return asyncio.run(run())


def work(done: list[str]) -> str:
    for step in ("one", "two", "three"):
        await_only(asyncio.sleep(0.01))
        done.append(step)
    return "result"


def test_in_a_thread_it_is_done_there() -> None:
    assert finish(threading.get_ident) == (threading.get_ident(), None)


def test_in_a_greenlet_it_returns_and_raises_as_it_is() -> None:
    done: list[str] = []
    assert in_a_loop(lambda: finish(lambda: work(done))) == ("result", None)
    assert done == ["one", "two", "three"]
    with pytest.raises(ZeroDivisionError):
        in_a_loop(lambda: finish(lambda: 1 / 0))


def test_cancelled_at_each_turn_it_is_done_once_and_the_first_cancellation_is_raised() -> None:
    done: list[str] = []
    error, times = cancelled_at_each_turn(lambda: finished(lambda: work(done)))
    assert done == ["one", "two", "three"]
    assert times > 3
    assert isinstance(error, asyncio.CancelledError)
    assert error.args == ("number 1",)


def test_what_it_raised_stands_behind_the_cancellation() -> None:
    def fails() -> None:
        await_only(asyncio.sleep(0.01))
        raise ZeroDivisionError

    error, _ = cancelled_at_each_turn(lambda: finish(fails))
    assert isinstance(error, asyncio.CancelledError)
    assert isinstance(error.__cause__, ZeroDivisionError)


def test_one_inside_another_is_finished_too() -> None:
    done: list[str] = []
    (value, cancellation), _ = cancelled_at_each_turn(lambda: finish(lambda: finished(lambda: work(done))))
    assert (value, done) == ("result", ["one", "two", "three"])
    assert isinstance(cancellation, asyncio.CancelledError)


def test_inside_it_is_known_that_the_task_was_asked_to_end() -> None:
    error = asyncio.CancelledError()

    def run() -> tuple[bool, bool]:
        before = finish(lambda: stops(error))[0]
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        try:
            await_only(asyncio.sleep(0))
        except asyncio.CancelledError:
            return before, finish(lambda: finished(lambda: stops(error)))[0]
        raise AssertionError

    assert in_a_loop(run) == (False, True)


@pytest.mark.parametrize("cancelled", [True, False], ids=["cancelled again", "within_s"])
def test_it_takes_no_longer_than_it_may(monkeypatch: pytest.MonkeyPatch, cancelled: bool) -> None:
    monkeypatch.setattr(finishing, "LONGEST_S", 0.1)
    ended: list[str] = []

    def hangs() -> None:
        try:
            await_only(asyncio.sleep(30))
        finally:
            ended.append("cut off")

    began = monotonic()
    if cancelled:
        error, _ = cancelled_at_each_turn(lambda: finish(hangs))
        assert error.args == ("number 1",)
    else:
        with pytest.raises(asyncio.CancelledError):
            in_a_loop(lambda: finish(hangs, within_s=0.1))
    assert monotonic() - began < 10
    assert ended == ["cut off"]


@pytest.mark.parametrize("exits", [SystemExit, KeyboardInterrupt])
def test_an_exit_reaches_who_waits_for_it_and_ends_no_loop(exits: type[BaseException]) -> None:
    def leave() -> None:
        await_only(asyncio.sleep(0))
        raise exits

    async def run() -> str:
        with pytest.raises(exits):
            await greenlet_spawn(finish, leave)
        await asyncio.sleep(0)
        return "goes on"

    assert asyncio.run(run()) == "goes on"


def test_what_it_sets_in_its_context_is_set_for_who_waits() -> None:
    """A hook of the application's sets a variable as a transaction begins, and sets it back as it ends."""
    tenant: ContextVar[str] = ContextVar("tenant", default="nobody")

    def run() -> tuple[str, str]:
        was = tenant.set("seven")
        finish(lambda: tenant.reset(was))
        between = tenant.get()
        finish(lambda: (tenant.set("eight"), await_only(asyncio.sleep(0))))
        return between, tenant.get()

    assert in_a_loop(run) == ("nobody", "eight")


@pytest.mark.parametrize("factory", ["of two arguments", "eager"])
def test_a_factory_of_tasks_makes_no_difference(factory: str) -> None:
    tenant: ContextVar[str] = ContextVar("tenant", default="nobody")

    async def run() -> tuple[str, str]:
        loop: Any = asyncio.get_running_loop()
        if factory == "eager":
            loop.set_task_factory(getattr(asyncio, "eager_task_factory", None))  # there since Python 3.12
        else:
            loop.set_task_factory(lambda loop, coro: asyncio.Task(coro, loop=loop))

        def both() -> str:
            was = tenant.set("seven")
            value, _ = finish(lambda: work([]))
            finish(lambda: tenant.reset(was))
            return value

        return await greenlet_spawn(both), tenant.get()

    assert asyncio.run(asyncio.wait_for(run(), 10)) == ("result", "nobody")
