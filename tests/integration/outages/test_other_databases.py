"""A handler has other databases than the store's, and one of them is away: its message has failed, and nothing is held for it.

What no connection could be had from is known by its engine. The store's own engine, or one that shares its pool, is the
store's matter: then no message is to be blamed, whatever handler met it.
"""

import sqlite3
from collections.abc import Iterator
from datetime import timedelta
from itertools import count
from time import sleep
from typing import Any

import psycopg
import pymysql
import pytest
from sqlalchemy import URL, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from exactly_once import ExactlyOnce, Message, Outcome, Retry
from tests.integration.shop import COLOURS, GROUP, Shop, on, order, put, shops
from tests.integration.ways import ALONE, IN_A_STEP, UNDER_A_LEASE, Way, driver_of, each_way, thrice
from tests.waiting import until

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


def asked(engine: Engine | AsyncEngine, statement: str = "SELECT 1") -> None:
    """Ask it something, in a handler."""
    if isinstance(engine, Engine):
        with engine.connect() as connection:
            connection.execute(text(statement))
        return

    async def ask() -> None:
        async with engine.connect() as connection:
            await connection.execute(text(statement))

    await_only(ask())


def disposed(shop: Shop, engine: Engine | AsyncEngine) -> None:
    """Close an engine of the handler's own."""
    closing = engine.dispose()
    if closing is not None:
        shop.await_(closing)


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


# -- a legacy database that is asked by the driver's own way, or by another engine -------------------------------------


def connected_elsewhere(dialect: str) -> None:
    """As a handler connects to a database of its own, which is away."""
    match dialect:
        case "postgres":
            psycopg.connect("host=127.0.0.1 port=1 dbname=legacy user=me connect_timeout=2")
        case "mariadb":
            pymysql.connect(host="127.0.0.1", port=1, user="me", connect_timeout=2)
        case _:
            sqlite3.connect("/nonexistent/folder/legacy.db")


@each_way
def test_a_drivers_own_connection_that_is_refused_fails_its_message_once_a_delivery(shop: Shop, way: Way) -> None:
    runs: list[Any] = []

    def do(session: Session, no: Any) -> None:
        runs.append(no)
        put(session, "undone")
        connected_elsewhere(shop.dialect)

    way.handles(shop, do, retry=THREE)
    assert thrice(shop, way) == [F, F, DEAD]
    assert len(runs) == 3
    assert (shop.failure().state, shop.failure().attempts, shop.effects()) == ("dead", 3, [])
    shop.borrow()


def refusal(dialect: str, code: str) -> str:
    """A statement that is answered as if the server could not work now."""
    if dialect == "mariadb":
        return f"SIGNAL SQLSTATE 'HY000' SET MYSQL_ERRNO = {code}, MESSAGE_TEXT = 'it cannot work now'"
    return f"DO $$ BEGIN RAISE EXCEPTION 'it cannot work now' USING ERRCODE = '{code}'; END $$"


# read only, a full disk, being shut down
CODES = {"postgres": ("25006", "53100", "57P03"), "mariadb": ("1290", "1114", "1053")}


@each_way
@pytest.mark.parametrize("nth", range(3))
@pytest.mark.parametrize("grouped", [False, True], ids=["raised", "in a group of exceptions"])
@on("postgres", "mariadb")
def test_what_another_database_answers_says_nothing_of_the_store(shop: Shop, way: Way, nth: int, grouped: bool) -> None:
    replica = other(shop, shop.url)
    runs: list[Any] = []

    def do(session: Session, no: Any) -> None:
        runs.append(no)
        put(session, "undone")
        try:
            asked(replica, refusal(shop.dialect, CODES[shop.dialect][nth]))
        except DBAPIError as error:
            if grouped:
                raise ExceptionGroup("tasks", [error]) from None
            raise

    way.handles(shop, do, retry=THREE)
    try:
        assert thrice(shop, way) == [F, F, DEAD]
    finally:
        disposed(shop, replica)
    assert len(runs) == 3
    assert (shop.failure().state, shop.failure().attempts, shop.effects()) == ("dead", 3, [])
    shop.borrow()


@on("postgres", "mariadb", colour="sync")
def test_failures_elsewhere_cost_the_store_no_connection(shop: Shop) -> None:
    made: list[Any] = []
    ALONE.handles(shop, lambda session, no: connected_elsewhere(shop.dialect), retry=THREE)
    shop.process(order(0))
    event.listen(shop.engine, "connect", lambda dbapi, record: made.append(record))
    for no in range(1, 6):
        assert shop.process(order(no)) is F
    assert made == []


def of_few_connections(shop: Shop, most: int) -> URL:
    """The shop's database for a user who may have so many connections, as hosted databases sell them."""
    url = make_url(shop.url)
    name = f"few_{next(_names)}"
    with shop.outside.begin() as connection:
        if shop.dialect == "postgres":
            statements = [
                f"CREATE ROLE {name} LOGIN PASSWORD 'few' CONNECTION LIMIT {most}",
                f"GRANT USAGE, CREATE ON SCHEMA public TO {name}",
                f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {name}",
                f"GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {name}",
            ]
        else:
            statements = [
                # without a password, which PyMySQL sends to a MySQL without TLS with the package `cryptography` alone
                f"CREATE USER {name} WITH MAX_USER_CONNECTIONS {most}",
                f"GRANT ALL ON `{url.database}`.* TO {name}",
            ]
        for statement in statements:
            connection.execute(text(statement))
    return url.set(username=name, password="few" if shop.dialect == "postgres" else "")


