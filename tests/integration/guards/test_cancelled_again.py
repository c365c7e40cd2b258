"""A run is cancelled at each of its awaits, as scopes of anyio do until the task has left them: it lets go of what it holds.

The kind: what follows a run takes awaits of its own (the lease or the lock is let go of, the handler's session is rolled back, a
failure is written down). Cancelled there too, the key stays held until it expires, and each later delivery is told that it is
in progress; the failure is not counted, and its message comes again for ever.
"""

import asyncio
import gc
import math
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from time import monotonic
from typing import Any

import anyio
import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from exactly_once import AsyncSteps, ExactlyOnce, Lease, Lock, Outcome, Retry
from exactly_once.exceptions.finishing import LONGEST_S
from exactly_once.redis.pools import CONNECTIONS
from tests.integration.shop import DIALECTS, Shop, on, order, put, shops
from tests.integration.ways import ALONE
from tests.services.proxy import Proxy
from tests.services.redis import Redis

pytestmark = pytest.mark.nightly(meet=2)

LONG = timedelta(seconds=300)
"""What is not let go of stays held for longer than any test."""
NOT_AT_ALL = timedelta(0)

Ends = asyncio.Event
"""Set when the limit is to come."""
Limit = Callable[[Coroutine[Any, Any, object], Ends], Coroutine[Any, Any, bool]]
"""Awaits something under a limit; says whether that ended it."""


@pytest.fixture(scope="module", params=[(dialect, "async") for dialect in DIALECTS], ids=DIALECTS)
def ground(request: pytest.FixtureRequest) -> Iterator[Shop]:
    yield from shops(request, *request.param, options={"pool_timeout": 1})


@asynccontextmanager
async def when(ends: Ends, do: Callable[[], object]) -> AsyncIterator[None]:
    async def done() -> None:
        await ends.wait()
        do()

    task = asyncio.create_task(done())
    try:
        yield
    finally:
        task.cancel()


async def move_on(run: Coroutine[Any, Any, object], ends: Ends) -> bool:
    with anyio.move_on_after(math.inf) as scope:
        async with when(ends, lambda: setattr(scope, "deadline", anyio.current_time())):
            await run
    return scope.cancelled_caught


async def fail(run: Coroutine[Any, Any, object], ends: Ends) -> bool:
    try:
        with anyio.fail_after(math.inf) as scope:
            async with when(ends, lambda: setattr(scope, "deadline", anyio.current_time())):
                await run
    except TimeoutError:
        return True
    return False


async def a_neighbour_fails(run: Coroutine[Any, Any, object], ends: Ends) -> bool:
    async def neighbour() -> None:
        await ends.wait()
        raise ZeroDivisionError

    async def awaited() -> None:
        await run

    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(awaited)
            tasks.start_soon(neighbour)
    except ExceptionGroup as errors:
        return [type(each) for each in errors.exceptions] == [ZeroDivisionError]
    return False


async def one_limit_in_another(run: Coroutine[Any, Any, object], ends: Ends) -> bool:
    with anyio.CancelScope() as outer:
        try:
            async with asyncio.timeout(None) as inner:
                loop = asyncio.get_running_loop()
                async with when(ends, lambda: (outer.cancel(), inner.reschedule(loop.time()))):
                    await run
        except TimeoutError:
            return True
    return outer.cancelled_caught


LIMITS: list[Limit] = [move_on, fail, a_neighbour_fails, one_limit_in_another]
each_limit = pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit.__name__)


class Hangs:
    """What a handler does until its limit comes: the first time, or always."""

    def __init__(self, *, always: bool = False) -> None:
        self.ends = Ends()
        self._always = always

    async def wait(self) -> None:
        if self._always or not self.ends.is_set():
            self.ends.set()
            await asyncio.sleep(30)

    def __call__(self) -> None:
        await_only(self.wait())


def limited(shop: Shop, limit: Limit, ends: Ends, begin: Callable[[], Coroutine[Any, Any, object]]) -> None:
    """Have this ended by a limit; neither a cancellation nor a place in the pool is left behind."""

    async def ended() -> None:
        task = asyncio.current_task()
        assert task is not None
        assert await limit(begin(), ends)
        assert task.cancelling() == 0
        await asyncio.sleep(0)  # no cancellation is still to come
        pool: Any = shop.async_engine.pool
        assert pool.checkedout() == 0

    gc.disable()
    try:
        shop.await_(ended())
    finally:
        gc.enable()


