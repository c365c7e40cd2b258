"""Something still uses the handler's session when the handler has returned: refused before COMMIT, and nothing is kept.

The kind: a task that was not awaited, a thread that was not joined, a stream that is read elsewhere. What it has sent by then
would be committed, and what it sends next refused: half of it. A driver that waits for an answer is in a transaction, but
nobody can say what will be in it.
"""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncSession, async_session
from sqlalchemy.orm import DeclarativeBase, Session

from exactly_once import AsyncSteps, Lease, Misuse, Outcome, Steps
from exactly_once.database.dialects.registry import dialect_for
from tests.integration.shop import COLOURS, DIALECTS, EFFECT, ONE_TRY, Shop, on, order, put, shops
from tests.integration.ways import LEASE, WAYS, Way

pytestmark = pytest.mark.nightly(meet=2)


class Base(DeclarativeBase):
    """Of objects that are added."""


class Effect(Base):
    __table__ = EFFECT


SLOW = {
    "postgres": "INSERT INTO effect (text) SELECT 'slow' FROM pg_sleep(1.5)",
    "mariadb": "INSERT INTO effect (text) SELECT 'slow' FROM (SELECT SLEEP(1.5)) AS slow",
    "sqlite": (
        "INSERT INTO effect (text) SELECT 'slow' WHERE (WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n"
        " WHERE i < 4000000) SELECT count(*) FROM n) > 0"
    ),
}
ROWS = {
    "postgres": "SELECT i FROM generate_series(1, 40) AS i, LATERAL (SELECT pg_sleep(0.05 + 0 * i)) AS slow",
    "mariadb": "WITH RECURSIVE seq (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM seq WHERE n < 40) SELECT n, SLEEP(0.05) FROM seq",
    "sqlite": (
        "SELECT i, (WITH RECURSIVE n (j) AS (SELECT 1 UNION ALL SELECT j + 1 FROM n WHERE j < 200000 + m.i)"
        " SELECT count(*) FROM n) FROM (WITH RECURSIVE k (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM k WHERE i < 40)"
        " SELECT i FROM k) AS m"
    ),
}
UNDER_WAY_S = 0.3
"""Until what was begun has surely been sent; too short and a test proves less."""


@pytest.fixture(
    params=[(dialect, colour) for dialect in DIALECTS for colour in COLOURS],
    ids=[f"{dialect}-{colour}" for dialect in DIALECTS for colour in COLOURS],
)
def ground(request: pytest.FixtureRequest) -> Iterator[Shop]:
    """A shop of the test's own: what it leaves running must not meet another's."""
    yield from shops(request, *request.param, pool_size=2, options={"pool_use_lifo": True})


def is_refused(shop: Shop, *, kept: tuple[str, ...] = ()) -> None:
    """The message failed, the text says why, and nothing of it is there, nor in the connection."""
    failure = shop.failure()
    assert failure.state == "retrying"
    assert failure.error_class == "Misuse"
    assert "still" in failure.error_text
    assert "session" in failure.error_text
    shop.assert_kept(*kept, claims=[])


# -- tasks -------------------------------------------------------------------------------------------------------------


Work = Callable[[AsyncSession, Shop], Any]


async def _writes_slowly(session: AsyncSession, shop: Shop) -> None:
    await session.execute(text(SLOW[shop.dialect]))
    await session.run_sync(put, "second")


async def _reads_a_stream(session: AsyncSession, shop: Shop) -> None:
    async for row in await session.stream(text(ROWS[shop.dialect]).execution_options(yield_per=1)):
        if row[0] > 30:
            await session.run_sync(put, "read")


async def _reads_the_drivers_stream(session: AsyncSession, shop: Shop) -> None:
    driver = (await session.connection()).sync_connection.connection.driver_connection  # type: ignore[union-attr]
    match shop.dialect:
        case "postgres":
            cursor = driver.cursor()
            async for _ in cursor.stream(ROWS["postgres"]):
                pass
        case "mariadb":
            from asyncmy.cursors import SSCursor

            async with driver.cursor(SSCursor) as cursor:
                await cursor.execute(ROWS["mariadb"])
                while await cursor.fetchone():
                    pass
        case _:
            async with driver.execute(ROWS["sqlite"]) as cursor:
                async for _ in cursor:
                    pass


