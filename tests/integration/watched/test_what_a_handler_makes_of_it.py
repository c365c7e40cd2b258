"""What was seen of a handler's transaction weighs more than the error it makes of that, whichever way its work runs.

The kind: a repository catches what a statement or `commit()` met, rolls back, and raises its own; a decorator tries the work
again inside a savepoint; a limit of time cuts a statement off, and that is caught. A transaction that the server threw away is
run again at once and not counted, and a line to delete is named in the row: alone, in a group, under a lease, in a step.
"""

import asyncio
from collections import deque
from collections.abc import Iterator
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import event, insert, text, update
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.util import await_only, greenlet_spawn

from exactly_once import AsyncSteps, Outcome, Reject, Retry, Steps
from tests.integration.guards.test_behind_a_claim import killed_once
from tests.integration.shop import COLOURS, DIALECTS, ONE_TRY, STOCK, Shop, on, order, put, shops
from tests.integration.threads import Turn, in_thread
from tests.integration.ways import LEASE, WAYS, Way, mariadb_procedures

P, D, F = Outcome.PROCESSED, Outcome.DUPLICATE, Outcome.FAILED
pytestmark = pytest.mark.nightly(meet=2)
each_way = pytest.mark.parametrize("way", WAYS, ids=str)
GROUNDS = [(dialect, colour) for dialect in DIALECTS for colour in COLOURS]


@pytest.fixture(scope="module", params=GROUNDS, ids="-".join)
def ground(request: pytest.FixtureRequest) -> Iterator[Shop]:
    """With room for a step's connection."""
    yield from shops(request, *request.param, pool_size=3)


@pytest.fixture
def shop(ground: Shop) -> Shop:
    ground.clear()
    return ground


class RepositoryError(Exception):
    """The application's own."""


# -- a line to delete --------------------------------------------------------------------------------------------------


@each_way
@pytest.mark.parametrize("rolls_back", [False, True])
@pytest.mark.parametrize("line", ["commit", "COMMIT"])
def test_a_repository_that_commits_and_wraps_what_that_met_is_told_its_line(
    shop: Shop, way: Way, line: str, rolls_back: bool
) -> None:
    def do(session: Session, no: Any) -> None:
        try:
            put(session, f"{no}")
            session.commit() if line == "commit" else session.execute(text(line))
        except Exception as error:
            if rolls_back:
                session.rollback()
            raise RepositoryError("could not be saved") from error

    way.handles(shop, do)
    assert set(way.deliver(shop, [order(1), order(2)])) == {F}
    rows = shop.failures()
    assert [line in row.error_text and "Delete that" in row.error_text for row in rows] == [True, True], rows
    assert shop.effects() == []
    shop.borrow()


@each_way
def test_a_handler_that_rolls_back_for_an_error_of_its_own_is_told_that_error(shop: Shop, way: Way) -> None:
    def do(session: Session, no: Any) -> None:
        try:
            put(session, f"{no}")
            int("nothing")
        except ValueError as error:
            session.rollback()
            raise RepositoryError("could not be saved") from error

    way.handles(shop, do)
    assert way.deliver(shop, [order(1)]) == [F]
    assert shop.failure().error_class == "RepositoryError"
    assert shop.effects() == []


@each_way
@on(colour="async")
def test_a_statement_given_up_on_a_time_limit_is_told_as_what_it_is(shop: Shop, way: Way) -> None:
    """As anyio's `move_on_after` does it, which raises nothing behind it; also where SQLAlchemy says to roll back."""

    async def cut(statement: Any) -> None:
        try:
            async with asyncio.timeout(0.05):
                await statement
        except TimeoutError:
            pass

    slow = {
        "postgres": "SELECT pg_sleep(5)",
        "mariadb": "SELECT SLEEP(5)",
        "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n",
    }[shop.dialect]

    def do(session: Session, no: Any) -> None:
        put(session, f"{no} before")
        await_only(cut(greenlet_spawn(session.execute, text(slow))))
        put(session, f"{no} after")

    way.handles(shop, do)
    assert way.deliver(shop, [order(1)]) == [F]
    assert "given up before its answer came" in shop.failure().error_text
    assert shop.effects() == []
    shop.borrow()


# -- a transaction that the server threw away --------------------------------------------------------------------------


def deadlocks_once(shop: Shop) -> tuple[Any, Any]:
    """What to run beside the handler, and what the handler does: it is the victim the first time."""
    with shop.outside.begin() as connection:
        connection.execute(insert(STOCK), [{"item": item, "amount": 9} for item in (1, 2)])
    ours, theirs = Turn(), Turn()
    runs: list[int] = []

    def take(session: Any, item: int) -> None:
        session.execute(update(STOCK).where(STOCK.c.item == item).values(amount=STOCK.c.amount - 1))

    def other() -> None:
        with shop.outside.begin() as connection:
            if shop.dialect == "postgres":
                connection.execute(text("SET LOCAL deadlock_timeout = '60s'"))
            connection.execute(insert(STOCK), [{"item": item, "amount": 0} for item in range(100, 400)])
            take(connection, 2)
            theirs.come()
            ours.wait()
            take(connection, 1)

    def both(session: Session) -> None:
        runs.append(1)
        theirs.wait()
        take(session, 1)
        ours.come()
        take(session, 2)

    return other, both


