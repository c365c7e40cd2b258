"""The plain lock: one holder at a time, never another's let go of, never for ever; and what it says when that ends."""

import asyncio
import json
import logging
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from time import monotonic, sleep
from typing import Any

import pytest
from sqlalchemy.util import greenlet_spawn

from exactly_once import ExactlyOnce
from exactly_once.errors import BadKey, ConfigurationError, InProgress, StoreUnavailable
from exactly_once.redis.lock import _ACQUIRE, _RELEASE, RedisLock
from exactly_once.testing.child import wait_until
from tests.services.proxy import Proxy
from tests.services.redis import Redis

SHORT = timedelta(milliseconds=150)
NOT_AT_ALL = timedelta(0)
KEY = 'exactly_once:lock:["shop", "stock"]'


@pytest.fixture
def eo(redis_url: str) -> Iterator[ExactlyOnce]:
    made = ExactlyOnce(group="shop", redis=redis_url)
    yield made
    made._redis_connections.close()


@pytest.fixture
def other(redis_url: str) -> Iterator[ExactlyOnce]:
    """Another process, as far as the lock can tell."""
    made = ExactlyOnce(group="shop", redis=redis_url)
    yield made
    made._redis_connections.close()


class Warned:
    """What the lock logged."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    def __str__(self) -> str:
        return "\n".join(each.getMessage() for each in self._caplog.records if each.name == "exactly_once.lock")


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Warned:
    caplog.set_level(logging.WARNING, "exactly_once.lock")
    return Warned(caplog)


def refused(eo: ExactlyOnce, key: object = "stock", **options: Any) -> InProgress:
    with pytest.raises(InProgress) as raised, eo.lock(key, wait=NOT_AT_ALL, **options):
        pytest.fail("it ran all the same")
    return raised.value


# -- one at a time -------------------------------------------------------------------------------------------------------


def test_while_one_holds_it_nobody_else_does(eo: ExactlyOnce, other: ExactlyOnce) -> None:
    with eo.lock("stock"):
        told = str(refused(other))
        refused(eo)
    assert "'stock'" in told
    assert "'shop'" in told
    assert re.search(r"at most (29|30)\.\d s more", told)
    assert "Nothing ran" in told
    with other.lock("stock", wait=NOT_AT_ALL):
        refused(eo)


def test_other_names_and_other_groups_do_not_wait(eo: ExactlyOnce, redis_url: str) -> None:
    bakery = ExactlyOnce(group="bakery", redis=redis_url)
    with eo.lock("stock", wait=NOT_AT_ALL), eo.lock("Stock", wait=NOT_AT_ALL), bakery.lock("stock", wait=NOT_AT_ALL):
        refused(eo)
        refused(bakery)
    bakery._redis_connections.close()


def test_a_key_may_have_parts(eo: ExactlyOnce) -> None:
    with eo.lock(("rebuild", 12)):
        refused(eo, ("rebuild", "12"))
        with eo.lock(("rebuild", 1, 2), wait=NOT_AT_ALL), eo.lock("rebuild", wait=NOT_AT_ALL):
            pass


@pytest.mark.parametrize("key", ["", None, 1.5, True, (), "x" * 256])
def test_a_key_that_names_nothing_is_refused(eo: ExactlyOnce, key: object) -> None:
    with pytest.raises(BadKey):
        eo.lock(key)


@pytest.mark.parametrize("options", [{"expires": timedelta(0)}, {"expires": -SHORT}, {"wait": -SHORT}])
def test_a_time_that_makes_no_sense_is_refused(eo: ExactlyOnce, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="was given"):
        eo.lock("stock", **options)


def test_what_stands_in_redis_is_a_token_that_expires(eo: ExactlyOnce, redis_server: Redis) -> None:
    tokens = set()
    for _ in range(3):
        with eo.lock("stock", expires=timedelta(seconds=5)):
            assert redis_server.tell("KEYS", "*") == [KEY.encode()]
            tokens.add(redis_server.tell("GET", KEY))
            assert 4000 < redis_server.tell("PTTL", KEY) <= 5000
        assert redis_server.tell("KEYS", "*") == []
    assert len(tokens) == 3
    assert json.dumps(["shop", "stock"]) in KEY


def test_it_is_let_go_of_when_the_work_fails(eo: ExactlyOnce, other: ExactlyOnce) -> None:
    with pytest.raises(ZeroDivisionError), eo.lock("stock"):
        _ = 1 / 0
    with other.lock("stock", wait=NOT_AT_ALL):
        pass


def test_threads_and_loops_never_overlap(eo: ExactlyOnce, other: ExactlyOnce) -> None:
    inside, most, runs = 0, 0, 0

    def enter() -> None:
        nonlocal inside, most, runs
        inside += 1
        most, runs = max(most, inside), runs + 1

    def leave() -> None:
        nonlocal inside
        inside -= 1

    def in_thread(app: ExactlyOnce) -> None:
        for _ in range(20):
            with app.lock("stock", wait=timedelta(minutes=1)):
                enter()
                sleep(0.001)
                leave()

    async def in_task(app: ExactlyOnce) -> None:
        for _ in range(20):
            async with app.lock("stock", wait=timedelta(minutes=1)):
                enter()
                await asyncio.sleep(0.001)
                leave()

    async def in_loop(app: ExactlyOnce) -> None:
        await asyncio.gather(*(in_task(app) for _ in range(4)))

    with ThreadPoolExecutor(8) as threads:
        found = [threads.submit(in_thread, app) for app in (eo, other) for _ in range(3)]
        found += [threads.submit(asyncio.run, in_loop(app)) for app in (eo, other)]
        for each in found:
            each.result(60)
    assert (most, runs) == (1, 3 * 2 * 20 + 4 * 2 * 20)


# -- waiting -------------------------------------------------------------------------------------------------------------


def test_it_is_waited_for_and_got_soon_after_it_is_free(eo: ExactlyOnce, other: ExactlyOnce) -> None:
    got = threading.Event()

    def wait() -> None:
        with other.lock("stock"):
            got.set()

    with eo.lock("stock"):
        waiting = threading.Thread(target=wait)
        waiting.start()
        assert not got.wait(0.3)
    assert got.wait(2)
    waiting.join()


def test_it_is_waited_for_no_longer_than_said(eo: ExactlyOnce, other: ExactlyOnce) -> None:
    with eo.lock("stock"):
        began = monotonic()
        with pytest.raises(InProgress, match=r"within 0\.3 s"), other.lock("stock", wait=timedelta(seconds=0.3)):
            pytest.fail("it ran all the same")
        assert 0.3 <= monotonic() - began < 2


def test_what_a_holder_that_died_had_is_got_as_it_expires(eo: ExactlyOnce, other: ExactlyOnce) -> None:
    began = monotonic()
    eo.lock("stock", expires=timedelta(seconds=0.5)).acquire()
    with other.lock("stock"):
        assert 0.45 <= monotonic() - began < 2


def test_who_waits_asks_redis_less_and_less_often(eo: ExactlyOnce, redis_server: Redis) -> None:
    with eo.lock("stock"):
        redis_server.tell("CONFIG", "RESETSTAT")
        with pytest.raises(InProgress), eo.lock("stock", wait=timedelta(seconds=1)):
            pytest.fail("it ran all the same")
        assert 3 <= redis_server.tell("INFO", "COMMANDSTATS")["cmdstat_evalsha"]["calls"] <= 35


# -- ours and not ours -----------------------------------------------------------------------------------------------------


def test_what_expired_and_is_anothers_is_not_let_go_of(eo: ExactlyOnce, other: ExactlyOnce, warned: Warned) -> None:
    late = eo.lock("stock", expires=SHORT)
    late.acquire()
    with other.lock("stock"):
        assert late.release() is False
        refused(eo)
    assert "'stock' of the group 'shop'" in str(warned)
    assert "it had expired: give it a longer expires=" in str(warned)
    assert "Another may have run at the same time" in str(warned)


def test_what_expired_and_is_nobodys_is_said_too(eo: ExactlyOnce, warned: Warned) -> None:
    with eo.lock("stock", expires=SHORT):
        sleep(0.2)
    assert "it had expired" in str(warned)


def test_a_redis_that_forgot_is_said(eo: ExactlyOnce, redis_server: Redis, warned: Warned) -> None:
    with eo.lock("stock"):
        redis_server.tell("FLUSHALL")
    assert "did not know of it any more" in str(warned)


def test_in_time_nothing_is_said(eo: ExactlyOnce, warned: Warned) -> None:
    lock = eo.lock("stock")
    lock.acquire()
    assert lock.release() is True
    assert lock.release() is False
    assert str(warned) == ""


def test_one_object_is_used_once_at_a_time(eo: ExactlyOnce) -> None:
    lock = eo.lock("stock", wait=NOT_AT_ALL)
    for _ in range(2):
        with lock, pytest.raises(ConfigurationError, match="already"):
            lock.acquire()


# -- Redis is away, or an answer is lost ------------------------------------------------------------------------------------


def test_each_script_sent_twice_does_what_it_does_once(eo: ExactlyOnce) -> None:
    acquire, release = (eo.redis_at().script(text) for text in (_ACQUIRE, _RELEASE))
    assert acquire([KEY], ["ours", 60_000]) == [1, 0]
    assert acquire([KEY], ["ours", 60_000]) == [1, 0]
    won, left_ms = acquire([KEY], ["theirs", 60_000])
    assert won == 0
    assert 59_000 < left_ms <= 60_000
    assert release([KEY], ["theirs"]) == 0
    assert release([KEY], ["ours"]) == 1
    assert release([KEY], ["ours"]) == 0


def test_a_lock_whose_answer_was_lost_is_ours(redis_url: str, other: ExactlyOnce) -> None:
    with Proxy(redis_url) as proxy:
        eo = ExactlyOnce(group="shop", redis=proxy.url)
        with eo.lock("warm"):
            pass
        proxy.cut_at(re.compile(b"^EVALSHA"), "after")
        with eo.lock("stock", wait=NOT_AT_ALL):
            assert proxy.cuts == 1
            refused(other)
        eo._redis_connections.close()


def test_without_redis_nothing_runs(own_redis: Redis) -> None:
    eo = ExactlyOnce(group="shop", redis=own_redis.url)
    own_redis.kill()
    with pytest.raises(StoreUnavailable, match="does not answer") as raised, eo.lock("stock"):
        pytest.fail("it ran all the same")
    assert raised.value.store == eo.redis_at().name
    own_redis.start()
    with eo.lock("stock"):
        pass


def test_redis_gone_at_the_end_is_no_error_of_work_that_is_done(own_redis: Redis, warned: Warned) -> None:
    eo = ExactlyOnce(group="shop", redis=own_redis.url)
    with eo.lock("stock", expires=timedelta(seconds=7)):
        own_redis.kill()
    assert "could not be released, and is free after 7 s" in str(warned)
    own_redis.start()

    def fail() -> None:
        own_redis.kill()
        _ = 1 / 0

    with pytest.raises(ZeroDivisionError), eo.lock("other"):
        fail()


def test_no_redis_named_says_how_to_name_one() -> None:
    with pytest.raises(ConfigurationError, match="EXACTLY_ONCE_REDIS=redis://"):
        ExactlyOnce(group="shop").lock("stock")


def test_the_setting_the_argument_and_the_program_name_a_redis(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = "redis://127.0.0.1:1/0"
    with ExactlyOnce(group="shop").lock("stock", store=redis_url):
        pass
    monkeypatch.setenv("EXACTLY_ONCE_REDIS", redis_url)
    eo = ExactlyOnce(group="shop", redis=nowhere)
    with eo.lock("stock"):
        pass
    with pytest.raises(StoreUnavailable), eo.lock("stock", store=nowhere):
        pass
    assert eo.redis_at() is eo.redis_at(redis_url)
    assert eo.redis_at() is not eo.redis_at(nowhere)


# -- asyncio ---------------------------------------------------------------------------------------------------------------


def test_a_coroutine_that_waits_lets_its_loop_go_on(eo: ExactlyOnce) -> None:
    async def all_together() -> int:
        turns = 0

        async def tick() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0.005)

        ticking = asyncio.create_task(tick())
        async with eo.lock("stock"):
            with pytest.raises(InProgress):
                async with eo.lock("stock", wait=timedelta(seconds=0.5)):
                    pytest.fail("it ran all the same")
        ticking.cancel()
        return turns

    assert asyncio.run(all_together()) > 30


def test_a_plain_with_in_a_coroutine_is_refused(eo: ExactlyOnce, redis_server: Redis) -> None:
    async def blocking() -> None:
        with eo.lock("stock"):
            pytest.fail("it ran all the same")

    with pytest.raises(ConfigurationError, match="async with"):
        asyncio.run(blocking())
    assert redis_server.tell("KEYS", "*") == []


def test_a_plain_with_in_sync_code_under_asyncio_lets_the_loop_go_on(eo: ExactlyOnce) -> None:
    def sync_code() -> str:
        with eo.lock("stock", wait=timedelta(seconds=5)):
            return "done"

    async def all_together() -> str:
        async with asyncio.timeout(10):
            async with eo.lock("stock"):
                waiting = asyncio.create_task(greenlet_spawn(sync_code))
                await asyncio.sleep(0.1)
            return await waiting

    assert asyncio.run(all_together()) == "done"


def test_what_a_cancelled_coroutine_was_waiting_for_stays_the_holders(eo: ExactlyOnce, redis_server: Redis) -> None:
    async def cancelled() -> None:
        async with eo.lock("stock"):
            token = redis_server.tell("GET", KEY)
            waiting = asyncio.create_task(eo.lock("stock").__aenter__())
            await asyncio.sleep(0.05)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert redis_server.tell("GET", KEY) == token

    asyncio.run(cancelled())
    assert redis_server.tell("KEYS", "*") == []


def test_a_coroutine_cancelled_as_it_got_the_lock_does_not_keep_it(redis_url: str, redis_server: Redis) -> None:
    async def cancelled(eo: ExactlyOnce, proxy: Proxy) -> None:
        async with eo.lock("warm"):
            pass
        proxy.stall("replies")
        getting = asyncio.create_task(eo.lock("stock").__aenter__())
        while not redis_server.tell("EXISTS", KEY):
            await asyncio.sleep(0.01)
        getting.cancel()
        proxy.resume()
        with pytest.raises(asyncio.CancelledError):
            await getting

    with Proxy(redis_url) as proxy:
        eo = ExactlyOnce(group="shop", redis=proxy.url)
        asyncio.run(cancelled(eo, proxy))
        wait_until(lambda: redis_server.tell("KEYS", "*") == [], what="it is free", patience_s=3)
        eo._redis_connections.close()


@pytest.mark.parametrize("work_s", [60, 0])
def test_at_whatever_moment_a_coroutine_is_cancelled_the_lock_is_free_afterwards(
    eo: ExactlyOnce, redis_server: Redis, work_s: int
) -> None:
    async def hold() -> None:
        async with eo.lock("stock", wait=NOT_AT_ALL):
            await asyncio.sleep(work_s)

    async def cancelled() -> None:
        async with eo.lock("warm"):
            pass
        for turn in range(200):
            holding = asyncio.create_task(hold())
            for _ in range(turn % 40):  # so many turns of the loop later, in the middle of something else each time
                await asyncio.sleep(0)
            holding.cancel()
            await asyncio.wait([holding], timeout=5)
            assert holding.cancelled() or not work_s
            assert redis_server.tell("KEYS", "*") == [], f"cancelled after {turn % 40} turns of the loop"

    asyncio.run(cancelled())


def test_a_coroutine_cancelled_as_it_lets_go_does_not_keep_it(redis_url: str, redis_server: Redis) -> None:
    async def cancelled(eo: ExactlyOnce, proxy: Proxy) -> None:
        entered, leave = asyncio.Event(), asyncio.Event()

        async def hold() -> None:
            async with eo.lock("stock"):
                entered.set()
                await leave.wait()

        holding = asyncio.create_task(hold())
        await entered.wait()
        before = proxy.round_trips
        proxy.stall("requests")
        leave.set()
        while proxy.round_trips == before:  # it is on its way, and never arrives
            await asyncio.sleep(0.01)
        holding.cancel()
        proxy.cut_all()
        proxy.resume()
        with pytest.raises(asyncio.CancelledError):
            await holding

    with Proxy(redis_url) as proxy:
        eo = ExactlyOnce(group="shop", redis=proxy.url)
        asyncio.run(cancelled(eo, proxy))
        assert redis_server.tell("KEYS", "*") == []
        eo._redis_connections.close()


def test_a_cancelled_block_lets_go(eo: ExactlyOnce, redis_server: Redis) -> None:
    async def cancelled() -> None:
        entered = asyncio.Event()

        async def hold() -> None:
            async with eo.lock("stock"):
                entered.set()
                await asyncio.sleep(60)

        holding = asyncio.create_task(hold())
        await entered.wait()
        assert redis_server.tell("EXISTS", KEY)
        holding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await holding

    asyncio.run(cancelled())
    assert redis_server.tell("KEYS", "*") == []


def test_a_lock_made_without_the_facade_is_the_same(eo: ExactlyOnce) -> None:
    with RedisLock(eo.redis_at(), "shop", "stock"):
        refused(eo)
