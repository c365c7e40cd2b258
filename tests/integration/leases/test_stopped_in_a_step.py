"""A task that is cancelled, or a program that exits, inside a step whose transaction ends *broken*: written down, then raised on.

MariaDB: a procedure that commits, or one that is cut off in the middle, of which nobody can say whether it had committed.
"""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from exactly_once import Outcome
from tests.integration.shop import COLOURS, Shop, order, put, shops
from tests.integration.ways import IN_A_STEP, UNDER_A_LEASE, Way, cancel_this_task, driver_of, mariadb_procedures
from tests.waiting import until

each_way = pytest.mark.parametrize("way", [UNDER_A_LEASE, IN_A_STEP], ids=str)


@pytest.fixture(scope="module", params=COLOURS)
def ground(request: pytest.FixtureRequest) -> Iterator[Shop]:
    for shop in shops(request, "mariadb", request.param, pool_size=3):
        mariadb_procedures(
            shop,
            sleeps="() BEGIN DO SLEEP(20); END",
            commits="() BEGIN INSERT INTO effect (text) VALUES ('by it'); COMMIT; END",
        )
        yield shop


@pytest.fixture
def shop(ground: Shop) -> Shop:
    ground.clear()
    return ground


@each_way
def test_behind_a_hidden_commit_the_stop_is_raised_on(shop: Shop, way: Way) -> None:
    def do(session: Session, no: Any) -> None:
        put(session, "before")
        driver_of(session).cursor().execute("CALL commits()")
        if shop.is_async:
            cancel_this_task()
        raise SystemExit(3)

    way.handles(shop, do)
    with pytest.raises(asyncio.CancelledError if shop.is_async else SystemExit):
        shop.process(order(1))
    assert "COMMIT" in shop.failure().error_text
    assert shop.process(order(1, attempt=2)) is Outcome.DUPLICATE  # kept for a person


@each_way
def test_a_call_that_a_cancellation_cuts_off_is_told_and_the_task_ends(shop: Shop, way: Way) -> None:
    if not shop.is_async:
        pytest.skip("a thread is not cancelled")

    def do(session: Session, no: Any) -> None:
        session.execute(text("CALL sleeps()"))

    def sleeps() -> int:
        look = "SELECT count(*) FROM information_schema.processlist WHERE info LIKE 'DO SLEEP%%'"
        with shop.outside.connect() as connection:
            return int(connection.exec_driver_sql(look).scalar_one())

    async def cancelled() -> None:
        task = asyncio.ensure_future(shop.eo.aprocess(order(1)))
        await asyncio.to_thread(until, sleeps, "it sleeps")
        task.cancel()
        await task

    way.handles(shop, do)
    with pytest.raises(asyncio.CancelledError):
        shop.await_(cancelled())
    assert "A procedure was called" in shop.failure().error_text