@each_way
@pytest.mark.parametrize("makes", ["tries again in a savepoint", "swallows", "rolls back", "wraps", "rejects"])
@on("mariadb")  # on PostgreSQL a savepoint survives, and the rest is an error of the handler's like any other
def test_a_deadlock_is_run_again_at_once_whatever_the_handler_makes_of_it(shop: Shop, way: Way, makes: str) -> None:
    other, both = deadlocks_once(shop)

    def do(session: Session, no: Any) -> None:
        put(session, f"{no} before")
        for _ in (1, 2):
            try:
                if makes == "tries again in a savepoint":
                    with session.begin_nested():
                        both(session)
                else:
                    both(session)
            except OperationalError as error:
                if makes == "rolls back":
                    session.rollback()
                if makes == "wraps":
                    raise RepositoryError("could not be saved") from error
                if makes == "rejects":
                    raise Reject("could not be saved") from error
                if makes == "swallows":
                    break
            else:
                break
        put(session, f"{no} after")

    way.handles(shop, do)
    with in_thread(other):
        ends = way.deliver(shop, [order(1)])
    assert ends == [P], [(row.error_class, row.error_text) for row in shop.failures()]
    assert shop.failures() == []
    assert shop.effects() == ["1 before", "1 after"]
    assert way.deliver(shop, [order(1)]) == [D]
    shop.borrow()


@each_way
@pytest.mark.parametrize("makes", ["wraps", "swallows"])
@on("mariadb")  # whose driver's error says by itself that the connection is lost
def test_a_connection_that_is_killed_is_run_again_at_once_whatever_the_handler_makes_of_it(
    shop: Shop, way: Way, makes: str
) -> None:
    runs: list[int] = []

    def do(session: Session, no: Any) -> None:
        put(session, f"{no} before")
        runs.append(1)
        if len(runs) == 1:
            number = session.execute(text("SELECT CONNECTION_ID()")).scalar_one()
            with shop.outside.begin() as outside:
                outside.execute(text(f"KILL {number}"))
        try:
            put(session, f"{no} after")
        except DBAPIError as error:
            if makes == "wraps":
                raise RepositoryError("could not be saved") from error

    way.handles(shop, do)
    assert way.deliver(shop, [order(1)]) == [P], [(row.error_class, row.error_text) for row in shop.failures()]
    assert shop.failures() == []
    assert shop.effects() == ["1 before", "1 after"]
    shop.borrow()


@each_way
@on("mariadb", "postgres")
def test_a_connection_that_ends_in_each_run_is_a_failure_after_a_few(shop: Shop, way: Way) -> None:
    """A body too large for the server does that, and a statement that a watchdog kills."""
    runs: list[int] = []

    def do(session: Session, no: Any) -> None:
        runs.append(1)
        put(session, f"{no} before")
        mariadb = shop.engine.dialect.name != "postgresql"
        number = session.execute(text("SELECT CONNECTION_ID()" if mariadb else "SELECT pg_backend_pid()")).scalar_one()
        with shop.outside.begin() as outside:
            outside.execute(text(f"KILL {number}" if mariadb else f"SELECT pg_terminate_backend({number}, 10000)"))
        put(session, f"{no} after")

    way.handles(shop, do, retry=ONE_TRY)
    assert way.deliver(shop, [order(1)]) == [F]
    # one, the four that a loss of the moment is worth, and one behind the look that found the store at work
    assert len(runs) == 6
    assert shop.failure().attempts == 1
    assert shop.effects() == []
    shop.borrow()


@each_way
@on("mariadb")
def test_a_deadlock_that_a_procedure_swallows_is_run_again_at_once(shop: Shop, way: Way) -> None:
    mariadb_procedures(
        shop,
        takes="(one INT) BEGIN DECLARE EXIT HANDLER FOR SQLEXCEPTION BEGIN END;"
        " UPDATE stock SET amount = amount - 1 WHERE item = one; END",
    )
    other, _ = deadlocks_once(shop)
    ours, theirs = (cell.cell_contents for cell in other.__closure__ if isinstance(cell.cell_contents, Turn))

    def do(session: Session, no: Any) -> None:
        put(session, f"{no} before")
        theirs.wait()
        session.execute(text("CALL takes(1)"))
        ours.come()
        session.execute(text("CALL takes(2)"))
        put(session, f"{no} after")

    way.handles(shop, do)
    with in_thread(other):
        ends = way.deliver(shop, [order(1)])
    assert ends == [P], [(row.error_class, row.error_text) for row in shop.failures()]
    assert shop.effects() == ["1 before", "1 after"]
    shop.borrow()