async def _sends_by_the_driver(session: AsyncSession, shop: Shop) -> None:
    driver = (await session.connection()).sync_connection.connection.driver_connection  # type: ignore[union-attr]
    if shop.dialect == "sqlite":
        await driver.execute(SLOW["sqlite"])
        return
    async with driver.cursor() as cursor:
        await cursor.execute(SLOW[shop.dialect])


TASKS: dict[str, Work] = {
    "writes": _writes_slowly,
    "reads a stream": _reads_a_stream,
    "reads the driver's stream": _reads_the_drivers_stream,
    "writes by the driver": _sends_by_the_driver,
}


class Left:
    """A task that a handler begins and does not await; its end is seen afterwards."""

    def __init__(self, shop: Shop, work: Work) -> None:
        self._shop, self._work = shop, work
        self._tasks: list[asyncio.Task[Any]] = []

    async def begin(self, session: AsyncSession) -> None:
        await session.run_sync(put, "handler")
        self._tasks.append(asyncio.create_task(self._work(session, self._shop)))
        await asyncio.sleep(UNDER_WAY_S)

    def end(self) -> None:
        async def ended() -> None:
            await asyncio.gather(*self._tasks, return_exceptions=True)

        self._shop.await_(asyncio.wait_for(ended(), 10))


@pytest.mark.parametrize("work", TASKS)
@pytest.mark.parametrize("guard", [None, LEASE], ids=["transaction", "lease"])
@on(colour="async")  # a thread has no tasks
def test_a_task_that_still_uses_the_session_is_refused(shop: Shop, work: str, guard: Lease | None) -> None:
    left = Left(shop, TASKS[work])

    @shop.eo.handler("orders", name="handler", key="no", retry=ONE_TRY, guard=guard)
    async def handler(session: AsyncSession) -> None:
        await left.begin(session)

    try:
        assert shop.process(order()) is Outcome.FAILED
    finally:
        left.end()
    is_refused(shop) if guard is None else _lease_is_refused(shop)


def _lease_is_refused(shop: Shop) -> None:
    failure = shop.failure()
    assert (failure.state, failure.error_class) == ("retrying", "Misuse")
    assert "still" in failure.error_text
    assert shop.effects() == []
    shop.borrow()
    assert shop.effects() == ["stranger"]


@pytest.mark.parametrize("in_lists", [False, True], ids=["batch=", "batch handler"])
@on(colour="async")  # a thread has no tasks
def test_a_task_of_one_of_a_group_is_refused_and_the_others_are_processed(shop: Shop, in_lists: bool) -> None:
    from tests.integration.batches import outcomes

    left = Left(shop, _writes_slowly)
    options: dict[str, Any] = {"name": "handler", "key": "no", "retry": ONE_TRY}
    if in_lists:

        @shop.eo.batch_handler("orders", **options)
        async def lists(session: AsyncSession, bodies: list[dict[str, Any]]) -> None:
            for body in bodies:
                await session.run_sync(put, str(body["no"]))
            if any(body["no"] == 3 for body in bodies):
                await left.begin(session)
    else:

        @shop.eo.handler("orders", **options, batch=100)
        async def each(session: AsyncSession, body: dict[str, Any]) -> None:
            await session.run_sync(put, str(body["no"]))
            if body["no"] == 3:
                await left.begin(session)

    try:
        found = outcomes(shop, [order(no) for no in (1, 2, 3)])
    finally:
        left.end()
    assert found == [Outcome.PROCESSED, Outcome.PROCESSED, Outcome.FAILED]
    assert shop.failure().business_key == "3"
    assert "still" in shop.failure().error_text
    assert sorted(shop.effects()) == ["1", "2"]
    assert shop.claims() == ["1", "2"]
    shop.borrow()


@on(colour="async")  # a thread has no tasks
def test_a_task_that_still_uses_a_steps_session_is_refused(shop: Shop) -> None:
    left = Left(shop, _writes_slowly)

    @shop.eo.handler("orders", name="handler", key="no", retry=ONE_TRY, guard=LEASE)
    async def handler(steps: AsyncSteps) -> None:
        await steps.transaction("step", left.begin)

    try:
        assert shop.process(order()) is Outcome.FAILED
    finally:
        left.end()
    _lease_is_refused(shop)
    assert shop.rows(shop.tables.step) == []


def _given(session: Session) -> AsyncSession:
    given = async_session(session)
    assert given is not None
    return given


async def _executes(session: AsyncSession) -> None:
    await session.run_sync(put, "task")


async def _adds(session: AsyncSession) -> None:
    session.add(Effect(text="task"))
    await session.flush()


