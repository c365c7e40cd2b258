"""A handler ends its transaction on the driver's own connection, and the driver silently begins another one.

The kind: the transaction that is open at the end is not the one of the claim. What came before is gone (or committed alone), and
COMMIT would keep the rest without a claim. On PostgreSQL the driver's own BEGIN tells, on SQLite and MariaDB a savepoint.
"""

import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from typing import Any

import pytest
from sqlalchemy.orm import Session

from exactly_once import Outcome
from tests.integration.shop import Shop, on, order, put
from tests.integration.ways import WAYS, Way, driver_of, sends

P, D = Outcome.PROCESSED, Outcome.DUPLICATE
pytestmark = pytest.mark.nightly(meet=2)
each_way = pytest.mark.parametrize("way", WAYS, ids=str)


def _rolls_back(session: Session) -> None:
    driver_of(session).rollback()


def _commits(session: Session) -> None:
    driver_of(session).commit()


def _commits_in_between(session: Session) -> None:
    driver = driver_of(session)
    driver.rollback()
    sends(session, "INSERT INTO effect (text) VALUES ('between')")
    driver.commit()


ENDS: dict[str, Callable[[Session], None]] = {
    "rollback()": _rolls_back,
    "commit()": _commits,
    "ROLLBACK as text": lambda session: sends(session, "ROLLBACK"),
    "COMMIT as text": lambda session: sends(session, "COMMIT"),
    "rollback, write, commit": _commits_in_between,
}


def told_once(shop: Shop, way: Way, do: Callable[[Session], object]) -> list[Any]:
    """Deliver a message three times whose handler does this; return what it ran as, and how each delivery ended."""
    runs: list[int] = []

    def counted(session: Session, no: Any) -> None:
        runs.append(len(runs))
        put(session, "before")
        do(session)

    way.handles(shop, counted)
    ends = [end for attempt in (1, 2, 3) for end in way.attempted(shop, [order(3, attempt=attempt)])]
    return [runs, ends]


def assert_for_a_person(shop: Shop, runs: list[int], ends: list[Any]) -> None:
    """It was never told as done, ran once, and a person is told."""
    assert P not in ends, (ends, shop.effects(), shop.claims())
    assert len(runs) == 1, (runs, ends)
    assert [row.state for row in shop.failures()] == ["broken"]
    there = shop.effects()
    assert len(set(there)) == len(there), there
    shop.borrow()


@each_way
@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("then", ["returns", "goes on", "raises", "claims"])
# a commit on MariaDB's driver behind a rollback there has no witness; the page says so
@pytest.mark.where(lambda ground, how, **_: ground[0] != "mariadb" or how != "rollback, write, commit")
@pytest.mark.nightly(meet=3)
def test_what_follows_a_transaction_that_ended_on_the_driver_is_never_told_as_done(
    shop: Shop, way: Way, how: str, then: str
) -> None:
    def do(session: Session) -> None:
        ENDS[how](session)
        if then == "claims":
            with suppress(Exception):
                shop.eo.claim(session, "part", "P-1")
        with suppress(Exception):
            sends(session, "INSERT INTO effect (text) VALUES ('raw')")
        if then == "goes on":
            put(session, "after")
        elif then == "raises":
            raise ZeroDivisionError

    runs, ends = told_once(shop, way, do)
    if shop.dialect == "mariadb" and "rollback" in how.lower() and then != "claims":
        # nothing was committed since: a failure like any other
        assert P not in ends, (ends, shop.effects())
        assert shop.effects() == []
        return
    assert_for_a_person(shop, runs, ends)


@each_way
@pytest.mark.parametrize("fails", [False, True])
@on("sqlite", colour="sync")  # sqlite3's own connection
def test_sqlites_connection_as_a_context_manager_ends_the_transaction(shop: Shop, way: Way, fails: bool) -> None:
    def do(session: Session) -> None:
        with suppress(ZeroDivisionError), driver_of(session):
            sends(session, "INSERT INTO effect (text) VALUES ('within')")
            if fails:
                raise ZeroDivisionError
        sends(session, "INSERT INTO effect (text) VALUES ('raw')")

    assert_for_a_person(shop, *told_once(shop, way, do))


@each_way
@on("sqlite")  # INSERT OR ROLLBACK is SQLite's
def test_a_conflict_that_rolls_back_on_sqlites_own_cursor_is_noticed(shop: Shop, way: Way) -> None:
    def do(session: Session) -> None:
        for text in ("one", "one", "two"):
            with suppress(Exception):
                sends(session, f"INSERT OR ROLLBACK INTO only_one VALUES ('{text}')")

    assert_for_a_person(shop, *told_once(shop, way, do))


@each_way
@on("sqlite")  # which keeps the locks of a connection that was closed as long as one of its cursors is there
def test_a_cursor_that_a_handler_keeps_does_not_lock_the_file_behind_it(shop: Shop, way: Way) -> None:
    kept: list[Any] = []

    def do(session: Session) -> None:
        for text in ("one", "one", "two"):
            cursor = driver_of(session).cursor()
            kept.append(cursor)
            with suppress(Exception):
                cursor.execute(f"INSERT OR ROLLBACK INTO only_one VALUES ('{text}')")

    runs, ends = told_once(shop, way, do)
    assert kept
    with closing(sqlite3.connect(shop.engine.url.database or "", timeout=0)) as other:
        other.execute("BEGIN IMMEDIATE")
        other.rollback()
    assert_for_a_person(shop, runs, ends)
