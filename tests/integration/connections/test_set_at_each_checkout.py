"""What an application sets anew in each connection as it is taken, by what it is taken for, is the transaction's and no longer.

The kind: a role of each tenant, a time limit of each kind of work, set by a listener of the pool or the engine, or by a hook that
begins transactions. Learnt once a connection, the first one's would be every later one's: a role that has left the shop, or
another request's limit.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from datetime import timedelta
from functools import partial
from time import sleep
from typing import Any

import pytest
from sqlalchemy import Engine, event, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from exactly_once import Lease, Outcome, Retry
from tests.integration.outside import run
from tests.integration.shop import COLOURS, Shop, order, put, shops
from tests.integration.threads import in_thread
from tests.integration.ways import UNDER_A_LEASE, WAYS, Way, one_by_one
from tests.services.mariadb import MYSQLD
from tests.waiting import until

pytestmark = pytest.mark.nightly(meet=2)

P, D, F = Outcome.PROCESSED, Outcome.DUPLICATE, Outcome.FAILED
THREE = Retry(immediate=0, delays=[0.01], max_attempts=5)
each_way = pytest.mark.parametrize("way", WAYS, ids=str)

Say = Callable[[], str | None]
"""What is to be sent now, if anything."""


@pytest.fixture(params=COLOURS)
def shop(request: pytest.FixtureRequest) -> Iterator[Shop]:
    yield from shops(request, "postgres", request.param)


@pytest.fixture
def tenants(shop: Shop, request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """Two roles, and what each is called: roles are the whole server's."""
    database = str(shop.engine.url.database)
    names = {tenant: f"{database}_{tenant}" for tenant in "ab"}
    for name in names.values():
        run(shop, f"CREATE ROLE {name}")
        for things in ("TABLES", "SEQUENCES"):
            run(shop, f"GRANT ALL ON ALL {things} IN SCHEMA public TO {name}")
    yield names
    for name in names.values():
        leaves(shop, name)


def leaves(shop: Shop, role: str) -> None:
    with shop.outside.begin() as connection:
        if connection.execute(text("SELECT 1 FROM pg_roles WHERE rolname = :role"), {"role": role}).scalar():
            connection.exec_driver_sql(f"DROP OWNED BY {role}")
            connection.exec_driver_sql(f"DROP ROLE {role}")


def engine_of(shop: Shop) -> Engine:
    return shop.async_engine.sync_engine if shop.is_async else shop.engine


def sends(dbapi: Any, statement: str | None) -> None:
    """Send it on the driver's connection, for as long as it lasts."""
    if dbapi is not None and statement is not None:
        cursor = dbapi.cursor()
        cursor.execute(statement)
        cursor.close()
        dbapi.commit()


def at_checkout(shop: Shop, say: Say) -> None:
    event.listen(engine_of(shop), "checkout", lambda dbapi, record, proxy: sends(dbapi, say()))


def at_checkin(shop: Shop, say: Say) -> None:
    event.listen(engine_of(shop), "checkin", lambda dbapi, record: sends(dbapi, say()))


def as_sqlalchemy_takes_it(shop: Shop, say: Say) -> None:
    event.listen(
        engine_of(shop), "engine_connect", lambda connection: sends(connection.connection.dbapi_connection, say())
    )


def as_it_begins(shop: Shop, say: Say) -> None:
    """In the transaction, for it alone; not in each."""

    def begun(connection: Any) -> None:
        statement = say()
        if statement is not None:
            connection.exec_driver_sql(statement.replace("SET", "SET LOCAL"))

    event.listen(engine_of(shop), "begin", begun)


PLACES = {"checkout": at_checkout, "engine_connect": as_sqlalchemy_takes_it, "begin": as_it_begins}
each_place = pytest.mark.parametrize("place", PLACES)


@each_way
@each_place
def test_a_role_of_each_tenant_of_which_the_first_one_leaves(
    shop: Shop, tenants: dict[str, str], way: Way, place: str
) -> None:
    now = ["a"]
    PLACES[place](shop, lambda: f"SET ROLE {tenants[now[0]]}")
    at_checkin(shop, lambda: "RESET ROLE")
    failing = {2, 4}

    def do(session: Session, no: Any) -> None:
        put(session, str(no))
        if no in failing:
            raise ZeroDivisionError

    way.handles(shop, do, retry=THREE)
    assert one_by_one(shop, way, [1, 2]) == [P, F]
    now[0] = "b"
    assert one_by_one(shop, way, [3, 4]) == [P, F]
    leaves(shop, tenants["a"])
    failing.clear()
    assert way.deliver(shop, [order(4, attempt=2)]) == [P]
    assert way.deliver(shop, [order(2, attempt=3)]) == [P]
    assert one_by_one(shop, way, [5, 1]) == [P, D]
    assert sorted(shop.effects()) == ["1", "2", "3", "4", "5"]
    assert [row.state for row in shop.failures()] == ["resolved", "resolved"]