async def _nests(session: AsyncSession) -> None:
    async with session.begin_nested():
        await session.run_sync(put, "task")


AT_ONCE: dict[str, Callable[[AsyncSession], Any]] = {"executes": _executes, "adds": _adds, "nests": _nests}


@pytest.mark.parametrize("does", AT_ONCE)
@pytest.mark.parametrize("way", WAYS, ids=str)
@on(colour="async")  # a thread has no tasks
def test_a_task_that_was_not_awaited_fails_the_message(shop: Shop, way: Way, does: str) -> None:
    """It begins with the next await of its creator. Red before: that was our COMMIT, and its effect was missing."""
    tasks: list[asyncio.Task[Any]] = []

    def do(session: Session, no: Any) -> None:
        put(session, f"{no}")
        tasks.append(asyncio.get_running_loop().create_task(AT_ONCE[does](_given(session))))

    way.handles(shop, do)
    outcomes = way.deliver(shop, [order(1)])

    async def ended() -> None:
        await asyncio.gather(*tasks, return_exceptions=True)

    shop.await_(ended())
    assert outcomes == [Outcome.FAILED]
    failure = shop.failure()
    assert (failure.state, failure.error_class) == ("retrying", "Misuse"), failure.error_text
    assert "still uses its session" in failure.error_text
    assert shop.effects() == []
    shop.borrow()


@on(colour="async")  # a thread has no tasks
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_task_that_begins_while_commit_is_under_way_breaks_the_message(shop: Shop, way: Way) -> None:
    """Its effect is missing, and the handler's are committed: for a person. Red before: processed."""
    tasks: list[asyncio.Task[Any]] = []

    def begin(session: Session) -> None:  # behind the last look of ours, as a timer may
        tasks.append(asyncio.get_running_loop().create_task(_executes(_given(session))))

    def do(session: Session, no: Any) -> None:
        put(session, f"{no}")
        event.listen(session, "before_commit", begin, once=True)

    way.handles(shop, do)
    outcomes = way.deliver(shop, [order(1)])
    found: list[Any] = []

    async def ended() -> None:
        found.extend(await asyncio.gather(*tasks, return_exceptions=True))

    shop.await_(ended())
    assert outcomes == [Outcome.DEAD]
    failure = shop.failure()
    assert failure.state == "broken"
    assert "used its session while COMMIT was under way" in failure.error_text
    assert [type(each) for each in found] == [Misuse]
    assert "Nothing of this was sent" in str(found[0])
    assert shop.effects() == ["1"]
    assert shop.process(order(1)).acknowledge
    assert shop.effects() == ["1"]
    shop.borrow()


# -- threads -----------------------------------------------------------------------------------------------------------


@on(colour="sync")  # an async session cannot be used by a thread
def test_a_thread_that_still_uses_the_session_is_refused(shop: Shop) -> None:
    threads: list[threading.Thread] = []

    def slowly(session: Session) -> None:
        try:
            session.execute(text(SLOW[shop.dialect]))
            put(session, "second")
        except Exception:
            pass

    @shop.eo.handler("orders", name="handler", key="no", retry=ONE_TRY)
    def handler(session: Session) -> None:
        put(session, "handler")
        threads.append(threading.Thread(target=slowly, args=(session,)))
        threads[0].start()
        threading.Event().wait(UNDER_WAY_S)

    try:
        assert shop.process(order()) is Outcome.FAILED
    finally:
        threads[0].join(20)
    is_refused(shop)


@on(colour="sync")  # an async session cannot be used by a thread
def test_a_thread_that_still_uses_a_steps_session_is_refused(shop: Shop) -> None:
    threads: list[threading.Thread] = []

    def slowly(session: Session) -> None:
        try:
            session.execute(text(SLOW[shop.dialect]))
            put(session, "second")
        except Exception:
            pass

    def work(session: Session) -> None:
        put(session, "handler")
        threads.append(threading.Thread(target=slowly, args=(session,)))
        threads[0].start()
        threading.Event().wait(UNDER_WAY_S)

    @shop.eo.handler("orders", name="handler", key="no", retry=ONE_TRY, guard=LEASE)
    def handler(steps: Steps) -> None:
        steps.transaction("step", work)

    try:
        assert shop.process(order()) is Outcome.FAILED
    finally:
        threads[0].join(20)
    _lease_is_refused(shop)
    assert shop.rows(shop.tables.step) == []


