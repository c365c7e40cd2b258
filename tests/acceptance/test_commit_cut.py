"""The connection is cut at the handler's COMMIT by a real proxy: right before the server gets it, and right after it obeyed.

Both look alike to the worker, which cannot know. Either way the message is processed once, and no attempt is counted.
"""

import asyncio
import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from exactly_once import ExactlyOnce, Message, Outcome
from exactly_once.transports.memory import forget
from tests.services.proxy import Proxy

ORDERS = [f"A-{n:02}" for n in range(12)]
URL = "memory://commit-cut"
CUTS = ("before", "after")
COLOURS = ("sync", "async")


@pytest.fixture(params=["postgres", "mariadb"])
def server_url(request: pytest.FixtureRequest) -> str:
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture
def outside(server_url: str) -> Iterator[Engine]:
    """The database without the proxy."""
    engine = create_engine(server_url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE cut_effect (no VARCHAR(20) NOT NULL)"))
    forget("commit-cut")
    yield engine
    forget("commit-cut")
    engine.dispose()


def application(url: str, colour: str) -> ExactlyOnce:
    eo = ExactlyOnce(url, group="cut")
    effect = text("INSERT INTO cut_effect VALUES (:no)")
    if colour == "async":

        @eo.handler("orders", key="no", name="reserve")
        async def areserve(session: AsyncSession, order: dict[str, Any]) -> None:
            await session.execute(effect, order)
    else:

        @eo.handler("orders", key="no", name="reserve")
        def reserve(session: Session, order: dict[str, Any]) -> None:
            session.execute(effect, order)

    return eo


def order(no: str, attempt: int = 1) -> Message:
    return Message("orders", json.dumps({"no": no}).encode(), message_id=f"id-{no}", attempt=attempt)


def cut(proxy: Proxy, when: str, nth: int = 1) -> None:
    (proxy.cut_before_commit if when == "before" else proxy.cut_after_commit)(nth)


def ledger(outside: Engine) -> tuple[list[str], list[str], int]:
    """Effects, claims, failure rows."""
    with outside.connect() as connection:
        effects = connection.execute(text("SELECT no FROM cut_effect ORDER BY no")).scalars().all()
        claims = connection.execute(text("SELECT message_id FROM message_idempotent ORDER BY 1")).scalars().all()
        failures = connection.execute(text("SELECT count(*) FROM message_failure")).scalar_one()
    return list(effects), list(claims), int(failures)


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("when", CUTS)
def test_a_connection_cut_at_commit_is_told_as_what_it_was(
    server_url: str, outside: Engine, when: str, colour: str
) -> None:
    async def twice(eo: ExactlyOnce, proxy: Proxy) -> list[Outcome]:
        await eo.aprocess(order("A-0"))  # connects; a new connection commits its settings, and that is not to be cut
        cut(proxy, when)
        return [await eo.aprocess(order("A-1")), await eo.aprocess(order("A-1", attempt=2))]

    with Proxy(server_url) as proxy:
        first, second = asyncio.run(twice(application(proxy.url, colour), proxy))
        proxy.wait_for_cut()
    if when == "before":
        # nothing there: not acknowledged, and the next copy does the work
        assert (first, second) == (Outcome.UNKNOWN, Outcome.PROCESSED)
    else:
        # the look-up over a fresh connection finds the claim
        assert (first, second) == (Outcome.PROCESSED, Outcome.DUPLICATE)
    assert ledger(outside) == (["A-0", "A-1"], ["id-A-0", "id-A-1"], 0)


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("when", CUTS)
def test_a_worker_whose_connections_are_cut_at_commit_loses_doubles_and_counts_nothing(
    server_url: str, outside: Engine, when: str, colour: str
) -> None:
    with Proxy(server_url) as proxy:
        eo = application(proxy.url, colour)
        with eo.worker(URL, concurrency=2) as worker, eo.producer(URL) as producer:
            for part in (1, 2, 3):
                cut(proxy, when, part)  # a handler's COMMIT, or the pump's, which does not mind either
                for no in ORDERS[part - 1 :: 3] * 2:
                    producer.send(Message("orders", json.dumps({"no": no}).encode()))
                proxy.wait_for_cut(part)
                worker.drain(timedelta(seconds=60))
            counts = worker.counts
    effects, claims, failures = ledger(outside)
    assert (effects, len(claims), failures) == (ORDERS, len(ORDERS), 0)
    assert counts.outcomes["failed"] == counts.outcomes["dead"] == 0
