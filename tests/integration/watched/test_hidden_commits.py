"""A handler's transaction is ended where nobody can refuse it: what it left is for a person, and never passes for done.

The kind: a procedure commits, begins anew or swallows a deadlock while the driver still says "in a transaction", or the raw
driver commits; then the handler returns, raises, is cancelled, exits, or swallows what followed. Whichever it does, and
whichever way its work runs: no message is acknowledged with half of its effects and nobody told, and no effect happens twice.
"""

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from exactly_once import Lease, Outcome, Retry
from tests.integration.shop import COLOURS, DIALECTS, ONE_TRY, STOCK, Shop, on, order, put, shops
from tests.integration.threads import Turn, in_thread
from tests.integration.ways import (
    ALONE,
    IN_A_BATCH,
    IN_A_LIST,
    IN_A_STEP,
    UNDER_A_LEASE,
    WAYS,
    Way,
    accounted,
    cancel_this_task,
    driver_of,
    make_anew,
    mariadb_procedures,
    requeued,
)
from tests.services.mariadb import MYSQLD
from tests.waiting import until

pytestmark = pytest.mark.nightly(meet=2)

ROOT = Path(__file__).parents[3]
GROUNDS = [(dialect, colour) for dialect in DIALECTS for colour in COLOURS]

P, D, F, DEAD = Outcome.PROCESSED, Outcome.DUPLICATE, Outcome.FAILED, Outcome.DEAD
each_way = pytest.mark.parametrize("way", WAYS, ids=str)
by_itself = pytest.mark.parametrize("way", [ALONE, UNDER_A_LEASE, IN_A_STEP], ids=str)

PROCEDURES = {
    "truncates": "() BEGIN TRUNCATE TABLE staging; INSERT INTO staging VALUES (1); END",
    "begins": "() BEGIN START TRANSACTION; INSERT INTO staging VALUES (1); END",
    "commits": "() BEGIN COMMIT; INSERT INTO staging VALUES (1); END",
    "only_commits": "() BEGIN COMMIT; END",
    "defines": (
        "() BEGIN PREPARE it FROM 'ALTER TABLE staging COMMENT = \"x\"'; EXECUTE it; INSERT INTO staging VALUES (1); END"
    ),
    "rolls_back": "() BEGIN ROLLBACK; INSERT INTO staging VALUES (1); END",
    "answers_and_commits": "() BEGIN SELECT 1; COMMIT; INSERT INTO staging VALUES (1); SELECT 2; END",
    "harmless": "() BEGIN INSERT INTO staging VALUES (1); END",
    "answers": "() BEGIN SELECT 1 AS one; INSERT INTO staging VALUES (1); SELECT 2 AS two; END",
}


@pytest.fixture(scope="module", params=GROUNDS, ids=[f"{dialect}-{colour}" for dialect, colour in GROUNDS])
def ground(request: pytest.FixtureRequest) -> Iterator[Shop]:
    """A shop with room for a step's connection beside its handler's own."""
    for shop in shops(request, *request.param, pool_size=3, options={"pool_use_lifo": True}):
        if shop.dialect == "mariadb":
            mariadb_procedures(shop, **PROCEDURES)
        yield shop


@pytest.fixture(scope="module", params=COLOURS)
def mariadb_ground(request: pytest.FixtureRequest) -> Iterator[Shop]:
    """The same on the servers whose procedures end the transaction they are called in."""
    for shop in shops(request, "mariadb", request.param, pool_size=3, options={"pool_use_lifo": True}):
        mariadb_procedures(shop, **PROCEDURES)
        yield shop


@pytest.fixture
def mariadb(mariadb_ground: Shop) -> Shop:
    mariadb_ground.clear()
    return mariadb_ground


# -- what hides it, and what the handler does then ---------------------------------------------------------------------


def _execute(statement: str) -> Callable[[Session], object]:
    return lambda session: session.execute(text(statement))


def _second(session: Session) -> None:
    session.execute(text("CALL harmless()"))
    session.execute(text("CALL begins()"))


def _nested(session: Session) -> None:
    with session.begin_nested():
        session.execute(text("CALL begins()"))


