"""What stands of a transaction under a lease, and who finds it: schedules that lost or doubled a message, found by attack.

A hidden commit under a lease leaves a trace, a mark or an unfinished claim. Whoever claims the message next must find it:
another guard, a Redis that forgot, a process that came after one that was killed at the worst line. And whoever only waits,
deletes old rows or swallows an error must neither be taken for it nor be kept from working.
"""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from exactly_once import AsyncSteps, Lease, Lock, Outcome, Steps, Transaction
from exactly_once.processing.processor import Processor
from exactly_once.transports.contract import Features
from tests.integration.shop import ONE_TRY, Shop, order, put, shops
from tests.integration.ways import ALONE, IN_A_STEP, UNDER_A_LEASE, Way, driver_of, mariadb_procedures, requeued
from tests.services.redis import Redis

ROOT = Path(__file__).parents[3]
P, F, DEAD = Outcome.PROCESSED, Outcome.FAILED, Outcome.DEAD
SHORT, LONG = timedelta(seconds=1), timedelta(seconds=30)

CHILD = """
import os, signal, sys
from contextlib import suppress
from datetime import timedelta
from sqlalchemy import text
from exactly_once import Lease
from exactly_once.processing.recording import Recording
from tests.integration.shop import Shop, order, put
from tests.integration.ways import WAYS
url, name, where, redis = sys.argv[1:]
(way,) = (each for each in WAYS if each.name == name)
def die(*a, **k):
    os.kill(os.getpid(), signal.SIGKILL)
if where == "record":
    Recording.record = die  # killed at this line: behind the release, before the failure row
def do(session, no):
    put(session, f"{no} before")
    with suppress(Exception if where != "record" else ()):
        session.execute(text("CALL begins()"))
    die()
shop = Shop("mariadb", "sync", url, pool_size=3)
way.handles(shop, do, **({"guard": Lease(timedelta(seconds=1), store=redis or None)} if way.lease else {}))
way.deliver(shop, [order(3)])
"""


@contextmanager
def on(request: pytest.FixtureRequest, dialect: str, colour: str = "sync", **options: Any) -> Iterator[Shop]:
    for shop in shops(request, dialect, colour, pool_size=4, options={"pool_use_lifo": True} | options):
        if dialect == "mariadb":
            mariadb_procedures(shop, begins="() BEGIN START TRANSACTION; INSERT INTO staging VALUES (1); END")
        yield shop


def killed(shop: Shop, way: Way, where: str, redis: str = "") -> None:
    """A process runs message 3 and dies: behind a hidden commit, or at that line."""
    command = [sys.executable, "-c", CHILD, shop.url, way.name, where, redis]
    ended = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60, check=False)
    assert ended.returncode == -signal.SIGKILL


def states(shop: Shop) -> list[str]:
    return [row.state for row in shop.failures()]


def by_a_mended_program(shop: Shop, way: Way, guard: Any) -> None:
    """Deliver until acknowledged; then nothing is doubled, and what is half there has its row."""

    def do(session: Session, no: Any) -> None:
        put(session, f"{no} before")
        put(session, f"{no} after")

    way.handles(shop, do, guard=guard)
    for _ in range(40):
        end = shop.process(order(3, attempt=2))
        if end.acknowledge:
            break
        time.sleep(0.1)
    effects = Counter(shop.effects())
    assert effects["3 before"] <= 1, (end, effects)
    assert "broken" in states(shop) or effects["3 after"] == 1, (end, effects)


# -- a hidden commit, and who finds it ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tries", [1, 2])
def test_a_step_that_hid_a_commit_is_broken_although_the_handler_swallows_it(
    request: pytest.FixtureRequest, tries: int
) -> None:
    with on(request, "mariadb") as shop:
        runs: list[int] = []

        @shop.eo.handler("orders", name="handler", key="no", retry=ONE_TRY, guard=Lease(LONG))
        def handler(steps: Steps) -> None:
            def work(session: Session) -> None:
                runs.append(1)
                put(session, "before")
                if len(runs) == 1:
                    cursor = driver_of(session).cursor()
                    cursor.execute("CALL begins()")
                    cursor.close()
                put(session, "after")

            for _ in range(tries):
                with suppress(Exception):
                    steps.transaction("step", work)
                    break

        shop.process(order(3))
        assert states(shop) == ["broken"]
        assert shop.effects() == ["before"]


@pytest.mark.parametrize("way", [ALONE, UNDER_A_LEASE, IN_A_STEP], ids=str)
def test_a_process_killed_before_it_could_write_down_that_it_is_broken(
    request: pytest.FixtureRequest, way: Way
) -> None:
    with on(request, "mariadb") as shop:
        killed(shop, way, "record")
        by_a_mended_program(shop, way, Lease(SHORT) if way.lease else Transaction())


