"""Sync handlers of deliveries that run on a loop: they take no thread that async handlers need, and begin nothing after a stop.

The threads of `asyncio.to_thread` and of name look-ups are few. A sync handler that waited in one of them for a row, which an
async handler of the same topic held while it waited for such a thread, would wait for ever: no database sees that deadlock.
"""

import asyncio
import os
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from itertools import count
from threading import Lock
from time import monotonic, sleep
from typing import Any

import pytest
from sqlalchemy import insert, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from exactly_once import ExactlyOnce, Message, Outcome, Retry
from tests.integration.shop import GROUP, STOCK, Shop, order, put, shops

SOON = Retry(immediate=0, delays=[0.05], max_attempts=6)
MORE = update(STOCK).where(STOCK.c.item == 1).values(amount=STOCK.c.amount + 1)
_number = count(1)


def broker() -> str:
    return f"memory://beside-{os.getpid()}-{next(_number)}"


@pytest.fixture
def own(request: pytest.FixtureRequest) -> Iterator[Shop]:
    """A shop whose application makes its own engines."""
    for shop in shops(request, "postgres", "sync"):
        shop.eo = ExactlyOnce(shop.url, group=GROUP)
        with shop.outside.begin() as connection:
            connection.execute(insert(STOCK).values(item=1, amount=0))
        yield shop
        shop.eo._store_binding.close()


def both_take_one_row(eo: ExactlyOnce, limit: int | None) -> None:
    @eo.handler("orders", name="audit", key="no", concurrency=limit, retry=SOON)
    def audit(session: Session, body: dict[str, Any]) -> None:
        session.execute(MORE)
        put(session, f"{body['no']} sync")
        sleep(0.02)

    @eo.handler("orders", name="reserve", key="no", retry=SOON)
    async def reserve(session: AsyncSession, body: dict[str, Any]) -> None:
        await session.execute(MORE)
        await asyncio.to_thread(sleep, 0.02)  # a client that is sync; or a name that is looked up
        await session.run_sync(put, f"{body['no']} async")


@pytest.mark.parametrize("limit", [1, None])
def test_handlers_of_both_kinds_over_one_row_end(own: Shop, limit: int | None) -> None:
    both_take_one_row(own.eo, limit)
    where = broker()
    with own.eo.worker(where, concurrency=16) as worker, own.eo.producer(where) as producer:
        producer.send_all([order(number) for number in range(40)])
        worker.drain(timedelta(seconds=60))
    assert Counter(own.effects()) == Counter(f"{number} {kind}" for number in range(40) for kind in ("sync", "async"))


def test_messages_that_a_callers_loop_processes_side_by_side_end(own: Shop) -> None:
    both_take_one_row(own.eo, None)

    async def all_of_them() -> list[Outcome]:
        return await asyncio.gather(*(own.eo.aprocess(order(number)) for number in range(16)))

    assert asyncio.run(asyncio.wait_for(all_of_them(), 60)) == [Outcome.PROCESSED] * 16


def test_what_waits_for_its_limit_holds_no_thread_of_the_loop(own: Shop) -> None:
    lock, now, most = Lock(), [0], [0]

    @own.eo.handler("orders", name="slow", key="no", concurrency=1, retry=SOON)
    def slow(session: Session, body: dict[str, Any]) -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        sleep(0.3)
        put(session, f"{body['no']} slow")
        with lock:
            now[0] -= 1

    @own.eo.handler("orders", name="beside", key="no", retry=SOON)
    async def beside(session: AsyncSession, body: dict[str, Any]) -> None:
        await session.run_sync(put, f"{body['no']} beside")

    @own.eo.handler("notes", name="notes", key="no", retry=SOON)
    async def notes(session: AsyncSession, body: dict[str, Any]) -> None:
        async with asyncio.timeout(2):
            await asyncio.to_thread(sleep, 0.001)
        await session.run_sync(put, f"{body['no']} notes")

    where = broker()
    with own.eo.worker(where, concurrency=16) as worker, own.eo.producer(where) as producer:
        producer.send_all([order(number) for number in range(12)])
        sleep(0.5)
        producer.send_all([Message("notes", b'{"no": %d}' % number) for number in range(100, 103)])
        worker.drain(timedelta(seconds=60))
    assert own.failures() == []
    assert most == [1]
    wanted = [f"{number} {kind}" for number in range(12) for kind in ("slow", "beside")]
    assert Counter(own.effects()) == Counter([*wanted, *(f"{number} notes" for number in range(100, 103))])


@pytest.mark.parametrize("batch", [None, 2], ids=["alone", "in a batch"])
@pytest.mark.parametrize("beside", ["nobody", "an async one"])
def test_what_waits_for_its_limit_begins_no_more_once_the_worker_has_ended(
    own: Shop, beside: str, batch: int | None
) -> None:
    """What the handler needs, a client or a pool, is closed by then."""
    began: list[float] = []

    @own.eo.handler("orders", name="slow", key="no", concurrency=1, retry=SOON, batch=batch)
    def slow(session: Session, body: dict[str, Any]) -> None:
        began.append(monotonic())
        sleep(1)
        put(session, f"{body['no']} slow")

    if beside == "an async one":

        @own.eo.handler("orders", name="beside", key="no", retry=SOON)
        async def other(session: AsyncSession, body: dict[str, Any]) -> None:
            await session.run_sync(put, f"{body['no']} beside")

    where = broker()
    spans = {"concurrency": 8, "drain_timeout": timedelta(seconds=0.2)}
    with own.eo.worker(where, **spans), own.eo.producer(where) as producer:  # type: ignore[arg-type]
        producer.send_all([order(number) for number in range(6)])
        sleep(0.5)
    ended = monotonic()
    sleep(2.5)
    # the calls of a batch that has begun go on: they are one transaction
    assert [at for at in began if at > ended] == [] or batch
    assert len(began) <= (batch or 1)
    assert own.failures() == []