def _between_savepoints(session: Session) -> None:
    with session.begin_nested():
        session.execute(text("SELECT 1"))
    session.execute(text("CALL begins()"))
    with session.begin_nested():
        session.execute(text("SELECT 1"))


def _undone(session: Session) -> None:
    """What the handler believes to have undone is committed."""
    nested = session.begin_nested()
    session.execute(text("CALL begins()"))
    nested.rollback()


def _by_the_driver(session: Session) -> None:
    cursor = driver_of(session).cursor()
    cursor.execute("CALL begins()")
    cursor.close()


CALLS: dict[str, Callable[[Session], object]] = {
    "TRUNCATE": _execute("CALL truncates()"),
    "START TRANSACTION": _execute("CALL begins()"),
    "COMMIT": _execute("CALL commits()"),
    "COMMIT and no more": _execute("CALL only_commits()"),
    "prepared DDL": _execute("CALL defines()"),
    "with results": lambda session: session.execute(text("CALL answers_and_commits()")).all(),
    "as the second statement": _second,
    "in another case": _execute("/* start it */ cAlL `BEGINS` ()"),
    "in a savepoint": _nested,
    "between savepoints": _between_savepoints,
    "in a savepoint that is rolled back": _undone,
}
if not MYSQLD:  # which has no such statement
    CALLS["a prepared CALL"] = _execute("EXECUTE IMMEDIATE 'CALL begins()'")


# each way once, and each call in the two ways whose code differs most: a TRUNCATE is slow
each_call = pytest.mark.parametrize(
    ("way", "call"),
    [(way, call) for way in (ALONE, IN_A_BATCH) for call in CALLS]
    + [
        (way, call)
        for way in (IN_A_LIST, UNDER_A_LEASE, IN_A_STEP)
        for call in ("START TRANSACTION", "COMMIT and no more")
    ],
    ids=str,
)


class Panic(Exception):
    """The handler's own."""


def _raise() -> None:
    raise Panic("after the call")


def _exit() -> None:
    raise SystemExit(3)


ENDS: dict[str, Callable[[], None]] = {
    "goes on": lambda: None,
    "raises": _raise,
    "exits": _exit,
    "is cancelled": cancel_this_task,
}


@dataclass
class Hiding:
    """A handler: each message has two effects, and between those of one of them a commit hides."""

    hide: Callable[[Session], object]
    end: Callable[[], None] = ENDS["goes on"]
    bad: Any = 3
    swallow: bool = False
    """Whatever is raised from there on."""
    at_once: bool = False
    """It returns then, without the second effect."""
    mended: bool = False
    runs: Counter[Any] = field(default_factory=Counter)

    def __call__(self, session: Session, no: Any) -> None:
        self.runs[no] += 1
        put(session, f"{no} before")
        if no != self.bad or self.mended:
            put(session, f"{no} after")
        elif self.swallow:
            with suppress(Exception):
                self.hide(session)
            with suppress(Exception):
                put(session, f"{no} after")
        else:
            self.hide(session)
            self.end()
            if not self.at_once:
                put(session, f"{no} after")


def numbers_of(way: Way) -> list[int]:
    return [1, 2, 3, 4, 5, 6, 7, 8] if way.together else [3]


def tell_the_story(
    shop: Shop, way: Way, hiding: Hiding, numbers: list[int], *, says: str = "", attempt: int = 1
) -> None:
    """Bring the messages until each is acknowledged; account for each; then a copy of each, then a person's decision."""
    left = list(numbers)
    while left:
        assert attempt < 5, f"still not acknowledged: {left}"
        ends = way.attempted(shop, [order(no, attempt=attempt) for no in left])
        left = [no for no, end in zip(left, ends, strict=True) if not (isinstance(end, Outcome) and end.acknowledge)]
        attempt += 1
    accounted(shop, numbers, effects_of_each=("before", "after"))
    broken = [row for row in shop.failures() if row.state == "broken"]
    bad = next((row for row in broken if row.business_key == str(hiding.bad)), None)
    assert bad is not None, "its claim was committed before its end, and nobody noticed"
    assert bad.error_class == "Misuse"
    assert says.lower() in bad.error_text.lower()
    ran = hiding.runs.copy()
    assert all(outcome.acknowledge for outcome in way.deliver(shop, [order(no, attempt=5) for no in numbers]))
    assert hiding.runs == ran, "a copy ran"
    assert [row.id for row in shop.failures() if row.state == "broken"] == [row.id for row in broken]
    hiding.mended = True
    requeued(shop, [row.id for row in broken])
    again = [int(row.business_key) for row in broken]
    assert way.deliver(shop, [order(no, attempt=6) for no in again]) == [P] * len(again)
    assert way.deliver(shop, [order(no, attempt=7) for no in again]) == [D] * len(again)
    assert hiding.runs == ran + Counter(again)
    assert {row.state for row in shop.failures()} == {"resolved"}
    assert set(shop.claims()) == set(map(str, numbers))
    shop.borrow()


