"""One message beside others in a batch: what it raises, whom it waits for, and everything at once."""

import asyncio
from collections import Counter
from datetime import UTC, datetime, timedelta
from functools import partial
from random import Random
from time import monotonic
from typing import Any

import pytest
from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from exactly_once import Outcome, Retry
from exactly_once.testing.child import wait_until
from exactly_once.transports.contract import Features
from tests.integration.batches import effect, handles, orders, own_engines, told
from tests.integration.shop import GROUP, ONE_TRY, Shop, order, put, shops

DIALECTS = ("postgres", "mariadb", "sqlite")
SERVERS = DIALECTS[:2]
LIMITED = Features(redelivers=True, counts_attempts=True, max_attempts=5)


# -- what is no Exception ------------------------------------------------------------------------------------------------


def effects(shop: Shop, number: int) -> bool:
    return len(shop.effects()) >= number


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("own_task", [False, True])
def test_a_handler_that_is_cancelled_by_its_own_doing_stops_nobody(
    request: pytest.FixtureRequest, dialect: str, own_task: bool
) -> None:
    for shop in shops(request, dialect, "async"):
        own_engines(shop)
        calls: list[Any] = []

        @shop.eo.handler("orders", key="no", name="handler", retry=ONE_TRY, batch=10)
        async def handler(session: AsyncSession, body: dict[str, Any], calls: list[Any] = calls) -> None:
            calls.append(body["no"])
            if body["no"] == "poison" and calls.count("poison") < 3:
                cancelled: Any = asyncio.current_task() if own_task else asyncio.ensure_future(asyncio.sleep(10))
                cancelled.cancel()
                await (asyncio.sleep(0) if own_task else cancelled)
            await session.run_sync(put, str(body["no"]))

        name = f"memory://cancelled-{dialect}-{own_task}"
        with shop.eo.worker(name, concurrency=2), shop.eo.producer(name) as producer:
            producer.send_all([order("poison"), *(order(number) for number in range(3))])
            wait_until(partial(effects, shop, 4), what="the first group has ended", patience_s=20)
            producer.send_all([order(number) for number in range(3, 5)])
            wait_until(partial(effects, shop, 6), what="groups go on", patience_s=20)
        assert sorted(shop.effects()) == ["0", "1", "2", "3", "4", "poison"]


@pytest.mark.parametrize("raised", [asyncio.CancelledError, GeneratorExit, KeyboardInterrupt])
def test_what_is_no_exception_costs_the_others_nothing(
    request: pytest.FixtureRequest, raised: type[BaseException]
) -> None:
    def do(session: Session, no: Any) -> None:
        put(session, str(no))
        if no == 0:
            raise raised("of the handler's own")

    for shop in shops(request, "postgres", "sync"):
        handles(shop, do)
        ran = told(shop, orders(*range(5)), LIMITED)
        if raised is asyncio.CancelledError:  # nobody asked for it: it is a failure like any other
            assert ran.results[0].outcome is Outcome.FAILED  # type: ignore[union-attr]
        else:
            assert isinstance(ran.results[0], raised), "the worker brings it again, and says so"
        assert [each.outcome for each in ran.results[1:]] == [Outcome.PROCESSED] * 4
        assert sorted(shop.effects()) == ["1", "2", "3", "4"]


# -- keys that others hold -----------------------------------------------------------------------------------------------


def held_elsewhere(shop: Shop, key: str) -> dict[str, Any]:
    return {
        "consumer_group": GROUP,
        "handler": "handler",
        "business_key": key,
        "status": 1,
        "fingerprint": b"",
        "retry_times": 0,
        "created_at": datetime.now(UTC),
    }


@pytest.mark.parametrize("dialect", SERVERS)
@pytest.mark.parametrize("attempt", [1, 2])
def test_many_held_keys_hold_the_others_no_longer_than_one(
    request: pytest.FixtureRequest, dialect: str, attempt: int
) -> None:
    held = 10
    for shop in shops(request, dialect, "sync"):
        handles(shop, effect)
        with shop.outside.begin() as other:
            for number in range(held):
                other.execute(insert(shop.tables.idempotent).values(**held_elsewhere(shop, str(number))))
            messages = [order(number, attempt=attempt if number < held else 1) for number in range(20)]
            began = monotonic()
            ran = told(shop, messages)
            took_s = monotonic() - began
            other.rollback()
        outcomes = [each.outcome for each in ran.results]
        assert outcomes == [Outcome.IN_PROGRESS] * held + [Outcome.PROCESSED] * (20 - held)
        assert took_s < held  # not a second for each; alone a message waits two


