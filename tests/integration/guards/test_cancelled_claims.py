"""A claim that is cut off while the server works on it: its connection is not used again, and the pool has its place back.

The kind: a timeout around the application's call, a task that is cancelled, Ctrl-C, in a statement of ours that SQLAlchemy knows
nothing of. Nobody knows what such a connection is in the middle of, and its ROLLBACK may raise.
"""

import asyncio
import gc
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only, greenlet_spawn

from exactly_once import Message, Outcome
from exactly_once.guards import transaction
from tests.integration.batches import run_together
from tests.integration.shop import DIALECTS, Shop, order, put, shops
from tests.integration.ways import ALONE, IN_A_BATCH, IN_A_LIST, IN_A_STEP, UNDER_A_LEASE, Way

CUT_OFF_S = 0.2
"""By then the claim waits; it would wait longer than that."""


@pytest.fixture(scope="module", params=DIALECTS)
def ground(request: pytest.FixtureRequest) -> Iterator[Shop]:
    """With one connection: an attempt that keeps it stops all the others."""
    yield from shops(request, request.param, "async", options={"pool_timeout": 1})


@contextmanager
def held_up(shop: Shop) -> Iterator[None]:
    """Nobody can write a claim meanwhile."""
    table = shop.tables.idempotent.name
    lock = {
        "postgres": f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE",
        "mariadb": f"LOCK TABLES {table} WRITE",
        "sqlite": "BEGIN IMMEDIATE",
    }
    with shop.outside.connect() as connection:
        connection.execute(text(lock[shop.dialect]))
        yield
        connection.rollback()
        if shop.dialect == "mariadb":
            connection.execute(text("UNLOCK TABLES"))


def cut_off(shop: Shop, begin: Callable[[], Coroutine[Any, Any, object]]) -> None:
    """Let this begin, and cancel it while its claim waits; nothing is collected meanwhile that would hide a leak."""

    async def timed() -> None:
        async with asyncio.timeout(CUT_OFF_S):
            await begin()

    with held_up(shop):
        gc.disable()
        try:
            with pytest.raises(TimeoutError):
                shop.await_(timed())
            assert shop.async_engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        finally:
            gc.enable()


def leave(error: BaseException) -> None:
    """As a worker does that is told to stop."""
    raise error


@pytest.mark.nightly(meet=1)
@pytest.mark.parametrize("way", [ALONE, IN_A_BATCH, IN_A_LIST, UNDER_A_LEASE], ids=str)
def test_a_claim_that_is_cut_off_gives_its_place_in_the_pool_back(
    shop: Shop, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transaction, "_BATCH_WAIT_MS", 5000)  # as long as one alone waits
    way.handles(shop, lambda session, no: put(session, f"{no} did"))

    async def begin(messages: list[Message]) -> None:
        if way.together:
            await greenlet_spawn(run_together(shop, messages), leave=leave)
        else:
            await shop.eo.aprocess(messages[0])

    # the second one is on a connection that is known already: what is cut off is the claim, not the first look
    for no in (1, 2, 3):
        cut_off(shop, lambda: begin([order(1), order(2), order(3)]))
        assert way.deliver(shop, [order(f"{no} neighbour")]) == [Outcome.PROCESSED]
    if not way.lease:  # a lease's claim may be carried out all the same, when the server comes to it
        assert way.deliver(shop, [order(1), order(2), order(3)]) == [Outcome.PROCESSED] * 3
        assert sorted(shop.effects()) == sorted(f"{no}{more} did" for no in (1, 2, 3) for more in ("", " neighbour"))


def test_a_callers_claim_that_is_cut_off_is_not_committed_by_a_caller_who_goes_on(shop: Shop) -> None:
    """A caller who swallows the timeout believes that the key is not theirs, and commits what is left."""

    async def goes_on() -> None:
        async with AsyncSession(shop.async_engine) as session:
            with held_up(shop), pytest.raises(TimeoutError):
                async with asyncio.timeout(CUT_OFF_S):
                    await session.run_sync(lambda given: shop.eo.claim(given, "handler", "A-1"))
            with pytest.raises(InvalidRequestError):  # "Can't reconnect until invalid transaction is rolled back"
                await session.run_sync(put, "without a claim")

    shop.await_(goes_on())
    assert (shop.effects(), shop.claims()) == ([], [])
    shop.borrow()


MINUTES = (
    "WITH RECURSIVE counted (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM counted WHERE n < 100000000)"
    " SELECT count(*) FROM counted"
)


@pytest.mark.parametrize("ground", ["sqlite"], indirect=True)
@pytest.mark.parametrize("way", [ALONE, IN_A_BATCH, IN_A_LIST, UNDER_A_LEASE, IN_A_STEP], ids=str)
def test_a_statement_that_a_handler_cuts_off_keeps_the_file_from_nobody(shop: Shop, way: Way) -> None:
    """aiosqlite's thread goes on with what nobody waits for any more, in a transaction that excludes all others."""

    def do(session: Session, no: object) -> None:
        async def limited() -> None:
            async with asyncio.timeout(CUT_OFF_S):
                await greenlet_spawn(session.execute, text(MINUTES))

        if no == "long":
            await_only(limited())
        put(session, f"{no} did")

    way.handles(shop, do)
    assert way.deliver(shop, [order("long")]) == [Outcome.FAILED]
    assert shop.failure().error_class == "TimeoutError"
    assert way.deliver(shop, [order("neighbour")]) == [Outcome.PROCESSED]
    shop.assert_kept("neighbour did", claims=["long", "neighbour"] if way.lease else ["neighbour"])