# -- MySQL's and MariaDB's procedures ----------------------------------------------------------------------------------


@each_call
def test_a_procedure_that_ends_the_transaction_before_the_handler_raises(mariadb: Shop, way: Way, call: str) -> None:
    hiding = Hiding(CALLS[call], _raise)
    way.handles(mariadb, hiding)
    tell_the_story(mariadb, way, hiding, numbers_of(way), says="CALL")


@each_call
def test_a_procedure_that_ends_the_transaction_before_the_handler_returns(mariadb: Shop, way: Way, call: str) -> None:
    hiding = Hiding(CALLS[call])
    way.handles(mariadb, hiding)
    tell_the_story(mariadb, way, hiding, numbers_of(way), says="CALL")


@each_way
@pytest.mark.parametrize("end", ["exits", "is cancelled"])
# a thread is not cancelled
@pytest.mark.where(lambda mariadb_ground, end, **_: mariadb_ground == "async" or end == "exits")
def test_a_procedure_that_ends_the_transaction_before_the_handler_is_stopped(mariadb: Shop, way: Way, end: str) -> None:
    hiding = Hiding(CALLS["START TRANSACTION"], ENDS[end])
    way.handles(mariadb, hiding)
    tell_the_story(mariadb, way, hiding, numbers_of(way))


@each_way
@pytest.mark.parametrize("call", ["START TRANSACTION", "in a savepoint"])
def test_a_procedure_that_ends_the_transaction_and_what_followed_is_swallowed(
    mariadb: Shop, way: Way, call: str
) -> None:
    hiding = Hiding(CALLS[call], swallow=True)
    way.handles(mariadb, hiding)
    tell_the_story(mariadb, way, hiding, numbers_of(way), says="CALL")


@each_way
@pytest.mark.parametrize("end", ["goes on", "raises"])
def test_a_procedure_that_ends_the_transaction_as_the_last_thing(mariadb: Shop, way: Way, end: str) -> None:
    hiding = Hiding(CALLS["START TRANSACTION"], ENDS[end], at_once=True)
    way.handles(mariadb, hiding)
    tell_the_story(mariadb, way, hiding, numbers_of(way), says="CALL begins")


@by_itself
def test_a_handler_that_always_raises_behind_such_a_procedure_runs_once(mariadb: Shop, way: Way) -> None:
    hiding = Hiding(CALLS["START TRANSACTION"], _raise)
    way.handles(mariadb, hiding, retry=Retry(immediate=2, max_attempts=3))
    tell_the_story(mariadb, way, hiding, [3], says="CALL begins")
    assert hiding.runs[3] == 2  # and once when a person said so


@pytest.mark.parametrize("way", [IN_A_BATCH, IN_A_LIST], ids=str)
@pytest.mark.parametrize("bad", [1, 11, 20])
def test_one_of_a_large_group_hides_a_commit_and_raises(mariadb: Shop, way: Way, bad: int) -> None:
    hiding = Hiding(CALLS["START TRANSACTION"], _raise, bad=bad)
    way.handles(mariadb, hiding)
    tell_the_story(mariadb, way, hiding, list(range(1, 21)), says="CALL")


@each_way
def test_a_call_sent_by_the_raw_driver_is_noticed_too(mariadb: Shop, way: Way) -> None:
    hiding = Hiding(_by_the_driver, _raise)
    way.handles(mariadb, hiding)
    tell_the_story(mariadb, way, hiding, numbers_of(way))


