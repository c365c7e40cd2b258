"""A time limit of the session's that is shorter than `claim_wait` ends the wait for another run: in progress, and no failure.

PostgreSQL's statement_timeout, of a role, a database or an engine, and MariaDB's max_statement_time. MySQL's limit is for SELECT.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from threading import Event, Thread
from time import monotonic
from typing import Any

import pytest
from sqlalchemy import create_engine, event, select, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from exactly_once import ExactlyOnce, InProgress, Outcome, Retry
from exactly_once.failures.store import FailureStore
from tests.integration.shop import COLOURS, GROUP, Shop, order, put, shops
from tests.integration.ways import ALONE, IN_A_BATCH, IN_A_LIST, UNDER_A_LEASE, Way
from tests.services.mariadb import MYSQLD
from tests.waiting import until

pytestmark = pytest.mark.nightly(meet=2)

BUSY, P = Outcome.IN_PROGRESS, Outcome.PROCESSED
THREE = Retry(immediate=0, delays=[0.01], max_attempts=3)
GROUNDS = [(dialect, colour) for dialect in ("postgres", "mariadb")[: 1 if MYSQLD else 2] for colour in COLOURS]
LIMITS = {"postgres": "SET statement_timeout = 300", "mariadb": "SET SESSION max_statement_time = 0.3"}


@pytest.fixture(params=GROUNDS, ids="-".join)
def limited(request: pytest.FixtureRequest) -> Iterator[Shop]:
    """A shop whose engines' sessions have a time limit."""
    dialect, colour = request.param
    args: dict[str, Any] = (
        {"options": "-c statement_timeout=300"} if dialect == "postgres" else {"init_command": LIMITS[dialect]}
    )
    yield from shops(request, dialect, colour, options={"connect_args": args})


@contextmanager
def another_runs(shop: Shop) -> Iterator[None]:
    """While another process is in the handler of the first message."""
    began, may_end, ends = Event(), Event(), []
    eo = ExactlyOnce(shop.outside, group=GROUP)

    @eo.handler("orders", name="handler", key="no")
    def handler(session: Session) -> None:
        began.set()
        assert may_end.wait(30)

    thread = Thread(target=lambda: ends.append(eo.process(order(1))), daemon=True)
    thread.start()
    try:
        assert began.wait(20)
        yield
    finally:
        may_end.set()
        thread.join(20)
    assert ends == [P]


@pytest.mark.parametrize("way", [ALONE, IN_A_BATCH, IN_A_LIST], ids=str)
def test_a_copy_that_waits_longer_than_the_limit_is_in_progress(limited: Shop, way: Way) -> None:
    shop = limited
    way.handles(shop, lambda session, no: put(session, str(no)), retry=THREE)
    assert way.deliver(shop, [order(7)]) == [P]  # the connection was used before
    with another_runs(shop):
        for attempt in (2, 3, 4):
            assert way.deliver(shop, [order(1, attempt=attempt)]) == [BUSY]
        assert way.deliver(shop, [order(1), order(2), order(3)])[0] is BUSY
    assert shop.failures() == []
    assert way.deliver(shop, [order(1, attempt=5)]) == [Outcome.DUPLICATE]
    shop.borrow()


@pytest.fixture(params=GROUNDS, ids="-".join)
def roomy(request: pytest.FixtureRequest) -> Iterator[Shop]:
    """The same with several connections, all of which the limit is on."""
    dialect, colour = request.param
    args: dict[str, Any] = (
        {"options": "-c statement_timeout=300"} if dialect == "postgres" else {"init_command": LIMITS[dialect]}
    )
    yield from shops(request, dialect, colour, pool_size=4, options={"connect_args": args})


@contextmanager
def row_is_locked(shop: Shop) -> Iterator[None]:
    """While somebody holds the row of a lease itself."""
    t = shop.tables.idempotent
    with shop.outside.connect() as connection:
        connection.execute(select(t.c.status).where(t.c.business_key == "1").with_for_update())
        yield


