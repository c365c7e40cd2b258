"""More runs at once than the pool has room for, each waiting for its second connection: it is said at once, and what to do."""

import logging
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from threading import Barrier
from time import monotonic
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from exactly_once import ExactlyOnce, Lease, Message, Outcome, Steps
from exactly_once.database.errors.crowded import all_taken

CONNECTIONS = 3
POOL_TIMEOUT_S = 4


@pytest.mark.parametrize("dialect", ["postgres", "mariadb"])
def test_steps_that_wait_for_each_others_connections_say_so_at_once(
    request: pytest.FixtureRequest, dialect: str, caplog: pytest.LogCaptureFixture
) -> None:
    url = request.getfixturevalue(f"{dialect}_url")
    engine = create_engine(url, pool_size=CONNECTIONS, max_overflow=0, pool_timeout=POOL_TIMEOUT_S)
    eo = ExactlyOnce(engine, group="crowded")
    all_there = Barrier(CONNECTIONS)

    @eo.handler("orders", key="no", guard=Lease(timedelta(minutes=1)))
    def pay(session: Session, order: dict[str, Any], steps: Steps) -> None:
        session.execute(text("SELECT 1"))
        all_there.wait(20)
        steps.run("charge", lambda key: "paid")

    began = monotonic()
    with ThreadPoolExecutor(CONNECTIONS) as threads:
        outcomes = list(threads.map(lambda n: eo.process(Message("orders", b'{"no": %d}' % n)), range(CONNECTIONS)))
    assert Outcome.WAITING in outcomes
    assert Outcome.FAILED not in outcomes, "the message is not to blame"
    lines = [record for record in caplog.records if record.name.startswith("exactly_once.")]
    (early,) = [line for line in lines if line.getMessage().startswith("pool_exhausted")]
    assert early.levelno == logging.WARNING
    assert f"store=default connections={CONNECTIONS}: a step needs a connection beside" in early.getMessage()
    assert "pool_size=" in early.getMessage()
    late = next(line for line in lines if line.getMessage().startswith("store_away"))
    assert f"No connection was free: all {CONNECTIONS} of the pool were in use" in late.getMessage()
    assert "does not answer" not in late.getMessage()
    assert late.created - early.created > POOL_TIMEOUT_S - 1, "before anybody had waited"
    assert monotonic() - began < 6 * POOL_TIMEOUT_S
    engine.dispose()


def test_only_a_pool_with_a_bound_is_ever_full(sqlite_url: str) -> None:
    engine = create_engine(sqlite_url, pool_size=1, max_overflow=1)
    assert all_taken(engine) is None
    with engine.connect(), engine.connect():
        assert all_taken(engine) == 2
    assert all_taken(engine) is None
    for unbounded in (create_engine(sqlite_url, poolclass=NullPool), create_engine(sqlite_url, max_overflow=-1)):
        with unbounded.connect():
            assert all_taken(unbounded) is None