@each_way
@pytest.mark.parametrize("end", ["goes on", "raises"])
def test_a_rollback_in_a_procedure_keeps_no_effect_without_its_claim(mariadb: Shop, way: Way, end: str) -> None:
    """Nothing was committed, but nobody can know it: run again or broken, both are right."""
    hiding = Hiding(_execute("CALL rolls_back()"), ENDS[end])
    way.handles(mariadb, hiding)
    numbers = numbers_of(way)
    ends = way.attempted(mariadb, [order(no) for no in numbers])
    accounted(
        mariadb,
        [no for no, each in zip(numbers, ends, strict=True) if each in (P, D)],
        effects_of_each=("before", "after"),
    )
    assert all(each is not P for no, each in zip(numbers, ends, strict=True) if no == hiding.bad)
    assert str(hiding.bad) in {row.business_key for row in mariadb.failures()}
    hiding.mended = True
    broken = [row.id for row in mariadb.failures() if row.state == "broken"]
    if broken:
        requeued(mariadb, broken)
    left = [no for no, each in zip(numbers, ends, strict=True) if each is not P]
    assert way.deliver(mariadb, [order(no, attempt=2) for no in left]) == [P] * len(left)
    accounted(mariadb, numbers, effects_of_each=("before", "after"))
    assert len(mariadb.effects()) == 2 * len(numbers)


def test_the_second_statement_of_one_text_hides_it(request: pytest.FixtureRequest) -> None:
    from pymysql.constants.CLIENT import MULTI_STATEMENTS

    for colour in COLOURS:
        options = {"connect_args": {"client_flag": MULTI_STATEMENTS}} if colour == "sync" else {}
        for shop in shops(request, "mariadb", colour, options=options):
            mariadb_procedures(shop, **PROCEDURES)
            for end in (_raise, ENDS["goes on"]):
                shop.clear()
                hiding = Hiding(lambda session: session.connection().exec_driver_sql("SELECT 1; CALL begins()"), end)
                ALONE.handles(shop, hiding)
                tell_the_story(shop, ALONE, hiding, [3])


# -- a deadlock that a procedure swallows ------------------------------------------------------------------------------

SWALLOWING = {
    "a procedure": (
        (
            "CREATE PROCEDURE takes_two() BEGIN DECLARE CONTINUE HANDLER FOR SQLEXCEPTION BEGIN END;"
            " UPDATE stock SET amount = amount - 1 WHERE item = 2; INSERT INTO staging VALUES (1); END"
        ),
        "CALL takes_two()",
    ),
    "a function": (
        (
            "CREATE FUNCTION took_two() RETURNS INT MODIFIES SQL DATA BEGIN"
            " DECLARE CONTINUE HANDLER FOR SQLEXCEPTION BEGIN END;"
            " UPDATE stock SET amount = amount - 1 WHERE item = 2; RETURN 1; END"
        ),
        "SELECT took_two()",
    ),
}
AND_COMMITS = (
    (
        "CREATE PROCEDURE takes_two_and_commits() BEGIN DECLARE CONTINUE HANDLER FOR SQLEXCEPTION BEGIN END;"
        " UPDATE stock SET amount = amount - 1 WHERE item = 2; INSERT INTO effect (text) VALUES ('inside'); COMMIT;"
        " INSERT INTO staging VALUES (1); END"
    ),
    "CALL takes_two_and_commits()",
)


def _take(session: Any, item: int) -> None:
    session.execute(update(STOCK).where(STOCK.c.item == item).values(amount=STOCK.c.amount - 1))


class Deadlock:
    """Another transaction, heavier than the handler's, that the handler's runs into once; the server throws the latter away."""

    def __init__(self, shop: Shop, swallowing: str, statement: str) -> None:
        self.shop, self.statement = shop, statement
        self.handler_has_one, self.other_has_two = Turn(), Turn()
        self.met = False
        with shop.outside.begin() as connection:
            make_anew(connection, swallowing)
            connection.execute(insert(STOCK), [{"item": item, "amount": 9} for item in (1, 2)])

    def other(self) -> None:
        with self.shop.outside.begin() as connection:
            # the heavier of two is not the victim
            connection.execute(insert(STOCK), [{"item": item, "amount": 0} for item in range(100, 400)])
            _take(connection, 2)
            self.other_has_two.come()
            self.handler_has_one.wait()
            _take(connection, 1)

    def __call__(self, session: Session) -> None:
        if not self.met:
            self.met = True
            self.other_has_two.wait()
            _take(session, 1)
            self.handler_has_one.come()
            session.execute(text(self.statement))


