"""A handler or its COMMIT ends badly in a way nobody thought of: it is counted, bounded and written down, or it was no failure.

The kind: an exception that is no `Exception`, a hook that raises before or after COMMIT, a refusal with a number of the user's
own, a connection that is gone each time, a store that goes away at the worst moment, an order that is asked of a message that
was done long ago. Nothing of it may come again for ever, pass in silence, or happen twice.
"""

import asyncio
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from itertools import count
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event, text, update
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import Session

from exactly_once import ExactlyOnce, Lease, Message, Misuse, Outcome, Retry
from exactly_once.database.server_clock import utcnow
from tests.integration.failing import THREE, Panic
from tests.integration.grounds import ground
from tests.integration.outside import column
from tests.integration.shop import COLOURS, GROUP, Shop, on, order, put, shops
from tests.integration.ways import (
    ALONE,
    IN_A_BATCH,
    IN_A_LIST,
    IN_A_STEP,
    UNDER_A_LEASE,
    Way,
    by_itself,
    cancel_this_task,
    driver_of,
    each_way,
    mariadb_procedures,
    requeued,
    thrice,
)
from tests.services.proxy import Proxy
from tests.services.redis import Redis
from tests.waiting import until

__all__ = ["ground"]

pytestmark = pytest.mark.nightly(meet=2)

P, D, F, DEAD = Outcome.PROCESSED, Outcome.DUPLICATE, Outcome.FAILED, Outcome.DEAD

_names = count(1)
PATIENCE_S = 10


# -- exceptions that are no Exception ----------------------------------------------------------------------------------


