"""Thousands of messages, each delivered two or three times, to workers that are killed and stopped; servers are restarted.

What was called is in the ledger of an outside service (`lease_ledger`); it is held against what the stores remember, the
effects in the database, and what was done to whom and when. Half of the messages have their leases in the handler's
PostgreSQL, half in Redis.

`make nightly` runs the whole acceptance, 20,000 messages and 100 kills and stops; EXACTLY_ONCE_TEST_FULL=0.25 a quarter of it.
`EXACTLY_ONCE_TEST_SEED` makes it choose as an earlier run did; the moments are the machine's.
"""

import os
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from pathlib import Path

import pytest
from sqlalchemy import Engine, NullPool, create_engine, select, text
from sqlalchemy.orm import Session

import exactly_once.alembic
from exactly_once.testing import bound
from exactly_once.testing.postgres import EmbeddedPostgres
from tests import length
from tests.acceptance import lease_ledger, lease_shop
from tests.acceptance.lease_ledger import Call, Ledger
from tests.acceptance.lease_shop import (
    CALLS,
    LEASE,
    STEPS,
    Order,
    Record,
    Shipment,
    message,
    records_in_redis,
    records_in_sql,
)
from tests.acceptance.lease_workers import Worker
from tests.services.redis import Redis

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG and /proc are Linux's"),
    pytest.mark.alone,  # its books explain each overlap by what was done to whom, within 50 ms
]

WORKERS = 2
CONCURRENCY = 16
LATENCY_S = 0.01  # on the way to the service: where a stop finds a run before its call has arrived
WORK_S = 0.005
INVISIBLE_S = 3
STOP_S = 2 * LEASE.total_seconds()
OUTAGE_S = (0.05, 0.5)
# what a thread may do between the sending of a signal and its effect
LAG_S = 0.05
TICK_S = 0.05
LOOK_S = 0.5  # how often the queue is looked at
TOGETHER = 250  # messages whose copies are sent in any order


@dataclass(frozen=True, slots=True)
class Size:
    """How much of everything."""

    messages: int
    kills: int
    stops: int
    restarts: int
    """Of PostgreSQL, and as many of Redis."""
    patience_s: float

    @property
    def planned(self) -> Counter[str]:
        """What is to happen."""
        return Counter(kill=self.kills, stop=self.stops, postgres=self.restarts, redis=self.restarts)


SMALL = Size(messages=1500, kills=8, stops=4, restarts=2, patience_s=150)
FULL = Size(messages=20_000, kills=60, stops=40, restarts=5, patience_s=1500)


@dataclass(frozen=True, slots=True)
class Happened:
    """What was done to a worker, or to a server, and when."""

    what: str
    """kill, stop, postgres or redis."""
    pid: int
    since: float
    sent: float
    """When the signal had been sent for certain: on a busy machine that is not when it was decided."""
    until: float


def _size() -> Size:
    if not length.WHOLE:
        return SMALL
    messages, kills, stops = (round(length.PART * each) for each in (FULL.messages, FULL.kills, FULL.stops))
    return Size(messages, kills, stops, FULL.restarts, FULL.patience_s)