@pytest.mark.parametrize("way", [ALONE, IN_A_BATCH, IN_A_LIST, UNDER_A_LEASE], ids=str)
def test_a_limit_that_every_connection_has_is_met_once(roomy: Shop, way: Way) -> None:
    """It is the role's, and nobody left it there: each connection of the pool in turn was tried and closed."""
    shop = roomy
    made: list[int] = []
    way.handles(shop, lambda session, no: put(session, str(no)), retry=THREE)
    _fill(shop, 4)
    assert way.deliver(shop, [order(7)]) == [P]
    if way.lease:
        assert way.deliver(shop, [order(1)]) == [P]
    for _ in range(4):
        way.deliver(shop, [order(7)])  # each connection is prepared
    for engine in (shop.engine, shop.async_engine.sync_engine):
        event.listen(engine, "connect", lambda *_: made.append(1))
    with row_is_locked(shop) if way.lease else another_runs(shop):
        began = monotonic()
        # the lease is completed, and PostgreSQL reads that beside the lock
        seen = Outcome.DUPLICATE if way.lease and shop.dialect == "postgres" else BUSY
        assert way.deliver(shop, [order(1, attempt=2)]) == [seen]
        assert monotonic() - began < 1.5
    assert made == []
    assert shop.failures() == []
    shop.borrow()


@pytest.mark.parametrize("way", [ALONE, IN_A_BATCH, IN_A_LIST], ids=str)
@pytest.mark.parametrize("colour", COLOURS)
def test_a_limit_that_a_listener_sets_for_each_transaction_is_met_once(
    request: pytest.FixtureRequest, way: Way, colour: str
) -> None:
    made: list[int] = []
    for shop in shops(request, "postgres", colour, pool_size=3):
        for engine in (shop.engine, shop.async_engine.sync_engine):
            event.listen(engine, "begin", lambda c: c.exec_driver_sql("SET LOCAL statement_timeout = 300"))
        way.handles(shop, lambda session, no: put(session, str(no)), retry=THREE)
        assert way.deliver(shop, [order(7)]) == [P]
        for engine in (shop.engine, shop.async_engine.sync_engine):
            event.listen(engine, "connect", lambda *_: made.append(1))
        with another_runs(shop):
            assert way.deliver(shop, [order(1, attempt=2)]) == [BUSY]
        assert made == []
        assert shop.failures() == []
        shop.borrow()


LOCKS = {
    "postgres": ("LOCK TABLE message_failure IN ACCESS EXCLUSIVE MODE", {"options": "-c lock_timeout=100"}),
    "mariadb": ("LOCK TABLES message_failure WRITE", {"init_command": "SET SESSION lock_wait_timeout = 1"}),
    "sqlite": ("BEGIN IMMEDIATE", {"timeout": 0.1}),
}


@pytest.fixture(params=[(dialect, colour) for dialect in LOCKS for colour in COLOURS], ids=" ".join)
def short_waits(request: pytest.FixtureRequest) -> Iterator[Shop]:
    """Its connections wait for a lock for a tenth of a second, or a second."""
    for shop in shops(request, *request.param, pool_size=3):
        options: dict[str, Any] = {"pool_size": 3, "connect_args": LOCKS[shop.dialect][1]}
        engine, async_engine = (
            create_engine(shop.engine.url, **options),
            create_async_engine(shop.async_engine.url, **options),
        )
        shop.fresh_eo(engine, async_engine)
        yield shop
        engine.dispose()
        shop.await_(async_engine.dispose())


