"""MariaDB: a deadlock met on the driver's own cursor throws all away, and SQLAlchemy hears nothing of it.

The kind: the transaction of the claim, or of a lease, is gone, and what the driver committed since has no witness of ours. Where
the server keeps a binary log, that tells. Nothing was committed: the message is run again, as after any deadlock. Something was:
to run again would repeat it. Where the log does not tell, a message under a lease is kept for a person.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import insert, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from exactly_once import Outcome
from exactly_once.testing.databases import DatabaseServer
from tests.conftest import require
from tests.integration.shop import COLOURS, STOCK, Shop, order, put, shops
from tests.integration.threads import Turn, in_thread
from tests.integration.ways import IN_A_STEP, UNDER_A_LEASE, WAYS, Way, driver_of, sends
from tests.services import mariadb as mariadb_service
from tests.services.mariadb import MYSQLD, MariaDB

pytestmark = [
    pytest.mark.nightly(meet=2),
    pytest.mark.skipif(MYSQLD is not None, reason="MySQL tells no session what its log has of it"),
]

P, F = Outcome.PROCESSED, Outcome.FAILED
each_way = pytest.mark.parametrize("way", WAYS, ids=str)


@pytest.fixture(scope="module")
def mariadb_server() -> Iterator[DatabaseServer]:
    """One that keeps a binary log, as a primary does."""
    require(mariadb_service)
    with MariaDB(settings={"log-bin": "log", "server-id": "1"}) as server:
        yield DatabaseServer(server.url, source="url")


@pytest.fixture(scope="module", params=COLOURS)
def ground(request: pytest.FixtureRequest) -> Iterator[Shop]:
    yield from shops(request, "mariadb", request.param, pool_size=3, options={"pool_use_lifo": True})


@pytest.fixture
def logged(ground: Shop) -> Shop:
    ground.clear()
    return ground


class Deadlock:
    """Another transaction, heavier than the handler's, which the server throws away; met on the driver's own cursor."""

    def __init__(self, shop: Shop) -> None:
        self.shop = shop
        self.handler_has_one, self.other_has_two = Turn(), Turn()
        self.met = False
        with shop.outside.begin() as connection:
            connection.execute(insert(STOCK), [{"item": item, "amount": 9} for item in (1, 2)])

    def other(self) -> None:
        with self.shop.outside.begin() as connection:
            connection.execute(insert(STOCK), [{"item": item, "amount": 0} for item in range(100, 400)])
            connection.exec_driver_sql("UPDATE stock SET amount = 1 WHERE item = 2")
            self.other_has_two.come()
            self.handler_has_one.wait()
            connection.exec_driver_sql("UPDATE stock SET amount = 1 WHERE item = 1")

    def meet(self, session: Session, by: Callable[[Session, str], None] = sends) -> None:
        """As a handler does that takes the driver's connection: the driver raises 1213."""
        self.other_has_two.wait()
        by(session, "UPDATE stock SET amount = 2 WHERE item = 1")
        self.handler_has_one.come()
        self.met = True
        by(session, "UPDATE stock SET amount = 2 WHERE item = 2")


def by_the_session(session: Session, statement: str) -> None:
    session.execute(text(statement))


def told(shop: Shop, way: Way, do: Callable[[Session], object]) -> list[Any]:
    """Deliver message 3, whose handler does this in its first run, until it is acknowledged; return how each delivery ended."""
    runs: list[int] = []

    def handler(session: Session, no: Any) -> None:
        put(session, f"{no}")
        if no == 3:
            runs.append(len(runs))
            if len(runs) == 1:
                do(session)

    way.handles(shop, handler)
    for no in (11, 12, 13):  # the log is known of a connection when it has had a commit on it
        assert way.deliver(shop, [order(no)]) == [P]
    ends: list[Any] = []
    for attempt in (1, 2, 3):
        ends += way.attempted(shop, [order(3, attempt=attempt)])
        if isinstance(ends[-1], Outcome) and ends[-1].acknowledge:
            break
    return ends