class Timeout(BaseException):
    """As gevent's."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


RAISED: dict[str, Callable[[], BaseException]] = {
    "Panic": lambda: Panic("attempt to subtract with overflow"),
    "Timeout": lambda: Timeout(5.0),
    "CancelledError": lambda: asyncio.CancelledError("nobody asked for it"),
    "a group of them": lambda: BaseExceptionGroup("two", [Panic("one"), ValueError("two")]),
}


def raises(make: Callable[[], BaseException]) -> Callable[[Session, Any], None]:
    def do(session: Session, no: Any) -> None:
        put(session, "undone")
        raise make()

    return do


@each_way
@pytest.mark.parametrize("kind", RAISED)
def test_what_is_no_exception_is_counted_and_kept_all_the_same(shop: Shop, way: Way, kind: str) -> None:
    way.handles(shop, raises(RAISED[kind]), retry=THREE)
    ends = thrice(shop, way)
    for end in ends[:2]:  # `process` raises it on, when it is written down; a caller's task is not cancelled by it
        if way.together or kind == "CancelledError":
            assert end is F
        else:
            assert type(end) is type(RAISED[kind]())
    assert ends[2] is DEAD
    row = shop.failure()
    assert (row.state, row.attempts) == ("dead", 3)
    assert row.error_class in (type(RAISED[kind]()).__name__, "Misuse", "HandlerExited")
    assert type(RAISED[kind]()).__name__ in f"{row.error_class} {row.error_text}"
    assert shop.effects() == []
    shop.borrow()


def test_what_is_raised_on_keeps_no_other_handler_from_running(shop: Shop) -> None:
    shop.handles(lambda session: raises(RAISED["Panic"])(session, None), name="first", retry=THREE)
    shop.handles(lambda session: put(session, "second"), name="second", retry=THREE)
    with pytest.raises(Panic):
        shop.process(order())
    assert shop.effects() == ["second"]
    assert shop.failure().attempts == 1


def test_a_limit_of_the_callers_own_ends_the_call_and_not_one_run_of_several(shop: Shop) -> None:
    runs: list[int] = []

    def do(session: Session) -> None:
        runs.append(1)
        raise Timeout(5.0)

    shop.handles(do, retry=Retry(immediate=2, delays=[0.01], max_attempts=9))
    with pytest.raises(Timeout):
        shop.process(order())
    assert len(runs) == 1


@pytest.mark.parametrize("number", [1213, 1205, 2006, 1040])
def test_a_number_that_is_no_drivers_is_a_failure_like_any_other(shop: Shop, number: int) -> None:
    runs: list[int] = []

    def do(session: Session) -> None:
        runs.append(1)
        raise KeyError(number)

    shop.handles(do, retry=THREE)
    assert shop.process(order()) is F
    assert (len(runs), shop.failure().error_class) == (1, "KeyError")


@pytest.mark.parametrize(
    ("scheme", "way", "kind"),
    [("memory://panics-{n}", ALONE, kind) for kind in RAISED]
    + [("memory://panics-{n}", way, "Panic") for way in (IN_A_BATCH, IN_A_LIST, UNDER_A_LEASE)]
    + [("sql://", ALONE, "Panic")],
    ids=str,
)
def test_a_worker_counts_it_and_goes_on(shop: Shop, way: Way, kind: str, scheme: str) -> None:
    runs: Counter[Any] = Counter()

    def do(session: Session, no: Any) -> None:
        runs[no] += 1
        put(session, str(no))
        if no == 2:
            raise RAISED[kind]()

    shop.eo = ExactlyOnce(shop.url, group=GROUP)
    way.handles(shop, do, retry=THREE)
    url = scheme.format(n=next(_names))
    with shop.eo.worker(url, concurrency=2, drain_timeout=timedelta(seconds=2)) as worker:
        with shop.eo.producer(url) as producer:
            producer.send_all([order(no) for no in (1, 2, 3)])
        until(lambda: worker.counts.acked == 3, "all three are acknowledged")
    row = shop.failure()
    assert (row.business_key, row.state, row.attempts) == ("2", "dead", 3)
    assert sorted(shop.effects()) == ["1", "3"]


EXITS: dict[str, Callable[[], BaseException]] = {
    "SystemExit": lambda: SystemExit(3),
    "a group of it": lambda: BaseExceptionGroup("of a task group", [SystemExit(3)]),
    "a group of it and others": lambda: BaseExceptionGroup("two", [ValueError("one"), Panic("two"), SystemExit(3)]),
}


@each_way
@pytest.mark.parametrize("kind", EXITS)
def test_a_worker_counts_an_exit_also_one_in_a_group_of_exceptions(ground: Shop, way: Way, kind: str) -> None:
    shop = ground
    shop.clear()

    def do(session: Session, no: Any) -> None:
        put(session, str(no))
        if no == 2:
            raise EXITS[kind]()

    shop.eo = ExactlyOnce(shop.url, group=GROUP)
    way.handles(shop, do, retry=THREE)
    url = f"memory://exits-{next(_names)}"
    with shop.eo.worker(url, concurrency=2, drain_timeout=timedelta(seconds=2)) as worker:
        with shop.eo.producer(url) as producer:
            producer.send_all([order(no) for no in (1, 2, 3)])
        until(lambda: worker.counts.acked == 3, "all three are acknowledged")
    row = shop.failure()
    assert (row.business_key, row.state, row.attempts) == ("2", "dead", 3)
    assert "sys.exit(3)" in row.error_text
    assert sorted(shop.effects()) == ["1", "3"]


@pytest.mark.parametrize(
    ("way", "kind"), [*((ALONE, kind) for kind in RAISED), (UNDER_A_LEASE, "Panic"), (IN_A_STEP, "Panic")], ids=str
)
def test_the_pump_counts_it_too(shop: Shop, way: Way, kind: str) -> None:
    ends: list[Callable[[], BaseException]] = [lambda: ValueError("the first time")]
    runs: list[int] = []

    def do(session: Session, no: Any) -> None:
        runs.append(1)
        raise ends[0]()

    shop.eo = ExactlyOnce(shop.url, group=GROUP)
    way.handles(shop, do, retry=Retry(immediate=0, delays=[0.01], max_attempts=1))
    assert shop.process(order(1)) is DEAD
    ends[0] = RAISED[kind]
    requeued(shop, [shop.failure().id])
    with shop.eo.worker(f"memory://pumped-{next(_names)}", concurrency=1, drain_timeout=timedelta(seconds=2)):
        until(lambda: len(runs) > 1, "the pump has run it")
        until(lambda: shop.failure().state == "dead", "the failure of the pump's run is written down")
    assert len(runs) == 2
    assert "the first time" not in shop.failure().error_text


STOPS: dict[str, Callable[[], object]] = {
    "KeyboardInterrupt": lambda: _raise(KeyboardInterrupt()),
    "GeneratorExit": lambda: _raise(GeneratorExit()),
    "SystemExit": lambda: _raise(SystemExit(1)),
    "BaseExceptionGroup": lambda: _raise(BaseExceptionGroup("g", [ValueError("one"), KeyboardInterrupt()])),
    "CancelledError": cancel_this_task,
}


def _raise(error: BaseException) -> None:
    raise error


@by_itself
@pytest.mark.parametrize("stop", STOPS)
# a thread is not cancelled
@pytest.mark.where(lambda ground, stop, **_: ground[1] == "async" or stop != "CancelledError")
def test_a_stop_of_the_callers_is_raised_on_and_is_no_failure(shop: Shop, way: Way, stop: str) -> None:
    stopped = [True]

    def do(session: Session, no: Any) -> None:
        put(session, str(no))
        if stopped:
            STOPS[stop]()

    way.handles(shop, do, retry=Retry(immediate=0, max_attempts=1))
    (end,) = way.attempted(shop, [order(1)])
    assert type(end).__name__ == stop
    assert shop.failures() == []
    assert shop.effects() == []
    shop.borrow()
    stopped.clear()
    assert shop.process(order(1, attempt=2)) is P
    assert shop.effects() == ["stranger", "1"]


# -- hooks around COMMIT -----------------------------------------------------------------------------------------------


def hooked(when: str, hook: Callable[..., object]) -> Callable[[Session, Any], None]:
    """A handler in whose session a hook of the program's raises."""

    def do(session: Session, no: Any) -> None:
        put(session, str(no))
        if no == 1:
            event.listen(session, when, hook)

    return do


