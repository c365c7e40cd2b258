"""A run is cut off at any moment: by one cancellation, by one that comes again (at each await: anyio), by a signal's exception.

The kind: the connection that a statement of ours has used is being given back, and that takes a conversation with the server (a
session's setting put back, a rollback). Whoever is cut off there loses the connection's place in the pool: some timeouts later
the pool is empty, and nothing is processed until the program is started again.
"""

import asyncio
import gc
from collections.abc import Coroutine, Generator, Iterator
from itertools import count
from typing import Any

import pymysql
import pytest
from sqlalchemy.orm import Session

from exactly_once import Outcome
from tests.integration.shop import DIALECTS, Shop, order, put, shops
from tests.integration.ways import ALONE, IN_A_STEP, UNDER_A_LEASE, Way

LEASED = (UNDER_A_LEASE, IN_A_STEP)
LONGEST = 200
"""So many moments no run has."""


class CutOff:
    """Awaits a coroutine whose task is cancelled at one of its suspensions, and at the next ones if it is to come again."""

    def __init__(self, run: Coroutine[Any, Any, object], at: int, times: int) -> None:
        self._run, self._at, self._times, self.suspended = run, at, times, 0

    def __await__(self) -> Generator[Any, Any, object]:
        steps, task, loop = self._run.__await__(), asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        raised: BaseException | None = None
        while True:
            try:
                waits_for = steps.send(None) if raised is None else steps.throw(raised)
            except StopIteration as done:
                return done.value
            self.suspended += 1
            if self._at <= self.suspended < self._at + self._times:
                loop.call_soon(task.cancel)
            raised = None
            try:
                yield waits_for
            except BaseException as error:
                raised = error


def at_this_moment(shop: Shop, no: str, at: int, times: int) -> bool:
    """Run one message, cut off there; False: it has ended before. Nothing is collected meanwhile that would hide a loss."""

    async def cut_off() -> CutOff:
        run = CutOff(shop.eo.aprocess(order(no)), at, times)

        async def awaited() -> None:
            await run

        task = asyncio.ensure_future(awaited())
        await asyncio.wait([task])
        assert not times or run.suspended < at or task.cancelled(), f"the cancellation at suspension {at} was lost"
        return run

    gc.collect()
    gc.disable()
    try:
        run = shop.await_(cut_off())
        assert shop.async_engine.pool.checkedout() == 0, f"{times} from suspension {at} on"  # type: ignore[attr-defined]
    finally:
        gc.enable()
    return bool(run.suspended >= at)


@pytest.fixture(params=DIALECTS)
def ashop(request: pytest.FixtureRequest) -> Iterator[Shop]:
    yield from shops(request, request.param, "async", options={"pool_timeout": 1})


@pytest.mark.nightly(meet=2)
@pytest.mark.parametrize("ends", ["processed", "failed"])
@pytest.mark.parametrize("times", [1, 2, LONGEST])
@pytest.mark.parametrize("way", [ALONE, *LEASED], ids=str)
def test_a_cancellation_at_any_moment_gives_every_place_in_the_pool_back(
    ashop: Shop, way: Way, times: int, ends: str
) -> None:
    def do(session: Session, no: Any) -> None:
        put(session, f"{no}")
        if ends == "failed" and no != "neighbour":
            raise ZeroDivisionError

    way.handles(ashop, do)
    at_this_moment(ashop, "first", LONGEST, 0)  # the connection is known from here on
    for at in count(1):
        if not at_this_moment(ashop, f"cut off at {at}", at, times):
            break
        assert at < LONGEST
    assert ashop.process(order("neighbour")) is Outcome.PROCESSED
    ashop.borrow()
    # none keeps its lease: whether it was committed is known, also where COMMIT was cut off
    for no in range(1, at):
        again = ashop.process(order(f"cut off at {no}"))
        assert again in (Outcome.DUPLICATE, Outcome.FAILED if ends == "failed" else Outcome.PROCESSED), no


class Signalled(Exception):
    """As Celery's SoftTimeLimitExceeded, which its signal's handler raises wherever the program is."""


@pytest.fixture
def mariadb(request: pytest.FixtureRequest) -> Iterator[Shop]:
    yield from shops(request, "mariadb", "sync", options={"pool_timeout": 1})


@pytest.mark.parametrize("ends", ["processed", "failed"])
@pytest.mark.parametrize("error", [Signalled, KeyboardInterrupt])
@pytest.mark.parametrize("way", LEASED, ids=str)
def test_a_signals_exception_in_any_wait_for_the_server_gives_every_place_in_the_pool_back(
    mariadb: Shop, way: Way, error: type[BaseException], ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver: Any = pymysql.connections.Connection
    shop, read, waits, at = mariadb, driver._read_bytes, 0, 0

    def interrupted(self: Any, size: int) -> bytes:
        nonlocal waits
        if size == 4:  # the head of an answer
            waits += 1
            if waits == at:
                self._force_close()  # as the driver does whatever is raised there
                raise error
        return bytes(read(self, size))

    def do(session: Session, no: Any) -> None:
        put(session, f"{no}")
        if ends == "failed" and no != "neighbour":
            raise ZeroDivisionError

    monkeypatch.setattr(driver, "_read_bytes", interrupted)
    way.handles(shop, do)
    way.attempted(shop, [order("first")])
    while waits >= at:
        at, waits = at + 1, 0
        gc.disable()
        try:
            way.attempted(shop, [order(f"interrupted at {at}")])
            assert shop.engine.pool.checkedout() == 0, f"in wait {at}"  # type: ignore[attr-defined]
        finally:
            gc.enable()
        assert at < LONGEST
    at = 0
    assert shop.process(order("neighbour")) is Outcome.PROCESSED
    shop.borrow()
