"""A procedure sends its first rows, and then fails: the handler's own error, also where a statement of ours is the next one sent.

The kind: PyMySQL and asyncmy read what is left of an answer with the next statement. Behind a handler's last CALL that one is
ours: the COMMIT of its transaction, the record of a step, a claim, a look at a transaction that is given up. What the procedure
met is told as its error, counted once, and taken for nothing of ours.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import pytest
from pymysql.connections import Connection
from sqlalchemy import event, insert, text
from sqlalchemy.orm import Session

from exactly_once import Lease, Outcome, Retry
from tests.integration.shop import COLOURS, STOCK, Shop, on, order, put, shops
from tests.integration.threads import Turn, in_thread
from tests.integration.ways import (
    ALONE,
    IN_A_BATCH,
    IN_A_LIST,
    IN_A_STEP,
    UNDER_A_LEASE,
    WAYS,
    Way,
    driver_of,
    in_session,
    mariadb_procedures,
)

P, D, F = Outcome.PROCESSED, Outcome.DUPLICATE, Outcome.FAILED
pytestmark = pytest.mark.nightly(meet=2)
each_way = pytest.mark.parametrize("way", WAYS, ids=str)

FAILING = {
    "signals": "() BEGIN SELECT 'looking' AS progress; SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'out of stock'; END",
    "collides": (
        "() BEGIN SELECT 'looking' AS progress; INSERT INTO only_one VALUES ('x'); INSERT INTO only_one VALUES ('x'); END"
    ),
    "misses": "() BEGIN SELECT 'looking' AS progress; CALL nowhere(); END",
    "finds_no_table": "() BEGIN SELECT 'looking' AS progress; SELECT * FROM nowhere; END",
}
TOLD = {"signals": "out of stock", "collides": "duplicate entry", "misses": "1305", "finds_no_table": "1146"}
WELL = "() BEGIN SELECT 1 AS one; INSERT INTO effect (text) VALUES ('by the procedure'); SELECT 2 AS two; END"
each_error = pytest.mark.parametrize("procedure", FAILING)


@pytest.fixture(scope="module", params=COLOURS)
def ground(request: pytest.FixtureRequest) -> Iterator[Shop]:
    for shop in shops(request, "mariadb", request.param, pool_size=3, options={"pool_use_lifo": True}):
        mariadb_procedures(shop, **FAILING, well=WELL)
        yield shop


def told_of(shop: Shop) -> list[tuple[str, str | None, int]]:
    return [(row.state, row.business_key, row.attempts) for row in shop.failures()]


def call(session: Session, procedure: str, through: str = "SQLAlchemy") -> None:
    """Leave its rows unread."""
    if through == "SQLAlchemy":
        session.execute(text(f"CALL {procedure}()"))
    else:
        driver_of(session).cursor().execute(f"CALL {procedure}()")


@each_way
@each_error
@pytest.mark.parametrize("through", ["SQLAlchemy", "the driver"])
@pytest.mark.parametrize("place", ["in the midst", "last"])
def test_its_error_is_the_messages_own_and_counted_once(
    shop: Shop, way: Way, procedure: str, through: str, place: str
) -> None:
    runs: list[Any] = []

    def do(session: Session, no: Any) -> None:
        runs.append(no)
        put(session, f"{no} before")
        if no == 3:
            call(session, procedure, through)

    way.handles(shop, do)
    numbers = ([1, 2, 3] if place == "last" else [1, 2, 3, 4]) if way.together else [3]
    ends = way.deliver(shop, [order(no) for no in numbers])
    others = [no for no in numbers if no != 3]
    assert ends == [F if no == 3 else P for no in numbers], told_of(shop)
    assert told_of(shop) == [("retrying", "3", 1)]
    assert TOLD[procedure] in shop.failure().error_text.lower(), shop.failure().error_text
    assert runs.count(3) <= 2  # of a group once with the others, and once alone
    assert sorted(shop.effects()) == [f"{no} before" for no in others]
    shop.borrow()


@each_way
@each_error
def test_what_the_handler_raises_behind_it_is_what_is_told(shop: Shop, way: Way, procedure: str) -> None:
    def do(session: Session, no: Any) -> None:
        put(session, "before")
        call(session, procedure)
        raise ZeroDivisionError

    way.handles(shop, do)
    assert way.deliver(shop, [order(3)]) == [F]
    assert told_of(shop) == [("retrying", "3", 1)]
    assert shop.failure().error_class == "ZeroDivisionError"
    assert shop.effects() == []


@each_way
@each_error
def test_another_call_behind_it_is_not_what_failed(shop: Shop, way: Way, procedure: str) -> None:
    def do(session: Session, no: Any) -> None:
        call(session, procedure, "the driver")
        call(session, "well")

    way.handles(shop, do)
    assert way.deliver(shop, [order(3)]) == [F]
    assert told_of(shop) == [("retrying", "3", 1)]
    assert TOLD[procedure] in shop.failure().error_text.lower()
    assert shop.effects() == []


@each_error
@pytest.mark.parametrize("way", [ALONE, IN_A_BATCH, UNDER_A_LEASE, IN_A_STEP], ids=str)
def test_a_hook_before_our_commit_calls_it(shop: Shop, way: Way, procedure: str) -> None:
    def do(session: Session, no: Any) -> None:
        event.listen(session, "before_commit", lambda each: call(each, procedure))
        put(session, "before")

    way.handles(shop, do)
    assert way.deliver(shop, [order(3)]) == [F]
    assert told_of(shop) == [("retrying", "3", 1)]
    assert TOLD[procedure] in shop.failure().error_text.lower()
    assert shop.effects() == []


@pytest.mark.parametrize("way", [ALONE, IN_A_BATCH, IN_A_LIST], ids=str)
def test_a_trigger_that_signals_as_our_claim_is_finished_says_nothing_of_the_transaction(shop: Shop, way: Way) -> None:
    """SIGNAL gives it the number that ours would have, too."""
    with shop.outside.begin() as connection:
        creates = f"CREATE TRIGGER audit BEFORE UPDATE ON {shop.tables.idempotent.name} FOR EACH ROW"
        connection.execute(text(f"{creates} SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'the audit is full'"))
    runs: list[Any] = []
    way.handles(shop, lambda session, no: runs.append(no))
    try:
        assert way.deliver(shop, [order(3)]) == [F]
    finally:
        with shop.outside.begin() as connection:
            connection.execute(text("DROP TRIGGER audit"))
    assert runs == [3]
    assert told_of(shop) == [("retrying", "3", 1)]
    assert "the audit is full" in shop.failure().error_text


@each_way
@pytest.mark.parametrize("through", ["SQLAlchemy", "the driver"])
def test_rows_that_nobody_reads_do_no_harm(shop: Shop, way: Way, through: str) -> None:
    way.handles(shop, lambda session, no: call(session, "well", through))
    assert way.deliver(shop, [order(3)]) == [P]
    assert shop.effects() == ["by the procedure"]
    assert way.deliver(shop, [order(3)]) == [D]
    assert shop.failures() == []
    shop.borrow()


@each_way
def test_a_deadlock_behind_its_rows_runs_the_message_again(shop: Shop, way: Way) -> None:
    takes = "() BEGIN SELECT 1 AS one; UPDATE stock SET amount = amount - 1 WHERE item = 2; END"
    mariadb_procedures(shop, takes=takes)
    with shop.outside.begin() as connection:
        connection.execute(insert(STOCK), [{"item": item, "amount": 9} for item in (1, 2)])
    ours, theirs = Turn(), Turn()
    runs: list[int] = []

    def other() -> None:
        with shop.outside.begin() as connection:
            # the more rows it has written, the less the server chooses it for the victim
            connection.execute(insert(STOCK), [{"item": item, "amount": 0} for item in range(100, 400)])
            connection.execute(text("UPDATE stock SET amount = 5 WHERE item = 2"))
            theirs.come()
            ours.wait()
            connection.execute(text("UPDATE stock SET amount = 5 WHERE item = 1"))

    def do(session: Session, no: Any) -> None:
        runs.append(no)
        theirs.wait()
        put(session, "before")
        session.execute(text("UPDATE stock SET amount = amount - 1 WHERE item = 1"))
        ours.come()
        call(session, "takes")

    way.handles(shop, do, retry=Retry(immediate=2))
    with in_thread(other):
        ends = way.deliver(shop, [order(3)])
    assert ends == [P], told_of(shop)
    assert len(runs) == 2
    assert shop.effects() == ["before"]
    assert shop.failures() == []


@each_error
@pytest.mark.parametrize("claimed", [False, True], ids=["a new key", "a key that is consumed"])
@pytest.mark.parametrize("nested", [False, True], ids=["", "in a savepoint"])
@pytest.mark.parametrize("through", ["SQLAlchemy", "the driver"])
@pytest.mark.parametrize("within", [False, True], ids=["of a caller", "of a handler"])
def test_a_claim_behind_it_is_not_refused_by_it(
    shop: Shop, procedure: str, claimed: bool, nested: bool, through: str, within: bool
) -> None:
    if claimed:
        with Session(shop.outside) as session, session.begin():
            assert shop.fresh_eo(shop.outside).claim(session, "reserve", "A-1")
    before = shop.claims()

    def work(session: Session, no: Any = None) -> None:
        with session.begin_nested() if nested else nullcontext():
            call(session, procedure, through)
            if shop.eo.claim(session, "reserve", "A-1"):
                put(session, "done")

    if within:
        ALONE.handles(shop, work)
        assert ALONE.deliver(shop, [order(3)]) == [F]
        assert told_of(shop) == [("retrying", "3", 1)]
        assert TOLD[procedure] in shop.failure().error_text.lower()
    else:
        with pytest.raises(Exception, match=r"(?i)out of stock|duplicate entry 'x'|nowhere"):
            in_session(shop, work)
    assert shop.effects() == []
    assert shop.claims() == before


@pytest.mark.parametrize("claimed", [False, True])
def test_a_claim_behind_rows_that_nobody_reads_is_made(shop: Shop, claimed: bool) -> None:
    if claimed:
        with Session(shop.outside) as session, session.begin():
            assert shop.fresh_eo(shop.outside).claim(session, "reserve", "A-1")
    mine: list[bool] = []

    def work(session: Session) -> None:
        call(session, "well")
        mine.append(shop.eo.claim(session, "reserve", "A-1"))

    in_session(shop, work)
    assert mine == [not claimed]
    assert shop.effects() == ["by the procedure"]


@each_error
@pytest.mark.parametrize("way", [UNDER_A_LEASE, IN_A_STEP], ids=str)
def test_under_a_lease_of_another_store(shop: Shop, redis_url: str, way: Way, procedure: str) -> None:
    def do(session: Session, no: Any) -> None:
        put(session, "before")
        call(session, procedure)

    way.handles(shop, do, guard=Lease(timedelta(seconds=30), store=redis_url))
    assert way.deliver(shop, [order(3)]) == [F]
    assert told_of(shop) == [("retrying", "3", 1)]
    assert TOLD[procedure] in shop.failure().error_text.lower()
    assert shop.effects() == []


@on("mariadb", colour="sync")  # asyncmy is compiled, and its commands cannot be counted
@each_way
def test_what_a_call_costs_whose_rows_nobody_reads(shop: Shop, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """One round trip, to ask what became of it; a message whose answers were read pays none."""
    commands: list[str] = []
    execute = Connection._execute_command

    def counted(connection: Connection, command: int, sql: bytes | str) -> None:
        commands.append(sql if isinstance(sql, str) else sql.decode())
        execute(connection, command, sql)

    monkeypatch.setattr(Connection, "_execute_command", counted)

    def sent(reads: bool, no: int) -> list[str]:
        def do(session: Session, no: Any) -> None:
            rows = session.execute(text("CALL well()"))
            if reads:
                rows.all()

        shop.fresh_eo()
        way.handles(shop, do)
        commands.clear()
        assert way.deliver(shop, [order(no)]) == [P]
        return list(commands)

    sent(True, 1)  # the connection is new
    read, unread = sent(True, 2), sent(False, 3)
    # behind rows that were read the same question is asked at once
    assert len(unread) == len(read), (read, unread)
    assert sum("_call" in each for each in unread) == 2
