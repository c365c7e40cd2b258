"""Processes that fork: after first use, inside a handler, with a transaction open; each effect once, or a sentence."""

import asyncio
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from sqlalchemy import StaticPool, create_engine, select, text
from sqlalchemy.orm import Session

import exactly_once.alembic
from exactly_once import ExactlyOnce, Lease, Lock, Message, Outcome, SendFailed, Steps
from exactly_once.transports.memory import forget
from tests import length
from tests.integration.guards.forking import Forked, forked
from tests.integration.shop import GROUP, ONE_TRY, Shop, order, put

pytestmark = pytest.mark.nightly(meet=2)

CHILDREN, EACH = (12, 24) if length.WHOLE else (4, 8)
ROOT = Path(__file__).parents[3]


def in_child(shop: Shop, message: Message) -> Outcome:
    """As `shop.process`, on a loop of the child's own."""
    if shop.is_async:
        return asyncio.run(shop.eo.aprocess(message))
    return shop.eo.process(message)


def messages(who: object) -> list[Message]:
    return [order(f"{who}-{n}") for n in range(EACH)]


def each_once(shop: Shop) -> None:
    """The parent has processed a message; then it and its children process side by side."""
    assert shop.process(order("first")) is Outcome.PROCESSED
    children = [Forked(lambda n=n: [in_child(shop, message).value for message in messages(n)]) for n in range(CHILDREN)]
    mine = [shop.process(message) for message in messages("parent")]
    told = [child.result() for child in children]
    assert mine == [Outcome.PROCESSED] * EACH
    assert told == [["processed"] * EACH] * CHILDREN
    assert sorted(shop.effects()) == sorted(
        ["first", *(f"{who}-{n}" for who in [*range(CHILDREN), "parent"] for n in range(EACH))]
    )
    assert shop.failures() == []


def handles_orders(shop: Shop, **more: Any) -> None:
    options: dict[str, Any] = {"name": "handler", "key": "no", "retry": ONE_TRY} | more
    if shop.is_async:
        from sqlalchemy.ext.asyncio import AsyncSession

        @shop.eo.handler("orders", **options)
        async def awaited(session: AsyncSession, body: dict[str, Any]) -> None:
            await session.run_sync(put, str(body["no"]))
    else:

        @shop.eo.handler("orders", **options)
        def plain(session: Session, body: dict[str, Any]) -> None:
            put(session, str(body["no"]))


@pytest.mark.nightly
def test_children_of_a_process_that_has_processed_before_take_effect_once_each(shop: Shop) -> None:
    handles_orders(shop)
    each_once(shop)


@pytest.mark.nightly
def test_children_under_leases_in_the_database_take_effect_once_each(shop: Shop) -> None:
    handles_orders(shop, guard=Lease(timedelta(seconds=5)))
    each_once(shop)


@pytest.mark.nightly
def test_children_under_leases_in_redis_take_effect_once_each(shop: Shop, redis_url: str) -> None:
    shop.fresh_eo(redis=redis_url, group=f"shop-{os.urandom(4).hex()}")
    handles_orders(shop, guard=Lease(timedelta(seconds=5), store="redis"))
    each_once(shop)


@pytest.mark.nightly
def test_children_of_an_application_that_makes_its_own_engines_take_effect_once_each(shop: Shop) -> None:
    shop.eo = ExactlyOnce(shop.url, group=GROUP)
    handles_orders(shop)
    each_once(shop)


