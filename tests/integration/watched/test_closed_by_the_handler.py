"""The handler closes the driver's own connection, as psycopg's `with connection:` does, which commits before.

The kind: what ended the transaction took the connection along, so that nothing can be asked of it any more. Effects that were
committed stand once, and a person is told; the pool has its connection again.
"""

import asyncio
from collections import Counter
from typing import Any

import pytest
from sqlalchemy import create_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import StaticPool
from sqlalchemy.util import await_only

from exactly_once import ConfigurationError, ExactlyOnce, Outcome
from tests.integration.shop import GROUP, Shop, order, put
from tests.integration.ways import WAYS, Way

pytestmark = pytest.mark.nightly(meet=2)


def _driver(session: Session) -> Any:
    return session.connection().connection.driver_connection


def _awaited(ended: Any) -> None:
    if hasattr(ended, "__await__"):
        await_only(ended)


def _closes(session: Session) -> None:
    _awaited(_driver(session).close())


def _commits_and_closes(session: Session) -> None:
    driver = _driver(session)
    _awaited(driver.commit())
    _awaited(driver.close())


def _with_connection(session: Session) -> None:
    driver = _driver(session)
    if not hasattr(driver, "__aenter__"):
        with driver:
            return

    async def within() -> None:
        async with driver:
            await asyncio.sleep(0)

    await_only(within())


CLOSES = {"close()": _closes, "commit(), close()": _commits_and_closes, "with": _with_connection}


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("how", CLOSES)
@pytest.mark.parametrize("then", ["returns", "goes on", "raises"])
@pytest.mark.where(lambda ground, how, **_: how != "with" or ground[0] == "postgres")  # elsewhere it closes nothing
def test_what_was_committed_before_stands_once_and_is_told(shop: Shop, way: Way, how: str, then: str) -> None:
    runs: list[Any] = []

    def do(session: Session, no: Any) -> None:
        runs.append(no)
        put(session, f"{no} before")
        CLOSES[how](session)
        if then == "goes on":
            put(session, f"{no} after")
        if then == "raises":
            raise ZeroDivisionError

    way.handles(shop, do)
    ends = [end for attempt in (1, 2, 3) for end in way.attempted(shop, [order(3, attempt=attempt)])]
    assert Outcome.PROCESSED not in ends
    assert Outcome.WAITING not in ends
    assert set(Counter(shop.effects()).values()) <= {1}
    (failure,) = shop.failures()
    if shop.effects():
        assert failure.state == "broken"
    pool: Any = (shop.async_engine if shop.is_async else shop.engine).pool
    assert pool.checkedout() == 0
    shop.borrow()


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///file:x?mode=memory&cache=shared&uri=true"])
def test_a_worker_whose_threads_would_share_one_connection_does_not_start(url: str) -> None:
    """The driver ends the process then."""
    one: dict[str, Any] = {"poolclass": StaticPool} if url == "sqlite://" else {}
    eo = ExactlyOnce(create_engine(url, connect_args={"check_same_thread": False}, **one), group=GROUP)

    @eo.handler("orders", key="no")
    def handler(session: Session) -> None: ...

    with pytest.raises(ConfigurationError, match="one connection"):
        eo.worker("memory://one-connection").start()