@each_way
@pytest.mark.parametrize("swallowing", SWALLOWING)
@pytest.mark.parametrize("end", ["goes on", "raises"])
def test_a_swallowed_deadlock_never_keeps_effects_without_their_claim(
    mariadb: Shop, way: Way, swallowing: str, end: str
) -> None:
    deadlock = Deadlock(mariadb, *SWALLOWING[swallowing])
    hiding = Hiding(deadlock, lambda: ENDS[end]() if hiding.runs[3] == 1 else None)
    numbers = numbers_of(way)
    way.handles(mariadb, hiding)
    with in_thread(deadlock.other):
        ends = way.attempted(mariadb, [order(no) for no in numbers])
    assert deadlock.met
    left = [no for no, each in zip(numbers, ends, strict=True) if not (isinstance(each, Outcome) and each.acknowledge)]
    assert all(outcome.acknowledge for outcome in way.deliver(mariadb, [order(no, attempt=2) for no in left]))
    accounted(mariadb, numbers, effects_of_each=("before", "after"))
    ran = hiding.runs.copy()
    assert all(outcome.acknowledge for outcome in way.deliver(mariadb, [order(no, attempt=3) for no in numbers]))
    assert hiding.runs == ran, "a copy ran"
    mariadb.borrow()


@each_way
@pytest.mark.parametrize("end", ["goes on", "raises"])
def test_a_deadlock_and_a_commit_in_one_procedure_are_for_a_person(mariadb: Shop, way: Way, end: str) -> None:
    """The claim is gone, and what followed the loss is committed: to run again would repeat it."""
    deadlock = Deadlock(mariadb, *AND_COMMITS)
    hiding = Hiding(deadlock, ENDS[end])
    numbers = numbers_of(way)
    way.handles(mariadb, hiding)
    with in_thread(deadlock.other):
        ends = way.attempted(mariadb, [order(no) for no in numbers])
    left = [no for no, each in zip(numbers, ends, strict=True) if not (isinstance(each, Outcome) and each.acknowledge)]
    assert all(outcome.acknowledge for outcome in way.deliver(mariadb, [order(no, attempt=2) for no in left]))
    accounted(mariadb, numbers, effects_of_each=("before", "after"), extra=("inside",))
    (row,) = (row for row in mariadb.failures() if row.business_key == "3")
    assert row.state == "broken"
    assert mariadb.effects().count("inside") == 1
    assert all(outcome.acknowledge for outcome in way.deliver(mariadb, [order(no, attempt=3) for no in numbers]))
    assert mariadb.effects().count("inside") == 1, "a copy ran"
    assert hiding.runs[3] == 1
    mariadb.borrow()


# -- the raw driver, on every dialect ----------------------------------------------------------------------------------


def _commit(session: Session) -> None:
    driver_of(session).commit()


def _driver_itself(session: Session) -> None:
    driver = session.connection().connection.driver_connection
    ended: Any = driver.commit()  # type: ignore[union-attr]
    if ended is not None:
        from sqlalchemy.util import await_only

        await_only(ended)


@each_way
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.where(lambda ground, end, **_: ground[1] == "async" or end != "is cancelled")  # a thread is not cancelled
def test_a_commit_of_the_drivers_is_for_a_person_whatever_follows(shop: Shop, way: Way, end: str) -> None:
    hiding = Hiding(_commit, ENDS[end])
    way.handles(shop, hiding)
    tell_the_story(shop, way, hiding, numbers_of(way))


@each_way
def test_a_commit_of_the_drivers_as_the_last_thing_is_for_a_person(shop: Shop, way: Way) -> None:
    hiding = Hiding(_commit, at_once=True)
    way.handles(shop, hiding)
    tell_the_story(shop, way, hiding, numbers_of(way))