@each_way
@pytest.mark.parametrize("then", ["lets it out", "goes on", "returns", "raises"])
def test_a_deadlock_on_the_driver_behind_which_nothing_was_committed_is_as_any(
    logged: Shop, way: Way, then: str
) -> None:
    deadlock = Deadlock(logged)

    def do(session: Session) -> None:
        with suppress(() if then == "lets it out" else Exception):
            deadlock.meet(session)
        if then == "goes on":
            put(session, "on")
            sends(session, "INSERT INTO effect (text) VALUES ('raw')")
        if then == "raises":
            raise ZeroDivisionError

    with in_thread(deadlock.other):
        ends = told(logged, way, do)
    assert deadlock.met
    assert ends in ([P], [F, P])
    assert sorted(logged.effects()) == ["11", "12", "13", "3"]
    assert {row.state for row in logged.failures()} <= {"resolved"}
    logged.borrow()


@each_way
@pytest.mark.parametrize("then", ["raises", "returns", "goes on"])
def test_a_deadlock_and_a_commit_on_the_driver_are_for_a_person(logged: Shop, way: Way, then: str) -> None:
    deadlock = Deadlock(logged)

    def do(session: Session) -> None:
        try:
            deadlock.meet(session)
        except Exception:
            sends(session, "INSERT INTO effect (text) VALUES ('between')")
            driver_of(session).commit()
            if then != "returns":
                sends(session, "INSERT INTO effect (text) VALUES ('behind')")
            if then == "raises":
                raise

    with in_thread(deadlock.other):
        ends = told(logged, way, do)
    assert deadlock.met
    assert P not in ends
    assert sorted(logged.effects()) == ["11", "12", "13", "between"]
    assert {row.state for row in logged.failures()} == {"broken"}
    logged.borrow()


LOOKS = {
    "ROLLBACK": "ROLLBACK",
    "SET": "SET @a = 1",
    "SELECT 1": "SELECT 1",
    "SHOW WARNINGS": "SHOW WARNINGS",
    "SHOW ENGINE INNODB STATUS": "SHOW ENGINE INNODB STATUS",
}


@each_way
@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("then", ["raises", "goes on"])
def test_a_handler_that_looks_behind_a_deadlock_on_the_driver_has_committed_nothing(
    logged: Shop, way: Way, look: str, then: str
) -> None:
    """The answer to any statement says that no transaction is open, which is no commit."""
    deadlock = Deadlock(logged)

    def do(session: Session) -> None:
        try:
            deadlock.meet(session)
        except Exception:
            cursor = driver_of(session).cursor()
            cursor.execute(LOOKS[look])
            with suppress(Exception):
                cursor.fetchall()
            cursor.close()
            if then == "raises":
                raise
            sends(session, "UPDATE stock SET amount = 2 WHERE item = 1")
            put(session, "on")

    with in_thread(deadlock.other):
        ends = told(logged, way, do)
    assert deadlock.met
    assert ends in ([P], [F, P])
    assert sorted(logged.effects()) == ["11", "12", "13", "3"]
    assert {row.state for row in logged.failures()} <= {"resolved"}


@each_way
@pytest.mark.parametrize("then", ["raises", "returns", "goes on", "rolls back first", "goes on and fails"])
def test_a_deadlock_of_the_session_and_a_commit_on_the_driver_are_for_a_person(
    logged: Shop, way: Way, then: str
) -> None:
    """As a handler that writes a row of its error log by the driver, and commits it."""
    deadlock = Deadlock(logged)

    def do(session: Session) -> None:
        driver = driver_of(session)
        try:
            deadlock.meet(session, by=by_the_session)
        except OperationalError:
            if then == "rolls back first":
                driver.rollback()
            sends(session, "INSERT INTO effect (text) VALUES ('between')")
            driver.commit()
            if then.startswith("goes on"):
                sends(session, "INSERT INTO effect (text) VALUES ('behind')")
            if then == "goes on and fails":
                sends(session, "SELECT * FROM no_such_table")
            if then != "returns":
                raise

    with in_thread(deadlock.other):
        ends = told(logged, way, do)
    assert P not in ends
    assert sorted(logged.effects()) == ["11", "12", "13", "between"]
    assert {row.state for row in logged.failures()} == {"broken"}
    logged.borrow()