def _refuses(*_: object) -> None:
    raise ValueError("the hook refuses")


@each_way
def test_a_hook_that_raises_before_commit_is_a_failure_that_counts(shop: Shop, way: Way) -> None:
    way.handles(shop, hooked("before_commit", _refuses), retry=THREE)
    assert thrice(shop, way) == [F, F, DEAD]
    row = shop.failure()
    assert (row.state, row.attempts, row.error_class) == ("dead", 3, "ValueError")
    assert "the hook refuses" in row.error_text
    assert shop.effects() == []
    shop.borrow()


@pytest.mark.parametrize("way", [IN_A_BATCH, IN_A_LIST], ids=str)
def test_such_a_hook_of_one_message_costs_its_group_nothing(shop: Shop, way: Way) -> None:
    way.handles(shop, hooked("before_commit", _refuses), retry=THREE)
    assert way.deliver(shop, [order(no) for no in (1, 2, 3)]) == [F, P, P]
    assert sorted(shop.effects()) == ["2", "3"]
    shop.borrow()


@pytest.mark.parametrize("way", [ALONE, IN_A_BATCH, IN_A_LIST, UNDER_A_LEASE], ids=str)
def test_a_hook_that_raises_after_commit_changes_nothing(shop: Shop, way: Way) -> None:
    way.handles(shop, hooked("after_commit", _refuses))
    assert way.deliver(shop, [order(1)]) == [P]
    assert way.deliver(shop, [order(1, attempt=2)]) == [D]
    assert shop.effects() == ["1"]
    assert shop.failures() == []
    shop.borrow()


def test_a_hook_that_raises_after_a_steps_commit_repeats_no_effect(shop: Shop) -> None:
    """The handler is told of it by the step, and may fail of it; the step is done all the same."""
    IN_A_STEP.handles(shop, hooked("after_commit", _refuses))
    outcomes = IN_A_STEP.deliver(shop, [order(1, attempt=attempt) for attempt in (1, 2, 3)])
    assert outcomes in ([P, D, D], [F, P, D])
    assert shop.effects() == ["1"]
    shop.borrow()


@pytest.mark.parametrize("how", ["after_commit", "after_commit, and the session is broken"])
def test_a_hook_that_raises_after_commit_repeats_no_effect_under_a_lease_in_redis(
    shop: Shop, redis_url: str, how: str
) -> None:
    def hook(session: Session) -> None:
        if how != "after_commit":
            session.invalidate()
        raise ValueError("the hook refuses")

    ALONE.handles(shop, hooked("after_commit", hook), guard=Lease(timedelta(seconds=30), store=redis_url))
    assert [shop.process(order(1, attempt=attempt)) for attempt in (1, 2, 3)] == [P, D, D]
    assert shop.effects() == ["1"]
    assert shop.failures() == []


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("dialect", ["postgres", "mariadb"])
def test_a_redis_that_is_full_at_completion_repeats_no_effect(
    request: pytest.FixtureRequest, own_redis: Redis, dialect: str, colour: str
) -> None:
    for shop in shops(request, dialect, colour, pool_size=3):
        runs: list[int] = []

        def do(session: Session, no: Any, runs: list[int] = runs) -> None:
            runs.append(1)
            put(session, str(no))
            if len(runs) == 1:
                own_redis.tell("CONFIG", "SET", "maxmemory", "1")

        ALONE.handles(shop, do, guard=Lease(timedelta(seconds=2), store=own_redis.url))
        first = shop.process(order(1))
        own_redis.tell("CONFIG", "SET", "maxmemory", "0")
        threading.Event().wait(2.2)  # the lease is over
        outcomes = [first, *(shop.process(order(1, attempt=attempt)) for attempt in (2, 3, 4))]
        assert shop.effects() == ["1"], "the effect was repeated, without a crash"
        assert outcomes[-1].acknowledge
        with shop.outside.begin() as connection:
            connection.execute(text("DELETE FROM message_failure"))


