"""A handler has other databases than the store's, and one of them is away: its message has failed, and nothing is held for it.

What no connection could be had from is known by its engine. The store's own engine, or one that shares its pool, is the
store's matter: then no message is to be blamed, whatever handler met it.
"""

from collections.abc import Iterator
from datetime import timedelta
from itertools import count
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from exactly_once import ExactlyOnce, Message, Outcome, Retry
from tests.integration.shop import COLOURS, GROUP, Shop, order, put, shops
from tests.integration.test_ends_badly import each_way, thrice, until
from tests.integration.ways import ALONE, IN_A_STEP, UNDER_A_LEASE, Way

pytestmark = pytest.mark.nightly(meet=2)

F, DEAD, WAITING = Outcome.FAILED, Outcome.DEAD, Outcome.WAITING
THREE = Retry(immediate=0, delays=[0.01], max_attempts=3)
_names = count(1)


def nobody_answers(dialect: str) -> str:
    """The URL of a database that is not there."""
    return {
        "postgres": "postgresql+psycopg://u:p@127.0.0.1:1/reports?connect_timeout=2",
        "mariadb": "mysql+pymysql://u:p@127.0.0.1:1/reports",
        "sqlite": "sqlite:////nonexistent/folder/cache.db",
    }[dialect]


def other(shop: Shop, url: str, **options: Any) -> Engine | AsyncEngine:
    """An engine of the handler's own."""
    if shop.is_async:
        return create_async_engine(make_url(url).set(drivername=shop.async_engine.url.drivername), **options)
    return create_engine(url, **options)


def asked(engine: Engine | AsyncEngine) -> None:
    """Ask it something, in a handler."""
    if isinstance(engine, Engine):
        with engine.connect() as connection:
            connection.execute(text("SELECT 1"))
        return

    async def ask() -> None:
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))

    await_only(ask())


@each_way
def test_another_database_that_is_away_is_a_failure_of_its_message(shop: Shop, way: Way) -> None:
    away = other(shop, nobody_answers(shop.dialect))

    def do(session: Session, no: Any) -> None:
        put(session, "undone")
        asked(away)

    way.handles(shop, do, retry=THREE)
    assert thrice(shop, way) == [F, F, DEAD]
    assert (shop.failure().state, shop.failure().attempts) == ("dead", 3)
    assert shop.effects() == []
    shop.borrow()


@each_way
def test_another_pool_that_is_empty_is_a_failure_of_its_message(shop: Shop, way: Way) -> None:
    empty = other(shop, shop.url, pool_size=1, max_overflow=0, pool_timeout=0.05)

    def do(session: Session, no: Any) -> None:
        asked(empty)

    way.handles(shop, do, retry=THREE)
    leaked: Any = shop.await_(empty.connect().start()) if isinstance(empty, AsyncEngine) else empty.connect()
    try:
        assert thrice(shop, way) == [F, F, DEAD]
    finally:
        for closing in (leaked.close(), empty.dispose()):
            if closing is not None:
                shop.await_(closing)
    assert (shop.failure().state, shop.failure().attempts) == ("dead", 3)


@pytest.fixture(params=[("postgres", colour) for colour in COLOURS], ids="-".join)
def small(request: pytest.FixtureRequest) -> Iterator[Shop]:
    yield from shops(request, *request.param, options={"pool_timeout": 0.1})


@pytest.mark.parametrize("way", [ALONE, UNDER_A_LEASE], ids=str)
def test_the_stores_own_pool_that_is_empty_blames_no_message(small: Shop, way: Way) -> None:
    engine = small.async_engine if small.is_async else small.engine

    def do(session: Session, no: Any) -> None:
        put(session, "undone")
        asked(engine)  # a second connection of a pool that has one

    way.handles(small, do, retry=THREE)
    assert thrice(small, way) == [WAITING] * 3
    assert small.failures() == []
    small.borrow()


@pytest.mark.parametrize("batch", [None, 10])
def test_a_worker_holds_nothing_for_a_database_that_is_not_the_stores(shop: Shop, batch: int | None) -> None:
    away = other(shop, nobody_answers(shop.dialect))
    shop.eo = ExactlyOnce(shop.url, group=GROUP)
    shop.handles(lambda session: asked(away), topic="reports", name="bad", retry=THREE, batch=batch)
    shop.handles(lambda session: put(session, "good"), name="good", batch=batch)
    url = f"memory://others-{next(_names)}"
    held: list[int] = []
    with (
        shop.eo.worker(url, concurrency=2, drain_timeout=timedelta(seconds=1)) as worker,
        shop.eo.producer(url) as producer,
    ):
        producer.send_all([Message("reports", b'{"no": 1}'), Message("reports", b'{"no": 2}')])
        producer.send_all([order(no) for no in range(3, 9)])
        until(lambda: held.append(worker.counts.held) or len(shop.failures()) == 2, "both are recorded")
        until(lambda: {row.state for row in shop.failures()} == {"dead"}, "both are dead")
        until(lambda: len(shop.effects()) == 6, "the others are handled")
    assert set(held) == {0}


@pytest.mark.parametrize("asks", ["eo.lock", "eo.claim"])
@pytest.mark.parametrize("way", [ALONE, UNDER_A_LEASE, IN_A_STEP], ids=str)
def test_a_lock_or_claim_of_the_handlers_own_that_is_away_is_a_failure_too(shop: Shop, way: Way, asks: str) -> None:
    """Under a lease it passed for the lease's own store: the whole worker waited for what nobody could look at."""
    away = create_engine(nobody_answers(shop.dialect))

    def do(session: Session, no: Any) -> None:
        put(session, str(no))
        if asks == "eo.lock":
            with shop.eo.lock("printer", store="redis://127.0.0.1:1/0"):
                raise AssertionError("nobody answers there")
        with Session(away) as other:
            shop.eo.claim(other, "reports", no)

    way.handles(shop, do, retry=THREE)
    assert thrice(shop, way) == [F, F, DEAD]
    assert (shop.failure().attempts, shop.failure().error_class) == (3, "StoreUnavailable")
    assert shop.effects() == []
    shop.borrow()