@each_way
@pytest.mark.parametrize("end", ["goes on", "raises"])
def test_a_commit_of_the_drivers_own_connection_is_no_other(shop: Shop, way: Way, end: str) -> None:
    hiding = Hiding(_driver_itself, ENDS[end])
    way.handles(shop, hiding)
    tell_the_story(shop, way, hiding, numbers_of(way))


@by_itself
def test_a_handler_that_commits_by_the_driver_and_always_raises_runs_once(shop: Shop, way: Way) -> None:
    hiding = Hiding(_commit, _raise)
    way.handles(shop, hiding, retry=Retry(immediate=2, max_attempts=3))
    tell_the_story(shop, way, hiding, [3])
    assert hiding.runs[3] == 2  # and once when a person said so


CHILD = """
import os, signal, sys
from sqlalchemy import text
from tests.integration.shop import Shop, order, put
from contextlib import suppress
from datetime import timedelta
from exactly_once import Lease, Misuse
from tests.integration.ways import WAYS, driver_of
dialect, colour, url, name, hidden, handler, redis = sys.argv[1:]
(way,) = (each for each in WAYS if each.name == name)
def do(session, no):
    put(session, f"{no} before")
    if no == 3:
        if hidden == "driver":
            driver_of(session).commit()
        else:
            with suppress(Misuse):  # the call is told at once; the process dies before that is written down
                session.execute(text(hidden))
        os.kill(os.getpid(), signal.SIGKILL)
    put(session, f"{no} after")
shop = Shop(dialect, colour, url)
short = timedelta(seconds=2)
guard = Lease(short, store=redis) if redis else Lease(short)
way.handles(shop, do, name=handler, **({"guard": guard} if way.lease else {}))
way.deliver(shop, [order(no) for no in ([1, 2, 3, 4, 5, 6, 7, 8] if way.together else [3])])
"""
SHORT = timedelta(seconds=2)


@pytest.mark.parametrize(
    ("way", "store"),
    [(way, "") for way in WAYS] + [(UNDER_A_LEASE, "redis"), (IN_A_STEP, "redis")],
    ids=lambda it: str(it) or "own",
)
@pytest.mark.parametrize("hidden", ["driver", "CALL begins()"])
# only MySQL's and MariaDB's procedures end the transaction they are called in; there a claim is finished
@on("mariadb")
def test_a_process_killed_between_the_hidden_commit_and_our_record_leaves_no_duplicate(
    request: pytest.FixtureRequest, shop: Shop, way: Way, store: str, hidden: str
) -> None:
    redis = request.getfixturevalue("redis_url") if store else ""
    handler = f"handler-{os.urandom(4).hex()}"
    command = [sys.executable, "-c", CHILD, shop.dialect, shop.colour, shop.url, way.name, hidden, handler, redis]
    ended = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=120, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert "3 before" in shop.effects()
    assert "3 after" not in shop.effects()
    # told by what the dead process has left: 3 and its company
    hiding = Hiding(lambda session: None, mended=True)
    guard = Lease(SHORT, store=redis) if redis else Lease(SHORT)
    way.handles(shop, hiding, name=handler, **({"guard": guard} if way.lease else {}))
    if way.lease:
        until(lambda: shop.process(order(3, attempt=2)) is not Outcome.IN_PROGRESS, "the end of the dead run's lease")
    tell_the_story(shop, way, hiding, numbers_of(way), attempt=2)
    assert hiding.runs[3] == 1  # when a person said so


# -- what is no hidden commit ------------------------------------------------------------------------------------------


def _savepoints(session: Session) -> None:
    with session.begin_nested(), session.begin_nested():
        session.execute(text("SELECT 1"))
    nested = session.begin_nested()
    put(session, "undone")
    nested.rollback()
    with suppress(Panic), session.begin_nested():
        put(session, "undone")
        with session.begin_nested():
            put(session, "undone")
        raise Panic


