"""Handlers under leases that are not in their own database: Redis, another database; and the plain lock as a guard."""

from collections.abc import Callable, Iterator
from datetime import timedelta
from threading import Event, Thread
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from exactly_once import Alert, AsyncSteps, ConfigurationError, ExactlyOnce, Lease, Lock, Outcome, Steps
from exactly_once.database.server_clock import utcnow
from exactly_once.failures.decisions import Chosen, discard
from exactly_once.guards.lease.redis import key_of
from exactly_once.redis.connection import RedisConnection
from exactly_once.testing.conformance.leases import message as claim_row
from tests.integration.shop import COLOURS, DIALECTS, GROUP, ONE_TRY, Shop, order, put, shops
from tests.services.redis import Redis
from tests.waiting import until


@pytest.fixture(scope="module", params=COLOURS)
def ground(request: pytest.FixtureRequest) -> Iterator[Shop]:
    yield from shops(request, "postgres", request.param, pool_size=4)


def register(shop: Shop, do: Callable[[Session, Any], object], guard: Any, **more: Any) -> None:
    """Register do(session, steps) in the shop's colour."""
    options: dict[str, Any] = {"name": "handler", "key": "no", "retry": ONE_TRY, "guard": guard} | more
    if shop.is_async:

        @shop.eo.handler("orders", **options)
        async def awaited(session: AsyncSession, steps: AsyncSteps) -> None:
            await steps.run("first", lambda key: session.run_sync(lambda sync: None))
            await session.run_sync(lambda sync: do(sync, steps))
    else:

        @shop.eo.handler("orders", **options)
        def plain(session: Session, steps: Steps) -> None:
            steps.run("first", lambda key: None)
            do(session, steps)


def in_redis(url: str, lease_s: float = 30) -> Lease:
    return Lease(timedelta(seconds=lease_s), store=url)


def test_leases_in_redis_run_a_message_once(shop: Shop, redis_url: str) -> None:
    register(shop, lambda session, steps: put(session, "done"), in_redis(redis_url))
    assert [shop.process(order()) for _ in range(3)] == [Outcome.PROCESSED, Outcome.DUPLICATE, Outcome.DUPLICATE]
    assert shop.effects() == ["done"]
    assert shop.claims() == ["A-1"]  # the mark beside the effects


def test_a_message_takes_two_commands_of_redis(shop: Shop, redis_server: Redis, redis_url: str) -> None:
    options: dict[str, Any] = {"name": "handler", "key": "no", "guard": in_redis(redis_url)}
    if shop.is_async:

        @shop.eo.handler("orders", **options)
        async def awaited(session: AsyncSession) -> None:
            await session.run_sync(put, "done")
    else:

        @shop.eo.handler("orders", **options)
        def plain(session: Session) -> None:
            put(session, "done")

    shop.process(order("warm"))  # connects, and makes the scripts known
    redis_server.tell("CONFIG", "RESETSTAT")
    assert shop.process(order("A-2")) is Outcome.PROCESSED
    connection = RedisConnection(redis_url)
    (sent,) = [
        line
        for line in connection.command("INFO", "commandstats").decode().splitlines()
        if line.startswith("cmdstat_evalsha")
    ]
    connection.close()
    assert "calls=2," in sent


def test_a_message_is_kept_in_redis_for_the_retention(shop: Shop, redis_server: Redis, redis_url: str) -> None:
    guard = Lease(timedelta(seconds=30), store=redis_url, retention=timedelta(hours=1))
    register(shop, lambda session, steps: None, guard)
    assert shop.process(order()) is Outcome.PROCESSED
    connection = RedisConnection(redis_url)
    (key,) = connection.command("KEYS", "exactly_once:*")
    assert 3_500_000 < connection.command("PTTL", key) <= 3_600_000
    connection.close()


def test_a_transaction_step_is_exactly_once_also_with_the_lease_in_redis(shop: Shop, redis_url: str) -> None:
    runs: list[int] = []

    if shop.is_async:

        @shop.eo.handler("orders", name="handler", key="no", retry=ONE_TRY, guard=in_redis(redis_url))
        async def awaited(steps: AsyncSteps) -> None:
            await steps.transaction("create", lambda session: session.run_sync(put, "created"))
            runs.append(1)
            if len(runs) == 1:
                raise ValueError("no")
    else:

        @shop.eo.handler("orders", name="handler", key="no", retry=ONE_TRY, guard=in_redis(redis_url))
        def plain(steps: Steps) -> None:
            steps.transaction("create", lambda session: put(session, "created"))
            runs.append(1)
            if len(runs) == 1:
                raise ValueError("no")

    assert shop.process(order()) is Outcome.FAILED
    # as if the process had died between the commit and the word to Redis
    connection = RedisConnection(redis_url)
    (key,) = connection.command("KEYS", "exactly_once:*")
    connection.command("HDEL", key.decode(), "step:create")
    connection.close()
    assert shop.process(order(attempt=2)) is Outcome.PROCESSED
    assert shop.effects() == ["created"]


