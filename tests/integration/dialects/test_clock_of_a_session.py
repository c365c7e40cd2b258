"""MariaDB: the clock of a pooled session was set (`SET timestamp`, as imports and tests do), and no time of ours goes by it.

The kind: the server's time is asked for, and the session answers with its own. A lease that runs looks as if it were over, or one
that was just taken does; a retry is due in years. Left by other code of the program, or where no listener sees it, in the driver.
"""

import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import NullPool, create_engine, select
from sqlalchemy.orm import Session

from exactly_once import ExactlyOnce, Lease, Outcome, Retry, Transaction
from tests.integration.grounds import ground_on
from tests.integration.outside import by_other_code
from tests.integration.shop import COLOURS, GROUP, Shop, order, put
from tests.integration.ways import ALONE, UNDER_A_LEASE, WAYS, Way, one_by_one
from tests.services.mariadb import MYSQLD
from tests.waiting import until

pytestmark = pytest.mark.nightly(meet=2)

P, D, F = Outcome.PROCESSED, Outcome.DUPLICATE, Outcome.FAILED
each_way = pytest.mark.parametrize("way", WAYS, ids=str)

SET = {"past": "SET timestamp = 946684800", "future": "SET timestamp = 2145916800"}
each_clock = pytest.mark.parametrize("clock", SET)


@pytest.fixture(params=COLOURS)
def mariadb(request: pytest.FixtureRequest) -> Iterator[Shop]:
    yield from ground_on(request, "mariadb", request.param)


def in_the_driver(shop: Shop, statement: str) -> None:
    """On the pool's connection, past SQLAlchemy."""

    def send(dbapi: Any) -> None:
        cursor = dbapi.cursor()
        cursor.execute(statement)
        cursor.close()

    async def by_await() -> None:
        async with shop.async_engine.connect() as connection:
            await connection.run_sync(lambda each: send(each.connection))

    if shop.is_async:
        shop.await_(by_await())
    with shop.engine.connect() as connection:  # the pump's, and the renewal's
        send(connection.connection)


LEFT_BY: dict[str, Callable[[Shop, str], None]] = {"other code": by_other_code, "the driver": in_the_driver}
each_left = pytest.mark.parametrize("left", LEFT_BY)


def elsewhere(shop: Shop) -> ExactlyOnce:
    """The same handler in another process, whose sessions nobody has touched."""
    eo = ExactlyOnce(create_engine(shop.url, poolclass=NullPool), group=GROUP)

    @eo.handler("orders", name="handler", key="no", guard=Lease(timedelta(seconds=30)), retry=Retry(immediate=0))
    def handler(session: Session, body: dict[str, Any]) -> None:
        put(session, "second call")

    return eo


@each_clock
@each_left
@pytest.mark.parametrize("first", ["here", "elsewhere"])
def test_a_lease_that_runs_is_not_over(mariadb: Shop, clock: str, left: str, first: str) -> None:
    """Taken on such a session and looked at from elsewhere; and the other way round."""
    told: list[Outcome] = []
    other = elsewhere(mariadb)

    def do(session: Session, no: Any) -> None:
        put(session, "call")
        if no == 2:
            thread = threading.Thread(target=lambda: told.append(other.process(order(2))))
            thread.start()
            thread.join()

    UNDER_A_LEASE.handles(mariadb, do)
    assert one_by_one(mariadb, UNDER_A_LEASE, [1]) == [P]
    if first == "here":
        LEFT_BY[left](mariadb, SET[clock])
        assert one_by_one(mariadb, UNDER_A_LEASE, [2]) == [P]
        assert told == [Outcome.IN_PROGRESS]
        assert mariadb.effects() == ["call", "call"]
        return
    claims = mariadb.tables.idempotent
    with mariadb.outside.begin() as connection:  # a lease of another process, which runs
        row = connection.execute(select(claims)).one()._asdict()
        ends = {"lease_until": datetime.now(UTC) + timedelta(seconds=30), "token": "another's", "status": 0}
        connection.execute(claims.insert().values(row | ends | {"business_key": "2", "consumed_at": None}))
    fingerprint = _fingerprint_of(mariadb)
    with mariadb.outside.begin() as connection:
        connection.execute(claims.update().where(claims.c.business_key == "2").values(fingerprint=fingerprint))
    LEFT_BY[left](mariadb, SET[clock])
    assert one_by_one(mariadb, UNDER_A_LEASE, [2]) == [Outcome.IN_PROGRESS]
    assert mariadb.effects() == ["call"]