@each_way
def test_a_handlers_own_savepoints_keep_working(shop: Shop, way: Way) -> None:
    hiding = Hiding(_savepoints)
    way.handles(shop, hiding)
    assert way.deliver(shop, [order(no) for no in (1, 2, 3)]) == [P] * 3
    accounted(shop, (1, 2, 3), effects_of_each=("before", "after"))
    assert len(shop.effects()) == 6
    shop.borrow()


def _calls_within_savepoints(session: Session) -> None:
    session.execute(text("CALL harmless()"))
    with session.begin_nested():
        session.execute(text("CALL harmless()"))
        with session.begin_nested():
            assert session.execute(text("CALL answers()")).scalar_one() == 1
    nested = session.begin_nested()
    session.execute(text("CALL answers()")).all()
    put(session, "undone")
    nested.rollback()
    session.execute(text("CALL answers()")).close()
    session.execute(text("CALL harmless()"))


@each_way
def test_a_harmless_procedure_may_be_called_within_savepoints_and_without(mariadb: Shop, way: Way) -> None:
    hiding = Hiding(_calls_within_savepoints)
    way.handles(mariadb, hiding)
    assert way.deliver(mariadb, [order(no) for no in (1, 2, 3)]) == [P] * 3
    accounted(mariadb, (1, 2, 3), effects_of_each=("before", "after"))
    assert len(mariadb.effects()) == 6
    assert mariadb.failures() == []
    mariadb.borrow()


def _streamed(session: Session, procedure: str, read: str) -> None:
    """Call it in a savepoint that is rolled back, with its rows read one by one."""
    nested = session.begin_nested()
    rows = session.execute(text(f"CALL {procedure}()"), execution_options={"stream_results": True})
    if read == "half":
        rows.fetchone()
    else:
        rows.fetchall()
    if read == "closed":
        rows.close()
    nested.rollback()


unread = pytest.mark.filterwarnings("ignore:Previous unbuffered result was left incomplete")


@unread
@each_way
@pytest.mark.parametrize("read", ["half", "all", "closed"])
def test_a_call_whose_rows_are_streamed_may_be_undone_with_its_savepoint(mariadb: Shop, way: Way, read: str) -> None:
    hiding = Hiding(lambda session: _streamed(session, "answers", read))
    way.handles(mariadb, hiding)
    assert way.deliver(mariadb, [order(no) for no in (1, 2, 3)]) == [P] * 3
    accounted(mariadb, (1, 2, 3), effects_of_each=("before", "after"))
    assert len(mariadb.effects()) == 6
    mariadb.borrow()


@unread
@each_way
@pytest.mark.parametrize("read", ["half", "all", "closed"])
def test_a_commit_in_such_a_call_is_for_a_person(mariadb: Shop, way: Way, read: str) -> None:
    runs: list[object] = []

    def do(session: Session, no: object) -> None:
        runs.append(no)
        put(session, f"{no} before")
        _streamed(session, "answers_and_commits", read)
        put(session, f"{no} after")

    way.handles(mariadb, do)
    ends = [*way.attempted(mariadb, [order(3)]), *way.attempted(mariadb, [order(3, attempt=2)])]
    assert P not in ends
    assert [row.state for row in mariadb.failures()] == ["broken"]
    assert mariadb.effects().count("3 before") == 1
    assert len(runs) == 1


@each_way
@pytest.mark.parametrize("swallow", [False, True], ids=["raised", "swallowed"])
@on("postgres")
def test_postgresql_lets_no_procedure_commit_inside_a_transaction(shop: Shop, way: Way, swallow: bool) -> None:
    with shop.outside.begin() as connection:
        connection.execute(text("CREATE OR REPLACE PROCEDURE commits() LANGUAGE plpgsql AS 'BEGIN COMMIT; END'"))
    codes: list[Any] = []

    def call(session: Session) -> None:
        try:
            session.execute(text("CALL commits()"))
        except DBAPIError as error:
            codes.append(getattr(error.orig, "sqlstate", None))
            raise

    hiding = Hiding(call, swallow=swallow)
    way.handles(shop, hiding)
    numbers = numbers_of(way)
    assert way.deliver(shop, [order(no) for no in numbers]) == [F if no == 3 else P for no in numbers]
    assert set(codes) == {"2D000"}
    assert shop.failure().state == "retrying"
    accounted(shop, [no for no in numbers if no != 3], effects_of_each=("before", "after"))
    assert not {effect for effect in shop.effects() if effect.startswith("3 ")}
    shop.borrow()


