"""A connection of the pool is not as it was: whoever had it left a role, a time limit, a date's style or AUTOCOMMIT in it.

The kind: a function of a handler, or other code of the program on the same engine, changed the session where no statement's text
says so. Then no message is to be blamed for it, no copy may run, what fails is written down, and the pump goes on.
"""

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

import pymysql
import pytest
from sqlalchemy import Connection, create_engine, event, make_url, select, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import StaticPool

from exactly_once import AsyncSteps, ExactlyOnce, Lease, Outcome, Retry, Steps
from exactly_once.database.schema import tables
from exactly_once.database.server_clock import utcnow
from exactly_once.failures.decisions import Chosen, requeue
from exactly_once.testing.databases import DatabaseServer
from tests.integration.grounds import ground_on
from tests.integration.outside import by_other_code, run, set_autocommit
from tests.integration.shop import COLOURS, DIALECTS, EFFECT, GROUP, STOCK, Shop, order, put, shops
from tests.integration.ways import ALONE, IN_A_BATCH, IN_A_LIST, LEASE, UNDER_A_LEASE, WAYS, Way, one_by_one
from tests.services.mariadb import MYSQLD
from tests.waiting import until

pytestmark = pytest.mark.nightly(meet=2)

P, D, F = Outcome.PROCESSED, Outcome.DUPLICATE, Outcome.FAILED
each_way = pytest.mark.parametrize("way", WAYS, ids=str)
some_ways = pytest.mark.parametrize("way", [ALONE, IN_A_BATCH, UNDER_A_LEASE], ids=str)


@pytest.fixture(params=COLOURS)
def postgres(request: pytest.FixtureRequest) -> Iterator[Shop]:
    """With a role that may write effects, and nothing of ours."""
    for shop in ground_on(request, "postgres", request.param):
        run(
            shop,
            "CREATE ROLE tenant_of_the_pool NOLOGIN",
            "GRANT INSERT, SELECT ON effect TO tenant_of_the_pool",
            "GRANT USAGE ON SEQUENCE effect_id_seq TO tenant_of_the_pool",
        )
        yield shop
        run(shop, "DROP OWNED BY tenant_of_the_pool", "DROP ROLE tenant_of_the_pool")


@pytest.fixture(params=COLOURS)
def mariadb(request: pytest.FixtureRequest) -> Iterator[Shop]:
    yield from ground_on(request, "mariadb", request.param)


def in_the_end(shop: Shop, way: Way, no: Any) -> Outcome:
    """Deliver until it is no longer said to be an outage, which may be of one connection and ends by itself."""
    for _ in range(4):
        (outcome,) = one_by_one(shop, way, [no])
        if outcome is not Outcome.WAITING:
            return outcome
    return outcome


def several_meet(shop: Shop, way: Way, *, left: Callable[[], object]) -> None:
    """What was left meets several messages of one claim, one of them a copy: a group of one is claimed as one alone."""
    assert way.deliver(shop, [order(no) for no in (10, 11, 12)]) == [P, P, P]
    left()
    for _ in range(4):  # of one connection, an outage may be said, and ends by itself
        ends = way.deliver(shop, [order(no) for no in (20, 21, 22, 10)])
        if Outcome.WAITING not in ends:
            break
    assert ends == [P, P, P, D]
    assert shop.failures() == []
    assert sorted(shop.effects()) == ["10", "11", "12", "20", "21", "22"]


# -- PostgreSQL --------------------------------------------------------------------------------------------------------

LEFT = {
    "role": "SELECT set_config('role', 'tenant_of_the_pool', false)",
    "session authorization": "SELECT set_config('session_authorization', 'tenant_of_the_pool', false)",
    "read only": "SELECT set_config('default_transaction_read_only', 'on', false)",
    "lock timeout": "SELECT set_config('lock_timeout', '1', false)",
    "style of dates": "SELECT set_config('datestyle', 'German', false)",
    "isolation": "SELECT set_config('default_transaction_isolation', 'serializable', false)",
    "encoding": "SELECT set_config('client_encoding', 'LATIN1', false)",
    "path": "SELECT set_config('search_path', 'pg_temp', false)",
}


