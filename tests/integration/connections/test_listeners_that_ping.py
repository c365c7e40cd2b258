"""A listener of the program's asks the server as a connection is made or taken, and so begins a transaction before we do.

The old recipe of a ping does, and one that sets a search path or reads a table. SQLAlchemy's own sessions go on in that
transaction; each statement that we send by itself is to be sent there all the same, and once.
"""

from collections.abc import Iterator
from datetime import timedelta
from time import sleep
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from exactly_once import AsyncSteps, Lease, Message, Outcome, Retry, Steps
from exactly_once.database.schema import tables
from exactly_once.failures.due import DueFailures
from exactly_once.transports.contract import Receipt, Subscription
from exactly_once.transports.sql.transport import SqlTransport
from tests.integration.outside import run
from tests.integration.shop import COLOURS, GROUP, Shop, order, put, shops
from tests.integration.ways import ALONE, UNDER_A_LEASE, WAYS, Way

pytestmark = pytest.mark.nightly(meet=2)

P, D, F = Outcome.PROCESSED, Outcome.DUPLICATE, Outcome.FAILED
FIVE = Retry(immediate=0, delays=[0.01], max_attempts=5)
each_question = pytest.mark.parametrize("asks", ["SELECT 1", "SELECT count(*) FROM effect"], ids=["ping", "a table"])
each_moment = pytest.mark.parametrize("when", ["connect", "checkout"])


@pytest.fixture(
    params=[(dialect, colour) for dialect in ("postgres", "mariadb", "sqlite") for colour in COLOURS], ids="-".join
)
def own(request: pytest.FixtureRequest) -> Iterator[Shop]:
    """A shop of this test alone, whose engines it may listen to; its pool has one connection."""
    yield from shops(request, *request.param, options={"pool_timeout": 3})


def listening(shop: Shop, when: str, asks: str) -> None:
    """From the next connection that is made or taken the server is asked first."""

    def ask(dbapi: Any, *_: object) -> None:
        cursor = dbapi.cursor()
        cursor.execute(asks)
        cursor.fetchall()
        cursor.close()

    event.listen(shop.async_engine.sync_engine if shop.is_async else shop.engine, when, ask)


def taken(shop: Shop) -> int:
    """How many connections of the pool did not come back."""
    pool: Any = shop.async_engine.pool if shop.is_async else shop.engine.pool
    return int(pool.checkedout())


def with_a_step(shop: Shop, guard: Lease) -> list[str]:
    """A handler that calls another service in a step, once; returns the keys it was called with."""
    calls: list[str] = []
    options: dict[str, Any] = {"name": "handler", "key": "no", "retry": FIVE, "guard": guard}
    if shop.is_async:

        @shop.eo.handler("orders", **options)
        async def awaited(session: AsyncSession, steps: AsyncSteps) -> None:
            async def pay(key: str) -> None:
                calls.append(key)

            await steps.run("pay", pay)
            await session.run_sync(put, "paid")
    else:

        @shop.eo.handler("orders", **options)
        def plain(session: Session, steps: Steps) -> None:
            steps.run("pay", calls.append)
            put(session, "paid")

    return calls


@each_question
@each_moment
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_each_way_runs_fails_and_runs_again(own: Shop, way: Way, when: str, asks: str) -> None:
    fails = [True]

    def do(session: Session, no: Any) -> None:
        put(session, str(no))
        if fails:
            raise ZeroDivisionError

    way.handles(own, do, retry=FIVE)
    listening(own, when, asks)
    assert way.attempted(own, [order(1), order(2)]) == [F, F]
    assert {row.error_class for row in own.failures()} == {"ZeroDivisionError"}
    fails.clear()
    assert way.attempted(own, [order(1, attempt=2), order(2, attempt=2)]) == [P, P]
    assert way.attempted(own, [order(1, attempt=3), order(2, attempt=3)]) == [D, D]
    assert own.effects() == ["1", "2"]
    assert taken(own) == 0