def test_a_child_forked_while_other_threads_are_in_handlers_takes_effect_once(shop: Shop) -> None:
    """Whatever locks those threads hold at the fork are held for ever in the child."""
    if shop.dialect == "sqlite":
        pytest.skip("a child forked in a transaction of SQLite is refused: see the next test")
    if shop.is_async:
        pytest.skip("threads are the sync door's")
    shop.eo = ExactlyOnce(shop.url, group=GROUP)
    handles_orders(shop)
    assert shop.process(order("first")) is Outcome.PROCESSED
    stop = Event()

    def turn(who: int) -> None:
        n = 0
        while not stop.is_set():
            n += 1
            assert shop.eo.process(order(f"thread-{who}-{n}")) is Outcome.PROCESSED

    threads = [Thread(target=turn, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    try:
        told = [forked(lambda n=n: in_child(shop, order(f"child-{n}")).value) for n in range(12)]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert told == ["processed"] * 12
    assert len(set(shop.effects())) == len(shop.effects()) == len(shop.claims())


# -- forked inside ---------------------------------------------------------------------------------------------------------


def forks_inside(shop: Shop, inside: Callable[[Session], Any], **more: Any) -> list[Any]:
    """Register a handler that forks: the child does this with the session, the parent goes on."""
    said: list[Any] = []

    def do(session: Session) -> None:
        put(session, "before")
        child = Forked(lambda: inside(session))
        said.append(child.said())
        put(session, "after")

    shop.handles(do, **more)
    return said


def test_a_session_is_refused_in_a_child_that_its_handler_forks(shop: Shop) -> None:
    said = forks_inside(shop, lambda session: put(session, "child"))
    assert shop.process(order()) is Outcome.PROCESSED
    ((kind, name, words, _),) = said
    assert (kind, name) == ("raised", "ForkedProcess")
    assert "forked while a handler ran" in words
    shop.assert_kept("before", "after", claims=["A-1"])


@pytest.mark.parametrize("verb", ["commit", "flush", "connection"])
def test_what_a_child_forked_inside_a_handler_asks_of_its_session_reaches_no_server(shop: Shop, verb: str) -> None:
    said = forks_inside(shop, lambda session: str(getattr(session, verb)()))
    assert shop.process(order()) is Outcome.PROCESSED
    assert len(said) == 1
    shop.assert_kept("before", "after", claims=["A-1"])


@pytest.mark.parametrize("verb", ["rollback", "close"])
def test_a_child_forked_inside_a_handler_rolls_nothing_back(shop: Shop, verb: str) -> None:
    forks_inside(shop, lambda session: getattr(session, verb)())
    assert shop.process(order()) is Outcome.PROCESSED
    shop.assert_kept("before", "after", claims=["A-1"])


@pytest.mark.parametrize("where", ["between steps", "in the call of a step", "in its transaction"])
def test_a_step_is_refused_in_a_child_that_its_handler_forks(shop: Shop, where: str) -> None:
    """It would be recorded beside the parent's, which knows nothing of it: its retry could not go on."""
    said: list[Any] = []
    calls: list[str] = []
    failed: list[bool] = []

    def child(steps: Steps) -> None:
        if where == "in its transaction":
            steps.transaction("child", lambda session: put(session, "child"))
        else:
            steps.run("child", lambda key: calls.append("child"))

    @shop.eo.handler("orders", name="handler", key="no", guard=Lease(timedelta(seconds=30)), retry=ONE_TRY)
    def handler(body: dict[str, Any], steps: Steps, session: Session) -> None:
        steps.run("first", lambda key: said.append(Forked(lambda: child(steps)).said()) if "call" in where else None)
        if "call" not in where:
            said.append(Forked(lambda: child(steps)).said())
        steps.run("second", lambda key: None)
        put(session, "parent")
        if not failed:
            failed.append(True)
            raise ConnectionError("once")

    assert shop.process(order()) is Outcome.FAILED
    assert [shop.process(order(attempt=attempt)) for attempt in (2, 3)] == [Outcome.PROCESSED, Outcome.DUPLICATE]
    assert said[0][:2] == ("raised", "ForkedProcess")
    assert "forked while a handler ran" in said[0][2]
    assert shop.effects() == ["parent"]
    with shop.outside.connect() as connection:
        recorded = connection.execute(select(shop.tables.step.c.step).order_by(shop.tables.step.c.ordinal)).scalars()
        assert list(recorded) == ["first", "second"]


def test_the_end_of_a_step_in_a_child_that_its_call_forked_is_not_recorded(shop: Shop) -> None:
    """The child comes back from the call as its parent does: one of them recorded the step, and the other went on alone."""
    out, into = os.pipe()

    @shop.eo.handler("orders", name="handler", key="no", guard=Lease(timedelta(seconds=30)), retry=ONE_TRY)
    def handler(body: dict[str, Any], steps: Steps, session: Session) -> None:
        pids: list[int] = []
        try:
            steps.run("forks", lambda key: pids.append(os.fork()))
            if pids == [0]:
                os.write(into, b"went on")
        except BaseException as error:
            if pids == [0]:
                os.write(into, type(error).__name__.encode())
            else:
                raise
        if pids == [0]:
            os._exit(0)
        os.waitpid(pids[0], 0)
        put(session, "parent")

    assert [shop.process(order()), shop.process(order())] == [Outcome.PROCESSED, Outcome.DUPLICATE]
    assert os.read(out, 100) == b"ForkedProcess"
    assert shop.effects() == ["parent"]
    os.close(out)
    os.close(into)


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
@pytest.mark.parametrize("guard", [None, "lease", "lock"])
def test_a_child_that_comes_back_from_the_handler_is_refused_and_nothing_is_recorded(
    shop: Shop, fails: bool, guard: str | None, redis_url: str
) -> None:
    shop.fresh_eo(redis=redis_url, group=f"shop-{os.urandom(4).hex()}")
    more: dict[str, Any] = {}
    if guard is not None:
        more["guard"] = Lease(timedelta(seconds=20)) if guard == "lease" else Lock(expires=timedelta(seconds=20))
    out, into = os.pipe()
    children: list[int] = []

    def do(session: Session) -> None:
        put(session, "before")
        child = os.fork()
        if child == 0:
            if fails:
                raise ValueError("the child's")
            return
        children.append(child)
        os.close(into)
        with os.fdopen(out, "rb") as pipe:
            heard.append(pipe.read())  # until the child has ended
        os.waitpid(child, 0)
        put(session, "after")

    heard: list[bytes] = []
    shop.handles(do, **more)
    here = os.getpid()
    try:
        outcome = shop.process(order())
    except BaseException as error:
        if os.getpid() == here:
            raise
        os.write(into, type(error).__name__.encode())
    finally:
        if os.getpid() != here:
            os._exit(0)
    assert heard == [b"ForkedProcess"]
    assert outcome is Outcome.PROCESSED
    assert shop.effects() == ["before", "after"]
    assert shop.failures() == []


def test_a_session_with_a_claim_is_refused_in_a_child(shop: Shop) -> None:
    """The engine is the caller's, and was first seen with this claim."""
    if shop.is_async:
        pytest.skip("a claim of door 1 is made in a sync session")
    eo = ExactlyOnce(group=GROUP)

    def ends(session: Session) -> None:
        session.commit()

    shop.engine.dispose()
    with Session(shop.engine) as session:
        session.execute(text("SELECT 1"))
        assert eo.claim(session, "handler", "A-1")
        put(session, "parent")
        kind, name, *_ = Forked(lambda: ends(session)).said()
        assert (kind, name) == ("raised", "ForkedProcess")
        told = Forked(session.rollback).said()
        assert told[0] == "returned", told
        session.commit()
    assert shop.effects() == ["parent"]
    assert shop.claims() == ["A-1"]


def test_a_child_forked_inside_a_transaction_of_sqlite_is_refused_the_file(sqlite_url: str) -> None:
    with Shop("sqlite", "sync", sqlite_url) as shop:
        shop.handles(lambda session: put(session, "other"), topic="others", name="other")
        said = forks_inside(shop, lambda session: shop.eo.process(Message("others", b'{"no": 1}')).value)
        assert shop.process(order()) is Outcome.PROCESSED
        ((kind, name, words, _),) = said
        assert (kind, name) == ("raised", "ForkedProcess")
        assert "SQLite" in words
        # that connection is idle now, and keeps no later child from the file
        assert forked(lambda: shop.eo.process(Message("others", b'{"no": 2}')).value) == "processed"
        assert shop.effects() == ["before", "after", "other"]


@pytest.mark.parametrize("journal", ["delete", "wal"])
def test_children_of_sqlite_write_beside_their_parent(sqlite_url: str, journal: str) -> None:
    with Shop("sqlite", "sync", sqlite_url, pool_size=4) as shop:
        with shop.outside.connect() as connection:
            connection.execute(text(f"PRAGMA journal_mode={journal}"))
        handles_orders(shop)
        each_once(shop)
        with shop.outside.connect() as connection:
            assert connection.execute(text("PRAGMA integrity_check")).scalar() == "ok"


@pytest.mark.nightly(meet=1)
@pytest.mark.parametrize("way", ["exit", "return"])
def test_a_child_that_ends_as_programs_do_sends_nothing_to_its_parents_server(shop: Shop, way: str) -> None:
    """Through the interpreter's exit: exit functions, finalizers, the collector."""
    shop.clear()
    program = textwrap.dedent("""
        import asyncio, os, sys
        sys.path[:0] = [sys.argv[3]]
        from tests.integration.shop import Shop, order, put
        dialect, colour, root, url, way = sys.argv[1:]
        shop = Shop(dialect, colour, url)
        def do(session):
            put(session, "before")
            child = os.fork()
            if child == 0:
                if way == "exit":
                    sys.exit(7)
                return
            _, status = os.waitpid(child, 0)
            put(session, f"after {os.waitstatus_to_exitcode(status)}")
        shop.handles(do)
        here = os.getpid()
        try:
            print(shop.process(order()).value)
        except BaseException as error:
            if os.getpid() == here:
                raise
            sys.exit(9)
        print(shop.effects(), shop.failures())
        shop.close()
    """)
    done = subprocess.run(
        [sys.executable, "-c", program, shop.dialect, shop.colour, str(ROOT), shop.url, way],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["processed", "['before', 'after 9'] []"], done.stderr


# -- the worker, and what sends ----------------------------------------------------------------------------------------------


def test_a_child_that_a_workers_handler_forks_ends_with_a_sentence_and_the_parent_goes_on(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    codes: list[int] = []

    def do(session: Session) -> None:
        put(session, "before")
        child = os.fork()
        if child:
            codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            put(session, "after")

    shop.handles(do)
    name = f"memory://{os.urandom(4).hex()}"
    with shop.eo.worker(name, concurrency=1) as worker, shop.eo.producer(name) as producer:
        producer.send(order())
        assert worker.drain()["processed"] == 1
    assert codes == [1]
    assert shop.effects() == ["before", "after"]


def test_the_worker_of_a_parent_is_refused_in_a_child_and_leaving_it_there_is_nothing(shop: Shop) -> None:
    handles_orders(shop)
    name = f"memory://{os.urandom(4).hex()}"
    with shop.eo.worker(name) as worker, shop.eo.producer(name) as producer:
        producer.send(order("1"))
        worker.drain()
        assert Forked(worker.drain).said()[1] == "ForkedProcess"
        assert Forked(worker.stop).said() == ("returned", 0)
        producer.send(order("2"))
        assert worker.drain()["processed"] == 2


def test_children_send_over_sql_beside_their_parent(shop: Shop) -> None:
    if shop.is_async:
        pytest.skip("producers are sync")
    handles_orders(shop)

    def sends(producer: Any, who: object) -> int:
        return len([producer.send(message) for message in messages(who)])

    with shop.eo.producer("sql://") as producer:
        producer.send(order("first"))
        children = [Forked(lambda n=n: sends(producer, n)) for n in range(CHILDREN)]
        sends(producer, "parent")
        assert [child.result() for child in children] == [EACH] * CHILDREN
    with shop.eo.worker("sql://") as worker:
        assert worker.drain()["processed"] == 1 + EACH * (CHILDREN + 1)
    assert len(set(shop.effects())) == len(shop.effects()) == 1 + EACH * (CHILDREN + 1)


def test_what_a_child_sends_to_a_broker_in_its_parents_memory_is_refused(shop: Shop) -> None:
    name = os.urandom(4).hex()
    with shop.eo.producer(f"memory://{name}") as producer:
        producer.send(order("first"))

        def again() -> None:
            with shop.eo.producer(f"memory://{name}") as another:
                another.send(order("child"))

        for kind, error, words, _ in (Forked(lambda: producer.send(order("child"))).said(), Forked(again).said()):
            assert (kind, error) == ("raised", SendFailed.__name__)
            assert "cannot be reached from here" in words

        def of_its_own() -> int:
            forget(name)
            with shop.eo.producer(f"memory://{name}") as another:
                return len(another.send_all([order("child")]))

        assert forked(of_its_own) == 1


def test_a_lock_in_redis_is_not_let_go_of_by_a_child(redis_url: str) -> None:
    eo = ExactlyOnce(group=f"shop-{os.urandom(4).hex()}", redis=redis_url)

    def leaves(lock: Any) -> None:
        lock.__exit__(None, None, None)

    with eo.lock("rebuild") as lock:
        assert Forked(lambda: leaves(lock)).said() == ("returned", None)
        assert Forked(lambda: eo.lock("rebuild", wait=timedelta(0)).__enter__()).said()[1] == "InProgress"
        assert lock.release() is True


# -- loops -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True], ids=["given", "own"])
def test_a_loop_for_each_message_costs_no_message_an_attempt(
    shop: Shop, own: bool, caplog: pytest.LogCaptureFixture
) -> None:
    if not shop.is_async:
        pytest.skip("loops are the async door's")
    shop.eo = ExactlyOnce(shop.url, group=GROUP) if own else shop.fresh_eo()
    handles_orders(shop)
    assert [asyncio.run(shop.eo.aprocess(order(n))) for n in range(24)] == [Outcome.PROCESSED] * 24
    assert len(shop.effects()) == 24
    assert shop.failures() == []
    assert [record.getMessage() for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")] == []


def test_a_loop_for_each_batch_that_fills_the_pool_costs_no_message_an_attempt(shop: Shop) -> None:
    """Who waits for a connection binds the pool's queue to a loop."""
    if not shop.is_async:
        pytest.skip("loops are the async door's")
    handles_orders(shop)

    async def batch(which: int) -> Sequence[Outcome]:
        return await asyncio.gather(*(shop.eo.aprocess(order(f"{which}-{n}")) for n in range(4)))

    for which in range(4):
        assert asyncio.run(batch(which)) == [Outcome.PROCESSED] * 4
    assert shop.failures() == []


def test_loops_in_several_threads_do_not_hand_each_other_connections(shop: Shop) -> None:
    if not shop.is_async:
        pytest.skip("loops are the async door's")
    shop.eo = ExactlyOnce(shop.url, group=GROUP)
    handles_orders(shop)
    assert asyncio.run(shop.eo.aprocess(order("first"))) is Outcome.PROCESSED
    told: list[Outcome] = []

    async def several(who: int) -> None:
        told.extend([await shop.eo.aprocess(order(f"{who}-{n}")) for n in range(6)])

    threads = [Thread(target=lambda n=n: asyncio.run(several(n))) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert told == [Outcome.PROCESSED] * 24
    assert shop.failures() == []


@pytest.mark.parametrize(
    "url", ["sqlite:///file:{name}?mode=memory&cache=shared&uri=true", "sqlite:///file::memory:?uri=true"]
)
def test_a_database_in_memory_is_the_parents_after_a_fork_too(url: str) -> None:
    """Its last connection is the database: closed before the fork, as of a file, the parent's tables would be gone."""
    engine = create_engine(url.format(name=f"shop_{os.urandom(4).hex()}"), poolclass=StaticPool)
    exactly_once.alembic.upgrade(engine)
    eo = ExactlyOnce(engine, group=GROUP)

    @eo.handler("orders", name="handler", key="no")
    def handler(session: Session, body: dict[str, Any]) -> None:
        session.execute(text("SELECT 1"))

    assert eo.process(order(1)) is Outcome.PROCESSED
    child = Forked(lambda: eo.process(order(2)).value)
    assert child.result() == "processed"
    assert eo.process(order(1)) is Outcome.DUPLICATE
    assert eo.process(order(3)) is Outcome.PROCESSED