def test_what_fails_while_somebody_has_the_table_of_failures_is_written_whole_or_not_at_all(
    short_waits: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text in ASCII, for a database that takes no other, has another ordering key: the next message would pass this one."""
    shop, record, tries = short_waits, FailureStore.record, count(1)
    other = shop.outside.connect()

    def let_go() -> None:
        if not other.closed:
            other.rollback()
            if shop.dialect == "mariadb":
                other.exec_driver_sql("UNLOCK TABLES")
            other.close()

    def recorded(self: Any, session: Session, *more: Any) -> Any:
        if (tried := next(tries)) == 1:
            other.exec_driver_sql(LOCKS[shop.dialect][0])
        elif tried == 6:
            let_go()
        return record(self, session, *more)

    monkeypatch.setattr(FailureStore, "record", recorded)
    failing = [True]

    def do(session: Session, no: Any) -> None:
        if failing:
            raise ValueError("no stock")
        put(session, str(no))

    ALONE.handles(shop, do, ordered=True, retry=Retry(immediate=0, delays=[60]))
    try:
        assert shop.process(order(1, ordering_key="café")) in (Outcome.FAILED, Outcome.WAITING)
    finally:
        let_go()
    assert [(row.ordering_key, row.body) for row in shop.failures()] in ([], [("café", order(1).body)])
    assert shop.process(order(1, attempt=2, ordering_key="café")) is Outcome.FAILED
    assert [(row.ordering_key, row.body) for row in shop.failures()] == [("café", order(1).body)]
    failing.clear()
    assert shop.process(order(2, ordering_key="café")) is Outcome.WAITING
    assert shop.process(order(1, attempt=3, ordering_key="café")) is P
    assert shop.process(order(2, attempt=2, ordering_key="café")) is P


def _fill(shop: Shop, connections: int) -> None:
    """Open so many connections, and give them back."""

    async def fill() -> None:
        for each in [await shop.async_engine.connect() for _ in range(connections)]:
            await each.close()

    if shop.is_async:
        shop.await_(fill())
    else:
        for each in [shop.engine.connect() for _ in range(connections)]:
            each.close()


def test_a_claim_of_the_callers_says_in_progress_and_keeps_what_they_did(limited: Shop) -> None:
    shop = limited

    def do(session: Session) -> None:
        put(session, "before")
        with pytest.raises(InProgress):
            shop.eo.claim(session, "handler", "1")
        session.commit()

    with another_runs(shop):
        if shop.is_async:

            async def run() -> None:
                async with AsyncSession(shop.async_engine) as session:
                    await session.run_sync(do)

            shop.await_(run())
        else:
            with Session(shop.engine) as session:
                do(session)
    assert shop.effects() == ["before"]


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("way", [ALONE, IN_A_BATCH, UNDER_A_LEASE], ids=str)
def test_a_handler_whose_transaction_stands_still_too_long_is_counted_once_and_its_neighbours_run(
    request: pytest.FixtureRequest, way: Way, colour: str
) -> None:
    """PostgreSQL ends the connection then. Run again at once, the handler would only wait for the other service again."""
    limit = {"connect_args": {"options": "-c idle_in_transaction_session_timeout=200ms"}}
    for shop in shops(request, "postgres", colour, options=limit, pool_size=2):
        waits = [True]

        def do(session: Session, no: Any, shop: Shop = shop, waits: list[bool] = waits) -> None:
            put(session, f"{no}")
            if no == 1 and waits[0]:
                pid = session.execute(text("SELECT pg_backend_pid()")).scalar_one()
                until(lambda: not backend_is_there(shop, pid), "the server ends the connection")
                put(session, "too late")

        way.handles(shop, do, retry=THREE)
        assert way.deliver(shop, [order(1), order(2)]) == [Outcome.FAILED, P]
        row = shop.failure()
        assert (row.attempts, shop.effects()) == (1, ["2"])
        assert "25P03" in row.error_text
        waits[0] = False
        assert way.deliver(shop, [order(1, attempt=2)]) == [P]
        assert (sorted(shop.effects()), shop.failure().state) == (["1", "2"], "resolved")
        shop.borrow()


def backend_is_there(shop: Shop, pid: int) -> bool:
    with shop.outside.connect() as connection:
        look = text("SELECT count(*) FROM pg_stat_activity WHERE pid = :pid")
        return bool(connection.execute(look, {"pid": pid}).scalar_one())