@pytest.mark.parametrize("sent", [False, True], ids=["before COMMIT", "behind COMMIT"])
@on(colour="sync")  # an async session cannot be used by a thread
def test_a_thread_that_uses_the_session_in_our_commit_is_refused_or_breaks_the_message(
    shop: Shop, sent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Session] = []
    raised: list[Exception] = []

    def use() -> None:
        try:
            put(kept[-1], "thread")
        except Exception as error:
            raised.append(error)

    def elsewhere(*_: Any) -> None:
        if raised:  # the failure's own COMMIT
            return
        thread = threading.Thread(target=use)
        thread.start()
        thread.join(20)

    if sent:
        speaker = type(dialect_for(shop.engine, lambda: None))
        commit = speaker.commit

        def commits(self: Any, *given: Any) -> None:
            commit(self, *given)
            elsewhere()

        monkeypatch.setattr(speaker, "commit", commits)
    else:
        event.listen(shop.engine, "commit", elsewhere)
    shop.handles(lambda session: (put(session, "handler"), kept.append(session)))
    try:
        outcome = shop.process(order())
    finally:
        if not sent:
            event.remove(shop.engine, "commit", elsewhere)
    assert [type(error) for error in raised] == [Misuse]
    failure = shop.failure()
    if sent:
        assert (outcome, failure.state, shop.effects()) == (Outcome.DEAD, "broken", ["handler"])
        assert "while COMMIT was under way" in failure.error_text
    else:
        assert (outcome, failure.state, shop.effects()) == (Outcome.FAILED, "retrying", [])
        assert "still uses its session" in failure.error_text
    monkeypatch.undo()
    shop.borrow()


# -- what is no use any more -------------------------------------------------------------------------------------------


@on(colour="async")  # a thread has no tasks
def test_a_task_that_was_awaited_and_a_stream_that_was_read_are_fine(shop: Shop) -> None:
    short = {
        "postgres": "SELECT i FROM generate_series(1, 3) AS i",
        "mariadb": "SELECT 1 UNION ALL SELECT 2 UNION ALL SELECT 3",
        "sqlite": "SELECT 1 UNION ALL SELECT 2",
    }

    async def work(session: AsyncSession) -> None:
        async for _ in await session.stream(text(short[shop.dialect])):
            pass
        await session.run_sync(put, "task")

    @shop.eo.handler("orders", name="handler", key="no", retry=ONE_TRY)
    async def handler(session: AsyncSession) -> None:
        await asyncio.create_task(work(session))
        stream = await session.stream(text(short[shop.dialect]))  # begun, and given up
        await stream.first()

    assert shop.process(order()) is Outcome.PROCESSED
    shop.assert_kept("task", claims=["A-1"])


@on(colour="async")  # a thread has no streams
def test_a_stream_that_was_given_up_half_read_is_whole_or_refused(shop: Shop) -> None:
    kept: list[Any] = []

    @shop.eo.handler("orders", name="handler", key="no", retry=ONE_TRY)
    async def handler(session: AsyncSession) -> None:
        await session.run_sync(put, "handler")
        stream = await session.stream(text(ROWS[shop.dialect]).execution_options(yield_per=1))
        kept.append((stream, await stream.fetchone()))

    outcome = shop.process(order())
    if outcome is Outcome.FAILED:
        is_refused(shop)
        return
    assert outcome is Outcome.PROCESSED
    shop.assert_kept("handler", claims=["A-1"])


@on(colour="sync")  # an async session cannot be used by a thread
def test_a_cut_connection_is_thrown_away_by_nobody_but_us(shop: Shop) -> None:
    """The thread meets the cut, and takes its time over it; the pool's place has another message's connection by then."""
    threads: list[threading.Thread] = []
    theirs: list[object] = []

    @event.listens_for(shop.engine, "invalidate")
    def invalidated(*_: object) -> None:
        if threading.current_thread() in threads:
            theirs.append(_)
            threading.Event().wait(UNDER_WAY_S)

    def slowly(session: Session) -> None:
        with suppress(Exception):
            session.execute(text(SLOW[shop.dialect]))

    @shop.eo.handler("orders", name="handler", key="no", retry=ONE_TRY)
    def handler(session: Session) -> None:
        put(session, "handler")
        threads.append(threading.Thread(target=slowly, args=(session,)))
        threads[0].start()
        threading.Event().wait(UNDER_WAY_S)

    try:
        assert shop.process(order()) is Outcome.FAILED
    finally:
        threads[0].join(20)
    assert theirs == []
    is_refused(shop)
    shop.borrow()