@pytest.mark.parametrize("dialect", SERVERS)
def test_who_commits_behind_our_back_beside_a_held_key_is_parked(request: pytest.FixtureRequest, dialect: str) -> None:
    def do(session: Session, no: Any) -> None:
        put(session, str(no))
        if no == 2:
            driver: Any = session.connection().connection.dbapi_connection
            driver.commit()

    for shop in shops(request, dialect, "sync"):
        handles(shop, do)
        with shop.outside.begin() as other:
            other.execute(insert(shop.tables.idempotent).values(**held_elsewhere(shop, "0")))
            ran = told(shop, orders(0, 1, 2, 3))
            other.rollback()
        processed = Outcome.PROCESSED
        assert [each.outcome for each in ran.results] == [Outcome.IN_PROGRESS, processed, Outcome.DEAD, processed]
        assert [(row.business_key, row.state) for row in shop.failures()] == [("2", "broken")]


@pytest.mark.parametrize("rows", [0, 200])
def test_a_group_waits_for_no_key_that_is_not_its_own(request: pytest.FixtureRequest, rows: int) -> None:
    """MariaDB reads all rows of a small table where it is asked for some by IN, and waits for each that is locked."""
    for shop in shops(request, "mariadb", "sync"):
        handles(shop, effect)
        with shop.outside.begin() as connection:
            for number in range(rows):
                connection.execute(insert(shop.tables.idempotent).values(**held_elsewhere(shop, f"old {number}")))
        with shop.outside.begin() as other:
            other.execute(insert(shop.tables.idempotent).values(**held_elsewhere(shop, "of another")))
            began = monotonic()
            ran = told(shop, [order(f"a{number:03}") for number in range(100)])
            took_s = monotonic() - began
            other.rollback()
        assert {each.outcome for each in ran.results} == {Outcome.PROCESSED}
        assert took_s < 10  # as delivered the server waits 50 s for a lock


# -- everything at once --------------------------------------------------------------------------------------------------


class Once:
    """What two handlers do: fails now and then, and notices when it is called beside itself."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, int]] = Counter()
        self.beside: set[str] = set()
        self._running: set[str] = set()

    def __call__(self, session: Session, no: int, handler: str) -> None:
        if handler in self._running:
            self.beside.add(handler)
        self._running.add(handler)
        try:
            put(session, f"{handler} {no}")
            self.calls[handler, no] += 1
            # alone it fails twice at least, for a group's calls are counted here too
            if no % 17 == 3 and self.calls[handler, no] < 6:
                raise ValueError("for a while")
        finally:
            self._running.discard(handler)


@pytest.mark.parametrize("broker", ["memory", "sql"])
@pytest.mark.parametrize("colour", ["sync", "async"])
def test_two_handlers_with_groups_in_order_and_one_at_a_time_beside_the_pump(
    request: pytest.FixtureRequest, colour: str, broker: str
) -> None:
    numbers, keys, draw = 120, 11, Random(1)
    for shop in shops(request, "postgres", colour):
        own_engines(shop)
        once = Once()
        retry = Retry(immediate=0, delays=[0.05] * 12, max_attempts=12)
        options: dict[str, Any] = {"key": "no", "retry": retry, "batch": 20, "ordered": True, "concurrency": 1}
        for name in ("first", "second"):
            if shop.is_async:

                @shop.eo.handler("orders", name=name, **options)
                async def awaited(
                    session: AsyncSession, body: dict[str, Any], name: str = name, once: Once = once
                ) -> None:
                    await session.run_sync(once, body["no"], name)
            else:

                @shop.eo.handler("orders", name=name, **options)
                def plain(session: Session, body: dict[str, Any], name: str = name, once: Once = once) -> None:
                    once(session, body["no"], name)

        url = f"memory://everything-{colour}" if broker == "memory" else "sql://"
        with shop.eo.producer(url) as producer:
            for number in range(numbers):
                producer.send_all([order(number, ordering_key=str(number % keys))] * draw.choice((1, 1, 2)))
        with shop.eo.worker(url, concurrency=4) as worker:
            wait_until(partial(effects, shop, 2 * numbers), what="all have run", patience_s=60)
            worker.drain(timedelta(seconds=20))
        found = [one.split() for one in shop.effects()]
        assert sorted(found) == sorted([name, str(number)] for name in ("first", "second") for number in range(numbers))
        assert not once.beside
        for name in ("first", "second"):
            for key in range(keys):
                of_key = [int(no) for handler, no in found if handler == name and int(no) % keys == key]
                assert of_key == sorted(of_key), (name, key)
