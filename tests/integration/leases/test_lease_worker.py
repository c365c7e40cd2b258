"""Leases under a real worker: what waits for another run, and what it costs the broker."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from itertools import count
from pathlib import Path
from threading import Event
from time import monotonic
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Engine, create_engine, make_url, select, update
from sqlalchemy.orm import Session

from exactly_once import ExactlyOnce, Lease, Message, Outcome, Retry, Steps
from exactly_once.claim import ClaimRow
from exactly_once.database.schema import tables
from exactly_once.database.server_clock import utcnow
from exactly_once.database.store import Store
from exactly_once.guards.lease.sql import SqlLeases
from exactly_once.handlers.plan import plan
from exactly_once.testing.databases import DatabaseServer
from exactly_once.testing.postgres import EmbeddedPostgres
from tests.services.need import need
from tests.waiting import until

ROOT = Path(__file__).parents[3]
FAKETIME = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))), None)
_names = count(1)


@pytest.fixture
def engine(postgres_url: str) -> Iterator[Engine]:
    made = create_engine(postgres_url, pool_size=20)
    yield made
    made.dispose()


def message(no: str = "A-1") -> Message:
    return Message("orders", json.dumps({"no": no}).encode(), key=no)


def leases(engine: Engine) -> tuple[Store, SqlLeases]:
    store = Store("default", engine)
    return store, SqlLeases(store.name, store.engine, store.dialect, lambda: store.tables)


def test_a_copy_of_a_running_message_is_kept_in_hand_and_acknowledged_when_the_run_ends(engine: Engine) -> None:
    attempts: list[int] = []
    ran, may_end = Event(), Event()
    eo = ExactlyOnce(engine, group="shop")

    @eo.handler("orders", key="no", guard=Lease(timedelta(minutes=10)))
    def handler(order: dict[str, str], message: Message) -> None:
        attempts.append(message.attempt)
        ran.set()
        assert may_end.wait(20)

    url = f"memory://kept-{next(_names)}"
    with eo.worker(url) as worker, eo.producer(url) as producer:
        producer.send_all([message()])
        assert ran.wait(10)
        producer.send_all([message()])
        until(lambda: worker.counts.received == 2)
        asked = monotonic()
        until(lambda: monotonic() - asked > 1.2)  # looked at twice meanwhile
        assert worker.counts.in_hand == 2
        assert worker.counts.redelivered == 0
        may_end.set()
        worker.drain()
        counts = worker.counts
    assert (counts.acked, counts.redelivered) == (2, 0)
    assert counts.outcomes["processed"] == counts.outcomes["duplicate"] == 1
    assert attempts == [1]


def test_a_message_whose_run_died_is_redelivered_near_the_end_of_its_lease(engine: Engine) -> None:
    """Kept for five seconds, then given back until the lease ends: two deliveries, whatever the lease."""
    store, dead = leases(engine)
    eo = ExactlyOnce(engine, group="shop")
    attempts: list[tuple[int, int]] = []

    @eo.handler("orders", key="no", fingerprint=None, guard=Lease(timedelta(seconds=30)))
    def handler(steps: Steps, message: Message) -> None:
        attempts.append((message.attempt, steps.attempt))

    row = ClaimRow("shop", "handler", "A-1", b"")
    assert dead.claim(row, uuid4().hex, timedelta(seconds=8), also=b"", steps=False).won
    url = f"memory://dead-{next(_names)}"
    with eo.worker(url) as worker, eo.producer(url) as producer:
        producer.send_all([message()])
        until(lambda: bool(attempts), 30)
        worker.drain()
        counts = worker.counts
    assert attempts == [(2, 2)]
    assert (counts.redelivered, counts.acked) == (1, 1)
    store.close()


def test_near_the_brokers_limit_it_is_kept_as_waiting_and_not_as_dead(engine: Engine) -> None:
    store, dead = leases(engine)
    eo = ExactlyOnce(engine, group="shop")
    ran: list[int] = []

    @eo.handler("orders", key="no", fingerprint=None, guard=Lease(timedelta(seconds=30)))
    def handler(order: dict[str, str]) -> None:
        ran.append(1)

    row = ClaimRow("shop", "handler", "A-1", b"")
    assert dead.claim(row, uuid4().hex, timedelta(minutes=10), also=b"", steps=False).won
    t = tables().failure
    url = "sql://?max_attempts=2&invisible_s=2"
    with eo.worker(url) as worker, eo.producer(url) as producer:
        producer.send_all([message()])

        def states() -> list[Any]:
            with engine.connect() as connection:
                return list(connection.execute(select(t.c.state, t.c.attempts)).all())

        until(lambda: bool(states()), 20)
        assert states() == [("waiting", 0)]
        claims = tables().idempotent
        with engine.begin() as connection:  # the run that died is over, and the failure is due
            connection.execute(update(claims).values(lease_until=utcnow(-1)))
            connection.execute(update(t).values(next_attempt_at=utcnow()))
        until(lambda: states() == [("resolved", 0)], 20)
        worker.drain()
    assert ran == [1]
    store.close()


def test_a_lease_is_renewed_for_as_long_as_its_handler_runs(engine: Engine) -> None:
    eo = ExactlyOnce(engine, group="shop")
    may_end, began = Event(), Event()

    @eo.handler("orders", key="no", guard=Lease(timedelta(seconds=1)))
    def handler(session: Session) -> None:
        began.set()
        assert may_end.wait(20)

    url = f"memory://renewed-{next(_names)}"
    store, others = leases(engine)
    row = ClaimRow("shop", "handler", "A-1", plan(handler, topic="orders", key="no").read(message()).fingerprint)
    with eo.worker(url) as worker, eo.producer(url) as producer:
        producer.send_all([message()])
        assert began.wait(10)
        started = monotonic()
        while monotonic() - started < 4:  # four leases long
            assert not others.claim(row, uuid4().hex, timedelta(seconds=1), also=b"", steps=False).won
        may_end.set()
        worker.drain()
        assert worker.counts.outcomes["processed"] == 1
    store.close()


def test_a_row_that_its_own_step_has_locked_keeps_no_other_lease_from_being_renewed(engine: Engine) -> None:
    from exactly_once.guards.lease.contract import HeldLease

    store, mine = leases(engine)
    lease = timedelta(seconds=30)
    held = []
    for n in range(50):
        row = ClaimRow("shop", "handler", f"A-{n}", b"")
        token = uuid4().hex
        assert mine.claim(row, token, timedelta(seconds=2), also=b"", steps=False).won
        held.append(HeldLease(row, token, 1, lease))
    t = tables().idempotent
    with engine.connect() as step, step.begin():
        step.execute(select(t.c.token).where(t.c.business_key == "A-25").with_for_update())
        started = monotonic()
        assert list(mine.renew(held)) == []
        assert monotonic() - started < 2
    renewed = {row.business_key for row in _later_than(engine, 20)}
    assert renewed == {f"A-{n}" for n in range(50)} - {"A-25"}
    assert held[25].renewed < held[24].renewed
    assert list(mine.renew(held)) == []
    assert len(_later_than(engine, 20)) == 50
    store.close()


def test_a_database_that_dies_under_a_handler_gets_nothing_acknowledged_and_all_done_when_it_is_back(
    own_postgres: EmbeddedPostgres,
) -> None:
    """Killed before the handler's session is completed, and while another message waits for its claim."""
    server = DatabaseServer(make_url(own_postgres.url), source="url")
    engine = create_engine(server.create())
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE done (no text)")
    eo = ExactlyOnce(engine, group="shop")
    runs: list[int] = []

    @eo.handler("orders", key="no", guard=Lease(timedelta(seconds=2)))
    def handler(session: Session, order: dict[str, str], steps: Steps) -> None:
        session.connection().exec_driver_sql("INSERT INTO done VALUES (%s)", (order["no"],))
        runs.append(1)
        if len(runs) == 1:
            own_postgres.kill()

    url = f"memory://dies-{next(_names)}"
    with eo.worker(url, concurrency=2) as worker, eo.producer(url) as producer:
        producer.send_all([message(f"A-{n}") for n in range(5)])
        until(lambda: bool(worker.counts.outages), 20)
        own_postgres.start()
        until(lambda: worker.counts.acked == 5, 40)
        assert worker.counts.redelivered == 0, "an outage spends no delivery of the broker's"
    with engine.connect() as connection:
        done = connection.exec_driver_sql("SELECT no FROM done ORDER BY no").scalars().all()
    assert done == [f"A-{n}" for n in range(5)]
    engine.dispose()


