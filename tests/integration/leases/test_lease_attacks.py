"""Schedules of events that broke a promise of the leases once, each on real servers."""
# ruff: noqa: B023  (a shop is a generator of one, and its handlers do not outlive its turn)

import asyncio
import os
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from threading import Event, Thread
from time import monotonic
from typing import Any

import pytest
from sqlalchemy import select, text, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from exactly_once import AsyncSteps, ExactlyOnce, Lease, Message, Outcome, Steps, Transaction
from exactly_once.claim import ClaimRow
from exactly_once.database.server_clock import utcnow
from exactly_once.failures import decisions
from exactly_once.guards.lease.renewal import Renewal
from tests.integration.shop import GROUP, ONE_TRY, STOCK, Shop, order, put, shops
from tests.services.proxy import Proxy
from tests.services.redis import Redis
from tests.waiting import until

LEASED: dict[str, Any] = {"name": "handler", "key": "no", "retry": ONE_TRY, "guard": Lease(timedelta(seconds=30))}


def for_seconds(seconds: float, **more: Any) -> Lease:
    return Lease(timedelta(seconds=seconds), **more)


@pytest.fixture
def shop(request: pytest.FixtureRequest) -> Iterator[Shop]:
    yield from shops(request, "postgres", "sync", pool_size=4)


@pytest.fixture
def ashop(request: pytest.FixtureRequest) -> Iterator[Shop]:
    yield from shops(request, "postgres", "async", pool_size=4)


def renewal_of(shop: Shop) -> Renewal:
    (renewal,) = shop.eo.leases._renewals.values()
    return renewal


def counted(renewal: Renewal) -> list[float]:
    """A list that grows with each renewal from now on."""
    calls: list[float] = []
    real: Any = renewal.store.renew

    def renew(held: Any) -> Any:
        calls.append(monotonic())
        return real(held)

    renewal.store.renew = renew  # type: ignore[method-assign]
    return calls


def beside(do: Any) -> Thread:
    thread = Thread(target=do, daemon=True)
    thread.start()
    return thread


# -- pools ----------------------------------------------------------------------------------------------------------------


def test_handlers_that_hold_every_connection_of_a_pool_do_not_wait_for_each_others_steps(
    request: pytest.FixtureRequest,
) -> None:
    for shop in shops(request, "postgres", "async", pool_size=2, options={"pool_timeout": 1}):

        @shop.eo.handler("orders", **LEASED | {"guard": for_seconds(2)})
        async def handler(session: AsyncSession, steps: AsyncSteps) -> None:
            await session.run_sync(put, "x")
            await asyncio.sleep(0.2)  # the other one has its connection, too
            await steps.run("a", lambda key: session.run_sync(lambda sync: 1))

        async def two() -> list[Outcome]:
            runs = [asyncio.create_task(shop.eo.aprocess(order(no))) for no in ("A", "B")]
            done, pending = await asyncio.wait(runs, timeout=20)
            for run in pending:
                run.cancel()
            assert not pending
            return [run.result() for run in done]

        assert set(shop.await_(two())) <= {Outcome.PROCESSED, Outcome.WAITING}


def test_a_full_pool_keeps_no_lease_from_being_renewed(request: pytest.FixtureRequest) -> None:
    for shop in shops(request, "postgres", "sync", pool_size=2, options={"pool_timeout": 1}):
        options = LEASED | {"guard": for_seconds(2)}
        other = ExactlyOnce(shop.outside, group=GROUP)
        began, may_end = [Event(), Event()], Event()

        @other.handler("orders", **options)
        def second(session: Session) -> None: ...

        @shop.eo.handler("orders", **options)
        def handler(session: Session) -> None:
            put(session, "x")
            began.pop().set()
            assert may_end.wait(20)

        events = list(began)
        outcomes: list[Outcome] = []
        threads = [beside(lambda no=no: outcomes.append(shop.eo.process(order(no)))) for no in ("A", "B")]
        assert all(event.wait(10) for event in events)
        started = monotonic()
        while monotonic() - started < 4:  # two leases long
            assert other.process(order("A")) is Outcome.IN_PROGRESS
        may_end.set()
        for thread in threads:
            thread.join(20)
        assert outcomes == [Outcome.PROCESSED] * 2


