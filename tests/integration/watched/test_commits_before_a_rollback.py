"""A commit on the driver's own connection, another statement there, and then an error: a rollback takes the witness away.

The kind: what was committed is of a message that failed. To run that again repeats it. So the witnesses are asked before
SQLAlchemy rolls back, where PostgreSQL has aborted the transaction, and where it is lost and the driver was used since.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import insert, text
from sqlalchemy.orm import Session, registry

from exactly_once import Outcome
from exactly_once.testing.databases import DatabaseServer
from tests.conftest import require
from tests.integration.shop import COLOURS, DIALECTS, ONLY, Shop, order, shops
from tests.integration.watched.test_deadlocks_on_the_driver import told
from tests.integration.ways import WAYS, Way, driver_of, sends
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
    """One that keeps a binary log: without it a rollback, a write and a commit leave no witness."""
    require(mariadb_service)
    with MariaDB(settings={"log-bin": "log", "server-id": "1"}) as server:
        yield DatabaseServer(server.url, source="url")


@pytest.fixture(scope="module", params=[(d, c) for d in DIALECTS for c in COLOURS], ids=" ".join)
def ground(request: pytest.FixtureRequest) -> Iterator[Shop]:
    yield from shops(request, *request.param, pool_size=3, options={"pool_use_lifo": True})


@pytest.fixture
def anywhere(ground: Shop) -> Shop:
    ground.clear()
    return ground


class Once:
    """A row of `only_one`."""

    def __init__(self, text: str) -> None:
        self.text = text


registry().map_imperatively(Once, ONLY)


def a_statement_fails(session: Session) -> None:
    for _ in range(2):
        session.execute(insert(ONLY).values(text="one"))


def a_flush_fails(session: Session) -> None:
    for _ in range(2):
        once = Once("one")
        session.add(once)
        session.flush()
        session.expunge(once)


def a_savepoint_fails(session: Session) -> None:
    with session.begin_nested():
        a_statement_fails(session)


def the_session_rolls_back(session: Session) -> None:
    session.rollback()
    raise ZeroDivisionError


def the_driver_fails(session: Session) -> None:
    for _ in range(2):
        sends(session, "INSERT INTO only_one VALUES ('one')")


def it_raises(session: Session) -> None:
    raise ZeroDivisionError


ENDS: dict[str, Callable[[Session], None]] = {
    "a statement fails": a_statement_fails,
    "a flush fails": a_flush_fails,
    "a savepoint fails": a_savepoint_fails,
    "session.rollback()": the_session_rolls_back,
    "the driver fails": the_driver_fails,
    "it raises": it_raises,
}


@each_way
@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("behind", [True, False])
@pytest.mark.parametrize("rolls_back", [True, False])
def test_what_was_committed_before_an_error_is_for_a_person(
    anywhere: Shop, way: Way, how: str, behind: bool, rolls_back: bool
) -> None:
    def do(session: Session) -> None:
        if rolls_back:
            driver_of(session).rollback()
        sends(session, "INSERT INTO effect (text) VALUES ('between')")
        driver_of(session).commit()
        if behind:
            sends(session, "INSERT INTO effect (text) VALUES ('behind')")
        ENDS[how](session)

    ends = told(anywhere, way, do)
    assert P not in ends
    assert sorted(anywhere.effects()) == ["11", "12", "13", *([] if rolls_back else ["3"]), "between"]
    assert {row.state for row in anywhere.failures()} == {"broken"}
    anywhere.borrow()


@each_way
def test_a_loader_that_commits_each_chunk_repeats_none(anywhere: Shop, way: Way) -> None:
    runs: list[Any] = []

    def do(session: Session, no: Any) -> None:
        runs.append(no)
        for chunk in ("'a', 'b'", "'c', 'd'", "'e', NULL"):
            for value in chunk.split(", "):
                sends(session, f"INSERT INTO effect (text) VALUES ({value})")
            driver_of(session).commit()

    way.handles(anywhere, do)
    ends = [end for attempt in (1, 2, 3) for end in way.attempted(anywhere, [order(3, attempt=attempt)])]
    assert P not in ends
    assert anywhere.effects() == ["a", "b", "c", "d"]
    assert runs == [3]
    assert {row.state for row in anywhere.failures()} == {"broken"}


@each_way
@pytest.mark.parametrize("then", ["raises", "returns"])
def test_what_is_committed_behind_a_flush_that_failed_is_for_a_person(anywhere: Shop, way: Way, then: str) -> None:
    """As a handler that writes its error log by the driver: the flush has rolled back, and the connection is still at hand."""

    def do(session: Session) -> None:
        driver = driver_of(session)
        try:
            a_flush_fails(session)
        except Exception:
            cursor = driver.cursor()
            cursor.execute("INSERT INTO effect (text) VALUES ('between')")
            cursor.close()
            driver.commit()
            if then == "raises":
                raise

    ends = told(anywhere, way, do)
    assert P not in ends
    assert sorted(anywhere.effects()) == ["11", "12", "13", "between"]
    assert {row.state for row in anywhere.failures()} == {"broken"}


@each_way
@pytest.mark.parametrize("how", ["a statement fails", "a flush fails", "session.rollback()"])
def test_an_error_where_nothing_was_committed_is_a_failure_like_any_other(anywhere: Shop, way: Way, how: str) -> None:
    """Also where the transaction did what a binary log keeps of one that was rolled back."""

    def do(session: Session) -> None:
        if anywhere.dialect == "mariadb":
            session.execute(text("CREATE TEMPORARY TABLE IF NOT EXISTS load_here (id INT)"))
        sends(session, "INSERT INTO effect (text) VALUES ('raw')")
        ENDS[how](session)

    ends = told(anywhere, way, do)
    assert ends[-1] is P
    assert len(ends) > 1
    assert sorted(anywhere.effects()) == ["11", "12", "13", "3"]
    assert {row.state for row in anywhere.failures()} <= {"resolved"}
    anywhere.borrow()


@each_way
@pytest.mark.parametrize("then", ["raises", "returns", "goes on", "only looks"])
@pytest.mark.where(lambda ground, **_: ground[0] == "sqlite")  # whose statements can roll back
def test_a_conflict_that_rolled_back_and_a_commit_on_the_driver_are_for_a_person(
    anywhere: Shop, way: Way, then: str
) -> None:
    def do(session: Session) -> None:
        driver = driver_of(session)
        session.execute(text("INSERT INTO only_one VALUES ('one')"))
        try:
            session.execute(text("INSERT OR ROLLBACK INTO only_one VALUES ('one')"))
        except Exception:
            sends(session, "SELECT 1" if then == "only looks" else "INSERT INTO effect (text) VALUES ('between')")
            driver.commit()
            if then == "goes on":
                sends(session, "INSERT INTO effect (text) VALUES ('behind')")
            if then != "returns":
                raise

    ends = told(anywhere, way, do)
    if then == "only looks":
        assert ends in ([P], [F, P])
        assert sorted(anywhere.effects()) == ["11", "12", "13", "3"]
        return
    assert P not in ends
    assert sorted(anywhere.effects()) == ["11", "12", "13", "between"]
    assert {row.state for row in anywhere.failures()} == {"broken"}


@each_way
@pytest.mark.where(lambda ground, **_: ground[0] != "postgres")  # whose driver has begun another transaction by then
def test_an_error_of_the_driver_behind_a_rollback_is_no_commit(anywhere: Shop, way: Way) -> None:
    def do(session: Session) -> None:
        driver = driver_of(session)
        try:
            a_flush_fails(session)
        except Exception:
            cursor = driver.cursor()
            with suppress(Exception):
                cursor.execute("SELECT * FROM no_such_table")
            cursor.close()
            raise

    ends = told(anywhere, way, do)
    assert ends[-1] is P
    assert sorted(anywhere.effects()) == ["11", "12", "13", "3"]
    assert {row.state for row in anywhere.failures()} <= {"resolved"}