# -- COMMITs that are refused ------------------------------------------------------------------------------------------


@each_way
@pytest.mark.parametrize("code", ["ZZ001", "0A000", "P0001", "23514", "57014", "XX000", "F0000", "22000"])
@on("postgres")
def test_a_commit_that_a_deferred_trigger_refuses_counts_whatever_its_number(shop: Shop, way: Way, code: str) -> None:
    with shop.outside.begin() as connection:
        connection.execute(
            text(
                "CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
                " $$ BEGIN RAISE EXCEPTION 'refused at the end' USING ERRCODE = NEW.text; END $$"
            )
        )
        connection.execute(text("DROP TRIGGER IF EXISTS refuse ON only_one"))
        connection.execute(
            text(
                "CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON only_one DEFERRABLE INITIALLY DEFERRED"
                " FOR EACH ROW EXECUTE FUNCTION refuse()"
            )
        )

    def do(session: Session, no: Any) -> None:
        put(session, str(no))
        if no == 1:
            session.execute(text("INSERT INTO only_one VALUES (:code)"), {"code": code})

    way.handles(shop, do, retry=THREE)
    assert thrice(shop, way) == [F, F, DEAD]
    assert (shop.failure().state, shop.failure().attempts) == ("dead", 3)
    assert "SQLSTATE" in shop.failure().error_text
    assert shop.effects() == []
    shop.borrow()


@each_way
@on("postgres", "sqlite")  # MySQL and MariaDB check keys at once
def test_a_commit_that_a_deferred_key_refuses_counts(shop: Shop, way: Way) -> None:
    key = "REFERENCES parent (id) DEFERRABLE INITIALLY DEFERRED"
    with shop.outside.begin() as connection:
        connection.execute(text("CREATE TABLE IF NOT EXISTS parent (id INTEGER PRIMARY KEY)"))
        connection.execute(text(f"CREATE TABLE IF NOT EXISTS child (id INTEGER {key})"))
    if shop.dialect == "sqlite":
        for engine in (shop.engine, shop.async_engine.sync_engine):
            engine.dispose()
            if not event.contains(engine, "connect", _foreign_keys):
                event.listen(engine, "connect", _foreign_keys)

    def do(session: Session, no: Any) -> None:
        put(session, str(no))
        session.execute(text("INSERT INTO child VALUES (7)"))

    way.handles(shop, do, retry=THREE)
    assert thrice(shop, way) == [F, F, DEAD]
    assert (shop.failure().state, shop.failure().attempts) == ("dead", 3)
    assert shop.effects() == []
    shop.borrow()


def _foreign_keys(dbapi: Any, record: Any) -> None:
    cursor = dbapi.cursor()
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _gone(shop: Shop, connection: int) -> bool:
    return connection not in column(shop, "SELECT id FROM information_schema.processlist")


