"""A session is used after what it was given for has ended: the message, or a step's transaction.

The kind: a variable, a task or a thread kept it. Nobody would commit what it writes then, and nobody would give back the
connection it takes: after as many messages as the pool has connections the worker stands still.
"""

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from exactly_once import AsyncSteps, Misuse, Outcome, Steps
from tests.integration.shop import COLOURS, DIALECTS, ONE_TRY, Shop, order, put, shops
from tests.integration.ways import ALONE, LEASE, UNDER_A_LEASE, WAYS, Way

pytestmark = pytest.mark.nightly(meet=2)

P, F = Outcome.PROCESSED, Outcome.FAILED
REFUSED = "used after what it was given for had ended"


@pytest.fixture(
    params=[(dialect, colour) for dialect in DIALECTS for colour in COLOURS],
    ids=[f"{dialect}-{colour}" for dialect in DIALECTS for colour in COLOURS],
)
def small(request: pytest.FixtureRequest) -> Iterator[Shop]:
    """With few connections: what keeps one is noticed at the next messages."""
    yield from shops(request, *request.param, pool_size=2, options={"pool_timeout": 2})


def checked_out(shop: Shop) -> int:
    gc.collect()
    pool: Any = shop.async_engine.pool if shop.is_async else shop.engine.pool
    return int(pool.checkedout())


def told(shop: Shop, use: Callable[[], object]) -> str:
    """Use it in the shop's colour, and say what that raised."""

    async def awaited() -> None:
        from sqlalchemy.util import greenlet_spawn

        await greenlet_spawn(use)

    try:
        shop.await_(awaited()) if shop.is_async else use()
    except Misuse as error:
        return str(error)
    return "nothing"


USES: dict[str, Callable[[Session], object]] = {
    "execute": lambda session: put(session, "late"),
    "connection": lambda session: session.connection(),
    "begin": lambda session: session.begin() and session.execute(text("SELECT 1")),
    "begin_nested": lambda session: session.begin_nested() and session.execute(text("SELECT 1")),
    "scalar": lambda session: session.scalar(text("SELECT 1")),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_session_that_was_kept_is_refused_and_takes_no_connection(small: Shop, way: Way, use: str) -> None:
    kept: list[Session] = []

    def do(session: Session, no: Any) -> None:
        put(session, f"{no} in time")
        kept.append(session)
        if no == 2:
            raise ZeroDivisionError

    way.handles(small, do)
    assert way.attempted(small, [order(1)]) == [P]
    assert way.attempted(small, [order(2)]) == [F]
    for session in kept:
        assert REFUSED in told(small, lambda session=session: USES[use](session))  # type: ignore[misc]
    assert checked_out(small) == 0
    assert [way.attempted(small, [order(no)]) for no in (3, 4, 5)] == [[P]] * 3
    assert small.effects() == ["1 in time", "3 in time", "4 in time", "5 in time"]


def test_the_same_where_a_duplicate_runs_because_nothing_is_enforced(small: Shop) -> None:
    small.fresh_eo(enforce=False)
    kept: list[Session] = []

    def do(session: Session, no: Any) -> None:
        put(session, f"{no}")
        kept.append(session)

    ALONE.handles(small, do)
    for attempt in (1, 2, 3, 4):
        small.process(order(1, attempt=attempt))
    for session in kept:
        assert REFUSED in told(small, lambda session=session: put(session, "late"))  # type: ignore[misc]
    assert checked_out(small) == 0
    assert small.effects() == ["1"] * 4


@pytest.mark.parametrize("way", [ALONE, UNDER_A_LEASE], ids=str)
def test_a_thread_or_task_that_begins_after_the_end_is_told(small: Shop, way: Way) -> None:
    """The handler itself never used the session."""
    kept: list[Session] = []
    way.handles(small, lambda session, no: kept.append(session))
    assert way.attempted(small, [order(1)]) == [P]
    said: list[str] = []

    def late() -> None:
        said.append(told(small, lambda: put(kept[0], "late")))

    if small.is_async:
        late()
    else:
        thread = threading.Thread(target=late)
        thread.start()
        thread.join(20)
    assert REFUSED in said[0]
    assert checked_out(small) == 0
    assert small.effects() == []


@pytest.mark.parametrize("swallows", [True, False])
def test_a_steps_session_ends_with_the_step(small: Shop, swallows: bool) -> None:
    kept: list[Session] = []
    refused: AbstractContextManager[Any] = suppress(Misuse) if swallows else nullcontext()
    options: dict[str, Any] = {"name": "handler", "key": "no", "guard": LEASE, "retry": ONE_TRY}

    def work(session: Session) -> None:
        kept.append(session)
        put(session, "in the step")

    if small.is_async:

        @small.eo.handler("orders", **options)
        async def awaited(session: AsyncSession, steps: AsyncSteps) -> None:
            await steps.transaction("step", lambda inner: inner.run_sync(work))
            with refused:
                await session.run_sync(lambda _: put(kept[-1], "leaked"))
            await session.run_sync(put, "own")
    else:

        @small.eo.handler("orders", **options)
        def plain(session: Session, steps: Steps) -> None:
            steps.transaction("step", work)
            with refused:
                put(kept[-1], "leaked")
            put(session, "own")

    ends = [small.process(order(no)) for no in (1, 2, 3, 4)]
    assert ends == [P if swallows else F] * 4, small.failures()
    assert checked_out(small) == 0
    assert small.effects() == (["in the step", "own"] * 4 if swallows else ["in the step"] * 4)
    if not swallows:
        assert all(REFUSED in row.error_text for row in small.failures())


@pytest.mark.parametrize("colour", COLOURS)
def test_what_a_session_had_read_can_be_used_as_ever(request: pytest.FixtureRequest, colour: str) -> None:
    for shop in shops(request, "sqlite", colour):
        kept: list[Any] = []

        def do(session: Session, no: Any, kept: list[Any] = kept) -> None:
            put(session, f"{no}")
            kept.extend([session, session.execute(text("SELECT text FROM effect")).all()])

        ALONE.handles(shop, do)
        assert ALONE.attempted(shop, [order(1)]) == [P]
        session, rows = kept
        assert [row.text for row in rows] == ["1"]
        shop.await_(_closed(session)) if shop.is_async else session.close()
        shop.borrow()


async def _closed(session: Session) -> None:
    from sqlalchemy.util import greenlet_spawn

    await greenlet_spawn(session.close)
    await asyncio.sleep(0)