def guard_of(name: str, redis_url: str) -> dict[str, Any]:
    match name:
        case "lease":
            return {"guard": Lease(LONG)}
        case "lease in Redis":
            return {"guard": Lease(LONG, store=redis_url)}
        case "lock":
            return {"guard": Lock(LONG, store=redis_url, wait=NOT_AT_ALL)}
        case _:
            return {}


each_guard = pytest.mark.parametrize("guard", ["transaction", "lease", "lease in Redis", "lock"])


@each_limit
@each_guard
def test_what_a_limit_ends_lets_go_of_its_key_at_once(shop: Shop, redis_url: str, guard: str, limit: Limit) -> None:
    hangs = Hangs()

    def do(session: Session, no: Any) -> None:
        put(session, "done")
        hangs()

    ALONE.handles(shop, do, **guard_of(guard, redis_url))
    limited(shop, limit, hangs.ends, lambda: shop.eo.aprocess(order()))
    assert (shop.effects(), shop.failures()) == ([], [])
    assert shop.process(order(attempt=2)) is Outcome.PROCESSED
    assert shop.effects() == ["done"]
    shop.borrow()


@each_guard
def test_the_connection_of_a_run_that_a_limit_ends_is_rolled_back_and_kept(
    shop: Shop, redis_url: str, guard: str
) -> None:
    """As of one that `asyncio.timeout` ends: closed instead, each such run would cost a new connection."""

    hangs = Hangs()

    def do(session: Session, no: Any) -> None:
        put(session, "done")
        if no == "hangs":
            hangs()

    ALONE.handles(shop, do, **guard_of(guard, redis_url))
    assert shop.process(order("first")) is Outcome.PROCESSED
    closed: list[Any] = []
    engine = shop.async_engine.sync_engine
    event.listen(engine, "invalidate", lambda *given: closed.append(given))
    limited(shop, move_on, hangs.ends, lambda: shop.eo.aprocess(order("hangs")))
    assert closed == []
    shop.borrow()


@each_guard
def test_what_fails_while_its_limit_is_over_is_counted(shop: Shop, redis_url: str, guard: str) -> None:
    """A library makes an error of its own of the cancellation; as often as it does, as often the message has failed."""
    runs, hangs = 0, Hangs(always=True)

    def do(session: Session, no: Any) -> None:
        nonlocal runs
        runs += 1
        put(session, "done")
        try:
            hangs()
        except asyncio.CancelledError:
            raise ConnectionError("the request was cut off") from None

    retry = Retry(immediate=2, delays=[0.01], max_attempts=3)
    ALONE.handles(shop, do, retry=retry, **guard_of(guard, redis_url))
    for attempt in (1, 2, 3):
        message = order(attempt=attempt)
        limited(shop, move_on, hangs.ends, lambda message=message: shop.eo.aprocess(message))  # type: ignore[misc]
        hangs.ends.clear()
        assert shop.failure().attempts == attempt
    assert shop.failure().state == "dead"
    assert shop.failure().error_class == "ConnectionError"
    assert runs == 3, "run again at once, it would have no limit any more"
    assert shop.effects() == []
    shop.borrow()


def test_a_step_that_a_limit_ends_gives_everything_back(shop: Shop) -> None:
    hangs = Hangs()

    @shop.eo.handler("orders", key="no", guard=Lease(LONG))
    async def handler(session: AsyncSession, steps: AsyncSteps) -> None:
        async def work(inner: AsyncSession) -> None:
            await inner.run_sync(put, "in a step")
            await hangs.wait()

        await steps.transaction("step", work)

    limited(shop, move_on, hangs.ends, lambda: shop.eo.aprocess(order()))
    assert shop.effects() == []
    assert shop.process(order(attempt=2)) is Outcome.PROCESSED
    shop.borrow()


@each_limit
def test_a_block_under_a_lock_that_a_limit_ends_lets_go(shop: Shop, redis_url: str, limit: Limit) -> None:
    hangs = Hangs()

    async def block() -> None:
        async with shop.eo.lock("stock", expires=LONG, wait=NOT_AT_ALL, store=redis_url):
            await hangs.wait()

    limited(shop, limit, hangs.ends, block)
    shop.await_(block())


@on("postgres")  # the lock is in Redis, whatever the database
def test_at_whatever_moment_a_limit_comes_the_lock_is_free_afterwards(
    shop: Shop, redis_url: str, redis_server: Redis
) -> None:
    async def ended() -> None:
        for turn in range(120):
            with anyio.CancelScope() as scope:
                for_turns(turn % 40, scope.cancel)
                async with shop.eo.lock("stock", expires=LONG, wait=NOT_AT_ALL, store=redis_url):
                    await asyncio.sleep(30)
            assert redis_server.tell("KEYS", "*") == [], f"ended after {turn % 40} turns of the loop"
            assert in_use(shop, redis_url) == 0, f"ended after {turn % 40} turns of the loop"

    shop.await_(ended())


