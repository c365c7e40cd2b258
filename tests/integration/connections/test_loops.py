"""Event loops that follow each other, and two at once: no message fails for it, and no connection stays behind.

A pool of SQLAlchemy's is for one loop at a time, and asyncmy's connections belong to the loop that opened them.
"""

import asyncio
import gc
import logging
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from threading import Barrier, Thread
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.pool import NullPool

from exactly_once import Outcome
from tests.integration.shop import DIALECTS, ONE_TRY, Shop, order, put, shops
from tests.waiting import until

pytestmark = pytest.mark.nightly(meet=2)

PATIENCE_S = 120
_OPEN = {
    "postgres": "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()",
    "mariadb": "SELECT count(*) FROM information_schema.processlist WHERE db = DATABASE()",
    "sqlite": "SELECT 0",
}
P = Outcome.PROCESSED


@pytest.fixture(params=DIALECTS)
def shop(request: pytest.FixtureRequest) -> Iterator[Shop]:
    yield from shops(request, request.param, "async")


@contextmanager
def served(shop: Shop, **options: Any) -> Iterator[AsyncEngine]:
    """A fresh engine that the application gives, with a handler: nobody has connected through it yet."""
    engine = create_async_engine(shop.async_engine.url, **options)
    eo = shop.fresh_eo(async_database=engine)

    @eo.handler("orders", name="handler", key="no", retry=ONE_TRY)
    async def handler(session: AsyncSession, body: dict[str, Any]) -> None:
        await session.run_sync(put, str(body["no"]))

    yield engine
    asyncio.run(engine.dispose())


async def together(shop: Shop, who: object, each: int) -> Sequence[Outcome]:
    return await asyncio.gather(*(shop.eo.aprocess(order(f"{who}-{n}")) for n in range(each)))


async def in_turn(shop: Shop, who: object, each: int) -> Sequence[Outcome]:
    return [await shop.eo.aprocess(order(f"{who}-{n}")) for n in range(each)]


def each_once(shop: Shop, *who: object, each: int) -> None:
    assert sorted(shop.effects()) == sorted(f"{one}-{n}" for one in who for n in range(each))
    assert shop.failures() == []


def opened(shop: Shop) -> int:
    """How many connections the server has for this database."""
    with shop.outside.connect() as connection:
        number: int = connection.execute(text(_OPEN[shop.dialect])).scalar_one()
    return number


# -- one after the other -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"pool_pre_ping": True}, {"pool_recycle": 0}], ids=["plain", "ping", "recycle"])
def test_fifty_loops_one_after_the_other_leave_no_connection_behind(shop: Shop, more: dict[str, Any]) -> None:
    size = 3
    with served(shop, pool_size=size, max_overflow=0, **more) as engine:
        before = opened(shop)
        gc.collect()
        gc.disable()  # what the collector would close is not closed by us
        try:
            for turn in range(50):
                assert asyncio.run(together(shop, turn, 5)) == [P] * 5
                pool: Any = engine.pool
                assert (pool.checkedout(), pool.checkedin() <= size) == (0, True)
                until(lambda: opened(shop) <= before + size, f"the connections of {turn + 1} loops are closed")
        finally:
            gc.enable()
        each_once(shop, *range(50), each=5)


@pytest.mark.parametrize("more", [{}, {"pool_pre_ping": True}], ids=["plain", "ping"])
def test_each_message_has_a_loop_of_its_own(shop: Shop, more: dict[str, Any]) -> None:
    with served(shop, pool_size=3, **more):
        for turn in range(8):
            assert asyncio.run(in_turn(shop, turn, 1)) == [P]
        each_once(shop, *range(8), each=1)


def test_what_was_in_use_when_its_loop_ended_is_handled_in_the_next_one(shop: Shop) -> None:
    with served(shop, pool_size=1, max_overflow=0, pool_timeout=20) as engine:
        gone = asyncio.new_event_loop()

        async def holds() -> AsyncSession:
            session = AsyncSession(engine)
            await session.execute(text("SELECT 1"))
            return session

        assert gone.run_until_complete(in_turn(shop, "first", 2)) == [P, P]
        held = gone.run_until_complete(holds())
        gone.close()
        assert asyncio.run(in_turn(shop, "next", 3)) == [P, P, P]
        assert sorted(shop.effects()) == ["first-0", "first-1", "next-0", "next-1", "next-2"]
        del held