def _on_conflict_rollback(session: Session) -> None:
    session.execute(text("INSERT INTO only_one VALUES ('one')"))
    session.execute(text("INSERT OR ROLLBACK INTO only_one VALUES ('one')"))


def _raise_rollback(session: Session) -> None:
    session.execute(text("INSERT INTO only_one VALUES ('refused')"))


@each_way
@pytest.mark.parametrize("rolls_back", [_on_conflict_rollback, _raise_rollback])
@pytest.mark.parametrize("how", ["raised", "swallowed", "swallowed last", "swallowed, and then another error"])
@on("sqlite")
def test_sqlites_own_rollbacks_keep_nothing_and_blame_one_message(
    shop: Shop, way: Way, rolls_back: Callable[[Session], None], how: str
) -> None:
    """ON CONFLICT ROLLBACK, and RAISE(ROLLBACK) in a trigger: the claim is gone, and nothing was committed."""
    with shop.outside.begin() as connection:
        connection.execute(
            text(
                "CREATE TRIGGER IF NOT EXISTS refuses BEFORE INSERT ON only_one WHEN NEW.text = 'refused'"
                " BEGIN SELECT RAISE(ROLLBACK, 'refused'); END"
            )
        )

    def hide(session: Session) -> None:
        if how == "raised":
            rolls_back(session)
        with suppress(DBAPIError):
            rolls_back(session)
        if how == "swallowed, and then another error":
            raise Panic

    hiding = Hiding(hide, at_once=how == "swallowed last")
    way.handles(shop, hiding)
    numbers = numbers_of(way)
    assert way.deliver(shop, [order(no) for no in numbers]) == [F if no == 3 else P for no in numbers]
    assert shop.failure().state == "retrying"
    assert not {effect for effect in shop.effects() if effect.startswith("3 ")}
    hiding.mended = True
    assert way.deliver(shop, [order(3, attempt=2)]) == [P]
    accounted(shop, numbers, effects_of_each=("before", "after"))
    shop.borrow()


# -- the handler's own session inside a step ---------------------------------------------------------------------------


@pytest.mark.parametrize("used", ["inside", "inside, before"])
def test_the_handlers_own_session_is_refused_inside_a_steps_callback(shop: Shop, used: str) -> None:
    """The step's record would stand and the write be undone: the next attempt would skip what never happened."""
    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.util import greenlet_spawn

    from exactly_once import AsyncSteps, Steps
    from tests.integration.ways import LEASE

    ran: list[str] = []
    attempts: list[int] = []

    def step(session: Session) -> str:
        ran.append("step")
        put(session, "in the step")
        return "done"

    def end() -> None:
        attempts.append(1)
        if len(attempts) == 1:
            raise Panic("once")

    options: dict[str, Any] = {"name": "handler", "key": "no", "retry": ONE_TRY, "guard": LEASE}
    if shop.is_async:

        @shop.eo.handler("orders", **options)
        async def awaited(session: AsyncSession, steps: AsyncSteps) -> None:
            async def call(key: str) -> str:
                return await greenlet_spawn(step, session.sync_session)

            if used == "inside, before":
                await session.run_sync(lambda sync: sync.execute(text("SELECT 1")))
            await steps.run("write", call)
            end()
    else:

        @shop.eo.handler("orders", **options)
        def plain(session: Session, steps: Steps) -> None:
            if used == "inside, before":
                session.execute(text("SELECT 1"))
            steps.run("write", lambda key: step(session))
            end()

    outcomes = [shop.process(order(attempt=1)), shop.process(order(attempt=2))]
    assert outcomes[0] in (F, DEAD)
    if P in outcomes or D in outcomes:
        assert shop.effects() == ["in the step"], "the message is acknowledged, and its step's write is gone"
    error = shop.failure()
    assert error.error_class in ("StepError", "Misuse")
    assert "write" in error.error_text
    assert "session" in error.error_text
    assert shop.effects() == []
    shop.borrow()
