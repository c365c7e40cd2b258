"""MariaDB: `completion_type` has each COMMIT and ROLLBACK begin another transaction (CHAIN), or end the connection (RELEASE).

The kind: a setting of the server, of `init_connect` or of whoever had the session before changes what the end of a transaction
does. A look that is to see what is committed is refused inside a transaction (errno 1568), and was so for ever. Whatever the
setting is, no message is lost, doubled, or refused by a connection for good.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from pymysql.err import OperationalError
from sqlalchemy import event, text
from sqlalchemy.orm import Session

from exactly_once import Lease, Outcome, Transaction
from exactly_once.alembic import ready
from exactly_once.database.store import Store
from exactly_once.testing.databases import DatabaseServer
from tests.conftest import require
from tests.integration.dialects.test_clock_of_a_session import in_the_driver
from tests.integration.grounds import ground_on
from tests.integration.shop import COLOURS, Shop, order, put, shops
from tests.integration.ways import ALONE, LEASE, WAYS, Way, driver_of
from tests.services import mariadb as mariadb_service
from tests.services.mariadb import MYSQLD, MariaDB
from tests.waiting import until

pytestmark = pytest.mark.nightly(meet=2)

P, D, F = Outcome.PROCESSED, Outcome.DUPLICATE, Outcome.FAILED
each_way = pytest.mark.parametrize("way", WAYS, ids=str)
each_type = pytest.mark.parametrize("kind", ["CHAIN", "RELEASE"])
SET = "SET completion_type = '{}'"


def by_text(session: Session, statement: str) -> None:
    session.execute(text(statement))


def by_the_driver(session: Session, statement: str) -> None:
    cursor = driver_of(session).cursor()
    cursor.execute(statement)
    cursor.close()


def until_told(shop: Shop, way: Way, no: int, attempts: Iterator[int], **more: Any) -> list[Any]:
    """Deliver until it is acknowledged; an outage may be said of a connection that the server has ended, and ends by itself."""
    ends: list[Any] = []
    for attempt in attempts:
        ends += way.attempted(shop, [order(no, attempt=attempt, **more)])
        if isinstance(ends[-1], Outcome) and ends[-1].acknowledge:
            return ends
        assert len(ends) < 8, ends
    return ends


@pytest.mark.parametrize("colour", COLOURS)
@each_way
@each_type
@pytest.mark.parametrize("pool_size", [2, 3])
def test_a_server_whose_transactions_chain_or_release_settles_every_message(
    request: pytest.FixtureRequest, colour: str, way: Way, kind: str, pool_size: int
) -> None:
    """As `completion_type` of the server, or `init_connect`, makes each connection."""

    def made(dbapi: Any, record: object) -> None:
        cursor = dbapi.cursor()
        cursor.execute(SET.format(kind))
        cursor.close()

    for shop in shops(request, "mariadb", colour, pool_size=pool_size, options={"pool_use_lifo": True}):
        for engine in (shop.engine, shop.async_engine.sync_engine):
            event.listen(engine, "connect", made)
        runs: list[int] = []

        def do(session: Session, no: Any, runs: list[int] = runs) -> None:
            runs.append(no)
            put(session, str(no))
            if no % 2 and runs.count(no) == 1:
                raise ZeroDivisionError

        way.handles(shop, do)
        attempts = iter(range(1, 100))
        for no in range(1, 7):
            ends = until_told(shop, way, no, attempts)
            assert ends[-1] is P
            if no > 4:
                assert ends == ([F, P] if no % 2 else [P])  # what is of the connections has ended by then
        for no in range(1, 7):
            ends = until_told(shop, way, no, attempts)
            assert ends == [D]
        assert sorted(shop.effects()) == [str(no) for no in range(1, 7)]
        assert sorted(set(runs)) == list(range(1, 7))


@pytest.fixture(params=COLOURS)
def mariadb(request: pytest.FixtureRequest) -> Iterator[Shop]:
    yield from ground_on(request, "mariadb", request.param)


@each_way
@each_type
@pytest.mark.parametrize("sets", [by_text, by_the_driver])
@pytest.mark.parametrize("then", ["returns", "raises"])
def test_a_handler_that_sets_it_leaves_it_to_no_other_message(
    mariadb: Shop, way: Way, kind: str, sets: Callable[[Session, str], None], then: str
) -> None:
    runs: list[int] = []

    def do(session: Session, no: Any) -> None:
        runs.append(no)
        put(session, str(no))
        if no == 2:
            sets(session, SET.format(kind))
            if then == "raises" and runs.count(2) == 1:
                raise ZeroDivisionError

    way.handles(mariadb, do)
    attempts = iter(range(1, 100))
    for no in (1, 2, 3, 2, 4):
        until_told(mariadb, way, no, attempts)
    assert until_told(mariadb, way, 2, attempts)[-1] is D
    assert until_told(mariadb, way, 5, attempts)[-1] is P
    assert sorted(mariadb.effects()) == list("12345")
    assert [row for row in mariadb.failures() if row.state != "resolved"] == []
    with suppress(Exception):
        in_the_driver(mariadb, "DO 0")  # a connection that the server has ended
    if not MYSQLD or way.lease:  # MySQL has no compound statement: only leases look at the session there
        mariadb.borrow()


@each_way
@each_type
def test_other_code_that_leaves_it_in_the_pool_stops_no_message(mariadb: Shop, way: Way, kind: str) -> None:
    def do(session: Session, no: Any) -> None:
        put(session, str(no))

    way.handles(mariadb, do)
    attempts = iter(range(1, 100))
    for no in (1, 2, 3):
        assert until_told(mariadb, way, no, attempts)[-1] is P
        with suppress(Exception):
            in_the_driver(mariadb, SET.format(kind))
    assert until_told(mariadb, way, 1, attempts)[-1] is D
    assert until_told(mariadb, way, 4, attempts)[-1] is P
    assert sorted(mariadb.effects()) == list("1234")


@each_type
@pytest.mark.parametrize("guard", [Transaction(), LEASE], ids=["alone", "under a lease"])
def test_what_only_looks_is_not_refused_for_ever(mariadb: Shop, kind: str, guard: Transaction | Lease) -> None:
    """What blocks an ordered message is looked at before its claim, on a connection that no claim has put right."""
    ran: list[int] = []

    def do(session: Session, no: Any) -> None:
        ran.append(no)
        put(session, str(no))
        if len(ran) == 1:
            raise ZeroDivisionError

    ALONE.handles(mariadb, do, guard=guard, ordered=True)
    attempts = iter(range(1, 100))
    for _ in range(3):
        with suppress(Exception):
            in_the_driver(mariadb, SET.format(kind))
        until_told(mariadb, ALONE, 1, attempts, ordering_key="k")
    assert mariadb.effects() == ["1"]


@pytest.fixture(params=COLOURS)
def set_for_the_server(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Shop]]:
    """A database that is ready, on a server of its own whose sessions begin with that setting from now on."""
    require(mariadb_service)
    with MariaDB() as server:
        url = DatabaseServer(server.url, source="url").create().render_as_string(hide_password=False)
        with Shop("mariadb", request.param, url, pool_size=3) as shop:

            def begin(kind: str) -> Shop:
                with shop.outside.connect() as connection:
                    connection.exec_driver_sql(f"SET GLOBAL completion_type = '{kind}'")
                return shop

            yield begin


@each_type
@pytest.mark.parametrize("transport", ["memory://{kind}-{colour}", "sql://"])
def test_a_worker_starts_on_a_server_that_chains_or_releases(
    set_for_the_server: Callable[[str], Shop], kind: str, transport: str
) -> None:
    """It looks at the tables in a transaction of its own, whose end must not end the connection it goes on with."""
    shop = set_for_the_server(kind)
    ALONE.handles(shop, lambda session, no: put(session, str(no)))
    for no in (1, 2, 3):
        for engine in (shop.engine, shop.async_engine.sync_engine):
            engine.dispose(close=False)  # as another process, whose connections are new
        url = transport.format(kind=kind, colour=shop.colour)
        with shop.eo.worker(url, concurrency=2), shop.eo.producer(url) as producer:
            producer.send(order(no))
            until(lambda no=no: str(no) in shop.effects(), f"{no} is handled")
    assert shop.effects() == ["1", "2", "3"]
    assert shop.failures() == []


def test_what_the_driver_raises_as_a_start_looks_is_an_outage(
    mariadb_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is sent on the driver itself meets its own errors, which SQLAlchemy has not wrapped."""
    store = Store("default", mariadb_url)

    def prepare(*_: object, **__: object) -> None:
        raise OperationalError(2013, "Lost connection to server during query")

    try:
        monkeypatch.setattr(store.dialect, "prepare", prepare)
        assert "does not answer" in str(ready.problem(store))
    finally:
        store.close()