# -- cancellation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guard", [for_seconds(2), Transaction()], ids=["lease", "transaction"])
@pytest.mark.parametrize("times", [1, 2, 1000])
def test_however_often_it_is_cancelled_nothing_is_kept(ashop: Shop, guard: Any, times: int) -> None:
    """Scopes of anyio cancel again at each await until the task ends."""
    began: list[int] = []

    @ashop.eo.handler("orders", **LEASED | {"guard": guard})
    async def handler(session: AsyncSession) -> None:
        await session.run_sync(put, "x")
        began.append(1)
        await asyncio.sleep(30)

    async def cancelled() -> None:
        task = asyncio.create_task(ashop.eo.aprocess(order()))
        while not began:
            await asyncio.sleep(0.01)
        left = times
        while not task.done():
            if left:
                task.cancel()
                left -= 1
            await asyncio.sleep(0)
        with suppress(asyncio.CancelledError):
            await task

    ashop.await_(cancelled())
    assert all(not renewal._due for renewal in ashop.eo.leases._renewals.values())
    pool: Any = ashop.async_engine.pool

    async def turn() -> None:
        await asyncio.sleep(0.02)

    def idle() -> bool:
        ashop.await_(turn())
        with ashop.outside.connect() as connection:
            open_ = "state LIKE 'idle in transaction%' AND datname = current_database()"
            count = connection.execute(text(f"SELECT count(*) FROM pg_stat_activity WHERE {open_}")).scalar_one()
        return bool(count == 0 and pool.checkedout() == 0)

    until(idle)
    assert ashop.effects() == []


def test_a_timeout_while_a_step_is_recorded_leaves_the_next_step_alone(ashop: Shop) -> None:
    delay = timedelta(milliseconds=150)
    with Proxy(ashop.url, delay=delay) as proxy, Shop("postgres", "async", proxy.url, pool_size=4) as far:
        calls: list[str] = []

        @far.eo.handler("orders", **LEASED)
        async def handler(session: AsyncSession, steps: AsyncSteps) -> None:
            async def call(key: str) -> None:
                calls.append(key)

            await steps.run("warm", call)
            with suppress(TimeoutError):
                async with asyncio.timeout(0.1):
                    await steps.run("a", call)
            await steps.run("b", call)

        assert far.await_(far.eo.aprocess(order())) is Outcome.PROCESSED
        assert len(calls) == 3


def test_a_handler_that_returns_while_a_step_still_runs_is_not_processed(ashop: Shop) -> None:
    @ashop.eo.handler("orders", **LEASED)
    async def handler(session: AsyncSession, steps: AsyncSteps) -> None:
        async def slow(key: str) -> None:
            await asyncio.sleep(0.5)

        async def bad() -> None:
            raise ValueError("no")

        with suppress(ValueError):
            await asyncio.gather(steps.run("a", slow), bad())

    assert ashop.await_(ashop.eo.aprocess(order())) is Outcome.DEAD
    assert "The step 'a' still runs" in ashop.failure().error_text


# -- renewal --------------------------------------------------------------------------------------------------------------


def test_renewal_does_not_spin_while_a_commit_takes_long(shop: Shop) -> None:
    with shop.outside.begin() as connection:
        connection.execute(
            text(
                "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS"
                " $$ BEGIN PERFORM pg_sleep(3); RETURN NULL; END $$"
            )
        )
        connection.execute(
            text(
                "CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON effect DEFERRABLE INITIALLY DEFERRED"
                " FOR EACH ROW EXECUTE FUNCTION slow()"
            )
        )
    calls: list[list[float]] = []

    @shop.eo.handler("orders", **LEASED | {"guard": for_seconds(3)})
    def handler(session: Session) -> None:
        calls.append(counted(renewal_of(shop)))
        put(session, "x")

    assert shop.process(order()) is Outcome.PROCESSED
    assert len(calls[0]) < 20


