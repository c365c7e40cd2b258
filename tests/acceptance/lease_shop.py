"""A shop under leases, whose worker kills or stops itself once at one named step of one message; see `lease_workers`.

One handler keeps its leases in its own PostgreSQL (EXACTLY_ONCE_DATABASE), the other in Redis (EXACTLY_ONCE_REDIS); both do
the same: a call to the outside, a transaction step, another call, and a write of the session. Each point is the real
function, wrapped from outside: nothing in the package knows of it. The marker file makes it happen once. At `stop` the process
gets SIGSTOP, and goes on from there when it is sent SIGCONT.

EXACTLY_ONCE_TEST_BREAK takes one guarantee away, in this process only, to see that the tests turn red: see `BREAKS`.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, Float, String, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from exactly_once import ExactlyOnce, Lease, Message, Retry, Steps
from exactly_once.database.schema import tables
from tests.acceptance.lease_ledger import Ledger

GROUP = "lease-shop"
LEASE = timedelta(seconds=2)
HANDLERS = {"sql": "in_sql", "redis": "in_redis"}
FIRST, MIDDLE, LAST = STEPS = ("lock stock", "create order", "charge")
CALLS = (FIRST, LAST)
"""The steps that are calls to the outside."""
POINTS = (
    "before the claim",
    "claimed",
    "in the first call, not sent",
    "the first call made, not recorded",
    "the first step recorded",
    "in the transaction step",
    "before the transaction step's COMMIT",
    "after the transaction step's COMMIT",
    "the transaction step recorded",
    "in the last call, not sent",
    "the last call made, not recorded",
    "the last step recorded",
    "before complete",
    "before COMMIT",
    "after COMMIT",
    "after complete",
    "before the settle",
    "after the settle",
)
RENEWING = "the lease renewed, by this process' clock"
"""In the thread that renews, while the run rests between two steps for longer than the third of a lease."""
_RETRY = Retry(immediate=0, delays=[0.2], max_attempts=50)


class Base(DeclarativeBase):
    pass


class _Effect:
    """What a run left in the database. Nothing is unique: a second time would be a second row."""

    id: Mapped[int] = mapped_column(primary_key=True)
    order_no: Mapped[str] = mapped_column(String(64))
    attempt: Mapped[int]
    pid: Mapped[int]
    at: Mapped[float] = mapped_column(Float(53))


class Order(_Effect, Base):
    """Written by the transaction step."""

    __tablename__ = "lease_order"


class Shipment(_Effect, Base):
    """Written by the handler's session."""

    __tablename__ = "lease_shipment"


eo = ExactlyOnce(group=GROUP)
_service = Ledger(0)


@eo.handler("lease-sql", key="order_no", guard=Lease(LEASE), retry=_RETRY)
def in_sql(session: Session, order: dict[str, Any], steps: Steps) -> None:
    _handle(session, order, steps)


@eo.handler("lease-redis", key="order_no", guard=Lease(LEASE, store="redis"), retry=_RETRY)
def in_redis(session: Session, order: dict[str, Any], steps: Steps) -> None:
    _handle(session, order, steps)


def _handle(session: Session, order: dict[str, Any], steps: Steps) -> None:
    no: str = order["order_no"]

    def call(step: str, key: str, asked: float) -> dict[str, Any]:
        _point(f"in the {_NTH[step]} call, not sent", no)
        time.sleep(float(os.environ.get("EXACTLY_ONCE_TEST_LATENCY_S", "0")))  # on the way to the service
        receipt = _service.call(key, steps.attempt, no, step, os.getpid(), asked)
        _point(f"the {_NTH[step]} call made, not recorded", no)
        return receipt

    def create(inner: Session) -> int:
        made = Order(order_no=no, attempt=steps.attempt, pid=os.getpid(), at=time.monotonic())
        inner.add(made)
        inner.flush()
        _point("in the transaction step", no)
        return made.id

    def run(step: str, *, at_most_once: bool = False) -> None:
        asked = time.monotonic()  # before it is looked whether the lease still holds
        steps.run(step, lambda key: call(step, key, asked), at_most_once=at_most_once)

    run(FIRST)
    steps.transaction(MIDDLE, create)
    if _wanted == RENEWING and is_victim(no) and _hit.wait(LEASE.total_seconds()):
        for _ in range(20):  # in small pieces: one long one would be over as soon as the process goes on
            time.sleep(0.01)
    run(LAST, at_most_once=order.get("once", False))
    session.add(Shipment(order_no=no, attempt=steps.attempt, pid=os.getpid(), at=time.monotonic()))
    session.flush()


