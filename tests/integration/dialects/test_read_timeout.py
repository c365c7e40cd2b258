"""A statement that takes longer than the driver waits for it (`read_timeout` of PyMySQL and asyncmy), on MySQL and MariaDB.

The driver ends the connection, and the server goes on with the statement, and holds what its transaction has locked. The message
fails as by any other error: it is counted, and does not wait for good as if the database were away.
"""

import logging
import time
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from exactly_once import Outcome, Retry
from tests.integration.shop import COLOURS, Shop, order, put, shops
from tests.integration.ways import ALONE, IN_A_BATCH, IN_A_LIST, IN_A_STEP, UNDER_A_LEASE, Way

pytestmark = pytest.mark.nightly(meet=1)
P, F, DEAD = Outcome.PROCESSED, Outcome.FAILED, Outcome.DEAD
BUSY = (Outcome.IN_PROGRESS, Outcome.WAITING)


@pytest.fixture(params=COLOURS)
def shop(request: pytest.FixtureRequest) -> Iterator[Shop]:
    yield from shops(request, "mariadb", request.param, pool_size=3, options={"connect_args": {"read_timeout": 1}})


def slow(session: Session, no: Any) -> None:
    put(session, f"{no}")
    if no == 1:
        session.execute(text("SELECT SLEEP(1.8)"))


@pytest.mark.parametrize("way", [ALONE, UNDER_A_LEASE, IN_A_STEP], ids=str)
def test_it_counts_and_ends_as_a_dead_letter(shop: Shop, way: Way, caplog: pytest.LogCaptureFixture) -> None:
    way.handles(shop, slow, retry=Retry(immediate=2, delays=[0.0], max_attempts=2))
    ends: list[Outcome] = []
    with caplog.at_level(logging.WARNING, "exactly_once"):
        deadline = time.monotonic() + 60
        while len(ends) < 2 and time.monotonic() < deadline:
            end = shop.process(order(1, attempt=len(ends) + 1))
            if end not in BUSY:  # else the server still runs the statement, and has the key locked
                ends.append(end)
            time.sleep(0.1)
    assert ends == [F, DEAD]
    failure = shop.failure()
    assert (failure.attempts, failure.error_class) == (2, "OperationalError")
    assert "2013" in failure.error_text
    assert "store_away" not in caplog.text
    assert shop.process(order(2)) is P
    assert shop.effects() == ["2"]


@pytest.mark.parametrize("way", [IN_A_BATCH, IN_A_LIST], ids=str)
def test_the_others_of_its_group_are_done(shop: Shop, way: Way) -> None:
    way.handles(shop, slow, retry=Retry(immediate=0, delays=[0.0], max_attempts=3))
    broker = f"memory://read-timeout-{shop.colour}-{way.name.replace(' ', '-')}"
    with shop.eo.producer(broker) as producer, shop.eo.worker(broker) as worker:
        producer.send_all([order(no) for no in (1, 2, 3)])
        deadline = time.monotonic() + 90
        while worker.counts.acked < 3 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert worker.counts.outcomes["dead"] == 1
    assert sorted(shop.effects()) == ["2", "3"]
