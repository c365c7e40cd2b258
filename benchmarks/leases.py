"""What leases cost: a message under a lease against a message under the transaction guard, and the renewal of a thousand.

Renewal is measured as the processor time of this process divided by the time between two renewals: the share of one core.
"""

from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import count
from time import perf_counter, process_time
from typing import Any, Final
from uuid import uuid4

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from benchmarks.measure import US, Figure, WrongRows, ratios, take_turns
from benchmarks.stage import Stage
from exactly_once import ExactlyOnce, Lease, Message, Outcome, Transaction
from exactly_once.claim import ClaimRow
from exactly_once.database.store import Store
from exactly_once.guards.lease.contract import HeldLease, LeaseStore
from exactly_once.guards.lease.redis import RedisLeases
from exactly_once.guards.lease.sql import SqlLeases
from exactly_once.redis.connection import RedisConnection
from tests.services import redis as redis_service

__all__ = ["measure"]

HELD: Final = 1000
LEASE: Final = timedelta(seconds=30)
SHARE: Final = 0.05
BEATS, BEATS_QUICKLY = 20, 3
ROUNDS, ROUNDS_QUICKLY = 7, 2
EACH, EACH_QUICKLY = 100, 20

_numbers = count(1)


def measure(stage: Stage, *, quick: bool) -> Iterator[Figure]:
    """Measure them."""
    beats = BEATS_QUICKLY if quick else BEATS
    with stage.database() as database:
        store = Store("default", database.engine)
        in_sql = SqlLeases(store.name, store.engine, store.dialect, lambda: store.tables)
        yield _renewed("PostgreSQL", in_sql, beats)
        if (missing := redis_service.missing()) is not None:
            yield Figure(name="leases", what="1,000 leases renewed in Redis / one core", skipped=missing)
            yield from _messages(database.engine, None, quick=quick)
            return
        with redis_service.Redis(persistent=True) as server:
            connection = RedisConnection(server.url)
            yield _renewed("Redis", RedisLeases(connection.name, connection.script, timedelta(days=7)), beats)
            connection.close()
            yield from _messages(database.engine, server.url, quick=quick)


def _renewed(where: str, store: LeaseStore, beats: int) -> Figure:
    held = []
    for n in range(HELD):
        row, token = ClaimRow("benchmark", "renewed", f"order-{n}", b""), uuid4().hex
        seen = store.claim(row, token, LEASE, also=b"", steps=False)
        if not seen.won:
            raise WrongRows(f"{row.key} was not free")
        held.append(HeldLease(row, token, 1, LEASE))
    took: list[float] = []
    walls: list[float] = []
    for _ in range(beats + 1):
        began, used = perf_counter(), process_time()
        lost = store.renew(held)
        took.append(process_time() - used)
        walls.append(perf_counter() - began)
        if lost:
            raise WrongRows(f"{len(lost)} of {HELD} leases were lost")
    third = LEASE.total_seconds() / 3
    return Figure(
        name="leases",
        what=f"{HELD:,} leases of {LEASE.total_seconds():g} s renewed in {where} / one core",
        rounds=[each / third for each in took[1:]],  # the first renewal makes statements and connections
        target=SHARE,
        measured={
            "processor time of one renewal": f"{sorted(took[1:])[beats // 2] * 1000:.1f} ms",
            "duration": f"{sorted(walls[1:])[beats // 2] * 1000:.1f} ms",
        },
    )


def _messages(engine: Engine, redis_url: str | None, *, quick: bool) -> Iterator[Figure]:
    guards: dict[str, Any] = {"transaction": Transaction(), "lease": Lease(timedelta(minutes=10))}
    if redis_url is not None:
        guards["lease in Redis"] = Lease(timedelta(minutes=10), store=redis_url)
    competitors = {name: _runs(engine, guard) for name, guard in guards.items()}
    rounds, each = (ROUNDS_QUICKLY, EACH_QUICKLY) if quick else (ROUNDS, EACH)
    took = take_turns(competitors, rounds=rounds, each=each)
    for name in list(guards)[1:]:
        yield Figure(
            name="leases",
            what=f"a message under a {name} / under the transaction guard, time",
            rounds=ratios(took[name], took["transaction"]),
            measured={each_name: f"{sorted(took[each_name])[rounds // 2] / each * US:.0f} us" for each_name in guards},
        )


def _runs(engine: Engine, guard: Any) -> Callable[[int], float]:
    eo = ExactlyOnce(engine, group="benchmark")

    @eo.handler("orders", key="no", name=f"handler {next(_numbers)}", guard=guard)
    def handler(session: Session) -> None:
        session.connection().exec_driver_sql("SELECT 1")

    def run(number: int) -> float:
        messages = [Message("orders", b'{"no": "%d"}' % next(_numbers)) for _ in range(number)]
        began = perf_counter()
        outcomes = [eo.process(message) for message in messages]
        took = perf_counter() - began
        if set(outcomes) != {Outcome.PROCESSED}:
            raise WrongRows(f"a message was not processed: {set(outcomes)}")
        return took

    return run