def _later_than(engine: Engine, seconds: float) -> list[Any]:
    t = tables().idempotent
    with engine.connect() as connection:
        return list(connection.execute(select(t.c.business_key).where(t.c.lease_until > utcnow(seconds))).all())


CLAIM = """
import sys
from datetime import datetime, timedelta
from sqlalchemy.orm import Session
from exactly_once import ExactlyOnce, Lease, Message
eo = ExactlyOnce(sys.argv[1], group="shop")
@eo.handler("orders", key="no", guard=Lease(timedelta(seconds=30)))
def handler(session: Session) -> None: ...
print(datetime.now().date().isoformat(), eo.process(Message("orders", b'{"no": "A-1"}')).value)
"""


@pytest.mark.parametrize("shift", ["+1d", "-1d"])
def test_a_workers_clock_that_is_a_day_off_has_no_effect(engine: Engine, postgres_url: str, shift: str) -> None:
    need(None if FAKETIME else "there is no libfaketime here (Debian: apt-get install faketime)")

    def elsewhere() -> tuple[str, str]:
        environment = os.environ | {
            "LD_PRELOAD": str(FAKETIME), "FAKETIME": shift, "FAKETIME_DONT_FAKE_MONOTONIC": "1", "PYTHONPATH": str(ROOT)
        }  # fmt: skip
        command = [sys.executable, "-c", CLAIM, postgres_url]
        told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True).stdout
        day, _, outcome = told.strip().partition(" ")
        return day, outcome

    eo = ExactlyOnce(engine, group="shop")
    seen: list[tuple[str, str]] = []

    @eo.handler("orders", key="no", guard=Lease(timedelta(seconds=30)), retry=Retry(immediate=0))
    def handler(session: Session) -> None:
        seen.append(elsewhere())  # beside a run that is alive: another process, a day later or earlier
        raise ValueError("let go of, and then free for whoever comes, on whichever day")

    assert eo.process(message()) is Outcome.FAILED
    ((day, outcome),) = seen
    assert outcome == "in progress"
    assert day != datetime.now().date().isoformat()  # noqa: DTZ005  (the child's own word, in the same zone)
    assert elsewhere()[1] == "processed"