def effect_of(session: Session, no: Any) -> None:
    session.execute(text("INSERT INTO public.effect (text) VALUES (:text)"), {"text": str(no)})
    if no == 3:
        raise ZeroDivisionError


@some_ways
@pytest.mark.parametrize("left", LEFT)
def test_what_a_function_of_a_handler_left_in_the_session_fails_no_neighbour(
    postgres: Shop, way: Way, left: str
) -> None:
    def do(session: Session, no: Any) -> None:
        effect_of(session, no)
        if no == 1:
            session.execute(text(LEFT[left]))

    way.handles(postgres, do)
    assert in_the_end(postgres, way, 1) in (P, F)
    assert [in_the_end(postgres, way, no) for no in (2, 3, 4)] == [P, F, P]
    assert one_by_one(postgres, way, [2, 4]) == [D, D]
    assert {row.business_key: row.error_class for row in postgres.failures()}["3"] == "ZeroDivisionError"


@some_ways
@pytest.mark.parametrize("left", LEFT)
def test_what_other_code_of_the_program_left_in_the_pool_fails_no_message(postgres: Shop, way: Way, left: str) -> None:
    way.handles(postgres, effect_of)
    assert one_by_one(postgres, way, [1]) == [P]
    by_other_code(postgres, LEFT[left])
    assert [in_the_end(postgres, way, no) for no in (2, 3, 4)] == [P, F, P]
    assert one_by_one(postgres, way, [1, 2, 4]) == [D, D, D]
    assert postgres.failure().error_class == "ZeroDivisionError"


@pytest.mark.parametrize("way", [IN_A_BATCH, IN_A_LIST], ids=str)
@pytest.mark.parametrize("left", [*LEFT, "autocommit of the driver's"])
def test_what_was_left_in_the_pool_fails_none_of_several(postgres: Shop, way: Way, left: str) -> None:
    way.handles(postgres, effect_of)
    several_meet(
        postgres, way, left=lambda: by_other_code(postgres, LEFT[left]) if left in LEFT else set_autocommit(postgres)
    )


@some_ways
def test_a_key_beyond_ascii_is_the_same_key_whatever_encoding_was_left(postgres: Shop, way: Way) -> None:
    way.handles(postgres, effect_of)
    assert one_by_one(postgres, way, [1, "ä-1"]) == [P, P]
    by_other_code(postgres, LEFT["encoding"])
    assert one_by_one(postgres, way, ["ä-1", "ä-2", "ä-2"]) == [D, P, D]
    assert postgres.claims() == ["1", "ä-1", "ä-2"]


def test_the_mark_of_a_lease_kept_elsewhere_is_written_in_our_name(postgres: Shop, redis_url: str) -> None:
    def do(session: Session, no: Any) -> None:
        session.execute(text("SET LOCAL ROLE tenant_of_the_pool"))
        effect_of(session, no)

    guard = Lease(timedelta(seconds=30), store=redis_url)
    UNDER_A_LEASE.handles(postgres, do, name=f"handler-{os.urandom(4).hex()}", guard=guard)
    assert one_by_one(postgres, UNDER_A_LEASE, [1, 1]) == [P, D]
    assert postgres.claims() == ["1"]


def test_a_run_beside_the_mark_is_seen_in_our_name_where_the_handler_took_a_role(
    postgres: Shop, redis_url: str
) -> None:
    """Another run has committed meanwhile, and its mark is read before anything of this one is committed."""
    ran: list[Any] = []

    def do(session: Session, no: Any) -> None:
        session.execute(text("SET LOCAL ROLE tenant_of_the_pool"))
        effect_of(session, no)
        ran.append(no)
        with postgres.outside.begin() as connection:
            claims = postgres.tables.idempotent
            values = {"consumer_group": GROUP, "handler": name, "business_key": "1", "fingerprint": b""}
            connection.execute(claims.insert().values(values | {"status": 1, "created_at": utcnow(), "token": "other"}))

    name = f"handler-{os.urandom(4).hex()}"
    guard = Lease(timedelta(seconds=30), store=redis_url)
    UNDER_A_LEASE.handles(postgres, do, name=name, guard=guard)
    assert one_by_one(postgres, UNDER_A_LEASE, [1]) == [D]
    assert (ran, postgres.effects()) == ([1], [])


