"""Other code shares the engine, and what it left in a connection is met where no claim is: before all, and in order.

The kind: a connection is changed before we ever saw it, or it is the first that the look at the order of messages gets, or the
failure store, a lease or a duplicate. Nothing is learnt from it, no message is blamed, and none waits for ever.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from exactly_once import Outcome, Retry
from tests.integration.outside import by_other_code, run, set_autocommit
from tests.integration.shop import COLOURS, Shop, order, shops
from tests.integration.ways import ALONE, IN_A_BATCH, UNDER_A_LEASE, Way
from tests.waiting import until

pytestmark = pytest.mark.nightly(meet=2)
P, D, F, W = Outcome.PROCESSED, Outcome.DUPLICATE, Outcome.FAILED, Outcome.WAITING
some_ways = pytest.mark.parametrize("way", [ALONE, IN_A_BATCH, UNDER_A_LEASE], ids=str)

LEFT = {
    "postgres role": "SET ROLE nobody_of_the_pool",
    "postgres encoding": "SET client_encoding = 'LATIN1'",
    "postgres time limit": "SET statement_timeout = 1",
    "postgres autocommit": "",
    "mariadb role": "SET ROLE nobody_of_the_pool",
    "mariadb mode": "SET sql_mode = ''",
    "mariadb limit of rows": "SET sql_select_limit = 0",
    "mariadb locked tables": "LOCK TABLES effect WRITE",
    "mariadb autocommit": "SET autocommit = 1",
    "sqlite autocommit": "",
}


@pytest.fixture(params=[(left, colour) for left in LEFT for colour in COLOURS], ids=" ".join)
def left(request: pytest.FixtureRequest) -> Iterator[tuple[Shop, str]]:
    """A shop with a role that may write effects, and nothing of ours; and what is left in a connection of its pool."""
    what, colour = request.param
    for shop in shops(request, what.split()[0], colour):
        role = what.endswith("role")
        if what == "postgres time limit":
            # a claim takes longer than the limit, on whatever machine: what is cut first is ours, and not the handler's
            run(
                shop,
                "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS"
                " 'BEGIN PERFORM pg_sleep(0.01); RETURN NEW; END'",
                "CREATE TRIGGER slow BEFORE INSERT OR UPDATE ON message_idempotent FOR EACH ROW EXECUTE FUNCTION slow()",
            )
        if role:
            run(shop, "DROP ROLE IF EXISTS nobody_of_the_pool", "CREATE ROLE nobody_of_the_pool")
            table = "effect" if what.startswith("postgres") else f"`{shop.engine.url.database}`.effect"
            run(shop, f"GRANT INSERT, SELECT ON {table} TO nobody_of_the_pool")
        if what == "mariadb role":
            run(shop, "GRANT nobody_of_the_pool TO CURRENT_USER")
        elif role:
            run(shop, "GRANT USAGE ON SEQUENCE effect_id_seq TO nobody_of_the_pool")
        yield shop, what
        shop.engine.dispose()
        shop.await_(shop.async_engine.dispose())
        if what == "postgres role":
            run(shop, "DROP OWNED BY nobody_of_the_pool")
        if role:
            run(shop, "DROP ROLE nobody_of_the_pool")


def leave(shop: Shop, what: str) -> None:
    if shop.dialect == "sqlite":
        vacuum(shop)
    elif LEFT[what]:
        by_other_code(shop, LEFT[what])
    else:
        set_autocommit(shop)


def vacuum(shop: Shop) -> None:
    """As it is done on the driver, which begins no transaction of its own from then on."""

    async def by_await() -> None:
        async with shop.async_engine.connect() as connection:
            driver: Any = (await connection.get_raw_connection()).driver_connection
            driver.isolation_level = None
            await driver.execute("VACUUM")

    if shop.is_async:
        shop.await_(by_await())
        return
    with shop.engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        driver.isolation_level = None
        driver.execute("VACUUM")


def effect_of(session: Session, no: Any) -> None:
    session.execute(text("INSERT INTO effect (text) VALUES (:text)"), {"text": str(no)})


def delivered(shop: Shop, way: Way, no: Any, attempt: int = 1, **more: Any) -> Outcome:
    (outcome,) = way.deliver(shop, [order(no, attempt=attempt, **more)])
    return outcome


@some_ways
def test_what_was_left_before_we_saw_the_connection_is_learnt_by_nobody(left: tuple[Shop, str], way: Way) -> None:
    shop, what = left
    way.handles(shop, effect_of)
    leave(shop, what)
    assert [delivered(shop, way, no) for no in ("ä1", "ä1", 2, 3)] == [P, D, P, P]
    assert (shop.effects(), shop.failures()) == (["ä1", "2", "3"], [])


@some_ways
def test_an_ordered_message_does_not_wait_for_what_was_left_in_the_pool(left: tuple[Shop, str], way: Way) -> None:
    shop, what = left
    fails = [True]

    def do(session: Session, no: Any) -> None:
        effect_of(session, no)
        if fails and no == 3:
            raise ZeroDivisionError

    way.handles(shop, do, retry=Retry(immediate=0, max_attempts=9), ordered=True)

    def next_of_key(no: Any, attempt: int = 1) -> Outcome:
        leave(shop, what)
        return delivered(shop, way, no, attempt, ordering_key="k")

    assert [next_of_key(no) for no in (1, 2, 3, 4)] == [P, P, F, W]
    assert next_of_key(3, 2) is F
    fails.clear()
    assert [next_of_key(no, attempt) for no, attempt in ((4, 2), (3, 3), (4, 3), (5, 1), (3, 4))] == [W, P, P, P, D]
    assert (shop.effects(), shop.failure().state) == (["1", "2", "3", "4", "5"], "resolved")


@some_ways
def test_a_failure_and_a_duplicate_are_written_down_whatever_was_left(left: tuple[Shop, str], way: Way) -> None:
    """The row of one that failed is the same row each time, and its success closes it."""
    shop, what = left
    fails = [True]

    def do(session: Session, no: Any) -> None:
        if fails:
            raise ZeroDivisionError
        effect_of(session, no)

    way.handles(shop, do, retry=Retry(immediate=0, max_attempts=9))
    for attempt in (1, 2, 3):
        leave(shop, what)
        assert delivered(shop, way, "中", attempt) is F
    fails.clear()
    assert delivered(shop, way, "中", 4) is P
    run(shop, "UPDATE message_failure SET state = 'retrying'")
    leave(shop, what)
    assert delivered(shop, way, "中", 5) is D
    row = shop.failure()
    assert (row.business_key, row.attempts, row.state) == ("中", 3, "resolved")


@pytest.mark.parametrize("hook", ["begin", "engine_connect"])
def test_under_a_lease_what_was_left_is_met_once_where_hooks_keep_the_connection(
    left: tuple[Shop, str], hook: str
) -> None:
    """What a hook has set on the connection of a handler would be lost with it: it is not exchanged, and nobody gets it again."""
    shop, what = left
    for engine in (shop.engine, shop.async_engine.sync_engine):
        event.listen(engine, hook, lambda connection: None)
    UNDER_A_LEASE.handles(shop, effect_of, retry=Retry(immediate=0, max_attempts=9))
    leave(shop, what)
    ends = [delivered(shop, UNDER_A_LEASE, 1, attempt) for attempt in (1, 2, 3)]
    assert ends[1:] in ([P, D], [D, D])
    assert shop.effects() == ["1"]


@pytest.mark.parametrize("colour", COLOURS)
def test_a_worker_starts_although_the_driver_of_sqlite_was_left_in_autocommit(
    request: pytest.FixtureRequest, colour: str
) -> None:
    for shop in shops(request, "sqlite", colour, pool_size=5):
        ALONE.handles(shop, effect_of)
        vacuum(shop)
        name = f"memory://left-before-us-{colour}"
        with shop.eo.worker(name, concurrency=1), shop.eo.producer(name) as producer:
            producer.send(order("1"))
            until(lambda shop=shop: shop.effects() == ["1"], "it has run")
        assert shop.failures() == []


@pytest.mark.parametrize("seen", [False, True])
def test_a_claim_of_a_callers_own_transaction_fails_once_at_most(left: tuple[Shop, str], seen: bool) -> None:
    """The connection is the caller's, and may hold work of theirs: it is not exchanged, and nobody gets it again."""
    shop, what = left
    first = [claimed(shop, "ä0")] if seen else []
    leave(shop, what)
    claimed(shop, "ä1")
    assert [*first, claimed(shop, "ä2"), claimed(shop, "ä2")] == [*[True for _ in first], True, False]
    assert "ä2" in shop.claims()


def claimed(shop: Shop, key: str) -> bool | str:
    """Claim in a transaction of the caller's, and commit it; what was raised, if that was refused."""

    async def by_await() -> bool:
        async with AsyncSession(shop.async_engine) as session, session.begin():
            return await session.run_sync(shop.eo.claim, "handler", key)

    try:
        if shop.is_async:
            return bool(shop.await_(by_await()))
        with Session(shop.engine) as session, session.begin():
            return shop.eo.claim(session, "handler", key)
    except Exception as error:
        return type(error).__name__