def _fingerprint_of(shop: Shop) -> bytes:
    """Of message 2, as a handler of the same kind writes it."""
    claims = shop.tables.idempotent
    eo = ExactlyOnce(create_engine(shop.url, poolclass=NullPool), group="probe")

    @eo.handler("orders", name="handler", key="no")
    def handler(session: Session, body: dict[str, Any]) -> None: ...

    assert eo.process(order(2)) is P
    with shop.outside.connect() as connection:
        found: bytes = connection.execute(
            select(claims.c.fingerprint).where(claims.c.consumer_group == "probe")
        ).scalar_one()
    return found


@each_way
@each_clock
@each_left
def test_what_is_written_down_has_the_servers_time(mariadb: Shop, way: Way, clock: str, left: str) -> None:
    if MYSQLD and left == "the driver" and not way.lease:
        pytest.skip("MySQL has no compound statement: only leases and failures look at the clock there")

    def do(session: Session, no: Any) -> None:
        put(session, str(no))
        if no == 3:
            raise ZeroDivisionError

    way.handles(mariadb, do)
    assert one_by_one(mariadb, way, [1]) == [P]
    LEFT_BY[left](mariadb, SET[clock])
    assert one_by_one(mariadb, way, [2]) == [P]
    LEFT_BY[left](mariadb, SET[clock])
    assert one_by_one(mariadb, way, [3]) == [F]
    claims = mariadb.tables.idempotent
    with mariadb.outside.connect() as connection:
        times = connection.execute(select(claims.c.created_at)).scalars().all()
    assert [each for each in (*times, mariadb.failure().last_failed_at) if not _now(each)] == []


def _now(at: datetime) -> bool:
    return abs(datetime.now(UTC) - at) < timedelta(minutes=5)


@each_clock
@each_left
@pytest.mark.parametrize("guard", [Transaction(), Lease(timedelta(seconds=3))], ids=["alone", "renewed"])
def test_a_retry_is_due_when_it_is_and_a_lease_is_renewed(mariadb: Shop, clock: str, left: str, guard: Any) -> None:
    """On the sessions of the pump and of the renewal, too."""
    ran: list[str] = []

    def do(session: Session, no: Any) -> None:
        ran.append(str(no))
        if len(ran) == 1:
            raise ZeroDivisionError
        if no == 2 and isinstance(guard, Lease):
            LEFT_BY[left](mariadb, SET[clock]) if not mariadb.is_async else None
            threading.Event().wait(5)
            with mariadb.outside.connect() as connection:
                claims = mariadb.tables.idempotent
                until = connection.execute(
                    select(claims.c.lease_until).where(claims.c.business_key == "2")
                ).scalar_one()
                assert _now(until)
                assert until > datetime.now(UTC)
        put(session, str(no))

    ALONE.handles(mariadb, do, guard=guard, retry=Retry(immediate=0, max_attempts=5))
    LEFT_BY[left](mariadb, SET[clock])
    name = f"memory://clock-{clock}-{left}-{mariadb.colour}-{type(guard).__name__}".replace(" ", "")
    with mariadb.eo.worker(name, concurrency=1), mariadb.eo.producer(name) as producer:
        producer.send(order(1))
        until(lambda: mariadb.effects() == ["1"], "the retry has run")
        producer.send(order(2))
        until(lambda: mariadb.effects() == ["1", "2"], "the second has run")
    assert ran == ["1", "1", "2"]