def test_renewal_does_not_spin_while_redis_is_away_at_the_completion(shop: Shop, own_redis: Redis) -> None:
    calls: list[list[float]] = []

    @shop.eo.handler("orders", **LEASED | {"guard": for_seconds(3, store=own_redis.url)})
    def handler(session: Session) -> None:
        calls.append(counted(renewal_of(shop)))
        own_redis.kill()

    assert shop.process(order()) is Outcome.WAITING
    assert len(calls[0]) < 30


def test_a_slow_alert_hook_keeps_no_lease_from_being_renewed(shop: Shop) -> None:
    called, may_end = Event(), Event()

    def hook(alert: object) -> None:
        called.set()
        assert may_end.wait(20)

    eo = shop.fresh_eo(alert=hook)

    @eo.handler("late", **LEASED | {"name": "late", "guard": for_seconds(1, max_run=timedelta(seconds=1))})
    def late(session: Session) -> None:
        assert may_end.wait(20)

    @eo.handler("orders", **LEASED | {"guard": for_seconds(1)})
    def handler(session: Session) -> None:
        assert may_end.wait(20)

    threads = [beside(lambda message=m: eo.process(message)) for m in (Message("late", b'{"no": "L"}'), order())]
    assert called.wait(10)
    other = ExactlyOnce(shop.outside, group=GROUP)

    @other.handler("orders", **LEASED | {"guard": for_seconds(1)})
    def second(session: Session) -> None: ...

    started = monotonic()
    while monotonic() - started < 3:  # three leases long
        assert other.process(order()) is Outcome.IN_PROGRESS
    may_end.set()
    for thread in threads:
        thread.join(20)


def test_a_forked_process_renews_its_own_leases(shop: Shop) -> None:
    """As under a preloading server: the parent has processed a message, then it forks."""

    @shop.eo.handler("quick", **LEASED | {"name": "quick"})
    def quick(session: Session) -> None: ...

    @shop.eo.handler("orders", **LEASED | {"guard": for_seconds(1)})
    def handler(session: Session) -> None:
        Event().wait(3)

    assert shop.process(Message("quick", b'{"no": "Q"}')) is Outcome.PROCESSED
    child = os.fork()
    if child == 0:
        shop.engine.dispose(close=False)
        try:
            shop.eo.process(order())
        finally:
            os._exit(0)
    t = shop.tables.idempotent
    running = select(t.c.lease_until > utcnow()).where(t.c.business_key == "A-1")
    try:
        seen: list[bool] = []
        started = monotonic()
        while monotonic() - started < 2.5:
            with shop.outside.connect() as connection:
                seen += connection.execute(running).scalars().all()
        assert seen
        assert all(seen)
    finally:
        os.waitpid(child, 0)


def test_a_step_does_not_prolong_a_lease_past_its_max_run(shop: Shop) -> None:
    seen: list[bool] = []

    @shop.eo.handler("orders", **LEASED | {"guard": for_seconds(1, max_run=timedelta(seconds=1))})
    def handler(steps: Steps) -> None:
        t = shop.tables.idempotent
        for n in range(4):
            Event().wait(0.7)
            steps.run(f"step {n}", lambda key: None)
        with shop.outside.connect() as connection:
            seen.extend(connection.execute(select(t.c.lease_until > utcnow())).scalars())

    assert shop.process(order()) is Outcome.PROCESSED
    assert seen == [False]


def test_a_run_that_stood_still_and_still_has_its_lease_is_not_taken_over_in_its_next_step(shop: Shop) -> None:
    """Nobody had taken it over when it woke up: asked whether it still has it, the store prolongs it as well."""
    inside: list[Outcome] = []
    other = ExactlyOnce(shop.outside, group=GROUP)

    @other.handler("orders", **LEASED)
    def second(session: Session) -> None: ...

    @shop.eo.handler("orders", **LEASED)
    def handler(steps: Steps) -> None:
        (held,) = renewal_of(shop)._due
        held.renewed -= 60  # as the clock says after a stop of a minute, before any thread of this process has run
        t = shop.tables.idempotent
        with shop.outside.begin() as connection:
            connection.execute(update(t).values(lease_until=utcnow(-30)))
        steps.run("call", lambda key: inside.append(other.process(order())))

    assert shop.process(order()) is Outcome.PROCESSED
    assert inside == [Outcome.IN_PROGRESS]


