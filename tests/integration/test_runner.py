"""How many deliveries run at once, on threads and on the loop: no more than were asked for, whatever is in hand."""

import asyncio
from collections.abc import Iterator
from datetime import timedelta
from threading import Lock
from time import sleep

import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from exactly_once import Message
from tests.integration.shop import COLOURS, Shop, shops

AT_ONCE = 3
MESSAGES = 30


@pytest.fixture(params=COLOURS)
def shop(request: pytest.FixtureRequest) -> Iterator[Shop]:
    yield from shops(request, "postgres", request.param, pool_size=AT_ONCE + 2)


class Running:
    """Counts what runs now, and the most that ever did."""

    def __init__(self) -> None:
        self._lock = Lock()
        self.now = self.most = 0

    def __enter__(self) -> None:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.now -= 1


def test_no_more_run_at_once_than_asked_for_although_more_are_in_hand(shop: Shop) -> None:
    running = Running()
    if shop.is_async:

        @shop.eo.handler("orders", key="no")
        async def awaited(session: AsyncSession) -> None:
            with running:
                await asyncio.sleep(0.02)
    else:

        @shop.eo.handler("orders", key="no")
        def plain(session: Session) -> None:
            with running:
                sleep(0.02)

    url = f"memory://at-once-{shop.colour}"
    with shop.eo.producer(url) as producer:
        producer.send_all([Message("orders", b'{"no": %d}' % n) for n in range(MESSAGES)])
    with shop.eo.worker(url, concurrency=AT_ONCE) as worker:
        outcomes = worker.drain(timedelta(seconds=30))
    assert outcomes["processed"] == MESSAGES
    assert running.most == AT_ONCE