@dataclass
class Run:
    """One run, from the first process to the last.

    Args:
        size: How much.
        chance: Chooses.
        postgres: The database, its own.
        redis: Redis, its own.
        ledger: The outside service.
        database: In PostgreSQL; without a pool, for the server goes away.
        folder: For logs.
    """

    size: Size
    chance: random.Random
    postgres: EmbeddedPostgres
    redis: Redis
    ledger: Ledger
    database: Engine
    folder: Path
    happened: list[Happened] = field(default_factory=list)
    _workers: list[Worker] = field(default_factory=list)
    _stopped: dict[int, tuple[Worker, float, float]] = field(default_factory=dict)

    @property
    def orders(self) -> dict[str, list[str]]:
        """The messages' keys, by store."""
        half = self.size.messages // 2
        return {store: [f"{store}-{n:05d}" for n in range(half)] for store in lease_shop.HANDLERS}

    def send(self) -> int:
        """Send every message two or three times; returns how many deliveries that makes."""
        both = [
            (store, no)
            for pair in zip(*self.orders.values(), strict=True)
            for store, no in zip(self.orders, pair, strict=True)
        ]
        sent = 0
        with bound(lease_shop.eo, self.database) as eo, eo.producer("sql://") as producer:
            for first in range(0, len(both), TOGETHER):
                some = both[first : first + TOGETHER]
                copies = some * 2 + self.chance.sample(some, len(some) // 2)
                self.chance.shuffle(copies)
                producer.send_all([message(store, no) for store, no in copies])
                sent += len(copies)
        return sent

    def play(self) -> float:
        """Work through all of it under fire; returns how long it took."""
        size, began = self.size, time.monotonic()
        plan = list(size.planned.elements())
        self.chance.shuffle(plan)
        # spread evenly over the work, not over time: a slow machine gets as much of it
        every = size.messages * len(CALLS) / (len(plan) + 1)
        deadline = began + size.patience_s
        look = began
        try:
            while True:
                now = time.monotonic()
                assert now < deadline, self._told()
                self._tend()
                called, callers = self.ledger.progress()
                if len(self.happened) + len(self._stopped) < len(plan):
                    number = len(self.happened) + len(self._stopped)
                    if called >= every * (number + 1):
                        self._happen(plan[number], callers)
                if now >= look and not self._stopped:
                    if self._left() == 0:
                        break
                    look = now + LOOK_S
                time.sleep(TICK_S)
            took = time.monotonic() - began
            for worker in self._workers:
                worker.send(signal.SIGTERM)
            for worker in self._workers:
                # who stood still may have in hand what others have settled meanwhile: it gives that back, and says so
                assert worker.ended() == min(1, self._given_back(worker)), self._told()
            return took
        finally:
            for worker in self._workers:
                worker.end()

    def _tend(self) -> None:
        """Have as many workers as there should be, and let go on who stood still for long enough."""
        now = time.monotonic()
        for pid, (worker, since, sent) in list(self._stopped.items()):
            if now - sent >= STOP_S:
                self.happened.append(Happened("stop", pid, since, sent, time.monotonic()))
                worker.send(signal.SIGCONT)
                del self._stopped[pid]
        for worker in [each for each in self._workers if each.code is not None]:
            killed = any(each.what == "kill" and each.pid == worker.pid for each in self.happened)
            assert killed, f"it ended by itself, with {worker.code}: {worker.told()}"
            self._workers.remove(worker)
        while len(self._workers) < WORKERS:
            environ = {
                "EXACTLY_ONCE_DATABASE": self.database.url.render_as_string(hide_password=False),
                "EXACTLY_ONCE_REDIS": self.redis.url,
                "EXACTLY_ONCE_CONCURRENCY": str(CONCURRENCY),
                "EXACTLY_ONCE_TEST_LATENCY_S": str(LATENCY_S),
            }
            url = f"sql://?invisible_s={INVISIBLE_S}"
            self._workers.append(Worker(environ, self.folder / "workers.log", url, str(self.ledger.port)))

    def _happen(self, what: str, callers: Mapping[int, int]) -> None:
        """Do it, unless it must wait for a worker that is at work."""
        since = time.monotonic()
        if what in ("kill", "stop"):
            able = [each for each in self._workers if each.pid not in self._stopped and callers.get(each.pid)]
            if not able:
                return
            worker = self.chance.choice(able)
            since = time.monotonic()
            if what == "stop":
                worker.send(signal.SIGSTOP)
                self._stopped[worker.pid] = worker, since, time.monotonic()
                return
            worker.send(signal.SIGKILL)
            worker.ended()
            self.happened.append(Happened("kill", worker.pid, since, time.monotonic(), inf))
            return
        server: EmbeddedPostgres | Redis = self.postgres if what == "postgres" else self.redis
        # a crash of all its processes, or its own way of leaving at once
        self.chance.choice((server.kill, server.stop))()
        sent = time.monotonic()
        time.sleep(self.chance.uniform(*OUTAGE_S))
        server.start()
        self.happened.append(Happened(what, 0, since, sent, time.monotonic()))

    def _left(self) -> int:
        with self.database.connect() as connection:
            return int(connection.execute(text("SELECT count(*) FROM message_queue")).scalar_one())

    def _given_back(self, worker: Worker) -> int:
        said = re.search(rf" {worker.pid} exactly_once.worker Stopped; (\d+) message", worker.told())
        assert said, f"it did not say how it stopped: {worker.told()}"
        return int(said[1])

    def _told(self) -> object:
        return self._left(), self.happened[-5:], (self.folder / "workers.log").read_text()[-3000:]


@dataclass(frozen=True, slots=True)
class Effect:
    """A row that a run left in the database."""

    attempt: int
    pid: int
    at: float


@dataclass
class Books:
    """What all sides say after a run."""

    orders: Mapping[str, Sequence[str]]
    calls: Mapping[tuple[str, str], Sequence[Call]]
    """By message and step, in the order they began."""
    records: Mapping[str, Record]
    created: Mapping[str, Sequence[Effect]]
    shipped: Mapping[str, Sequence[Effect]]
    failures: Sequence[tuple[str, str]]
    happened: Sequence[Happened]

    @property
    def everyone(self) -> list[str]:
        return [no for numbers in self.orders.values() for no in numbers]

    def unrecorded(self) -> Iterator[tuple[Call, Call]]:
        """Give each call that has no record, with the call that came in its place."""
        for (no, step), calls in self.calls.items():
            _, by = self.records[no].steps.get(step, (False, 0))
            for call in calls:
                if call.attempt < by and not call.refused:
                    yield call, next(each for each in calls if each.attempt > call.attempt)

    def overlapping(self) -> Iterator[tuple[Call, Call]]:
        """Give each two calls of one message that two runs made at a time, or in the wrong order; the earlier run's first."""
        by_message: dict[str, list[Call]] = {}
        for (no, _), calls in self.calls.items():
            by_message.setdefault(no, []).extend(calls)
        for calls in by_message.values():
            if len(calls) > len(CALLS):
                for earlier in calls:
                    later = [call for call in calls if call.attempt > earlier.attempt and call.asked < earlier.ended]
                    if later:
                        yield earlier, min(later, key=lambda call: call.asked)

    def why(self, pids: Sequence[int], since: float, until: float, *, servers: Sequence[str] = ()) -> str:
        """Say what happened to one of these processes, or to a server, in this time; "" for nothing."""
        for each in self.happened:
            met = each.since <= until + LAG_S and each.until >= since - LAG_S
            if met and (each.pid in pids or each.what in servers):
                return each.what
        return ""


def _books(run: Run) -> Books:
    calls: dict[tuple[str, str], list[Call]] = {}
    for call in run.ledger.calls():
        calls.setdefault((call.message, call.step), []).append(call)
    with run.redis.client() as client:
        records = records_in_sql(run.database) | records_in_redis(client, run.orders["redis"])
    with Session(run.database) as session:
        created, shipped = (_effects(session, table) for table in (Order, Shipment))
        failures = session.execute(text("SELECT state, error_text FROM message_failure")).all()
    open_ = [(state, why) for state, why in failures if state not in ("resolved", "discarded")]
    return Books(run.orders, calls, records, created, shipped, open_, sorted(run.happened, key=lambda each: each.since))


def _effects(session: Session, table: type[Order | Shipment]) -> dict[str, list[Effect]]:
    found: dict[str, list[Effect]] = {}
    rows = session.execute(select(table.order_no, table.attempt, table.pid, table.at).order_by(table.at))
    for no, attempt, pid, at in rows:
        found.setdefault(no, []).append(Effect(attempt, pid, at))
    return found


@pytest.fixture
def run(own_postgres: EmbeddedPostgres, own_redis: Redis, tmp_path: Path) -> Iterator[Run]:
    """Servers of its own, and nothing sent yet."""
    seed = int(os.environ.get("EXACTLY_ONCE_TEST_SEED") or random.randrange(1_000_000))
    print(f"EXACTLY_ONCE_TEST_SEED={seed}")
    database = create_engine(own_postgres.create_database("shop"), poolclass=NullPool)
    exactly_once.alembic.upgrade(database)
    lease_shop.Base.metadata.create_all(database)
    with lease_ledger.ledger(tmp_path, work_s=WORK_S) as ledger:
        yield Run(_size(), random.Random(seed), own_postgres, own_redis, ledger, database, tmp_path)
    database.dispose()


@pytest.mark.nightly
def test_nothing_is_lost_no_finished_step_is_repeated_and_runs_overlap_only_behind_a_stop(
    run: Run, figure: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    deliveries = run.send()
    took = run.play()
    books = _books(run)
    told = _summary(run, books, deliveries, took)
    figure(told)
    with capsys.disabled():
        print(f"\n{told}")
    assert Counter(each.what for each in books.happened) == run.size.planned
    _nothing_is_lost(books)
    _no_finished_step_is_repeated(books)
    _effects_are_single(books)
    _runs_overlap_only_behind_a_stop(books)


def _nothing_is_lost(books: Books) -> None:
    assert sorted(books.records) == sorted(books.everyone)
    assert not [no for no, record in books.records.items() if not record.consumed]
    done = dict.fromkeys(STEPS, True)
    for record in books.records.values():
        assert {step: finished for step, (finished, _) in record.steps.items()} == done
    assert not books.failures


def _no_finished_step_is_repeated(books: Books) -> None:
    assert set(books.calls) == {(no, step) for no in books.everyone for step in CALLS}
    for (no, step), calls in books.calls.items():
        _, by = books.records[no].steps[step]
        attempts = [call.attempt for call in calls]
        assert len({call.key for call in calls}) == 1
        assert max(attempts) == by, f"{no}, {step}: recorded by attempt {by}, and called by {attempts}"
        assert len(set(attempts)) == len(attempts), "a run calls once"
    assert len({calls[0].key for calls in books.calls.values()}) == len(books.calls)
    # a call without a record: the process was killed or stopped between the two, or the store was away for the lease
    for call, instead in books.unrecorded():
        servers = ("postgres",) if call.message.startswith("sql") else ("redis",)
        assert books.why([call.pid], call.asked, instead.asked, servers=servers), (call, instead)


def _effects_are_single(books: Books) -> None:
    assert {no: len(rows) for no, rows in books.created.items()} == dict.fromkeys(books.everyone, 1)
    assert {no: len(books.shipped[no]) for no in books.orders["sql"]} == dict.fromkeys(books.orders["sql"], 1)
    # the limit of a store that is not the handler's database: what happens between COMMIT and complete
    for no in books.orders["redis"]:
        for one, other in pairwise(books.shipped[no]):
            assert books.why([one.pid, other.pid], one.at, other.at, servers=("redis",)), (no, one, other)


def _runs_overlap_only_behind_a_stop(books: Books) -> None:
    late: Counter[tuple[int, str]] = Counter()
    for earlier, later in books.overlapping():
        stops = [each for each in books.happened if each.what == "stop" and each.pid == earlier.pid]
        # the one call it was in, or about to make, as it was stopped; none that it began when it went on
        mine = [stop for stop in stops if earlier.asked <= stop.sent + LAG_S and stop.until < earlier.ended]
        assert mine, "\n".join(map(str, ("no stop in it:", earlier, later, *stops)))
        late[mine[0].pid, earlier.message] += 1
    assert all(count == 1 for count in late.values()), "one call of a run for each stop"
    refused = [call for calls in books.calls.values() for call in calls if call.refused]
    assert {(call.pid, call.message) for call in refused} <= set(late)


def _summary(run: Run, books: Books, deliveries: int, took: float) -> str:
    calls = [call for each in books.calls.values() for call in each]
    unrecorded = Counter(
        books.why([call.pid], call.asked, instead.asked, servers=("postgres", "redis")) or "unexplained"
        for call, instead in books.unrecorded()
    )
    twice = Counter(
        (store, books.why([one.pid, other.pid], one.at, other.at, servers=("postgres", "redis")) or "unexplained")
        for store, numbers in books.orders.items()
        for no in numbers
        for one, other in pairwise(books.shipped.get(no, ()))
    )
    attempts = Counter(record.attempt for record in books.records.values())
    return (
        f"{run.size.messages} messages, {deliveries} deliveries, {took:.1f} s;"
        f" {dict(Counter(each.what for each in books.happened))}"
        f"\n{len(calls)} calls; without a record {dict(unrecorded)}; refused {sum(call.refused for call in calls)};"
        f" overlapping {sum(1 for _ in books.overlapping())}; written twice by the session {dict(twice)};"
        f" attempts {dict(sorted(attempts.items()))}"
    )