# -- steps ----------------------------------------------------------------------------------------------------------------


def test_a_step_that_raised_keeps_its_place(shop: Shop) -> None:
    runs: list[int] = []

    @shop.eo.handler("orders", **LEASED)
    def handler(steps: Steps) -> None:
        runs.append(1)
        try:
            steps.run("primary", lambda key: 1 / 0)
        except ZeroDivisionError:
            steps.run("fallback", lambda key: None)
        if len(runs) == 1:
            raise ValueError("a deadlock, say")

    assert [shop.process(order(attempt=n)) for n in (1, 2)] == [Outcome.FAILED, Outcome.PROCESSED]


def test_an_undecided_step_that_was_swallowed_goes_on_once_a_person_has_resolved_it(shop: Shop) -> None:
    runs: list[int] = []

    @shop.eo.handler("orders", **LEASED | {"fingerprint": None})
    def handler(steps: Steps) -> None:
        runs.append(1)
        with suppress(ZeroDivisionError):
            steps.run("reserve", lambda key: 1 / 0, at_most_once=True)
        steps.run("audit", lambda key: None)
        if len(runs) == 1:
            raise ValueError("later")

    assert [shop.process(order(attempt=n)) for n in (1, 2)] == [Outcome.FAILED, Outcome.DEAD]
    row = ClaimRow(GROUP, "handler", "A-1", b"")
    assert renewal_of(shop).store.resolve(row, "reserve", b"1")
    assert shop.process(order(attempt=3)) is Outcome.PROCESSED


def test_a_step_that_waits_for_its_own_handlers_row_fails_and_does_not_hang(shop: Shop) -> None:
    with shop.outside.begin() as connection:
        connection.execute(STOCK.insert().values(item=1, amount=5))

    @shop.eo.handler("orders", **LEASED)
    def handler(session: Session, steps: Steps) -> None:
        session.execute(update(STOCK).values(amount=4))
        steps.transaction("take", lambda inner: inner.execute(update(STOCK).values(amount=3)) and None)

    assert shop.process(order()) is Outcome.FAILED
    assert shop.failure().error_class == "Misuse"
    assert [row.amount for row in shop.rows(STOCK)] == [5]


def test_on_sqlite_the_session_used_inside_a_step_parks_and_does_not_hang(request: pytest.FixtureRequest) -> None:
    for shop in shops(request, "sqlite", "sync", pool_size=4):

        @shop.eo.handler("orders", **LEASED)
        def handler(session: Session, steps: Steps) -> None:
            steps.run("a", lambda key: put(session, "x"))

        assert shop.process(order()) is Outcome.DEAD
        assert "handler's session" in shop.failure().error_text
        assert shop.effects() == []


def test_a_result_too_large_to_be_kept_parks_and_is_not_sent(shop: Shop) -> None:
    @shop.eo.handler("orders", **LEASED)
    def handler(steps: Steps) -> None:
        steps.run("report", lambda key: "x" * 2**20)

    assert shop.process(order()) is Outcome.DEAD
    assert "at most 1,048,576 are kept" in shop.failure().error_text


@pytest.mark.parametrize("dialect", ["postgres", "mariadb", "sqlite"])
def test_a_requeued_broken_message_repeats_no_finished_step_and_counts_on(
    request: pytest.FixtureRequest, dialect: str
) -> None:
    for shop in shops(request, dialect, "sync", pool_size=3):
        attempts: list[int] = []
        calls: list[str] = []

        @shop.eo.handler("orders", **LEASED)
        def handler(session: Session, steps: Steps) -> None:
            attempts.append(steps.attempt)
            steps.run("charge", calls.append)
            if len(attempts) == 1:
                put(session, "half")
                session.connection().connection.dbapi_connection.commit()

        assert shop.process(order()) is Outcome.DEAD
        failure = shop.failure()
        assert failure.state == "broken"
        with shop.outside.begin() as connection:
            chosen = decisions.Chosen(group=GROUP, ids=[failure.id])
            decisions.requeue(connection, shop.tables, chosen, by="me", why=None, per_second=None)
        assert shop.process(order(attempt=2)) is Outcome.PROCESSED
        assert attempts == [1, 2]
        assert len(calls) == 1