@pytest.fixture(params=[(d, colour) for d in ("postgres", "mariadb") for colour in COLOURS], ids="-".join)
def few(request: pytest.FixtureRequest) -> Iterator[tuple[Shop, Engine | AsyncEngine]]:
    """A shop whose engine has the only connection that the server gives its user."""
    for shop in shops(request, *request.param):
        url = of_few_connections(shop, 1)
        engine = other(shop, url.render_as_string(hide_password=False), pool_size=1, max_overflow=0, pool_timeout=5)
        # the schema is looked up by an engine for threads, which would have no connection
        place = "public" if shop.dialect == "postgres" else url.database
        shop.eo = ExactlyOnce(engine, group=GROUP, schema=place)
        yield shop, engine
        disposed(shop, engine)
        drop(shop, url)


def drop(shop: Shop, url: URL) -> None:
    with shop.outside.begin() as connection:
        if shop.dialect == "postgres":
            connection.execute(text(f"DROP OWNED BY {url.username}"))
            connection.execute(text(f"DROP ROLE {url.username}"))
        else:
            connection.execute(text(f"DROP USER {url.username}"))


@pytest.mark.parametrize("way", [ALONE, UNDER_A_LEASE], ids=str)
def test_it_is_counted_also_where_the_store_has_all_connections_it_is_given(
    few: tuple[Shop, Engine | AsyncEngine], way: Way
) -> None:
    shop, _ = few
    way.handles(shop, lambda session, no: connected_elsewhere(shop.dialect), retry=THREE)
    assert thrice(shop, way) == [F, F, DEAD]
    assert (shop.failure().state, shop.failure().attempts) == ("dead", 3)


# -- what comes through the store's own connections is the store's matter, and is looked into --------------------------


@pytest.mark.parametrize("nth", range(3))
@pytest.mark.parametrize("way", [ALONE, UNDER_A_LEASE], ids=str)
def test_a_look_needs_no_connection_more_than_there_are(
    few: tuple[Shop, Engine | AsyncEngine], way: Way, nth: int
) -> None:
    """A full table of the handler's own says what a full disk says: the store is looked at, and it can work."""
    shop, _ = few
    statement = text(refusal(shop.dialect, CODES[shop.dialect][nth]))
    way.handles(shop, lambda session, no: session.execute(statement), retry=THREE)
    assert thrice(shop, way) == [F, F, DEAD]
    assert (shop.failure().state, shop.failure().attempts) == ("dead", 3)


@on("postgres", "mariadb", colour="sync")
def test_a_full_table_of_the_handlers_own_costs_its_neighbours_no_connection(shop: Shop) -> None:
    mine = {"postgres": "SELECT pg_backend_pid()", "mariadb": "SELECT CONNECTION_ID()"}[shop.dialect]
    ids: set[int] = set()

    def do(session: Session, no: Any) -> None:
        ids.add(session.execute(text(mine)).scalar_one())
        session.execute(text(refusal(shop.dialect, CODES[shop.dialect][1])))

    ALONE.handles(shop, do, retry=THREE)
    assert [shop.process(order(no)) for no in range(5)] == [F] * 5
    assert len(ids) == 1


def cut(shop: Shop, session: Session) -> None:
    """Somebody ends the connection that the handler has."""
    mine, ends = {
        "postgres": ("SELECT pg_backend_pid()", "SELECT pg_terminate_backend({})"),
        "mariadb": ("SELECT CONNECTION_ID()", "KILL {}"),
    }[shop.dialect]
    number = session.execute(text(mine)).scalar_one()
    with shop.outside.begin() as connection:
        connection.execute(text(ends.format(number)))
    sleep(0.1)  # the server closes it in its own time


@each_way
@pytest.mark.parametrize("by", ["the driver's cursor", "SQLAlchemy", "nothing"])
@on("postgres", "mariadb")
def test_a_connection_of_the_stores_that_was_lost_counts_nothing(shop: Shop, way: Way, by: str) -> None:
    """Also where only the driver was asked; and where what met it was ours: that an earlier failure is settled."""
    lost = [True]

    def do(session: Session, no: Any) -> None:
        put(session, f"{no} before")
        if lost:
            lost.clear()
            cut(shop, session)
            if by == "the driver's cursor":
                driver_of(session).cursor().execute("SELECT 1")
            elif by == "SQLAlchemy":
                session.execute(text("SELECT 1"))
        put(session, f"{no} after") if by != "nothing" else None

    way.handles(shop, do, retry=THREE)
    assert way.attempted(shop, [order(1, attempt=2)]) == [Outcome.PROCESSED]
    assert shop.failures() == []
    assert shop.effects() == (["1 before", "1 after"] if by != "nothing" else ["1 before"])
    shop.borrow()
