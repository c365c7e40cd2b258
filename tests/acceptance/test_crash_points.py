"""The process is killed with SIGKILL at every step between receive and settle; afterwards the ledger is right to the unit."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from exactly_once import Message, Outcome
from exactly_once.database.schema import tables
from exactly_once.failures.decisions import Chosen, requeue
from exactly_once.testing import bound
from exactly_once.testing.databases import DatabaseServer
from tests.acceptance import crash_shop
from tests.acceptance.crash_shop import BETWEEN, FAILING, POINTS, PUMP_POINTS, VICTIM
from tests.acceptance.orders import ledger, open_shop

ORDERS = 12
PATIENCE_S = 120  # for a process to start and to do its work, with neighbours
ROOT = Path(__file__).parents[2]


@pytest.fixture
def database(eo_server: DatabaseServer) -> Iterator[Engine]:
    with eo_server.fresh() as engine:
        open_shop(engine)
        yield engine


def _worker(database: Engine, url: str, point: str, marker: Path, mode: str = "") -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "EXACTLY_ONCE_DATABASE": database.url.render_as_string(hide_password=False),
        "EXACTLY_ONCE_CONCURRENCY": "4",
        "EXACTLY_ONCE_TEST_CRASH": mode,
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "tests.acceptance.crash_shop", url, point, str(marker)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)


def _until(what: Callable[[], bool], patience_s: float, told: Callable[[], object]) -> None:
    deadline = time.monotonic() + patience_s
    while not what():
        assert time.monotonic() < deadline, told()
        time.sleep(0.05)


def _left(database: Engine) -> int:
    with database.connect() as connection:
        return int(connection.execute(text("SELECT count(*) FROM message_queue")).scalar_one())


IN_GROUPS = [*POINTS, BETWEEN]
IN_LISTS = ["claimed", "between the handler's statements", BETWEEN, "before COMMIT", "after COMMIT"]


@pytest.mark.parametrize(
    ("mode", "point"),
    [("", point) for point in POINTS]
    + [("batch", point) for point in IN_GROUPS]
    + [("lists", point) for point in IN_LISTS],
)
def test_killed_at_this_step_nothing_is_lost_and_nothing_doubled(
    database: Engine, mode: str, point: str, tmp_path: Path
) -> None:
    url = "sql://?invisible_s=2"
    marker = tmp_path / "died"
    wanted = [f"order-{n}" for n in range(ORDERS)]
    with bound(crash_shop.eo, database) as eo, eo.producer(url) as producer:
        # each twice: the second copy must be a duplicate whatever happened to the first
        producer.send_all([Message("crash-orders", json.dumps({"order_no": no}).encode(), key=no) for no in wanted * 2])
    first = _worker(database, url, point, marker, mode)
    try:
        assert first.wait(PATIENCE_S) == -signal.SIGKILL, "the process was to die at this step"
    finally:
        first.kill()
    assert marker.exists()
    second = _worker(database, url, point, marker, mode)
    try:
        _until(lambda: _left(database) == 0, PATIENCE_S, lambda: (ledger(database), _left(database)))
        second.send_signal(signal.SIGTERM)
        assert second.wait(PATIENCE_S) == 0
    finally:
        second.kill()
    orders, taken = ledger(database)
    assert orders == sorted(wanted)
    assert taken == ORDERS
    with database.connect() as connection:
        claims = connection.execute(text("SELECT count(*) FROM message_idempotent")).scalar_one()
        open_rows = connection.execute(
            text("SELECT count(*) FROM message_failure WHERE state NOT IN ('resolved', 'discarded')")
        ).scalar_one()
    assert claims == ORDERS
    assert open_rows == 0


@pytest.mark.parametrize("point", PUMP_POINTS)
def test_killed_while_the_pump_brings_it_back_it_runs_once_all_the_same(
    database: Engine, point: str, tmp_path: Path
) -> None:
    url = "sql://?invisible_s=2"
    marker = tmp_path / "died"
    with bound(crash_shop.eo, database) as eo:
        failed = eo.process(Message("crash-orders", json.dumps({"order_no": FAILING}).encode(), message_id="one"))
        assert failed is Outcome.FAILED
    with database.begin() as connection:
        assert requeue(connection, tables(), Chosen(group="crash"), by="a test", why=None, per_second=None).count == 1
    first = _worker(database, url, point, marker)
    try:
        assert first.wait(PATIENCE_S) == -signal.SIGKILL, "the process was to die at this step"
    finally:
        first.kill()
    with database.begin() as connection:
        # the dead worker's lease on the row would run out by itself after a minute
        connection.execute(text("UPDATE message_failure SET next_attempt_at = now() WHERE next_attempt_at IS NOT NULL"))
    second = _worker(database, url, point, marker)
    try:
        _until(lambda: _states(database) == ["resolved"], PATIENCE_S, lambda: (ledger(database), _states(database)))
        second.send_signal(signal.SIGTERM)
        assert second.wait(PATIENCE_S) == 0
    finally:
        second.kill()
    assert ledger(database) == ([FAILING], 1)


def _states(database: Engine) -> list[str]:
    with database.connect() as connection:
        return list(connection.execute(text("SELECT state FROM message_failure")).scalars())


def test_a_message_that_kills_its_process_every_time_ends_parked(database: Engine, tmp_path: Path) -> None:
    url = "sql://?invisible_s=1&max_attempts=3"
    with bound(crash_shop.eo, database) as eo, eo.producer(url) as producer:
        producer.send(Message("crash-orders", json.dumps({"order_no": VICTIM}).encode(), key=VICTIM))
    deaths = 0
    deadline = time.monotonic() + PATIENCE_S
    while _states(database) != ["dead"]:
        assert time.monotonic() < deadline, _states(database)
        # a marker of its own each time: the poison kills every process that runs it
        worker = _worker(database, url, "handler begins", tmp_path / f"died-{deaths}")
        try:
            while worker.poll() is None and _states(database) != ["dead"] and time.monotonic() < deadline:
                time.sleep(0.05)
            deaths += worker.poll() == -signal.SIGKILL
        finally:
            worker.kill()
            worker.wait()
    assert deaths == 2, "delivered three times: run twice, then parked without running"
    assert ledger(database) == ([], 0)
    with bound(crash_shop.eo, database) as eo, eo.worker(url) as worker_here, eo.producer(url) as producer:
        producer.send(Message("crash-orders", json.dumps({"order_no": "order-2"}).encode(), key="order-2"))
        worker_here.drain()
    assert ledger(database) == (["order-2"], 1)