@each_way
@each_place
def test_a_role_that_only_some_transactions_have(shop: Shop, tenants: dict[str, str], way: Way, place: str) -> None:
    """What is written in our name has the role its transaction began with: in no other may a row of this shop be settled."""
    now: list[str | None] = ["a"]
    PLACES[place](shop, lambda: None if now[0] is None else f"SET ROLE {tenants[now[0]]}")
    at_checkin(shop, lambda: "RESET ROLE")
    failing, had = {1, 2}, []

    def do(session: Session, no: Any) -> None:
        had.append(session.execute(text("SELECT current_user")).scalar_one())
        put(session, str(no))
        if no in failing:
            raise ZeroDivisionError
        session.execute(text("RESET ROLE"))
        session.execute(text(f"SET LOCAL ROLE {tenants['b']}"))

    way.handles(shop, do, retry=THREE)
    assert one_by_one(shop, way, [1]) == [F]
    now[0] = None
    assert one_by_one(shop, way, [2]) == [F]
    failing.clear()
    run(shop, f"REVOKE ALL ON ALL TABLES IN SCHEMA public FROM {tenants['b']}")
    now[0] = "a"
    assert way.deliver(shop, [order(1, attempt=2)]) == [P]
    now[0] = None
    assert way.deliver(shop, [order(2, attempt=2)]) == [P]
    assert [each == tenants["a"] for each in had] == [True, False, True, False]
    assert [row.state for row in shop.failures()] == ["resolved", "resolved"]


RESETS = {
    "RESET ALL": ("SET LOCAL ROLE {b}", "RESET ALL"),
    "RESET ALL in a block": ("SET LOCAL ROLE {b}", "DO $$ BEGIN RESET ALL; END $$"),
    "RESET ALL before the role": ("RESET ALL", "SET LOCAL ROLE {b}"),
    "RESET ROLE": ("SET LOCAL ROLE {b}", "RESET ROLE"),
    "SET SESSION AUTHORIZATION DEFAULT": ("SET LOCAL ROLE {b}", "SET SESSION AUTHORIZATION DEFAULT"),
    "RESET SESSION AUTHORIZATION": ("RESET SESSION AUTHORIZATION", "SET LOCAL ROLE {b}"),
    "another session's user": ("SET LOCAL SESSION AUTHORIZATION {b}",),
}


@each_way
@each_place
@pytest.mark.parametrize("resets", RESETS)
def test_what_a_handler_resets_is_no_role_of_ours(
    shop: Shop, tenants: dict[str, str], way: Way, place: str, resets: str
) -> None:
    """Its failure is settled, its lease and its step are done, with the role that its transaction began with."""
    PLACES[place](shop, lambda: f"SET ROLE {tenants['a']}")
    at_checkin(shop, lambda: "RESET ROLE")
    run(
        shop,
        f"REVOKE ALL ON ALL TABLES IN SCHEMA public FROM {tenants['b']}",
        f"GRANT INSERT, SELECT ON effect TO {tenants['b']}",
    )
    failing = {1}

    def do(session: Session, no: Any) -> None:
        if no in (1, 2):
            for statement in RESETS[resets]:
                session.execute(text(statement.format(**tenants)))
        put(session, str(no))
        if no in failing:
            raise ZeroDivisionError

    way.handles(shop, do, retry=THREE)
    assert one_by_one(shop, way, [1]) == [F]
    failing.clear()
    assert way.deliver(shop, [order(1, attempt=2)]) == [P]
    assert one_by_one(shop, way, [2, 3, 1, 2, 3]) == [P, P, D, D, D]
    assert sorted(shop.effects()) == ["1", "2", "3"]
    assert [row.state for row in shop.failures()] == ["resolved"]