def test_a_discarded_message_does_not_run_as_another_copy(shop: Shop, redis_url: str) -> None:
    ran: list[int] = []

    def do(session: Session, steps: Any) -> None:
        ran.append(1)
        raise ValueError("no")

    register(shop, do, in_redis(redis_url))
    assert shop.process(order()) is Outcome.FAILED
    with shop.outside.begin() as connection:
        assert discard(connection, shop.tables, Chosen(group=GROUP, key="A-1"), by="me", why=None) == 1
    assert shop.process(order()) is Outcome.DUPLICATE
    assert ran == [1]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("when", ["between two steps", "in a step"])
def test_what_is_discarded_while_its_copy_runs_has_no_further_effect(
    request: pytest.FixtureRequest, redis_url: str, dialect: str, when: str
) -> None:
    """The person was told that it is discarded, and may do it by hand."""
    for shop in shops(request, dialect, "sync", pool_size=4):
        fails = [True]

        def discarded(shop: Shop = shop) -> None:
            with shop.outside.begin() as connection:
                chosen = Chosen(group=GROUP, key="A-1")
                assert discard(connection, shop.tables, chosen, by="me", why=None) == 1

        def handle(
            session: Session, steps: Steps, fails: list[bool] = fails, do: Callable[[], None] = discarded
        ) -> None:
            if fails[0]:
                raise ValueError("no")
            if when == "between two steps":
                steps.transaction("one", lambda session: put(session, "one"))
                do()
            else:
                do()  # a step's own transaction has not begun: SQLite has one writer
            steps.transaction("two", lambda session: put(session, "two"))
            steps.transaction("three", lambda session: put(session, "three"))

        shop.eo.handler("orders", name="handler", key="no", retry=ONE_TRY, guard=in_redis(redis_url))(handle)
        assert shop.process(order()) is Outcome.FAILED
        fails[0] = False
        assert shop.process(order(attempt=2)) is Outcome.IN_PROGRESS
        assert shop.effects() == (["one"] if when == "between two steps" else [])
        assert shop.failure().state == "discarded"
        assert shop.process(order(attempt=3)) is Outcome.DUPLICATE  # its lease was let go of
        shop.borrow()


def test_a_message_discarded_before_it_was_ever_claimed_does_not_run_as_another_copy(
    shop: Shop, redis_url: str
) -> None:
    ran: list[int] = []
    register(shop, lambda session, steps: ran.append(1), in_redis(redis_url), fingerprint=None)
    with shop.outside.begin() as connection:  # a copy whose body could not be read, settled by a person
        connection.execute(
            shop.tables.idempotent.insert().values(
                consumer_group=GROUP,
                handler="handler",
                business_key="A-1",
                status=1,
                fingerprint=b"",
                created_at=utcnow(),
            )
        )
    assert [shop.process(order()) for _ in range(2)] == [Outcome.DUPLICATE, Outcome.DUPLICATE]
    assert ran == []


def test_a_failure_is_closed_when_another_copy_is_processed(shop: Shop, redis_url: str) -> None:
    ran: list[int] = []

    def do(session: Session, steps: Any) -> None:
        ran.append(1)
        if len(ran) == 1:
            raise ValueError("no")

    register(shop, do, in_redis(redis_url))
    assert shop.process(order()) is Outcome.FAILED
    again = ExactlyOnce(
        shop.engine, async_database=shop.async_engine, group=GROUP
    )  # another process: it knows of nothing
    shop.eo = again
    register(shop, do, in_redis(redis_url))
    assert shop.process(order()) is Outcome.PROCESSED
    assert shop.failure().state == "resolved"


def test_redis_away_at_the_claim_runs_nothing_and_at_the_end_acknowledges_nothing(shop: Shop, own_redis: Redis) -> None:
    ran: list[str] = []

    def do(session: Session, steps: Any) -> None:
        ran.append("run")
        own_redis.kill()

    register(shop, do, in_redis(own_redis.url, lease_s=2))
    assert shop.process(order()) is Outcome.WAITING
    assert ran == ["run"]
    assert shop.process(order()) is Outcome.WAITING
    assert ran == ["run"]
    own_redis.start()
    connection = RedisConnection(own_redis.url)
    row = claim_row()
    assert connection.command("HGET", key_of(type(row)(GROUP, "handler", "A-1", b"")), "status") == b"0"
    connection.close()


def test_a_completion_is_insisted_on_while_redis_restarts(shop: Shop, own_redis: Redis) -> None:
    def do(session: Session, steps: Any) -> None:
        put(session, "done")
        own_redis.kill()
        Thread(target=lambda: (Event().wait(0.5), own_redis.start())).start()

    register(shop, do, in_redis(own_redis.url))
    assert shop.process(order()) is Outcome.PROCESSED
    assert shop.process(order()) is Outcome.DUPLICATE
    assert shop.effects() == ["done"]


