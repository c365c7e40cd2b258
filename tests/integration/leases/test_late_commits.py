"""A procedure that commits late, on MySQL and MariaDB under a lease: the server still runs it after its caller is gone.

A connection that is cut, or a process that is killed, does not end a CALL: the server learns of it when it answers. The next run
may have begun by then, and what is committed behind it would be there twice.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import Session

from exactly_once import Lease, Outcome
from tests.integration.shop import Shop, order, put, shops
from tests.integration.ways import IN_A_STEP, UNDER_A_LEASE, Way, driver_of, mariadb_procedures

ROOT = Path(__file__).parents[3]
SHORT = timedelta(seconds=1)
LEFT: list[Any] = []
"""Cursors that nobody has read to the end. As it is collected PyMySQL reads on, on a connection that is closed by then."""

CHILD = """
import sys
from datetime import timedelta
from exactly_once import Lease
from tests.integration.shop import Shop, order
from tests.integration.ways import WAYS
from tests.integration.leases.test_late_commits import calls
url, name, redis = sys.argv[1:]
(way,) = (each for each in WAYS if each.name == name)
shop = Shop("mariadb", "sync", url, pool_size=3)
way.handles(shop, calls, guard=Lease(timedelta(seconds=1), store=redis or None))
way.deliver(shop, [order(3)])
"""


@pytest.fixture
def shop(request: pytest.FixtureRequest) -> Iterator[Shop]:
    for each in shops(request, "mariadb", "sync", pool_size=4, options={"connect_args": {"read_timeout": 2}}):
        late = "() BEGIN INSERT INTO effect (text) VALUES ('procedure'); DO SLEEP(5); COMMIT; END"
        mariadb_procedures(each, late=late, late_rows=late.replace("DO SLEEP", "SELECT 1; DO SLEEP"))
        yield each


def calls(session: Session, no: Any) -> None:
    put(session, f"{no} before")
    with driver_of(session).cursor() as cursor:
        cursor.execute("CALL late()")


def leaves_rows(session: Session, no: Any) -> None:
    """The first rows are there at once, and nobody waits for what comes behind them."""
    from pymysql.cursors import SSCursor

    put(session, f"{no} before")
    cursor = driver_of(session).cursor(SSCursor)
    LEFT.append(cursor)
    cursor.execute("CALL late_rows()")
    cursor.fetchone()
    raise OSError("the other service is away")


def until_acknowledged(shop: Shop) -> list[Outcome]:
    ends: list[Outcome] = []
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        ends.append(shop.process(order(3, attempt=2)))
        if ends[-1].acknowledge:
            return ends
        time.sleep(0.2)
    raise AssertionError(ends)


def is_broken_once(shop: Shop) -> None:
    ends = until_acknowledged(shop)
    effects = shop.effects()
    assert [row.state for row in shop.failures()] == ["broken"], (ends, effects)
    assert sorted(effects) == ["3 before", "procedure"]


@pytest.mark.parametrize("way", [UNDER_A_LEASE, IN_A_STEP], ids=str)
@pytest.mark.parametrize("do", [calls, leaves_rows])
def test_what_is_committed_after_its_connection_was_given_up(shop: Shop, way: Way, do: Callable[..., None]) -> None:
    way.handles(shop, do, guard=Lease(timedelta(seconds=30)))
    with suppress(Exception):
        shop.process(order(3))
    is_broken_once(shop)
    while LEFT:
        cursor = LEFT.pop()
        cursor.connection, cursor._result.unbuffered_active = None, False


@pytest.mark.parametrize("store", ["own", "redis"])
@pytest.mark.parametrize("way", [UNDER_A_LEASE, IN_A_STEP], ids=str)
def test_what_is_committed_after_its_process_was_killed(
    request: pytest.FixtureRequest, shop: Shop, way: Way, store: str
) -> None:
    redis = request.getfixturevalue("redis_url") if store == "redis" else ""
    killed(shop, way, redis)
    way.handles(shop, lambda session, no: put(session, f"{no} before"), guard=Lease(SHORT, store=redis or None))
    is_broken_once(shop)


def killed(shop: Shop, way: Way, redis: str) -> None:
    """A process runs message 3 and dies while the server runs what it called."""
    command = [sys.executable, "-c", CHILD, shop.url, way.name, redis]
    child = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        while not running(shop):
            assert child.poll() is None
            time.sleep(0.02)
    finally:
        child.kill()
        child.wait()


def running(shop: Shop) -> int:
    with shop.outside.connect() as connection:
        asked = "SELECT COUNT(*) FROM information_schema.PROCESSLIST WHERE INFO LIKE '%%SLEEP(5)%%' AND ID <> CONNECTION_ID()"
        return connection.exec_driver_sql(asked).scalar_one()


def test_a_run_that_only_stands_still_does_not_keep_the_message(shop: Shop) -> None:
    """Its transaction is open, and the server runs nothing for it: it can commit nothing, for that is asked of its lease."""
    standing, go_on = threading.Event(), threading.Event()

    def do(session: Session, no: Any) -> None:
        put(session, f"{no} before")
        if not standing.is_set():
            standing.set()
            go_on.wait(30)

    UNDER_A_LEASE.handles(shop, do, guard=Lease(SHORT, max_run=SHORT))

    def stands() -> None:
        with suppress(Exception):
            shop.process(order(3))

    thread = threading.Thread(target=stands)
    thread.start()
    assert standing.wait(10)
    assert until_acknowledged(shop)[-1] is Outcome.PROCESSED
    go_on.set()
    thread.join()
    assert shop.effects() == ["3 before"]