@each_way
def test_a_raw_connection_that_was_left_in_autocommit_fails_no_message(postgres: Shop, way: Way) -> None:
    """As for LISTEN or VACUUM: `connection.connection.driver_connection.autocommit = True`, and back to the pool."""
    way.handles(postgres, effect_of, retry=Retry(immediate=0, max_attempts=1))
    assert one_by_one(postgres, way, [1]) == [P]
    set_autocommit(postgres)
    assert one_by_one(postgres, way, [2, 4]) == [P, P]


@pytest.mark.parametrize("colour", COLOURS)
def test_the_pump_goes_on_whatever_style_dates_have_in_the_database(eo_server: DatabaseServer, colour: str) -> None:
    url = eo_server.create()
    name = f"memory://dates-{colour}"
    try:
        with Shop("postgres", colour, url.render_as_string(hide_password=False), pool_size=5) as shop:
            failing = {"1", "2"}

            def do(session: Session, no: Any) -> None:
                put(session, str(no))
                if str(no) in failing:
                    raise ZeroDivisionError

            ALONE.handles(shop, do, retry=Retry(immediate=0, max_attempts=1))
            with shop.eo.worker(name, concurrency=2) as worker, shop.eo.producer(name) as producer:
                for no in ("1", "5"):
                    producer.send(order(no))
                worker.drain()
                run(shop, f"ALTER DATABASE \"{url.database}\" SET datestyle = 'German'")
                for engine in (shop.engine, shop.async_engine.sync_engine):
                    engine.dispose(close=False)
                producer.send(order("2"))
                worker.drain()
                assert shop.effects() == ["5"]
                failing.clear()
                run(shop, "UPDATE message_failure SET state = 'requeued', next_attempt_at = clock_timestamp()")
                until(lambda: len(shop.effects()) >= 3, "what failed has run")
            assert sorted(shop.effects()) == ["1", "2", "5"]
    finally:
        eo_server.drop(url)


def test_the_pump_goes_on_although_texts_come_as_bytes(postgres: Shop) -> None:
    """As on a connection that was left in SQL_ASCII."""
    failing = ["ä"]

    def do(session: Session, no: Any) -> None:
        if failing:
            raise ZeroDivisionError(failing.pop())
        put(session, str(no))

    ALONE.handles(postgres, do, retry=Retry(immediate=0, max_attempts=1))
    with postgres.eo.worker(f"memory://bytes-{postgres.colour}", concurrency=2) as worker:
        with postgres.eo.producer(f"memory://bytes-{postgres.colour}") as producer:
            producer.send(order("ä", properties={"ä": "中"}))
        worker.drain()
        with postgres.engine.begin() as connection:  # in the pool that the pump shares
            connection.exec_driver_sql("SET client_encoding = 'SQL_ASCII'")
        run(postgres, "UPDATE message_failure SET state = 'requeued', next_attempt_at = clock_timestamp()")
        until(lambda: postgres.effects() == ["ä"], "what failed has run")


@pytest.fixture(params=[(dialect, colour) for dialect in DIALECTS for colour in COLOURS], ids=" ".join)
def shop(request: pytest.FixtureRequest) -> Iterator[Shop]:
    yield from ground_on(request, *request.param)