_NTH = {FIRST: "first", LAST: "last"}


def message(store: str, order_no: str, *, once: bool = False) -> Message:
    """An order for the handler whose leases are in this store; `once` makes its last call one that is never repeated."""
    body = {"order_no": order_no, "once": once}
    return Message(f"lease-{store}", json.dumps(body).encode(), key=order_no)


# -- where it dies -----------------------------------------------------------------------------------------------------

_wanted, _how, _marker = "", signal.SIGKILL, Path()
_here = threading.local()
_hit = threading.Event()
OVER = "over"
"""Stands in the marker file when the run that was stopped has ended."""


def is_victim(order_no: str) -> bool:
    """At this message it happens."""
    return order_no.endswith("-victim")


def _point(point: str, order_no: str) -> None:
    if point != _wanted or not is_victim(order_no):
        return
    try:
        _marker.touch(exist_ok=False)
    except FileExistsError:
        return
    _hit.set()
    # to this thread, which goes no further; sent to the process, it would stop when another thread has noticed
    signal.pthread_kill(threading.get_ident(), _how)


def _wrap(owner: Any, name: str, before: str, after: str, key: Callable[..., str]) -> None:
    real = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        found = key(*args, **kwargs)
        if before:
            _point(before, found)
        result = real(*args, **kwargs)
        if after:
            _point(after, found)
        return result

    setattr(owner, name, wrapped)