@pytest.mark.parametrize("change", ["own->transaction", "own->redis", "redis forgot"])
def test_what_a_dead_run_had_committed_is_found_after_the_guard_was_changed(
    request: pytest.FixtureRequest, own_redis: Redis, change: str
) -> None:
    with on(request, "mariadb") as shop:
        killed(shop, UNDER_A_LEASE, "handler", own_redis.url if change == "redis forgot" else "")
        time.sleep(SHORT.total_seconds())
        if change == "redis forgot":
            own_redis.tell("FLUSHALL")
        guard = Transaction() if change == "own->transaction" else Lease(SHORT, store=own_redis.url)
        by_a_mended_program(shop, UNDER_A_LEASE, guard)


@pytest.mark.parametrize("after", ["own", "own->transaction", "own->redis"])
def test_a_trace_is_found_although_somebody_has_it_locked(
    request: pytest.FixtureRequest, redis_url: str, after: str
) -> None:
    """As a DELETE of old steps has, which reads them all."""
    with on(request, "mariadb") as shop:
        killed(shop, UNDER_A_LEASE, "handler")
        time.sleep(SHORT.total_seconds())
        redis = Lease(SHORT, store=redis_url)
        guard = {"own": Lease(SHORT), "own->transaction": Transaction(), "own->redis": redis}[after]
        with shop.outside.connect() as keeper:
            keeper.execute(text("SELECT * FROM message_step WHERE consumer_group = 'shop' FOR UPDATE"))
            by_a_mended_program(shop, UNDER_A_LEASE, guard)
            keeper.rollback()


def test_a_message_whose_deliveries_are_used_up_is_broken_and_not_only_dead(request: pytest.FixtureRequest) -> None:
    with on(request, "mariadb") as shop:
        killed(shop, UNDER_A_LEASE, "handler")
        UNDER_A_LEASE.handles(shop, lambda session, no: None, guard=Lease(SHORT))
        (plan,), (store,) = shop.eo.plans, shop.eo.stores.values()
        features = Features(redelivers=True, counts_attempts=True, max_attempts=16)
        Processor(plan, store, "shop", leases=shop.eo.leases).run(order(3, attempt=16), features)
        assert states(shop) == ["broken"]


@pytest.mark.parametrize("dialect", ["postgres", "sqlite", "mariadb"])
@pytest.mark.parametrize("colour", ["sync", "async"])
def test_a_broken_step_is_written_down_although_the_handler_is_stopped_behind_it(
    request: pytest.FixtureRequest, dialect: str, colour: str
) -> None:
    with on(request, dialect, colour) as shop:
        runs: list[int] = []

        def work(session: Session) -> None:
            runs.append(1)
            put(session, "before")
            if len(runs) == 1:
                driver_of(session).commit()
            put(session, "after")

        options: dict[str, Any] = {"name": "handler", "key": "no", "retry": ONE_TRY, "guard": Lease(LONG)}
        if colour == "async":

            @shop.eo.handler("orders", **options)
            async def awaited(steps: AsyncSteps) -> None:
                try:
                    await steps.transaction("step", lambda session: session.run_sync(work))
                finally:
                    if len(runs) == 1:  # the worker is told to stop while this is cleaning up
                        task = asyncio.current_task()
                        assert task is not None
                        task.cancel()
                        await asyncio.sleep(0)
        else:

            @shop.eo.handler("orders", **options)
            def plain(steps: Steps) -> None:
                try:
                    steps.transaction("step", work)
                finally:
                    if len(runs) == 1:
                        raise SystemExit(3)

        with pytest.raises((SystemExit, asyncio.CancelledError)):
            shop.process(order(3))
        shop.process(order(3, attempt=2))
        assert states(shop) == ["broken"]
        assert shop.effects() == ["before"]


# -- a session that could not begin -----------------------------------------------------------------------------------------


def test_a_first_statement_that_waited_too_long_loses_nothing_of_what_follows(request: pytest.FixtureRequest) -> None:
    with on(request, "mariadb") as shop:
        blocker = shop.outside.connect()  # as a DELETE of old steps does
        blocker.execute(text("SELECT * FROM message_step WHERE consumer_group = 'shop' FOR UPDATE"))
        errors: list[Exception] = []

        def do(session: Session, no: Any) -> None:
            try:
                put(session, "3 audit")
            except Exception as error:
                errors.append(error)
                blocker.rollback()
            put(session, "3 real")

        UNDER_A_LEASE.handles(shop, do, guard=Lease(LONG))
        end = shop.process(order(3))
        blocker.close()
        assert errors
        assert end is not P or "3 real" in shop.effects()


