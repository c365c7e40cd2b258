"""How many deliveries run at once, on threads and on the loop: no more than were asked for, whatever is in hand."""

import asyncio
from collections.abc import Iterator
from datetime import timedelta
from threading import Lock
from time import sleep
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from exactly_once import ConfigurationError, Message
from tests.integration.shop import COLOURS, Shop, put, shops

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


@pytest.mark.parametrize("kind", ["alone", "one at a time", "in groups", "in lists"])
def test_what_became_of_copies_is_counted_for_each_handler(shop: Shop, kind: str) -> None:
    """Of three copies one is processed by each handler, though not one copy by both: so by delivery nobody can count."""
    options: dict[str, Any] = {"one at a time": {"concurrency": 1}, "in groups": {"batch": 5}}.get(kind, {})
    names = ["first", "second"]
    for name in names:
        if shop.is_async:

            async def awaited(session: AsyncSession, orders: list[dict[str, Any]]) -> None:
                await asyncio.sleep(0)

            async def awaited_alone(session: AsyncSession, order: dict[str, Any]) -> None:
                await asyncio.sleep(0)

            plain, plain_alone = awaited, awaited_alone
        else:

            def plain(session: Session, orders: list[dict[str, Any]]) -> None: ...

            def plain_alone(session: Session, order: dict[str, Any]) -> None: ...

        if kind == "in lists" and name == "first":
            shop.eo.batch_handler("orders", key="no", name=name)(plain)
        else:
            shop.eo.handler("orders", key="no", name=name, **options)(plain_alone)
    shop.eo.handler("others", key="no", name="idle")(plain_alone)
    url = f"memory://copies-{shop.colour}-{kind}"
    with shop.eo.producer(url) as producer:
        producer.send_all([Message("orders", b'{"no": %d}' % n) for n in range(10) for _ in range(3)])
    with shop.eo.worker(url, concurrency=AT_ONCE) as worker:
        outcomes = worker.drain(timedelta(seconds=30))
        handlers = worker.counts.handlers
    assert outcomes["processed"] + outcomes["duplicate"] == 30
    said = {name: {outcome: n for outcome, n in counts.items() if n} for name, counts in handlers.items()}
    assert said == {
        "first": {"processed": 10, "duplicate": 20},
        "second": {"processed": 10, "duplicate": 20},
        "idle": {},
    }


@pytest.mark.parametrize("messages", [1, 3 * AT_ONCE])
def test_draining_ends_where_all_that_is_left_is_of_a_handler_that_is_held(shop: Shop, messages: int) -> None:
    """It returned an answer: its messages wait until the program is mended, which no test can wait for."""
    if shop.is_async:

        @shop.eo.handler("orders", key="no", name="wrong")
        async def awaited(session: AsyncSession) -> Any:
            return True
    else:

        @shop.eo.handler("orders", key="no", name="wrong")
        def plain(session: Session) -> Any:
            return True

    shop.handles(lambda session: put(session, "done"), topic="notes", name="right")
    url = f"memory://held-{shop.colour}-{messages}"
    with shop.eo.producer(url) as producer:
        producer.send(Message("notes", b'{"no": 0}'))
        producer.send_all([Message("orders", b'{"no": %d}' % n) for n in range(messages)])
    with shop.eo.worker(url, concurrency=AT_ONCE, drain_timeout=timedelta(seconds=1)) as worker:
        with pytest.raises(ConfigurationError, match=r"cannot be done: the handler 'wrong' is held: .* returned True"):
            worker.drain(timedelta(seconds=60))
        assert worker.counts.acked == 1
    assert shop.effects() == ["done"]
    assert shop.claims() == ["0"]