# under a lease our own last statement meets the dead connection before COMMIT does: a failure that is counted anyway
@pytest.mark.parametrize("way", [ALONE, IN_A_BATCH, IN_A_LIST], ids=str)
@pytest.mark.parametrize("colour", COLOURS)
def test_a_connection_that_the_server_ends_before_each_commit_is_bounded_and_then_waits_for_a_person(
    request: pytest.FixtureRequest, way: Way, colour: str
) -> None:
    """MariaDB's wait_timeout is shorter than the handler's pause: nobody knows what COMMIT did, time and again."""
    for shop in shops(request, "mariadb", colour, pool_size=3):
        more: dict[str, Any] = {"connect_args": {"init_command": "SET SESSION wait_timeout = 1"}}
        shop.fresh_eo(create_engine(shop.url, **more), create_async_engine(shop.async_engine.url, **more))

        def do(session: Session, no: Any, shop: Shop = shop) -> None:
            put(session, str(no))
            here = session.execute(text("SELECT CONNECTION_ID()")).scalar_one()
            until(partial(_gone, shop, here), "the server has ended it")

        way.handles(shop, do)
        deliveries = 0
        while not shop.failures():
            deliveries += 1
            assert deliveries <= 10, "unknown, ten times, and nobody is told"
            # a loop that counts no deliveries: else closing an earlier failure's row would meet the dead connection first
            way.attempted(shop, [order(1)])
        row = shop.failure()
        assert row.state == "waiting"
        assert row.error_text
        assert shop.effects() == []


# -- a store that goes away at the worst moment ------------------------------------------------------------------------


def through(shop: Shop, proxy: Proxy) -> tuple[Engine, AsyncEngine]:
    engine = create_engine(proxy.url)
    async_engine = create_async_engine(shop.async_engine.url.set(host="127.0.0.1", port=proxy.port))
    shop.fresh_eo(engine, async_engine)
    return engine, async_engine


@pytest.mark.parametrize("way", [ALONE, IN_A_BATCH, IN_A_LIST], ids=str)
@pytest.mark.parametrize("end", ["raises", "returns"])
@pytest.mark.parametrize("hidden", ["driver", "CALL truncates()"])
# SQLite's file is always there, and no procedure of PostgreSQL's commits inside a transaction
@pytest.mark.where(lambda ground, hidden, **_: ground[0] in ("mariadb", *(["postgres"] if hidden == "driver" else [])))
def test_a_hidden_commit_that_could_not_be_recorded_is_broken_when_the_store_is_back(
    shop: Shop, way: Way, end: str, hidden: str
) -> None:
    if shop.dialect == "mariadb":
        mariadb_procedures(shop, truncates="() BEGIN TRUNCATE TABLE staging; INSERT INTO staging VALUES (1); END")
    runs: Counter[Any] = Counter()
    with Proxy(shop.url) as proxy:
        engine, async_engine = through(shop, proxy)

        def do(session: Session, no: Any) -> None:
            runs[no] += 1
            put(session, f"{no} before")
            if no == 2 and runs[no] == 1:
                if hidden == "driver":
                    driver_of(session).commit()
                else:
                    with suppress(Misuse):  # it is told at once; hidden, it is told when the handler ends
                        session.execute(text(hidden))
                proxy.go_down()
                if end == "raises":
                    raise ValueError("and the store is gone")
            else:
                put(session, f"{no} after")

        way.handles(shop, do)
        numbers = [1, 2, 3] if way.together else [2]
        ends = way.attempted(shop, [order(no) for no in numbers])
        assert not [end for end in ends if isinstance(end, Outcome) and end.acknowledge]
        proxy.come_up()
        for attempt in (2, 3):  # the first may still find the store away
            way.attempted(shop, [order(no, attempt=attempt) for no in numbers])
        effects = Counter(shop.effects())
        assert max(effects.values()) == 1, effects
        broken = {row.business_key for row in shop.failures() if row.state == "broken"}
        assert "2" in broken, "half of its effects are there, and nobody is told"
        for no in numbers:
            whole = effects[f"{no} before"] == effects[f"{no} after"] == 1
            assert whole or str(no) in broken, f"message {no}"
        ran = runs[2]
        assert way.deliver(shop, [order(no, attempt=4) for no in numbers]) == [D] * len(numbers)
        assert runs[2] == ran == 1
        shop.await_(async_engine.dispose())
        engine.dispose()


# -- whose claim a broken one is ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [ALONE, UNDER_A_LEASE], ids=str)
@pytest.mark.parametrize("seconds", [-3600, -1, 3600])
def test_requeue_takes_a_broken_ones_claim_back_whatever_the_clock_says(shop: Shop, way: Way, seconds: int) -> None:
    runs: list[int] = []

    def do(session: Session, no: Any) -> None:
        runs.append(1)
        put(session, "effect")
        if len(runs) == 1:
            driver_of(session).commit()

    way.handles(shop, do)
    assert shop.process(order(1)) is DEAD
    t = shop.tables.failure
    with shop.outside.begin() as connection:  # as if the server's clock had been set between the claim and this row
        connection.execute(update(t).values(last_failed_at=utcnow(seconds), first_failed_at=utcnow(seconds)))
    requeued(shop, [shop.failure().id])
    assert [shop.process(order(1, attempt=2)), shop.process(order(1, attempt=3))] == [P, D]
    assert len(runs) == 2
    assert shop.failure().state == "resolved"