@pytest.mark.parametrize("guard", ["lease", "lock"])
def test_a_first_statement_that_the_handler_times_out_loses_nothing_of_what_follows(
    request: pytest.FixtureRequest, guard: str, redis_url: str
) -> None:
    with on(request, "postgres", "async") as shop:
        shop.fresh_eo(redis=redis_url)
        wanted = Lease(LONG) if guard == "lease" else Lock(LONG)

        @shop.eo.handler("orders", name="handler", key="no", retry=ONE_TRY, guard=wanted)
        async def handler(session: AsyncSession, body: dict[str, Any]) -> None:
            if body["no"] == 3:
                with suppress(TimeoutError):
                    async with asyncio.timeout(0):
                        await session.execute(text("INSERT INTO effect (text) VALUES ('audit')"))
            await session.execute(text("INSERT INTO effect (text) VALUES (:no)"), {"no": str(body["no"])})

        ends = [shop.process(order(no)) for no in (1, 3)]
        assert ends[1] is not P or "3" in shop.effects(), ends


# -- a row that is no mark ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["postgres", "mariadb", "sqlite"])
def test_leases_moved_to_redis_run_what_had_failed_before(
    request: pytest.FixtureRequest, dialect: str, redis_url: str
) -> None:
    with on(request, dialect) as shop:
        fails = [True]

        def do(session: Session, no: Any) -> None:
            put(session, str(no))
            if fails:
                raise ZeroDivisionError

        name = f"handler-{os.urandom(4).hex()}"
        UNDER_A_LEASE.handles(shop, do, guard=Lease(SHORT), name=name)
        assert shop.process(order(3)) is F
        fails.clear()
        shop.fresh_eo()
        UNDER_A_LEASE.handles(shop, do, guard=Lease(SHORT, store=redis_url), name=name)
        assert shop.process(order(3, attempt=2)) is P
        assert shop.effects() == ["3"]


def test_a_mark_that_was_committed_by_something_else_runs_again_once_requeued(
    request: pytest.FixtureRequest, redis_url: str
) -> None:
    with on(request, "mariadb") as shop:
        runs: list[int] = []

        def do(session: Session, no: Any) -> None:
            runs.append(1)
            put(session, f"run {len(runs)}")
            if len(runs) == 1:
                event.listen(session, "before_commit", lambda session: session.execute(text("CALL begins()")))

        name = f"handler-{os.urandom(4).hex()}"
        UNDER_A_LEASE.handles(shop, do, guard=Lease(LONG, store=redis_url), name=name)
        assert shop.process(order(3)) is DEAD
        requeued(shop, [shop.failure().id])
        assert shop.process(order(3, attempt=2)) is P
        assert shop.effects() == ["run 1", "run 2"]


# -- what only waits ----------------------------------------------------------------------------------------------------------


def _beside(shop: Shop, lease: Lease, meanwhile: Callable[[], Any]) -> Any:
    """While a handler is in its transaction, for at most 8 s."""
    inside, go = threading.Event(), threading.Event()

    def do(session: Session, no: Any) -> None:
        put(session, f"{no}")
        if no == 3 and not inside.is_set():
            inside.set()
            go.wait(8)

    UNDER_A_LEASE.handles(shop, do, guard=lease)
    thread = threading.Thread(target=shop.process, args=(order(3),))
    thread.start()
    assert inside.wait(10)
    try:
        return meanwhile()
    finally:
        go.set()
        thread.join()


@pytest.mark.parametrize("level", ["READ UNCOMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_a_transaction_that_is_open_is_neither_waited_for_nor_taken_for_a_committed_one(
    request: pytest.FixtureRequest, level: str
) -> None:
    with on(request, "mariadb", isolation_level=level) as shop:

        def copies() -> tuple[Outcome, float, Outcome]:
            began = time.monotonic()
            first = shop.process(order(3, attempt=2))
            took_s = time.monotonic() - began
            time.sleep(2.2)  # the first one's lease has run out; it hangs, and is alive
            return first, took_s, shop.process(order(3, attempt=3))

        first, took_s, second = _beside(shop, Lease(SHORT, max_run=SHORT), copies)
        assert first is Outcome.IN_PROGRESS
        assert took_s < 5
        assert second is P
        assert states(shop) == []
        assert shop.effects() == ["3"]


def test_a_delete_of_old_steps_does_not_keep_other_handlers_waiting_beyond_the_bound(
    request: pytest.FixtureRequest,
) -> None:
    with on(request, "mariadb") as shop:

        def retention() -> None:
            with suppress(Exception), shop.outside.begin() as connection:
                connection.exec_driver_sql("SET SESSION innodb_lock_wait_timeout = 6")
                connection.exec_driver_sql(
                    "DELETE FROM message_step WHERE created_at < UTC_TIMESTAMP() - INTERVAL 30 DAY LIMIT 10000"
                )

        def others() -> Outcome:
            keeper = threading.Thread(target=retention)
            keeper.start()
            time.sleep(0.5)
            end = shop.process(order(1))
            keeper.join()
            return end

        assert _beside(shop, Lease(LONG), others) is P