def test_leases_in_another_database(shop: Shop, sqlite_url: str) -> None:
    register(shop, lambda session, steps: put(session, "done"), Lease(timedelta(seconds=30), store=sqlite_url))
    assert [shop.process(order()) for _ in range(2)] == [Outcome.PROCESSED, Outcome.DUPLICATE]
    assert shop.effects() == ["done"]
    assert shop.claims() == ["A-1"]  # the mark beside the effects
    if shop.is_async:
        (store,) = shop.eo.leases._databases.values()
        shop.await_(store.async_engine.dispose())
    shop.eo.leases.close()


def test_a_run_past_its_max_run_is_not_renewed_and_a_person_is_told(shop: Shop, redis_url: str) -> None:
    alerts: list[Alert] = []
    shop.eo = ExactlyOnce(shop.engine, async_database=shop.async_engine, group=GROUP, alert=alerts.append)
    seconds = timedelta(seconds=1)

    def do(session: Session, steps: Any) -> None:
        until(lambda: bool(alerts))
        connection = RedisConnection(redis_url)
        (key,) = connection.command("KEYS", "exactly_once:*")

        def over() -> bool:
            now, _ = connection.command("TIME")
            return int(now) * 1000 > int(connection.command("HGET", key.decode(), "until"))

        until(over)
        connection.close()

    register(shop, do, Lease(seconds, store=redis_url, max_run=2 * seconds))
    shop.process(order())
    (alert,) = alerts
    assert (alert.what, alert.handler, alert.key) == ("overrun", "handler", "A-1")


def test_a_message_kept_for_a_person_raises_an_alert_once(shop: Shop, redis_url: str) -> None:
    alerts: list[Alert] = []

    def hook(alert: Alert) -> None:
        alerts.append(alert)
        raise ValueError("the pager is away")

    shop.eo = ExactlyOnce(shop.engine, async_database=shop.async_engine, group=GROUP, alert=hook)

    def do(session: Session, steps: Any) -> None:
        raise KeyError("bug")

    register(shop, do, in_redis(redis_url), retry=ONE_TRY.__class__(immediate=0, max_attempts=1))
    assert shop.process(order()) is Outcome.DEAD
    (alert,) = alerts
    assert (alert.what, alert.key) == ("parked", "A-1")


def test_a_lock_keeps_runs_apart_and_remembers_nothing(shop: Shop, redis_url: str) -> None:
    options: dict[str, Any] = {
        "name": "handler",
        "key": "no",
        "guard": Lock(timedelta(seconds=30), store=redis_url, wait=timedelta(0)),
    }
    inside: list[Outcome] = []
    other = ExactlyOnce(shop.outside, group=GROUP)

    @other.handler("orders", **options)
    def second(session: Session) -> None:
        put(session, "second")

    def do(session: Session) -> None:
        put(session, "first")
        inside.append(other.process(order()))

    if shop.is_async:

        @shop.eo.handler("orders", **options)
        async def awaited(session: AsyncSession) -> None:
            await session.run_sync(do)
    else:

        @shop.eo.handler("orders", **options)
        def plain(session: Session) -> None:
            do(session)

    assert shop.process(order()) is Outcome.PROCESSED
    assert inside == [Outcome.IN_PROGRESS]
    assert other.process(order()) is Outcome.PROCESSED
    assert shop.effects() == ["first", "second"]


def test_what_cannot_be_is_refused_before_the_first_message() -> None:
    eo = ExactlyOnce("sqlite:///nowhere.db", group=GROUP)
    with pytest.raises(ConfigurationError, match="asks for steps"):

        @eo.handler("orders", key="no")
        def one(steps: Steps) -> None: ...

    with pytest.raises(ConfigurationError, match="steps: AsyncSteps"):

        @eo.handler("orders", key="no", guard=Lease(timedelta(seconds=30)))
        async def two(steps: Steps) -> None: ...

    with pytest.raises(ConfigurationError, match="call it"):

        @eo.handler("orders", key="no", guard=Lease)  # type: ignore[arg-type]
        def three(session: Session) -> None: ...

    for wrong in (timedelta(0), timedelta(days=90), 30):
        with pytest.raises(ConfigurationError, match="give a timedelta"):
            Lease(wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="max_run"):
        Lease(timedelta(minutes=10), max_run=timedelta(minutes=1))
    with pytest.raises(ConfigurationError) as told:
        Lease(timedelta(minutes=10), store="user:secret@host")
    assert "secret" not in str(told.value)
    assert "secret" not in repr(Lease(timedelta(minutes=10), store="redis://:secret@host"))

    @eo.handler("orders", key="no", guard=Lease(timedelta(seconds=30), store="redis"))
    def four(session: Session) -> None: ...

    with pytest.raises(ConfigurationError, match="EXACTLY_ONCE_REDIS"):
        eo.process(order())