@pytest.mark.parametrize("seconds", [-3600, 3600])
def test_requeue_keeps_a_claim_that_is_another_runs(shop: Shop, seconds: int) -> None:
    """The broken one was discarded by hand and run again as another copy: that one's claim is not to be taken."""
    runs: list[int] = []

    def do(session: Session, no: Any) -> None:
        runs.append(1)
        put(session, "effect")
        if len(runs) == 1:
            driver_of(session).commit()

    ALONE.handles(shop, do)
    assert shop.process(order(1)) is DEAD
    t, claims = shop.tables.failure, shop.tables.idempotent
    with shop.outside.begin() as connection:
        connection.execute(claims.delete())  # somebody's own repair
    assert shop.process(order(1, attempt=1)) is P
    with shop.outside.begin() as connection:
        connection.execute(update(t).values(state="broken", last_failed_at=utcnow(seconds)))
    requeued(shop, [shop.failure().id])
    assert shop.process(order(1, attempt=2)) is D
    assert len(runs) == 2


# -- order, and what was done long ago ---------------------------------------------------------------------------------


def in_order(no: int, *, attempt: int = 1) -> Message:
    return order(no, attempt=attempt, ordering_key="one key")


def fails_at(*bad: int) -> tuple[Callable[[Session, Any], None], set[int]]:
    failing = set(bad)

    def do(session: Session, no: Any) -> None:
        put(session, str(no))
        if no in failing:
            raise ValueError(f"number {no}")

    return do, failing


@pytest.mark.parametrize("way", [ALONE, IN_A_BATCH, UNDER_A_LEASE], ids=str)
@pytest.mark.parametrize("most", [1, 5], ids=["dead", "retrying"])
def test_what_was_consumed_is_a_duplicate_whoever_of_its_key_failed_since(shop: Shop, way: Way, most: int) -> None:
    do, failing = fails_at(2)
    way.handles(shop, do, ordered=True, retry=Retry(immediate=0, delays=[60], max_attempts=most))
    assert way.deliver(shop, [in_order(1)]) == [P]
    assert way.deliver(shop, [in_order(2)]) == [DEAD if most == 1 else F]
    assert way.deliver(shop, [in_order(1, attempt=2)]) == [D]
    assert way.deliver(shop, [in_order(1)]) == [D]
    assert way.deliver(shop, [in_order(3)]) == [Outcome.WAITING], "what is new still waits"
    failing.clear()
    if most == 5:
        assert way.deliver(shop, [in_order(2, attempt=2)]) == [P]
        assert way.deliver(shop, [in_order(3, attempt=2)]) == [P]
        assert shop.effects() == ["1", "2", "3"]


@pytest.mark.parametrize("scheme", ["memory://again-{n}", "sql://"])
@pytest.mark.parametrize("way", [ALONE, IN_A_BATCH], ids=str)
def test_a_broker_that_reads_its_queue_from_the_start_is_answered_at_once(shop: Shop, way: Way, scheme: str) -> None:
    do, _ = fails_at(4)
    shop.eo = ExactlyOnce(shop.url, group=GROUP)
    way.handles(shop, do, ordered=True, retry=Retry(immediate=0, max_attempts=1))
    url = scheme.format(n=next(_names))
    with shop.eo.worker(url, concurrency=2, drain_timeout=timedelta(seconds=2)) as worker:
        with shop.eo.producer(url) as producer:
            producer.send_all([in_order(no) for no in (1, 2, 3, 4)])
            until(lambda: worker.counts.acked == 4, "all four are acknowledged")
            assert shop.failure().state == "dead"
            producer.send_all([in_order(no) for no in (1, 2, 3)])  # once more, from the start
            producer.send_all([order("other", ordering_key="another key")])
            until(lambda: worker.counts.acked == 8, "what was consumed is a duplicate")
        assert worker.counts.redelivered == 0
        assert worker.counts.outcomes["waiting"] == 0
    assert sorted(shop.effects()) == ["1", "2", "3", "other"]
