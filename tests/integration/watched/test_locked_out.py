"""SQLite: a handler with a session of its own waits for its own transaction. It is told so, at once and after one run."""

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import create_engine
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from exactly_once import Outcome, Retry
from tests.integration.shop import COLOURS, Shop, order, put, shops
from tests.integration.ways import ALONE, IN_A_BATCH, IN_A_LIST, UNDER_A_LEASE, Way

SOON = {"connect_args": {"timeout": 0.2}}
TWICE_AT_ONCE = Retry(immediate=2, delays=[0.01], max_attempts=5)


@pytest.fixture(params=COLOURS)
def shop(request: pytest.FixtureRequest) -> Iterator[Shop]:
    yield from shops(request, "sqlite", request.param, pool_size=3, options=SOON)


def elsewhere(shop: Shop, text: str, *, engine: bool) -> None:
    """As with `SessionLocal()` in a handler; or with an engine of the handler's own."""

    async def awaited() -> None:
        async with AsyncSession(shop.async_engine) as own, own.begin():
            await own.run_sync(put, text)

    if engine:
        own = create_engine(shop.url, **SOON)
        try:
            with Session(own) as session, session.begin():
                put(session, text)
        finally:
            own.dispose()
    elif shop.is_async:
        await_only(awaited())
    else:
        with Session(shop.engine) as session, session.begin():
            put(session, text)


@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize("way", [ALONE, IN_A_BATCH, IN_A_LIST], ids=str)
def test_a_handler_that_waits_for_itself_is_told_after_one_run(shop: Shop, way: Way, engine: bool) -> None:
    runs: list[Any] = []

    def do(session: Session, no: Any) -> None:
        put(session, f"{no}")
        if no == 2:
            runs.append(no)
            elsewhere(shop, "elsewhere", engine=engine)

    way.handles(shop, do, retry=TWICE_AT_ONCE)
    assert way.deliver(shop, [order(no) for no in (1, 2, 3)]) == [Outcome.PROCESSED, Outcome.DEAD, Outcome.PROCESSED]
    # in a group it runs once more, alone
    assert len(runs) == (2 if way.together else 1)
    row = shop.failure()
    assert (row.business_key, row.error_class) == ("2", "Misuse")
    assert "used another connection to" in row.error_text
    assert "Use the session that the handler is given" in row.error_text
    assert sorted(shop.effects()) == ["1", "3"]
    shop.borrow()


def test_under_a_lease_another_program_may_hold_the_file_and_the_message_is_tried_again(shop: Shop) -> None:
    """There the transaction begins with the session's first statement: what was locked before was locked by somebody else."""
    tries: list[Any] = []

    def do(session: Session, no: Any) -> None:
        tries.append(no)
        if len(tries) > 1:
            put(session, f"{no}")
            return
        try:
            with shop.outside.connect() as job:
                job.exec_driver_sql("INSERT INTO effect (text) VALUES ('the job')")
                try:
                    elsewhere(shop, "audit", engine=True)
                finally:
                    job.rollback()
        except OperationalError:
            put(session, "a note")
            raise

    UNDER_A_LEASE.handles(shop, do, retry=TWICE_AT_ONCE)
    assert shop.process(order(1)) is Outcome.PROCESSED
    assert shop.effects() == ["1"]
    shop.borrow()