@each_way
@pytest.mark.parametrize("then", ["lets it out", "returns", "looks", "rolls back"])
def test_a_deadlock_of_the_session_behind_which_nothing_was_committed_is_as_any(
    logged: Shop, way: Way, then: str
) -> None:
    """Also where it did what a binary log keeps of what was rolled back: the log is asked only if something was sent since."""
    deadlock = Deadlock(logged)

    def do(session: Session) -> None:
        driver = driver_of(session)
        if then in ("lets it out", "returns"):
            session.execute(text("CREATE TEMPORARY TABLE IF NOT EXISTS load_here (id INT)"))
        try:
            deadlock.meet(session, by=by_the_session)
        except OperationalError:
            if then == "looks":
                sends(session, "SELECT 1")
            if then == "rolls back":
                driver.rollback()
            if then != "returns":
                raise

    with in_thread(deadlock.other):
        ends = told(logged, way, do)
    assert ends in ([P], [F, P])
    assert sorted(logged.effects()) == ["11", "12", "13", "3"]
    assert {row.state for row in logged.failures()} <= {"resolved"}
    logged.borrow()


@each_way
def test_what_is_committed_once_the_deadlock_was_noticed_is_for_a_person(logged: Shop, way: Way) -> None:
    """The session's next statement was told that its transaction is gone, with nothing committed until then."""
    deadlock = Deadlock(logged)

    def do(session: Session) -> None:
        driver = driver_of(session)
        with suppress(Exception):
            deadlock.meet(session)
        sends(session, "SET @a = 1")  # whose answer says that no transaction is open
        with suppress(Exception):
            put(session, "on")
        sends(session, "INSERT INTO effect (text) VALUES ('between')")
        driver.commit()

    with in_thread(deadlock.other):
        ends = told(logged, way, do)
    assert P not in ends
    assert sorted(logged.effects()) == ["11", "12", "13", "between"]
    assert {row.state for row in logged.failures()} == {"broken"}


@each_way
def test_a_rollback_a_write_and_a_commit_on_the_driver_are_for_a_person(logged: Shop, way: Way) -> None:
    def do(session: Session) -> None:
        driver = driver_of(session)
        driver.rollback()
        sends(session, "INSERT INTO effect (text) VALUES ('between')")
        driver.commit()
        sends(session, "INSERT INTO effect (text) VALUES ('behind')")

    ends = told(logged, way, do)
    assert P not in ends
    assert sorted(logged.effects()) == ["11", "12", "13", "between"]
    assert {row.state for row in logged.failures()} == {"broken"}


@each_way
def test_where_the_log_has_shown_nothing_of_a_session_a_message_is_run_again_or_for_a_person(
    logged: Shop, way: Way
) -> None:
    """As a log that leaves out this database. Under a lease nobody can say what was committed; else the claim's row tells."""
    deadlock = Deadlock(logged)

    def do(session: Session) -> None:
        sends(session, "SET @exactly_once_logs = NULL")
        deadlock.meet(session)

    with in_thread(deadlock.other):
        ends = told(logged, way, do)
    assert deadlock.met
    assert (P in ends) is not way.lease
    assert sorted(logged.effects()) == ["11", "12", "13", *([] if way.lease else ["3"])]
    assert {row.state for row in logged.failures()} <= ({"broken"} if way.lease else {"resolved"})


@pytest.mark.parametrize("way", [UNDER_A_LEASE, IN_A_STEP], ids=str)
def test_a_commit_that_was_kept_out_of_the_log_is_for_a_person(logged: Shop, way: Way) -> None:
    deadlock = Deadlock(logged)

    def do(session: Session) -> None:
        try:
            deadlock.meet(session)
        except Exception:
            sends(session, "SET sql_log_bin = 0")  # which the server refuses inside a transaction
            sends(session, "INSERT INTO effect (text) VALUES ('between')")
            driver_of(session).commit()
            sends(session, "INSERT INTO effect (text) VALUES ('behind')")
            raise

    with in_thread(deadlock.other):
        ends = told(logged, way, do)
    assert deadlock.met
    assert P not in ends
    assert sorted(logged.effects()) == ["11", "12", "13", "between"]
    assert {row.state for row in logged.failures()} == {"broken"}