@on("postgres")
def test_many_that_a_limit_ends_together_give_every_connection_to_redis_back(
    shop: Shop, redis_url: str, redis_server: Redis
) -> None:
    """More of them than there are connections: some wait for one, and some have just been handed one."""

    async def one(number: int) -> None:
        async with shop.eo.lock(number, expires=LONG, store=redis_url):
            await asyncio.sleep(0.001)

    async def ended() -> None:
        for turn in (1, 5, 20, 60, 150):
            async with anyio.create_task_group() as tasks:
                for number in range(2 * CONNECTIONS):
                    tasks.start_soon(one, number)
                for_turns(turn, tasks.cancel_scope.cancel)
            assert in_use(shop, redis_url) == 0, f"ended after {turn} turns of the loop"
        assert redis_server.tell("KEYS", "*") == []

    shop.await_(ended())


def in_use(shop: Shop, redis_url: str) -> int:
    """How many of the loop's connections to Redis the pool misses."""
    return sum(len(side.pool._in_use_connections) for side in shop.eo.redis_at(redis_url)._pools._loops.values())


def for_turns(turns: int, then: Callable[[], object]) -> None:
    """Do something so many turns of the loop later."""
    loop = asyncio.get_running_loop()
    loop.call_soon(for_turns, turns - 1, then) if turns else loop.call_soon(then)


@pytest.mark.parametrize("guard", ["lease", "lease in Redis", "lock"])
def test_at_whatever_moment_a_limit_comes_the_key_is_free_afterwards(shop: Shop, redis_url: str, guard: str) -> None:
    """Also while it is claimed: whether that claim was carried out, nobody has told us."""

    def do(session: Session, no: Any) -> None:
        if guard != "lock":  # it is kept where nobody knows whether COMMIT was carried out
            put(session, str(no))

    ALONE.handles(shop, do, **guard_of(guard, redis_url))
    shop.process(order("first"))

    async def ended() -> None:
        pool: Any = shop.async_engine.pool
        for turn in range(40):
            with anyio.CancelScope() as scope:
                for_turns(turn, scope.cancel)
                await shop.eo.aprocess(order(turn))
            assert pool.checkedout() == 0, f"ended after {turn} turns of the loop"

    shop.await_(ended())
    for turn in range(40):
        end = shop.process(order(turn, attempt=2))
        assert end in (Outcome.PROCESSED, Outcome.DUPLICATE), f"ended after {turn} turns of the loop"
    assert shop.failures() == []
    if guard != "lock":
        assert sorted(shop.effects()) == sorted(["first", *map(str, range(40))])
    shop.borrow()


@on("postgres")
def test_where_the_store_is_silent_a_limit_is_late_by_some_seconds_and_the_loop_goes_on(
    shop: Shop, redis_url: str
) -> None:
    async def ended(eo: ExactlyOnce, proxy: Proxy) -> tuple[float, int]:
        ticks = 0

        async def ticking() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.1)
                ticks += 1

        beside = asyncio.create_task(ticking())
        with anyio.move_on_after(0.2):
            async with eo.lock("stock", expires=timedelta(seconds=30)):
                proxy.stall("requests")
                began = monotonic()
                await asyncio.sleep(30)
        beside.cancel()
        return monotonic() - began, ticks

    with Proxy(redis_url) as proxy:
        eo = ExactlyOnce(group="shop", redis=proxy.url)
        took_s, ticks = shop.await_(ended(eo, proxy))
        proxy.resume()
        eo._redis_connections.close()
    assert took_s < LONGEST_S + 2
    assert ticks > 10 * (took_s - 1)


@each_guard
def test_a_cancellation_is_answered_with_one_also_where_another_comes_at_the_end(
    shop: Shop, redis_url: str, guard: str
) -> None:
    hangs = Hangs()

    def do(session: Session, no: Any) -> None:
        put(session, "done")
        hangs()

    ALONE.handles(shop, do, **guard_of(guard, redis_url))

    async def cancelled() -> None:
        task = asyncio.create_task(shop.eo.aprocess(order()))
        await hangs.ends.wait()
        asked = 0
        while not task.done():
            asked += task.cancel()
            await asyncio.sleep(0)
        assert task.cancelled()
        assert task.cancelling() == asked > 1

    shop.await_(cancelled())
    assert shop.process(order(attempt=2)) is Outcome.PROCESSED
    assert shop.effects() == ["done"]
    shop.borrow()
