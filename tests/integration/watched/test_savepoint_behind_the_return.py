"""A savepoint that something else ends between the handler's return and COMMIT: its effects would be missing, and nobody told.

The kind: an async generator that holds `begin_nested()` is left by `break`. The event loop closes it in a task of its own, which
rolls the savepoint back while something of ours is awaited behind the handler.
"""

from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from exactly_once import AsyncSteps, Lease, Outcome, Retry
from tests.integration.shop import DIALECTS, EFFECT, Shop, order, put, shops

TWICE = Retry(immediate=0, delays=[0.01], max_attempts=5)


@pytest.fixture(scope="module", params=DIALECTS)
def ground(request: pytest.FixtureRequest) -> Iterator[Shop]:
    yield from shops(request, request.param, "async", pool_size=3)


@pytest.fixture
def shop(ground: Shop) -> Shop:
    ground.clear()
    return ground


async def lines(session: AsyncSession) -> AsyncIterator[int]:
    async with session.begin_nested():
        for number in range(3):
            yield number


async def leaves_by_break(session: AsyncSession) -> None:
    await session.execute(insert(EFFECT).values(text="one"))
    async for _ in lines(session):
        await session.execute(insert(EFFECT).values(text="two"))
        break


def whole(shop: Shop, outcome: Outcome) -> None:
    done = outcome.acknowledge and outcome is not Outcome.DEAD
    assert (done, sorted(shop.effects())) in [(True, ["one", "two"]), (False, [])], shop.failures()


@pytest.mark.parametrize("kind", ["alone", "under a lease", "in a step"])
@pytest.mark.parametrize("delivery", [1, 2], ids=["first", "behind a failure"])
def test_all_of_its_effects_are_there_or_none(shop: Shop, kind: str, delivery: int) -> None:
    fails = [delivery == 2]

    def failing() -> None:
        if fails.pop():
            fails.append(False)
            raise ValueError("the first time")
        fails.append(False)

    more: dict[str, Any] = {"key": "no", "retry": TWICE, "name": "handler"}
    if kind in ("under a lease", "in a step"):
        more["guard"] = Lease(timedelta(seconds=30))
    if kind == "in a step":

        @shop.eo.handler("orders", **more)
        async def stepping(session: AsyncSession, steps: AsyncSteps) -> None:
            failing()
            await steps.transaction("work", leaves_by_break)

    else:

        @shop.eo.handler("orders", **more)
        async def handler(session: AsyncSession) -> None:
            failing()
            await leaves_by_break(session)

    outcome = shop.process(order())
    if delivery == 2:
        assert outcome is Outcome.FAILED
        outcome = shop.process(order(attempt=2))
    whole(shop, outcome)


def test_a_savepoint_that_a_handler_leaves_open_is_committed_with_the_rest(shop: Shop) -> None:
    """A library that never ends its savepoint; nothing ended it, so nothing is missing."""

    def do(session: Session) -> None:
        put(session, "one")
        session.begin_nested()
        put(session, "two")

    shop.handles(do, retry=TWICE)
    assert shop.process(order()) is Outcome.PROCESSED
    assert sorted(shop.effects()) == ["one", "two"]