@each_way
@each_place
def test_a_limit_of_each_request_is_its_own(shop: Shop, way: Way, place: str) -> None:
    now: list[str | None] = [None]
    PLACES[place](shop, lambda: None if now[0] is None else f"SET lock_timeout = '{now[0]}'")
    at_checkin(shop, lambda: "RESET lock_timeout")
    found: list[str] = []
    way.handles(shop, lambda session, no: found.append(session.execute(text("SHOW lock_timeout")).scalar_one()))
    wanted = ["5s", "1s", None, "3s", "5s"]
    for no, each in enumerate(wanted):
        now[0] = each
        assert one_by_one(shop, way, [no]) == [P]
    assert found == [each or "0" for each in wanted]


@each_way
def test_a_limit_that_is_set_back_as_a_connection_is_given_back(shop: Shop, way: Way) -> None:
    """Set as it was made, and gone when it is taken again: nobody is to get it from us."""
    event.listen(engine_of(shop), "connect", lambda dbapi, record: sends(dbapi, "SET lock_timeout = '5s'"))
    at_checkin(shop, lambda: "RESET lock_timeout")
    found: list[str] = []
    way.handles(shop, lambda session, no: found.append(session.execute(text("SHOW lock_timeout")).scalar_one()))
    for no in range(4):
        assert one_by_one(shop, way, [no]) == [P]
    assert found[1:] == ["0"] * 3


@each_way
@pytest.mark.skipif(bool(MYSQLD), reason="MySQL bounds the session: its first claim decides")
@pytest.mark.parametrize("colour", COLOURS)
def test_limits_and_a_role_of_each_request_on_mariadb(request: pytest.FixtureRequest, colour: str, way: Way) -> None:
    """Nothing of them is learnt there, and each bound of ours is of one statement."""
    shows = (
        "SELECT CONCAT_WS(' ', @@innodb_lock_wait_timeout, @@lock_wait_timeout, @@max_statement_time, CURRENT_ROLE())"
    )
    for shop in shops(request, "mariadb", colour):
        role = f"{shop.engine.url.database}_a"[-30:]
        run(shop, f"CREATE ROLE {role}")
        now = [5]
        for name in ("innodb_lock_wait_timeout", "lock_wait_timeout", "max_statement_time"):
            at_checkout(shop, lambda name=name, now=now: f"SET SESSION {name} = {now[0]}")  # type: ignore[misc]
        at_checkout(shop, lambda role=role, now=now: f"SET ROLE {role if now[0] == 5 else 'NONE'}")  # type: ignore[misc]
        found: list[str] = []
        failing = {1, 2}

        def do(session: Session, no: Any, found: list[str] = found, failing: set[int] = failing) -> None:
            found.append(str(session.execute(text(shows)).scalar_one()))
            if no in failing:
                raise ZeroDivisionError

        way.handles(shop, do, retry=THREE)
        assert one_by_one(shop, way, [1]) == [F]
        now[0] = 7
        assert one_by_one(shop, way, [2]) == [F]
        run(shop, f"DROP ROLE {role}")
        failing.clear()
        assert way.deliver(shop, [order(1, attempt=2)]) == [P]
        now[0] = 9
        assert way.deliver(shop, [order(2, attempt=2)]) == [P]
        assert found == [f"5 5 5.000000 {role}", "7 7 7.000000", "7 7 7.000000", "9 9 9.000000"]


def claimed(shop: Shop, no: int, before: str | None = None) -> str:
    """By `eo.claim` in a transaction of the caller's; returns the limit that is found behind it."""

    def claims(session: Session) -> str:
        if before is not None:
            session.execute(text(before))
        assert shop.eo.claim(session, "handler", f"A-{no}")
        return str(session.execute(text("SHOW lock_timeout")).scalar_one())

    async def aclaims() -> str:
        async with AsyncSession(shop.async_engine) as session, session.begin():
            return await session.run_sync(claims)

    if shop.is_async:
        found: str = shop.await_(aclaims())
        return found
    with Session(shop.engine) as session, session.begin():
        return claims(session)


@each_place
def test_a_limit_of_each_request_is_its_own_behind_a_claim(shop: Shop, place: str) -> None:
    now = ["5s"]
    PLACES[place](shop, lambda: f"SET lock_timeout = '{now[0]}'")
    for no, each in enumerate(("5s", "1s", "3s")):
        now[0] = each
        assert claimed(shop, no) == each