def test_a_damaged_row_does_not_keep_the_others_of_the_failure_store(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    failing = True

    def do(session: Session, no: Any) -> None:
        if failing:
            raise ZeroDivisionError
        put(session, str(no))

    ALONE.handles(shop, do, retry=Retry(immediate=0, max_attempts=1))
    with shop.eo.worker(f"memory://damaged-{shop.dialect}-{shop.colour}", concurrency=2) as worker:
        with shop.eo.producer(f"memory://damaged-{shop.dialect}-{shop.colour}") as producer:
            for no in ("1", "2", "3"):
                producer.send(order(no))
        worker.drain()
        failing = False
        t = shop.tables.failure
        with shop.outside.begin() as connection:
            damaged = connection.execute(select(t.c.id).where(t.c.business_key == "2")).scalar_one()
            connection.execute(update(t).where(t.c.id == damaged).values(properties="{half"))
            connection.execute(update(t).values(state="requeued", next_attempt_at=utcnow()))
        until(lambda: sorted(shop.effects()) == ["1", "3"], "the others have run")
    assert f"failure_not_read id={damaged} handler=handler" in caplog.text
    assert [row.state for row in shop.failures() if row.business_key == "2"] == ["requeued"]


# -- MariaDB -------------------------------------------------------------------------------------------------------------

LEFT_ON_MARIADB = {
    "autocommit": "SET autocommit = 1",
    "read only": "SET SESSION TRANSACTION READ ONLY",
    "mode": "SET sql_mode = ''",
    "names": "SET NAMES latin1",
    "a limit of rows": "SET sql_select_limit = 0",
    "another database": "USE mysql",
}


@some_ways
@pytest.mark.parametrize("left", LEFT_ON_MARIADB)
def test_what_other_code_of_the_program_left_in_the_pool_of_mariadb_fails_no_message(
    mariadb: Shop, way: Way, left: str
) -> None:
    fails = [True]

    def do(session: Session, no: Any) -> None:
        session.execute(
            text(f"INSERT INTO `{mariadb.engine.url.database}`.effect (text) VALUES (:no)"), {"no": str(no)}
        )
        if no == 3 and fails:
            raise ZeroDivisionError

    way.handles(mariadb, do)
    assert one_by_one(mariadb, way, [1]) == [P]
    by_other_code(mariadb, LEFT_ON_MARIADB[left])
    first = [in_the_end(mariadb, way, no) for no in (2, 3, 4, 5)]
    assert P in first[2:], first
    for engine in (mariadb.engine, mariadb.async_engine.sync_engine):  # as a restart would: connections that nobody had
        engine.dispose(close=False)
    fails.clear()
    again = one_by_one(mariadb, way, [1, 2, 3, 4, 5])
    assert again[0] is D
    assert sorted(mariadb.effects()) == ["1", "2", "3", "4", "5"], (first, again)


@pytest.mark.parametrize("way", [IN_A_BATCH, IN_A_LIST], ids=str)
@pytest.mark.parametrize("left", LEFT_ON_MARIADB)
def test_what_was_left_in_the_pool_of_mariadb_fails_none_of_several(mariadb: Shop, way: Way, left: str) -> None:
    effect = text(f"INSERT INTO `{mariadb.engine.url.database}`.effect (text) VALUES (:no)")
    way.handles(mariadb, lambda session, no: session.execute(effect, {"no": str(no)}), retry=Retry(immediate=0))
    several_meet(mariadb, way, left=lambda: by_other_code(mariadb, LEFT_ON_MARIADB[left]))


@pytest.mark.parametrize("limit", [0, 1])
def test_a_limit_of_rows_hides_no_recorded_step(mariadb: Shop, limit: int) -> None:
    calls: list[str] = []

    def recorded(name: str) -> Callable[[str], None]:
        return lambda key: calls.append(name)

    options: dict[str, Any] = {"name": "handler", "key": "no", "guard": LEASE, "retry": Retry(immediate=0)}
    if mariadb.is_async:

        async def call(name: str) -> None:
            calls.append(name)

        @mariadb.eo.handler("orders", **options)
        async def by_await(body: dict[str, Any], steps: AsyncSteps) -> None:
            for name in ("first", "second"):
                await steps.run(name, lambda key, name=name: call(name))  # type: ignore[misc]
            if len(calls) == 2:
                calls.append("failed")
                raise ZeroDivisionError
    else:

        @mariadb.eo.handler("orders", **options)
        def handler(body: dict[str, Any], steps: Steps) -> None:
            for name in ("first", "second"):
                steps.run(name, recorded(name))
            if len(calls) == 2:
                calls.append("failed")
                raise ZeroDivisionError

    assert mariadb.process(order(1)) is F
    by_other_code(mariadb, f"SET sql_select_limit = {limit}")
    assert mariadb.process(order(1, attempt=2)) is P
    assert mariadb.process(order(1, attempt=3)) is D
    assert calls == ["first", "second", "failed"]


@pytest.mark.parametrize("limit", [0, 1])
def test_a_limit_of_rows_hides_nothing_of_a_group_and_of_what_failed(mariadb: Shop, limit: int) -> None:
    def do(session: Session, no: Any) -> None:
        put(session, str(no))
        if no in (2, 3):
            raise ZeroDivisionError

    IN_A_BATCH.handles(mariadb, do)
    assert IN_A_BATCH.deliver(mariadb, [order(no) for no in (0, 1, 2, 3)]) == [P, P, F, F]
    by_other_code(mariadb, f"SET sql_select_limit = {limit}")
    assert IN_A_BATCH.deliver(mariadb, [order(no) for no in (0, 1, 4, 5)]) == [D, D, P, P]
    with mariadb.engine.begin() as connection:
        connection.exec_driver_sql(f"SET sql_select_limit = {limit}")
        assert requeue(connection, mariadb.tables, Chosen(group=GROUP), by="me", why=None, per_second=None).count == 2


SLOW = {
    "postgres": ("SELECT set_config('statement_timeout', '200ms', false)", "SELECT pg_sleep(0.5)"),
    "mariadb": (
        "SET max_execution_time = 200" if MYSQLD else "SET max_statement_time = 0.2",
        "SELECT SLEEP(0.5) FROM stock",
    ),
}


@some_ways
@pytest.mark.parametrize("dialect", SLOW)
@pytest.mark.parametrize("colour", COLOURS)
def test_a_limit_of_time_that_was_left_is_met_by_one_try_alone(
    request: pytest.FixtureRequest, way: Way, dialect: str, colour: str
) -> None:
    limits, takes = SLOW[dialect]
    for shop in ground_on(request, dialect, colour):
        way.handles(shop, partial(_slow, takes))
        with shop.outside.begin() as connection:
            connection.execute(STOCK.insert().values(item=1, amount=1))
        assert one_by_one(shop, way, [1]) == [P]
        by_other_code(shop, limits)
        assert one_by_one(shop, way, [2]) == [F]
        assert way.deliver(shop, [order(2, attempt=2)]) == [P]
        assert one_by_one(shop, way, [3]) == [P]


def _slow(takes: str, session: Session, no: Any) -> None:
    session.execute(text(takes)).all()
    put(session, str(no))


# -- SQLite --------------------------------------------------------------------------------------------------------------


@some_ways
@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("uses_session", [True, False], ids=["with effects", "a claim alone"])
@pytest.mark.parametrize("set_to", ["synchronous = OFF", "journal_mode = WAL; synchronous = NORMAL"])
def test_on_sqlite_a_commit_of_ours_waits_for_the_disk_although_the_connection_does_not(
    request: pytest.FixtureRequest, colour: str, way: Way, uses_session: bool, set_to: str
) -> None:
    for shop in shops(request, "sqlite", colour):  # of one connection, so that it can be asked afterwards
        for engine in (shop.engine, shop.async_engine.sync_engine):

            @event.listens_for(engine, "connect")
            def connected(dbapi: Any, record: Any) -> None:
                cursor = dbapi.cursor()
                for pragma in set_to.split("; "):
                    cursor.execute(f"PRAGMA {pragma}")
                cursor.close()

        way.handles(shop, lambda session, no: put(session, str(no)) if uses_session else None)
        assert one_by_one(shop, way, [1]) == [P]
        assert _synchronous(shop) == 2


@pytest.mark.parametrize("way", [way for way in WAYS if not way.lease], ids=str)
@pytest.mark.parametrize("colour", COLOURS)
def test_on_sqlite_rows_that_tell_a_statements_count_make_no_claim_a_duplicate(
    request: pytest.FixtureRequest, colour: str, way: Way
) -> None:
    for shop in shops(request, "sqlite", colour):
        way.handles(shop, lambda session, no: put(session, str(no)))
        by_other_code(shop, "PRAGMA count_changes = ON")
        assert way.deliver(shop, [order(1), order(2)]) == [P, P]
        assert way.deliver(shop, [order(1), order(3)]) == [D, P]
        assert shop.effects() == ["1", "2", "3"]


def _synchronous(shop: Shop) -> int:
    async def ask() -> int:
        async with shop.async_engine.connect() as connection:
            return int((await connection.exec_driver_sql("PRAGMA synchronous")).scalar_one())

    if shop.is_async:
        return int(shop.await_(ask()))
    with shop.engine.connect() as connection:
        return int(connection.exec_driver_sql("PRAGMA synchronous").scalar_one())


@pytest.mark.parametrize("way", [way for way in WAYS if way.lease], ids=str)
def test_numbers_that_come_as_texts_make_no_failed_message_a_duplicate(
    request: pytest.FixtureRequest, way: Way
) -> None:
    """Converters of the application's own, as for a column that is a flag: the text "0" is true."""
    conv = dict(pymysql.converters.conversions) | {pymysql.constants.FIELD_TYPE.TINY: str}
    for shop in shops(request, "mariadb", "sync", options={"connect_args": {"conv": conv}}):
        bad = [True]

        def do(session: Session, no: Any, bad: list[bool] = bad) -> None:
            put(session, str(no))
            if bad:
                raise ZeroDivisionError

        way.handles(shop, do, retry=Retry(immediate=0, delays=[0.001], max_attempts=9))
        assert way.deliver(shop, [order(1)]) == [F]
        bad.clear()
        assert way.deliver(shop, [order(1, attempt=2)]) == [P]
        assert way.deliver(shop, [order(1, attempt=3)]) == [D]
        assert shop.effects() == ["1"]


# -- SQLite in memory, in tests of the application's own -------------------------------------------------------------------

LEFT_IN_MEMORY = {
    "pragma": ("PRAGMA cache_size = 100", "PRAGMA query_only = OFF"),
    "temporary table": ("CREATE TEMP TABLE IF NOT EXISTS kept (a int)",),
    "attached": ("ATTACH ':memory:' AS other",),
}


@pytest.mark.parametrize("left", LEFT_IN_MEMORY)
@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
@pytest.mark.parametrize("pool", [{}, {"poolclass": StaticPool}], ids=["its own", "StaticPool"])
def test_a_database_in_memory_is_not_thrown_away_with_what_a_handler_left(
    left: str, colour: str, url: str, pool: dict[str, Any]
) -> None:
    engine = create_engine(url, **pool)
    made = make_url(url).set(drivername="sqlite+aiosqlite")
    awaited = create_async_engine(made, poolclass=StaticPool)
    used = awaited.sync_engine if colour == "async" else engine
    failing = {2}

    def do(session: Session, no: Any) -> None:
        put(session, str(no))
        for statement in LEFT_IN_MEMORY[left]:
            with suppress(DBAPIError):  # it is attached already, or refused in a transaction
                session.execute(text(statement))
        if no in failing:
            raise ZeroDivisionError

    eo = ExactlyOnce(engine, async_database=awaited, group=GROUP)
    options: dict[str, Any] = {
        "key": "no",
        "name": "handler",
        "retry": Retry(immediate=0, delays=[0.001], max_attempts=9),
    }
    if colour == "async":

        @eo.handler("orders", **options)
        async def handles(session: AsyncSession, body: dict[str, Any]) -> None:
            await session.run_sync(do, body["no"])
    else:

        @eo.handler("orders", **options)
        def handles_plainly(session: Session, body: dict[str, Any]) -> None:
            do(session, body["no"])

    with asyncio.Runner() as runner:

        def both(work: Callable[[Connection], Any]) -> Any:
            """Do it in the one connection that there is."""

            async def in_the_loop() -> Any:
                async with awaited.begin() as connection:
                    return await connection.run_sync(work)

            if colour == "async":
                return runner.run(in_the_loop())
            with engine.begin() as connection:
                return work(connection)

        def process(no: int) -> Outcome:
            message = order(no)
            return runner.run(eo.aprocess(message)) if colour == "async" else eo.process(message)

        def rows(connection: Connection) -> list[str]:
            return list(connection.execute(select(EFFECT.c.text)).scalars())

        for metadata in (EFFECT.metadata, tables().idempotent.metadata):
            both(metadata.create_all)
        if colour == "async":  # tables are looked for through the other engine
            with engine.begin() as connection:
                tables().idempotent.metadata.create_all(connection)
        opened: list[object] = []
        event.listen(used, "connect", lambda *_: opened.append(_))
        assert [process(no) for no in (1, 2, 3)] == [P, F, P]
        failing.clear()
        assert [process(no) for no in (1, 2, 3)] == [D, P, D]
        assert sorted(both(rows)) == ["1", "2", "3"]
        assert opened == []
        runner.run(awaited.dispose())
    engine.dispose()
