"""The loop that all async handlers of a worker share goes on, whatever a task or a callback of one of them does to it.

asyncio ends a loop at a SystemExit or a KeyboardInterrupt of any task. Of one handler's mistake every message would hang, and
the worker would say that it is well.
"""

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from itertools import count
from time import monotonic, sleep
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from exactly_once import ExactlyOnce, Retry
from tests.integration.shop import GROUP, Shop, order, put, shops

pytestmark = pytest.mark.nightly(meet=2)

BAD = 2
THREE = Retry(immediate=0, delays=[0.01], max_attempts=3)
_names = count(1)


@pytest.fixture
def shop(request: pytest.FixtureRequest) -> Iterator[Shop]:
    yield from shops(request, "sqlite", "async")


class Panic(BaseException):
    """As a Rust extension raises it."""


def interrupts() -> None:
    raise KeyboardInterrupt


def panics() -> None:
    raise Panic


async def in_a_task(end: Callable[[], object]) -> None:
    async def child() -> None:
        end()

    task = asyncio.create_task(child())
    await asyncio.sleep(0.05)
    await task


async def in_a_task_that_nobody_awaits(end: Callable[[], object]) -> None:
    async def child() -> None:
        end()

    task = asyncio.create_task(child())
    await asyncio.sleep(0.05)
    with suppress(BaseException):
        task.result()


async def in_a_task_group(end: Callable[[], object]) -> None:
    async def child() -> None:
        end()

    async with asyncio.TaskGroup() as group:
        group.create_task(child())


async def in_a_callback(end: Callable[[], object]) -> None:
    asyncio.get_running_loop().call_soon(end)
    await asyncio.sleep(0.05)


async def in_the_handler(end: Callable[[], object]) -> None:
    end()


def stops() -> None:
    asyncio.get_running_loop().stop()


HOW: list[Callable[[Callable[[], object]], Awaitable[None]]] = [
    in_a_task,
    in_a_task_that_nobody_awaits,
    in_a_task_group,
    in_a_callback,
    in_the_handler,
]
AWAITED = (in_a_task, in_a_task_group, in_the_handler)


@pytest.mark.parametrize("how", HOW, ids=[how.__name__ for how in HOW])
@pytest.mark.parametrize("end", [sys.exit, interrupts, panics, stops], ids=["exit", "interrupt", "panic", "stop"])
@pytest.mark.parametrize("batch", [None, 10])
def test_whatever_a_handlers_task_ends_the_other_messages_are_handled(
    shop: Shop, how: Any, end: Callable[[], object], batch: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    eo = ExactlyOnce(shop.url, group=GROUP)

    @eo.handler("orders", name="handler", key="no", retry=THREE, batch=batch)
    async def handler(session: AsyncSession, body: dict[str, Any]) -> None:
        await session.run_sync(put, str(body["no"]))
        if body["no"] == BAD:
            await how(end)

    url = f"memory://loops-{next(_names)}"
    others = {"1", "3", "4", "5", "6"}
    with (
        caplog.at_level(logging.ERROR, "exactly_once.worker"),
        eo.worker(url, concurrency=2, drain_timeout=timedelta(seconds=1)) as worker,
        eo.producer(url) as producer,
    ):
        producer.send_all([order(1), order(BAD)])
        sleep(0.3)
        producer.send_all([order(no) for no in (3, 4, 5, 6)])
        deadline = monotonic() + 10
        while not others <= set(shop.effects()):
            assert monotonic() < deadline, f"only {shop.effects()} within 10 s"
            sleep(0.02)
        assert worker.unready() is None
        assert worker.stuck(timedelta(seconds=30)) == []
        if end is sys.exit and how in AWAITED:
            while not shop.failures() or shop.failure().attempts < 3:
                assert monotonic() < deadline, "its message was not counted"
                sleep(0.02)
            assert "sys.exit" in shop.failure().error_text
    if how is not in_the_handler and end is not panics:
        assert any("handlers_loop_ended" in record.getMessage() for record in caplog.records)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_loop_that_cannot_go_on_is_said_to_whoever_asks_how_the_worker_is(shop: Shop) -> None:
    eo = ExactlyOnce(shop.url, group=GROUP)

    @eo.handler("orders", name="handler", key="no")
    async def handler(session: AsyncSession) -> None:
        loop: Any = asyncio.get_running_loop()
        loop._selector.close()

    url = f"memory://loops-{next(_names)}"
    with (
        eo.worker(url, concurrency=2, drain_timeout=timedelta(seconds=0.1)) as worker,
        eo.producer(url) as producer,
    ):
        producer.send(order(1))
        deadline = monotonic() + 10
        while worker.unready() is None:
            assert monotonic() < deadline, "not within 10 s"
            sleep(0.02)
        assert worker.unready() == "ended: handlers' loop"
        assert worker.stuck(timedelta(seconds=30)) == ["handlers' loop"]
