"""A handler claims keys of its own with `eo.claim`, for the parts of its message, and another run has one of them.

The kind: what `eo.claim` says to a handler is about another run. That is no failure of its message, and a deadlock's victim
runs again at once, whatever the handler makes of the error.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import insert, text
from sqlalchemy.orm import Session
from sqlalchemy.util import greenlet_spawn

from exactly_once import ExactlyOnce, InProgress, Outcome
from tests.integration.batches import run_together
from tests.integration.shop import GROUP, ONE_TRY, STOCK, Shop, on, order, put
from tests.integration.threads import Turn, in_thread
from tests.integration.ways import IN_A_BATCH, IN_A_LIST, WAYS, Way

pytestmark = pytest.mark.nightly(meet=2)

P, D, IN_PROGRESS = Outcome.PROCESSED, Outcome.DUPLICATE, Outcome.IN_PROGRESS


@contextmanager
def held_by_another(shop: Shop) -> Iterator[None]:
    """Another transaction has the part, and may still fail."""
    held, done = Turn(), Turn()

    def other() -> None:
        with Session(shop.outside) as session, session.begin():
            assert ExactlyOnce(group=GROUP).claim(session, "part", "1")
            held.come()
            done.wait()

    with in_thread(other):
        held.wait()
        try:
            yield
        finally:
            done.come()


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("makes", ["lets it out", "goes on"])
@on("postgres", "mariadb")  # SQLite has one writer
def test_a_deadlock_of_claims_runs_its_victim_again_at_once(shop: Shop, way: Way, makes: str) -> None:
    eo = ExactlyOnce(group=GROUP)
    ours, theirs = Turn(), Turn()
    runs: list[Any] = []

    def other() -> None:
        with Session(shop.outside) as session, session.begin():
            if shop.dialect == "postgres":
                session.execute(text("SET LOCAL deadlock_timeout = '60s'"))
            # more work than ours, so that ours is the victim
            session.execute(insert(STOCK), [{"item": item, "amount": 0} for item in range(100, 400)])
            assert eo.claim(session, "part", "2")
            theirs.come()
            ours.wait()
            with suppress(InProgress):
                eo.claim(session, "part", "1")

    def do(session: Session, no: Any) -> None:
        runs.append(no)
        put(session, f"{no} before")
        if len(runs) == 1:
            theirs.wait()
        for part in ("1", "2"):
            try:
                shop.eo.claim(session, "part", part)
            except InProgress:
                if makes == "lets it out":
                    raise
            if len(runs) == 1 and part == "1":
                ours.come()
        put(session, f"{no} after")

    way.handles(shop, do, retry=ONE_TRY)
    with in_thread(other):
        ends = way.deliver(shop, [order(1)])
    # the other one is done by now
    while ends[-1] is IN_PROGRESS:
        ends = way.deliver(shop, [order(1)])
    assert ends == [P]
    assert shop.failures() == []
    assert shop.effects() == ["1 before", "1 after"]
    assert way.deliver(shop, [order(1, attempt=2)]) == [D]
    shop.borrow()


@pytest.mark.parametrize("way", WAYS, ids=str)
@on("postgres", "mariadb")  # SQLite has one writer
def test_a_part_that_another_run_holds_is_no_failure(shop: Shop, way: Way) -> None:
    def do(session: Session, no: Any) -> None:
        put(session, str(no))
        shop.eo.claim(session, "part", "1", claim_wait=timedelta(seconds=0.2))

    way.handles(shop, do, retry=ONE_TRY)
    with held_by_another(shop):
        ends = [end for attempt in (1, 2, 3) for end in way.deliver(shop, [order(1, attempt=attempt)])]
    assert ends == [IN_PROGRESS] * 3
    assert shop.failures() == []
    assert way.deliver(shop, [order(1, attempt=4)]) == [P]
    assert shop.effects() == ["1"]
    shop.borrow()


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_key_of_its_own_message_is_the_handlers_to_do(shop: Shop, way: Way) -> None:
    """As where a loop's `if eo.claim(...):` was moved into a handler: it found its own attempt, and did nothing."""

    def do(session: Session, no: Any) -> None:
        if shop.eo.claim(session, "handler", no):
            put(session, str(no))

    way.handles(shop, do)
    assert way.deliver(shop, [order(1), order(2)]) == [P, P]
    assert way.deliver(shop, [order(1, attempt=2), order(3)]) == [D, P]
    assert sorted(shop.effects()) == ["1", "2", "3"]
    shop.borrow()


@on("postgres", "sqlite")  # MariaDB waits for what its own transaction holds; elsewhere it is seen
def test_the_key_of_another_message_of_the_group_is_not(shop: Shop) -> None:
    won: list[tuple[int, bool]] = []

    def do(session: Session, no: Any) -> None:
        won.append((no, shop.eo.claim(session, "handler", 3 - no)))
        put(session, str(no))

    IN_A_BATCH.handles(shop, do)
    assert IN_A_BATCH.deliver(shop, [order(1), order(2)]) == [P, P]
    assert [each for _, each in won] == [False, False]


@pytest.mark.parametrize("way", [IN_A_BATCH, IN_A_LIST], ids=str)
@on("postgres", "mariadb")  # SQLite has one writer
def test_a_handler_that_waits_for_its_part_keeps_no_other_message_from_its_run(shop: Shop, way: Way) -> None:
    def do(session: Session, no: Any) -> None:
        put(session, str(no))
        if no == 1:
            shop.eo.claim(session, "part", "1", claim_wait=timedelta(seconds=3))

    way.handles(shop, do, retry=ONE_TRY)
    assert way.deliver(shop, [order(5)]) == [P]
    with held_by_another(shop):
        ends = way.deliver(shop, [*(order(no, attempt=2) for no in (1, 2, 3, 4)), order(5, attempt=2)])
    assert ends == [IN_PROGRESS, P, P, P, D]
    assert shop.failures() == []


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("makes", ["lets it out", "goes on"])
def test_the_same_where_the_server_undoes_more_than_a_statement(strict: Shop, way: Way, makes: str) -> None:
    def do(session: Session, no: Any) -> None:
        put(session, str(no))
        try:
            strict.eo.claim(session, "part", "1", claim_wait=timedelta(seconds=1))
        except InProgress:
            if makes == "lets it out":
                raise
        put(session, f"{no} more")

    way.handles(strict, do, retry=ONE_TRY)
    with held_by_another(strict):
        ends = way.deliver(strict, [order(1)])
    assert ends == [IN_PROGRESS]
    assert strict.failures() == []
    assert way.deliver(strict, [order(1, attempt=2)]) == [P]
    assert strict.effects() == ["1", "1 more"]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("raised", [InProgress, ZeroDivisionError])
@on(colour="async")
def test_a_cancellation_behind_what_the_handler_raised_comes_out(shop: Shop, way: Way, raised: type[Exception]) -> None:
    """The loop of the caller's would go on, and take the next message, although it was told to end."""

    def do(session: Session, no: Any) -> None:
        put(session, str(no))
        task = asyncio.current_task()
        assert task is not None
        task.cancel()  # told at the next await, which is our rollback
        raise raised("held")

    way.handles(shop, do, retry=ONE_TRY)

    async def consumes() -> str:
        try:
            if way.together:
                found = await greenlet_spawn(run_together(shop, [order(1), order(2)]))
                assert any(isinstance(each, asyncio.CancelledError) for each in found.results)
                return "cancelled"
            await shop.eo.aprocess(order(1))
        except asyncio.CancelledError:
            return "cancelled"
        return "went on"

    assert shop.await_(consumes()) == "cancelled"
    assert shop.effects() == []
    shop.borrow()
