"""Exceptions that come together, as a TaskGroup raises them: each is told, and the group counts as one of them.

The kind: what is decided by an exception's class (a Reject, a RetryLater, a class of `retry=`, a deadlock, a store that is away,
a cancellation) is decided the same when it comes inside a group, whichever way the handler runs.
"""

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from exactly_once import ExactlyOnce, Lease, Outcome, Reject, Retry, RetryLater, StepError, Steps
from tests.integration.failing import Panic
from tests.integration.grounds import ground
from tests.integration.shop import COLOURS, GROUP, ONLY, Shop, on, order, put, shops
from tests.integration.ways import ALONE, IN_A_BATCH, IN_A_LIST, UNDER_A_LEASE, Way, by_itself, each_way, thrice
from tests.waiting import until

__all__ = ["ground"]

pytestmark = pytest.mark.nightly(meet=2)
P, F, DEAD, W = Outcome.PROCESSED, Outcome.FAILED, Outcome.DEAD, Outcome.WAITING
THREE = Retry(immediate=0, delays=[0.01], max_attempts=3)
TASKS = "unhandled errors in a TaskGroup"


def together(*errors: BaseException) -> BaseException:
    return BaseExceptionGroup(TASKS, list(errors))


def raising(make: Callable[[], BaseException], runs: list[Any]) -> Callable[[Session, Any], None]:
    def do(session: Session, no: Any) -> None:
        runs.append(no)
        put(session, "undone")
        raise make()

    return do


@each_way
def test_the_row_the_log_and_the_reason_tell_what_a_group_is_made_of(
    shop: Shop, way: Way, caplog: pytest.LogCaptureFixture
) -> None:
    def group() -> BaseException:
        deep = ExceptionGroup("inside", [ConnectionError("the price service says 503"), KeyError("weight")])
        return together(ValueError("no stock of sku A"), deep)

    way.handles(shop, raising(group, []), retry=Retry(immediate=0, max_attempts=1))
    with caplog.at_level(logging.WARNING, logger="exactly_once"):
        way.attempted(shop, [order(1)])
    reasons = [record.getMessage() for record in caplog.records]
    row = shop.failure()
    assert row.error_class == "ExceptionGroup"
    assert row.error_text.startswith(f"{TASKS} (2 sub-exceptions): ")
    for told in (row.error_text, *reasons):
        for said in (
            "ValueError: no stock of sku A",
            "ConnectionError: the price service says 503",
            "KeyError: 'weight'",
        ):
            assert said in told
    assert len(reasons) == 2


def test_what_is_told_of_a_large_group_is_bounded_and_says_how_much_is_left_out(shop: Shop) -> None:
    def group() -> BaseException:
        large: BaseException = together(*(ValueError(f"number {n} " + "x" * 10_000) for n in range(1000)))
        for _ in range(5000):
            large = BaseExceptionGroup("g", [large])
        return large

    ALONE.handles(shop, raising(group, []), retry=THREE)
    assert shop.process(order(1)) is F
    told = shop.failure().error_text
    assert "number 0 " in told
    assert "and 990 more" in told
    assert len(told) <= 4000


class Counts:
    """What a group is to count as: how often it runs, how it ends, what the reason says."""

    def __init__(self, runs: int, end: Outcome, reason: str = "", *, delay: str = "") -> None:
        self.runs, self.end, self.reason, self.delay = runs, end, reason, delay


LATER = timedelta(seconds=77)
RULE: dict[str, tuple[Callable[[], Sequence[BaseException]], Counts]] = {
    "a Reject": (lambda: [Reject("no such article")], Counts(1, DEAD, "rejected by the handler: no such article")),
    "two": (lambda: [Reject("no such article"), Reject("no")], Counts(1, DEAD, "rejected by the handler: ")),
    "in a group": (lambda: [together(Reject("no"))], Counts(1, DEAD, "rejected by the handler: no")),
    "a StepError": (lambda: [StepError("not known", "charge")], Counts(1, DEAD, "not known")),
    "a Reject and an error": (lambda: [Reject("no"), ValueError("other")], Counts(3, F, delay="broker+5s")),
    "an error and a Reject": (lambda: [ValueError("other"), Reject("no")], Counts(3, F, delay="broker+5s")),
    "a RetryLater": (lambda: [RetryLater(LATER)], Counts(1, F, delay="broker+77s")),
    "the later of two": (
        lambda: [RetryLater(), RetryLater(LATER), RetryLater(LATER / 7)],
        Counts(1, F, delay="broker+77s"),
    ),
    "and an error": (lambda: [ValueError("x"), RetryLater(LATER)], Counts(1, F, delay="broker+77s")),
    "and a Reject": (lambda: [Reject("x"), RetryLater(LATER)], Counts(1, F, delay="broker+77s")),
    "one of a class": (
        lambda: [LookupError("x")],
        Counts(1, DEAD, "failed once, of 1 allowed; the last error was Exc"),
    ),
    "of a class and of none": (lambda: [LookupError("x"), ValueError("y")], Counts(3, F, delay="broker+5s")),
    "of none and of a class": (lambda: [ValueError("y"), LookupError("x")], Counts(3, F, delay="broker+5s")),
}