# -- of a step alone: the handler goes on behind it --------------------------------------------------------------------


@on("mariadb")
@pytest.mark.parametrize("then", ["wraps", "runs it again", "fails behind it"])
def test_a_step_that_was_lost_and_what_the_handler_does_behind_it(shop: Shop, then: str) -> None:
    other, both = deadlocks_once(shop)
    runs: list[int] = []

    def work(session: Session) -> None:
        put(session, "step")
        both(session)

    def again(ask: Any) -> Any:
        runs.append(1)
        try:
            return ask()
        except OperationalError as error:
            if then == "wraps":
                raise RepositoryError("could not be saved") from error
            return ask()

    def end() -> None:
        if then == "fails behind it":
            raise ValueError("its own")

    options: dict[str, Any] = {"name": "handler", "key": "no", "retry": ONE_TRY, "guard": LEASE}
    if shop.is_async:

        @shop.eo.handler("orders", **options)
        async def awaited(steps: AsyncSteps) -> None:
            def asks() -> Any:
                return await_only(steps.transaction("save", lambda session: session.run_sync(work)))

            await greenlet_spawn(again, asks)
            end()
    else:

        @shop.eo.handler("orders", **options)
        def plain(steps: Steps) -> None:
            again(lambda: steps.transaction("save", work))
            end()

    with in_thread(other):
        outcome = shop.process(order(1))
    if then == "fails behind it":
        assert (outcome, shop.failure().error_class) == (F, "ValueError")
    else:
        assert (outcome, shop.failures()) == (P, [])
    assert shop.effects() == ["step"]
    assert len(runs) == (2 if then == "wraps" else 1)


@each_way
@on("mariadb")
def test_a_statement_that_is_killed_in_a_savepoint_ends_no_handler(shop: Shop, way: Way) -> None:
    def do(session: Session, no: Any) -> None:
        put(session, f"{no} before")
        killed_once(shop, session)
        put(session, f"{no} after")

    way.handles(shop, do)
    assert way.deliver(shop, [order(1)]) == [P], [(row.error_class, row.error_text) for row in shop.failures()]
    assert shop.effects() == ["1 before", "1 after"]
    shop.borrow()


@each_way
@on(colour="async")
def test_what_a_hook_sets_in_its_context_is_set_back_where_the_handler_failed(shop: Shop, way: Way) -> None:
    """As a transaction begins, and as it ends: the next message in this task would find what the last one left."""
    current: ContextVar[object] = ContextVar("current", default=None)
    seen: list[object] = []
    began = deque[tuple[Session, Token[object]]]()

    class Mine(Session):
        pass

    def begins(session: Session, transaction: SessionTransaction, connection: object) -> None:
        if transaction.parent is None and type(session) is Mine:  # none of ours, which ends without hooks
            began.append((session, current.set(session)))

    def ends(session: Session, transaction: SessionTransaction) -> None:
        if began and began[-1][0] is session and transaction.parent is None:
            current.reset(began.pop()[1])

    def do(session: Session, no: Any) -> None:
        put(session, str(no))
        if no == 1:
            raise ValueError

    async def both() -> None:
        for no in (1, 2):
            seen.append(current.get())
            await shop.eo.aprocess(order(no))
        seen.append(current.get())

    shop.fresh_eo(None, async_sessionmaker(shop.async_engine, sync_session_class=Mine))
    way.handles(shop, do)
    event.listen(Mine, "after_begin", begins)
    event.listen(Mine, "after_transaction_end", ends)
    shop.await_(both())
    assert seen == [None] * 3
    assert shop.effects() == ["2"]


# -- errors that are dataclasses ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutOfStock(Exception):
    """Takes no attribute, the traceback neither, by assignment."""

    sku: str


@dataclass
class Unhashable(Exception):
    """Compared by its fields, and so in no set."""

    sku: str


@dataclass(frozen=True)
class NotOurs(Reject):
    """Kept for a person at once."""

    sku: str


@each_way
@pytest.mark.parametrize("error", [OutOfStock, Unhashable, NotOurs])
def test_an_error_that_is_a_dataclass_is_recorded_as_itself(shop: Shop, way: Way, error: type[Any]) -> None:
    def do(session: Session, no: Any) -> None:
        put(session, f"{no}")
        if no == 2:
            raise error("X-1")

    way.handles(shop, do, retry=Retry(immediate=0, delays=[0.01], max_attempts=3))
    ends = way.deliver(shop, [order(no) for no in (1, 2, 3)])
    assert ends == [P, Outcome.DEAD if error is NotOurs else F, P]
    row = shop.failure()
    assert (row.business_key, row.attempts, row.error_class) == ("2", 1, error.__name__)
    assert sorted(shop.effects()) == ["1", "3"]
    shop.borrow()