def test_what_one_caller_set_for_a_transaction_is_not_the_next_ones(shop: Shop) -> None:
    assert claimed(shop, 1, "SET LOCAL lock_timeout = '1s'") == "1s"
    assert [claimed(shop, no) for no in (2, 3)] == ["0", "0"]


def test_where_nobody_listens_but_we_nothing_more_is_sent(shop: Shop) -> None:
    shop.handles(lambda session: put(session, "effect"))
    assert [shop.process(order(no)) for no in (1, 2)] == [P, P]

    def varies(connection: Any) -> list[bool]:
        return [kept.varies for kept in connection.info.values() if hasattr(kept, "varies")]

    async def avaries() -> list[bool]:
        async with shop.async_engine.connect() as connection:
            return await connection.run_sync(varies)

    if shop.is_async:
        assert shop.await_(avaries()) == [False]
    else:
        with shop.engine.connect() as connection:
            assert varies(connection) == [False]


@pytest.mark.parametrize("colour", COLOURS)
def test_a_lease_is_renewed_where_a_listener_wants_the_tenant_of_the_run(
    request: pytest.FixtureRequest, colour: str, caplog: pytest.LogCaptureFixture
) -> None:
    """In a context variable, which the thread that renews did not have: another worker took a sound run over."""
    tenant: ContextVar[str] = ContextVar("tenant")
    for shop in shops(request, "postgres", colour, pool_size=4):

        def runs(session: Session, no: object) -> None:
            put(session, str(no))
            sleep(2)

        UNDER_A_LEASE.handles(shop, runs, guard=Lease(timedelta(seconds=1)))
        for engine in (shop.engine, shop.async_engine.sync_engine):
            event.listen(engine, "checkout", lambda *_: tenant.get() and None)
        was = tenant.set("seven")
        assert UNDER_A_LEASE.deliver(shop, [order(1)]) == [Outcome.PROCESSED]
        tenant.reset(was)
    assert "leases_not_renewed" not in caplog.text
    assert "lease_lost" not in caplog.text


@pytest.mark.parametrize("colour", COLOURS)
def test_a_run_whose_tenant_a_listener_refuses_costs_no_other_run_its_lease(
    request: pytest.FixtureRequest, colour: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Those of a process are renewed together, and the first one's tenant was asked for alone."""
    tenant: ContextVar[str] = ContextVar("tenant")
    gone: set[str] = set()

    def refuses(*_: object) -> None:
        if tenant.get() in gone:
            raise LookupError("no such tenant")

    for shop in shops(request, "postgres", colour, pool_size=6):
        here: set[object] = set()
        ends: dict[str, Outcome] = {}

        def waits(seconds: float, is_async: bool = shop.is_async) -> None:
            if is_async:
                await_only(asyncio.sleep(seconds))
            else:
                sleep(seconds)

        def runs(
            session: Session, no: object, here: set[object] = here, waits: Any = waits, ends: dict[str, Outcome] = ends
        ) -> None:
            put(session, str(no))
            here.add(no)
            while len(here) < 2:
                waits(0.01)
            gone.add("first")
            if no == "first":
                waits(2)
            while no == "second" and "first" not in ends:  # alone, the first would have nobody who renews it
                waits(0.01)

        def delivers(no: str, shop: Shop = shop, ends: dict[str, Outcome] = ends) -> None:
            tenant.set(no)
            ends[no] = shop.eo.process(order(no))

        async def adelivers(no: str, shop: Shop = shop, ends: dict[str, Outcome] = ends) -> None:
            tenant.set(no)
            ends[no] = await shop.eo.aprocess(order(no))

        async def both(adelivers: Any = adelivers, here: set[object] = here) -> None:
            first = asyncio.create_task(adelivers("first"))
            while not here:
                await asyncio.sleep(0.01)
            await asyncio.gather(first, adelivers("second"))

        UNDER_A_LEASE.handles(shop, runs, guard=Lease(timedelta(seconds=1)))
        for engine in (shop.engine, shop.async_engine.sync_engine):
            event.listen(engine, "checkout", refuses)
        if shop.is_async:
            shop.await_(both())
        else:
            with in_thread(partial(delivers, "first")):
                until(lambda here=here: here, "the first run")  # type: ignore[misc]
                delivers("second")
        assert ends == dict.fromkeys(("first", "second"), Outcome.PROCESSED)
        gone.clear()
    assert "leases_not_renewed" not in caplog.text