@each_way
@pytest.mark.parametrize("case", RULE)
def test_a_group_counts_as_that_of_its_exceptions_which_keeps_most(
    shop: Shop, way: Way, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    made, counts = RULE[case]
    runs: list[Any] = []
    policy = {LookupError: Retry(immediate=0, max_attempts=1), Exception: Retry(immediate=2, delays=[5])}
    way.handles(shop, raising(lambda: together(*made()), runs), retry=policy)
    with caplog.at_level(logging.WARNING, logger="exactly_once"):
        (end,) = way.attempted(shop, [order(1)])
    assert end is counts.end
    assert len(runs) == counts.runs  # of a group of one none is tried in company first
    log = "\n".join(record.getMessage() for record in caplog.records)
    assert counts.reason in log
    assert counts.delay in log
    assert shop.effects() == []


def test_a_policy_for_groups_themselves_holds(shop: Shop) -> None:
    policy = {ExceptionGroup: Retry(immediate=0, max_attempts=1), Exception: Retry(immediate=0)}
    ALONE.handles(shop, raising(lambda: together(ValueError("x")), []), retry=policy)
    assert shop.process(order(1)) is DEAD


def deadlock(shop: Shop) -> Callable[[Session], None]:
    """What the server says to the victim of a deadlock; of SQLite, that another writes."""

    def do(session: Session) -> None:
        match shop.dialect:
            case "postgres":
                raised = "DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '40P01', MESSAGE = 'deadlock detected'; END $$"
                session.execute(text(raised))
            case "mariadb":
                # 1205 of the statement alone: the transaction stands, and nobody but the exception tells of it
                session.execute(text("SIGNAL SQLSTATE 'HY000' SET MYSQL_ERRNO = 1205, MESSAGE_TEXT = 'lock wait'"))
            case _:
                path = session.get_bind().url.database  # type: ignore[union-attr]
                with closing(sqlite3.connect(path or "", timeout=0)) as other:
                    other.execute("INSERT INTO effect (text) VALUES ('x')")

    return do


@each_way
def test_a_deadlock_in_a_group_is_tried_again_at_once_as_it_is_alone(shop: Shop, way: Way) -> None:
    runs: list[Any] = []
    victim = deadlock(shop)

    def do(session: Session, no: Any) -> None:
        runs.append(no)
        put(session, str(no))
        if len(runs) < 3:
            try:
                victim(session)
            except Exception as error:
                raise ExceptionGroup(TASKS, [ExceptionGroup("inside", [error])]) from None
            raise AssertionError("no deadlock")

    way.handles(shop, do, retry=THREE)
    assert way.attempted(shop, [order(1)]) == [P]
    assert (shop.effects(), shop.failures()) == (["1"], [])


@by_itself
def test_a_deadlock_beside_another_error_is_a_failure(shop: Shop, way: Way) -> None:
    runs: list[Any] = []
    victim = deadlock(shop)

    def do(session: Session, no: Any) -> None:
        runs.append(no)
        put(session, "undone")
        try:
            victim(session)
        except Exception as error:
            raise ExceptionGroup(TASKS, [error, ValueError("no stock")]) from None

    way.handles(shop, do, retry=THREE)
    assert way.attempted(shop, [order(1)]) == [F]
    assert len(runs) == 1
    assert "no stock" in shop.failure().error_text


@on("postgres", colour="sync")  # the server sees all other such waits, or there is one writer
def test_a_step_that_waits_in_a_group_for_the_handlers_own_session_is_told_so(shop: Shop) -> None:
    @shop.eo.handler("orders", key="no", name="handler", guard=Lease(timedelta(seconds=30)), retry=THREE)
    def handle(session: Session, body: dict[str, Any], steps: Steps) -> None:
        def work(other: Session) -> None:
            try:
                other.execute(insert(ONLY).values(text="one"))
            except Exception as error:
                raise ExceptionGroup(TASKS, [error]) from None

        session.execute(insert(ONLY).values(text="one"))
        steps.transaction("step", work)

    assert shop.process(order(1)) is F
    assert (shop.failure().error_class, "they are two transactions" in shop.failure().error_text) == ("Misuse", True)


@pytest.fixture(params=COLOURS)
def narrow(request: pytest.FixtureRequest) -> Iterator[Shop]:
    """A pool of one, which nobody waits for."""
    yield from shops(request, "postgres", request.param, options={"pool_timeout": 0.1})


@pytest.mark.parametrize("way", [ALONE, IN_A_BATCH, IN_A_LIST], ids=str)
def test_a_store_that_is_away_in_a_group_is_waited_for(narrow: Shop, way: Way) -> None:
    async def ask(engine: AsyncEngine) -> None:
        async with engine.connect() as connection:
            await connection.execute(select(1))

    def do(session: Session, no: Any) -> None:
        put(session, "undone")
        try:
            if narrow.is_async:
                await_only(ask(narrow.async_engine))
            else:
                narrow.engine.connect()
        except Exception as error:
            raise ExceptionGroup(TASKS, [error]) from None

    way.handles(narrow, do, retry=THREE)
    assert thrice(narrow, way) == [W] * 3
    assert narrow.failures() == []


@by_itself
def test_a_group_of_cancellations_that_nobody_asked_for_is_counted_and_not_raised_on(shop: Shop, way: Way) -> None:
    """The caller's own task would pass for cancelled, as by a CancelledError alone."""
    way.handles(shop, raising(lambda: together(asyncio.CancelledError(), ValueError("x")), []), retry=THREE)
    assert thrice(shop, way) == [F, F, DEAD]


@by_itself
def test_a_group_with_what_is_no_exception_is_raised_on_when_it_is_written_down(shop: Shop, way: Way) -> None:
    way.handles(shop, raising(lambda: together(ValueError("x"), Panic("overflow")), []), retry=THREE)
    ends = thrice(shop, way)
    assert [type(end) for end in ends[:2]] == [BaseExceptionGroup] * 2
    assert ends[2] is DEAD
    assert "Panic: overflow" in shop.failure().error_text


@pytest.mark.parametrize("way", [ALONE, UNDER_A_LEASE, IN_A_BATCH], ids=str)
@on(colour="async")  # a plain handler has no tasks
def test_a_task_group_in_a_worker_rejects_and_asks_for_later(shop: Shop, way: Way) -> None:
    runs: list[int] = []
    options: dict[str, Any] = {"guard": Lease(timedelta(seconds=30))} if way.lease else {}
    options |= {"batch": 10} if way.together else {}
    shop.eo = ExactlyOnce(async_database=shop.async_engine.url, database=shop.url, group=GROUP)

    @shop.eo.handler("orders", key="no", name="handler", retry=THREE, **options)
    async def handle(session: AsyncSession, body: dict[str, Any]) -> None:
        no = body["no"]
        runs.append(no)

        async def task() -> None:
            if no == 1:
                raise Reject("no such article")
            if runs.count(2) < 3:
                raise RetryLater(timedelta(milliseconds=10))
            await session.run_sync(put, "2")

        async with asyncio.TaskGroup() as group:
            group.create_task(task())

    url = f"memory://groups-{shop.dialect}-{way.name.replace(' ', '-')}"
    with shop.eo.producer(url) as producer:
        producer.send_all([order(no) for no in (1, 2)])  # before the worker is there: it receives both at once
    with shop.eo.worker(url, concurrency=1) as worker:
        until(lambda: worker.counts.acked == 2, "both are acknowledged")
    assert shop.effects() == ["2"]
    assert {row.business_key: row.state for row in shop.failures()} == {"1": "dead", "2": "resolved"}
    # in company, and then alone. A batch begins with what is there: the first may have been alone from the start
    assert runs.count(1) in ((1, 2) if way.together else (1,))