def install(point: str, how: str, marker: Path) -> None:
    """Have the process killed or stopped at this point."""
    global _wanted, _how, _marker
    from exactly_once.database.watched.watch import Watch
    from exactly_once.guards.contract import Won
    from exactly_once.guards.lease import sql
    from exactly_once.guards.lease.guard import LeaseGuard
    from exactly_once.guards.lease.ledger import StepLedger
    from exactly_once.processing.processor import Processor
    from exactly_once.worker.lane import Lane

    assert point in (*POINTS, RENEWING), point
    _wanted, _how, _marker = point, {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[how], marker
    real_run = Processor.run

    def run(self: Processor, message: Message, *args: Any, **kwargs: Any) -> Any:
        told = real_run(self, message, *args, **kwargs)
        if _hit.is_set() and is_victim(message.key or ""):
            _marker.write_text(OVER)
        return told

    Processor.run = run  # type: ignore[method-assign]

    def of_won(self: LeaseGuard, *args: Any) -> str:
        held = args[-1].held
        return str(held.row.key)

    real_claim = LeaseGuard.claim

    def claim(self: LeaseGuard, session: Session, row: Any) -> Any:
        _point("before the claim", row.key)
        made = real_claim(self, session, row)
        if isinstance(made, Won):
            _point("claimed", row.key)
        return made

    LeaseGuard.claim = claim  # type: ignore[method-assign]
    real_clock = sql.clock

    def clock() -> float:
        _point(RENEWING, "any-victim")  # nobody else runs for so long that it is renewed
        return real_clock()

    sql.clock = clock
    _wrap(LeaseGuard, "complete", "before complete", "", of_won)
    _wrap(LeaseGuard, "consume", "after COMMIT", "after complete", of_won)

    real_finish = StepLedger.finish

    def finish(self: StepLedger, begun: Any, value: Any) -> Any:
        stored = real_finish(self, begun, value)
        _point(f"the {_NTH[begun.name]} step recorded", self._held.row.key)
        return stored

    StepLedger.finish = finish  # type: ignore[method-assign]
    real_transacted = StepLedger._transacted

    def transacted(self: StepLedger, begun: Any, work: Any) -> bytes:
        _here.step = self._held.row.key
        try:
            result = real_transacted(self, begun, work)
        finally:
            del _here.step
        _point("after the transaction step's COMMIT", self._held.row.key)
        return result

    StepLedger._transacted = transacted  # type: ignore[method-assign]
    _wrap(StepLedger, "transact", "", "the transaction step recorded", lambda self, *_: self._held.row.key)
    real_committing = Watch.committing

    def committing(self: Watch) -> None:
        real_committing(self)
        if hasattr(_here, "step"):
            _point("before the transaction step's COMMIT", _here.step)
        elif self.lease is not None:
            _point("before COMMIT", self.lease.row.key)

    Watch.committing = committing  # type: ignore[method-assign]
    real_made = Lane.__init__

    def made(self: Lane, consumer: Any, *args: Any, **kwargs: Any) -> None:
        real_settle = consumer.settle

        def settle(verdicts: Any) -> None:
            numbers = [delivery.message.key or "" for delivery, _ in verdicts]
            for each in numbers:
                _point("before the settle", each)
            real_settle(verdicts)
            for each in numbers:
                _point("after the settle", each)

        consumer.settle = settle
        real_made(self, consumer, *args, **kwargs)

    Lane.__init__ = made  # type: ignore[method-assign]


# -- what is left ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Record:
    """What a store remembers of a message."""

    consumed: bool
    attempt: int
    steps: Mapping[str, tuple[bool, int]]
    """Of each step: whether it is finished, and by which attempt."""


def records_in_sql(engine: Engine) -> dict[str, Record]:
    """What PostgreSQL remembers, by key; read without the package's own reading."""
    t, s = tables().idempotent, tables().step
    with engine.connect() as connection:
        steps: dict[str, dict[str, tuple[bool, int]]] = {}
        mine = select(s.c.business_key, s.c.step, s.c.status, s.c.attempt).where(s.c.handler == HANDLERS["sql"])
        for key, step, status, attempt in connection.execute(mine):
            steps.setdefault(key, {})[step] = (status == 1, attempt)
        rows = connection.execute(select(t.c.business_key, t.c.status, t.c.retry_times))
        return {key: Record(status == 1, times + 1, steps.get(key, {})) for key, status, times in rows}


def records_in_redis(client: Any, keys: Sequence[str]) -> dict[str, Record]:
    """What Redis remembers of these keys, read field by field."""
    pipe = client.pipeline(transaction=False)
    for key in keys:
        pipe.hgetall("exactly_once:" + json.dumps([GROUP, HANDLERS["redis"], key]))
    found: dict[str, Record] = {}
    for key, fields in zip(keys, pipe.execute(), strict=True):
        steps: dict[str, tuple[bool, int]] = {}
        for name, value in fields.items():
            if name.startswith(b"step:"):
                _, finished, attempt, _ = value.partition(b"\n")[0].split(b" ")
                steps[name[5:].decode()] = (finished == b"1", int(attempt))
        if fields:
            found[key] = Record(fields[b"status"] == b"1", int(fields[b"attempt"]), steps)
    return found


# -- guarantees taken away, to see the tests turn red ---------------------------------------------------------------


def _no_token() -> None:
    """Whoever has the message or not: every change of a lease is let through."""
    from exactly_once.guards.lease import scripts
    from exactly_once.guards.lease.sql import SqlLeases

    SqlLeases._ours = lambda self, held: self._of(self._t, held.row)  # type: ignore[method-assign]

    def complete_in(self: SqlLeases, connection: Any, held: Any) -> bool:
        changed = self._t.update().where(self._of(self._t, held.row)).values(status=1, lease_until=None)
        return bool(connection.execute(changed).rowcount == 1)

    SqlLeases.complete_in = complete_in  # type: ignore[method-assign]
    for name in ("COMPLETE", "RELEASE", "STEP"):
        text = getattr(scripts, name)
        broken = text.replace("or known[2] ~= ARGV[1]", "").replace(
            "if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then return 0 end", ""
        )
        assert broken != text, name
        setattr(scripts, name, broken)


def _no_steps() -> None:
    """What earlier attempts finished is forgotten."""
    from exactly_once.guards.lease.guard import LeaseGuard

    real = LeaseGuard.claim

    def claim(self: LeaseGuard, session: Any, row: Any) -> Any:
        claimed = real(self, session, row)
        if (held := getattr(claimed, "held", None)) is not None:
            held.steps = ()
        return claimed

    LeaseGuard.claim = claim  # type: ignore[method-assign]


def _no_fence() -> None:
    """Complete follows the COMMIT, also where both could be one transaction."""
    from exactly_once.guards.lease.guard import LeaseGuard

    LeaseGuard.complete = lambda self, session, won: None  # type: ignore[method-assign]
    LeaseGuard.consume = lambda self, won: self._store.complete(won.held)  # type: ignore[method-assign]


def _no_marker() -> None:
    """A call that is to happen at most once is one like any other."""
    from exactly_once.guards.lease.ledger import StepLedger

    real = StepLedger.begin

    def begin(self: StepLedger, name: str, returns: Any, *, at_most_once: bool = False) -> Any:
        return real(self, name, returns)

    StepLedger.begin = begin  # type: ignore[method-assign]


def _no_lease() -> None:
    """A lease that runs keeps nobody out."""
    from exactly_once.database.dialects import postgresql_lease
    from exactly_once.guards.lease import scripts

    postgresql_lease.TAKE = postgresql_lease.TAKE.replace("lease_until <= clock_timestamp()", "true")  # type: ignore[misc]
    scripts.CLAIM = scripts.CLAIM.replace("tonumber(till) <= now", "true")  # type: ignore[misc]


def _no_key() -> None:
    """The idempotency key is another one each time."""
    from uuid import uuid4

    from exactly_once.guards.lease import ledger as step_ledger

    step_ledger.step_key = lambda *words: uuid4().hex  # type: ignore[assignment]


def _no_asking() -> None:
    """A run that stood still goes on as if no time had passed."""
    from exactly_once.guards.lease.contract import HeldLease

    HeldLease.may_insist = lambda self: not self.lost  # type: ignore[method-assign]


def _no_complete() -> None:
    """A message that was consumed is not known to be."""
    from exactly_once.guards.lease import scripts
    from exactly_once.guards.lease.sql import SqlLeases

    def complete_in(self: SqlLeases, connection: Any, held: Any) -> bool:
        changed = self._t.update().where(self._ours(held)).values(token=None, lease_until=None)
        return bool(connection.execute(changed).rowcount == 1)

    SqlLeases.complete_in = complete_in  # type: ignore[method-assign]
    scripts.COMPLETE = scripts.RELEASE  # type: ignore[misc]


BREAKS: Mapping[str, Callable[[], None]] = {
    "token": _no_token,
    "steps": _no_steps,
    "fence": _no_fence,
    "marker": _no_marker,
    "lease": _no_lease,
    "key": _no_key,
    "asking": _no_asking,
    "complete": _no_complete,
}


# -- the process -------------------------------------------------------------------------------------------------------


def main(url: str, port: str, point: str = "", how: str = "", marker: str = "") -> int:
    """Run a worker until it is told to end.

    Args:
        url: The transport.
        port: The outside service's.
        point: Where it happens; nowhere if empty.
        how: What happens: kill or stop.
        marker: The file that says that it has happened.
    """
    _service.port = int(port)
    if what := os.environ.get("EXACTLY_ONCE_TEST_BREAK"):
        BREAKS[what]()
    if point:
        install(point, how, Path(marker))
    return eo.run(url)