@pytest.mark.parametrize("each", [1, 4])
@pytest.mark.parametrize("collects", [True, False], ids=["gc", "no gc"])
def test_loops_that_nobody_closes_are_as_good_as_ended(shop: Shop, each: int, collects: bool) -> None:
    loops = []
    with served(shop, pool_size=2, max_overflow=0, pool_timeout=5):
        before = opened(shop)
        gc.collect()
        if not collects:
            gc.disable()
        try:
            for turn in range(25):
                loop = asyncio.new_event_loop()
                loops += [] if collects else [loop]
                assert loop.run_until_complete(together(shop, turn, each)) == [P] * each
                until(lambda: opened(shop) <= before + 2, f"the connections of {turn + 1} loops are closed")
        finally:
            gc.enable()
        each_once(shop, *range(25), each=each)
    for loop in loops:
        loop.close()


def test_two_loops_take_turns_and_each_runs_again(shop: Shop) -> None:
    """As where two threads have a loop each, and one works at a time."""
    with served(shop, pool_size=2, max_overflow=0, pool_timeout=5):
        before = opened(shop)
        with asyncio.Runner() as one, asyncio.Runner() as two:
            for turn in range(10):
                for which, runner in enumerate((one, two)):
                    assert runner.run(together(shop, f"{which}-{turn}", 5)) == [P] * 5
                    until(lambda: opened(shop) <= before + 2, "the connections of the other loop are closed")
        each_once(shop, *(f"{which}-{turn}" for which in range(2) for turn in range(10)), each=5)


def test_what_waits_in_a_loop_that_rests_is_done_when_that_runs_again(shop: Shop) -> None:
    """It stops with its one connection in use and somebody waiting for it; another loop works meanwhile."""
    with served(shop, pool_size=1, max_overflow=0, pool_timeout=20) as engine, asyncio.Runner() as rests:

        async def stops() -> tuple[AsyncSession, asyncio.Future[Any]]:
            session = AsyncSession(engine)
            await session.execute(text("SELECT 1"))
            waits = asyncio.ensure_future(together(shop, "waits", 3))
            await asyncio.sleep(0.2)
            return session, waits

        async def goes_on() -> Any:
            await session.close()
            return await waits

        session, waits = rests.run(stops())
        assert asyncio.run(together(shop, "other", 3)) == [P, P, P]
        assert set(rests.run(goes_on())) <= {P, Outcome.WAITING}
        assert set(rests.run(together(shop, "waits", 3))) <= {P, Outcome.DUPLICATE}
        each_once(shop, "other", "waits", each=3)


# -- side by side ------------------------------------------------------------------------------------------------------


def side_by_side(*runs: Callable[[], Coroutine[Any, Any, Any]]) -> list[Any]:
    """Each in a thread and a loop of its own, begun in the same moment."""
    told: list[Any] = [None] * len(runs)
    begun = Barrier(len(runs))

    def run(which: int) -> None:
        async def begin() -> Any:
            begun.wait()
            return await runs[which]()

        told[which] = asyncio.run(begin())

    threads = [Thread(target=run, args=(which,), daemon=True) for which in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not any(thread.is_alive() for thread in threads), "waits for ever"
    return told


def test_two_loops_share_an_engine_without_a_pool(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "exactly_once")
    with served(shop, poolclass=NullPool):
        assert asyncio.run(in_turn(shop, "first", 1)) == [P]  # two first connections at once hang in SQLAlchemy
        assert side_by_side(lambda: in_turn(shop, "a", 20), lambda: in_turn(shop, "b", 20)) == [[P] * 20] * 2
        assert sorted(shop.effects()) == sorted(["first-0", *(f"{one}-{n}" for one in "ab" for n in range(20))])
    assert "event loops" not in caplog.text


def test_two_loops_at_once_are_told_what_to_do_and_lose_nothing(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """SQLAlchemy's pool is for one loop; whoever waits for its connections in another one may be refused."""
    caplog.set_level(logging.WARNING, "exactly_once")
    with served(shop, pool_size=1, max_overflow=0, pool_timeout=1):
        assert asyncio.run(in_turn(shop, "a", 1)) == [P]
        told = side_by_side(lambda: together(shop, "a", 20), lambda: together(shop, "b", 20))
        assert {outcome for each in told for outcome in each} <= {P, Outcome.DUPLICATE, Outcome.WAITING}
        assert shop.failures() == []
        again = [asyncio.run(together(shop, who, 20)) for who in "ab"]
        assert {outcome for each in again for outcome in each} <= {P, Outcome.DUPLICATE}
        each_once(shop, "a", "b", each=20)
    lines = [record.getMessage() for record in caplog.records]
    [line] = [each for each in lines if "two event loops" in each and not each.startswith("store_away")]
    assert "poolclass=NullPool" in line
    assert str(shop.async_engine.url.password or "no password") not in line
    for line in lines:
        if "different event loop" in line:
            assert "poolclass=NullPool" in line