@each_question
@each_moment
def test_an_outside_call_is_made_once(own: Shop, when: str, asks: str) -> None:
    calls = with_a_step(own, Lease(timedelta(seconds=30)))
    listening(own, when, asks)
    assert own.process(order()) is P
    assert (len(calls), taken(own)) == (1, 0)


@each_question
@each_moment
def test_with_the_leases_in_redis(own: Shop, redis_url: str, when: str, asks: str) -> None:
    guard = Lease(timedelta(seconds=30), store=redis_url)
    UNDER_A_LEASE.handles(own, lambda session, no: put(session, str(no)), guard=guard, retry=FIVE)
    listening(own, when, asks)
    assert [own.process(order(attempt=attempt)) for attempt in (1, 2, 3)] == [P, D, D]


@each_moment
def test_a_lease_is_renewed(own: Shop, when: str) -> None:
    def do(session: Session, no: Any) -> None:
        if not own.is_async:
            sleep(1.5)  # longer than the lease
        put(session, str(no))

    UNDER_A_LEASE.handles(own, do, guard=Lease(timedelta(seconds=1)), retry=FIVE)
    listening(own, when, "SELECT count(*) FROM effect")
    assert own.process(order()) is P


@pytest.mark.parametrize("dialect", ["postgres", "mariadb"])
@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("colour", COLOURS)
def test_on_an_engine_that_isolates_more(
    request: pytest.FixtureRequest, redis_url: str, dialect: str, colour: str, level: str
) -> None:
    for shop in shops(request, dialect, colour, options={"isolation_level": level}):
        calls = with_a_step(shop, Lease(timedelta(seconds=30)))
        listening(shop, "checkout", "SELECT count(*) FROM effect")
        assert [shop.process(order(attempt=attempt)) for attempt in (1, 2)] == [P, D]
        assert len(calls) == 1


@pytest.mark.parametrize("colour", COLOURS)
def test_what_a_listener_sets_for_its_transaction_holds_for_our_statements(
    request: pytest.FixtureRequest, colour: str
) -> None:
    for shop in shops(request, "postgres", colour):
        calls = with_a_step(shop, Lease(timedelta(seconds=30)))
        listening(shop, "checkout", "SELECT set_config('application_name', 'the tenant', true)")
        run(  # as a step is recorded, who is it for?
            shop,
            "CREATE FUNCTION noted() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " INSERT INTO effect (text) VALUES (current_setting('application_name')); RETURN NULL; END $$",
            "CREATE TRIGGER noted AFTER INSERT OR UPDATE ON message_step FOR EACH ROW EXECUTE FUNCTION noted()",
        )
        assert shop.process(order()) is P
        assert (len(calls), sorted(set(shop.effects()))) == (1, ["paid", "the tenant"])


@each_question
@each_moment
@pytest.mark.parametrize("dialect", ["postgres", "mariadb", "sqlite"])
def test_the_broker_in_a_table_sends_and_receives(
    request: pytest.FixtureRequest, dialect: str, when: str, asks: str
) -> None:
    for shop in shops(request, dialect, "sync", pool_size=3):
        listening(shop, when, asks)
        broker = SqlTransport(lambda engine=shop.engine: engine)  # type: ignore[misc]
        [consumer] = broker.subscribe(GROUP, [Subscription("orders")])
        [answer] = broker.producer().send([Message("orders", b"sent")])
        assert isinstance(answer, Receipt)
        assert [each.message.body for each in consumer.receive(5, timedelta(seconds=5))] == [b"sent"]


def test_the_sweep_of_failures_looks(request: pytest.FixtureRequest) -> None:
    for shop in shops(request, "mariadb", "sync"):

        def fails(session: Session, no: Any) -> None:
            raise ZeroDivisionError

        ALONE.handles(shop, fails, retry=FIVE)
        assert shop.process(order("B")) is F
        with Session(shop.outside) as other:
            assert shop.eo.claim(other, "handler", "B", payload=order("B").body)
            other.commit()
        listening(shop, "checkout", "SELECT count(*) FROM effect")
        assert DueFailures(tables).sweep(shop.engine.begin, GROUP) == 1
