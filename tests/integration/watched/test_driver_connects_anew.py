"""The driver connects anew under a handler: `ping(reconnect=True)`, behind an outside call that outlasted the server's patience.

The kind: the claim's transaction ended with the server's session, and no witness outlives that session. Most often nothing is
committed; but what was committed in the transaction's place, before or on the new session, nobody can say. So the message is
for a person, who is told what happened and not a statement that did nothing; nothing of it is there twice or lost unseen.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from exactly_once import Misuse, Outcome, Retry
from tests.integration.shop import COLOURS, Shop, on, order, put, shops
from tests.integration.ways import WAYS, Way, accounted, driver_of, in_session, mariadb_procedures
from tests.waiting import until

pytestmark = [
    pytest.mark.nightly(meet=2),
    pytest.mark.filterwarnings("ignore:The 'reconnect' argument is deprecated:DeprecationWarning"),
]
each_way = pytest.mark.parametrize("way", WAYS, ids=str)


@pytest.fixture(scope="module", params=COLOURS)
def ground(request: pytest.FixtureRequest) -> Iterator[Shop]:
    for shop in shops(request, "mariadb", request.param, pool_size=3, options={"pool_use_lifo": True}):
        mariadb_procedures(shop, commits="() BEGIN INSERT INTO effect (text) VALUES ('by it'); COMMIT; END")
        yield shop


def end_the_session(shop: Shop, session: Session) -> None:
    """As the server does with a session that was idle for too long."""
    ended = own(session).thread_id()
    with shop.outside.connect() as connection:
        connection.execute(text(f"KILL CONNECTION {ended}"))
        gone = text(f"SELECT COUNT(*) = 0 FROM information_schema.PROCESSLIST WHERE ID = {ended}")
        until(lambda: connection.execute(gone).scalar(), "the end of the session")


def connect_anew(shop: Shop, session: Session) -> None:
    """Have the driver find that out by itself."""
    before = own(session).thread_id()
    end_the_session(shop, session)
    if shop.is_async:
        await_only(own(session).ping(reconnect=True))
    else:
        own(session).ping(reconnect=True)
    assert own(session).thread_id() != before


def own(session: Session) -> Any:
    """The driver's connection, beneath what SQLAlchemy makes of an async one."""
    adapted = driver_of(session)
    return getattr(adapted, "driver_connection", None) or adapted


def ends(session: Session, how: str) -> None:
    """End the transaction in the session before."""
    match how:
        case "a commit":
            driver_of(session).commit()
        case "a procedure":
            sends(session, "CALL commits()")
        case "rollback, write, commit":
            driver_of(session).rollback()
            sends(session, "INSERT INTO effect (text) VALUES ('in place of it')")
            driver_of(session).commit()


def sends(session: Session, *statements: str) -> None:
    with driver_of(session).cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)


BEHIND: dict[str, Sequence[str]] = {
    "nothing": (),
    "a look": ("SELECT 1",),
    "a look at a table": ("SELECT * FROM effect",),
    "a write": ("INSERT INTO effect (text) VALUES ('on the new session')",),
    "a commit": ("INSERT INTO effect (text) VALUES ('on the new session')", "COMMIT"),
    "autocommit": (
        "SET autocommit = 1",
        "INSERT INTO effect (text) VALUES ('on the new session')",
        "SET autocommit = 0",
    ),
    "a procedure": ("CALL commits()",),
}
BEFORE = ("nothing", "a commit", "a procedure", "rollback, write, commit")
THEN = ("goes on", "last", "raises", "rolls back")


@each_way
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("behind", BEHIND)
@pytest.mark.parametrize("then", THEN)
def test_the_message_is_for_a_person_and_told_why(shop: Shop, way: Way, before: str, behind: str, then: str) -> None:
    runs: list[Any] = []

    def do(session: Session, no: Any) -> None:
        runs.append(no)
        put(session, f"{no} before")
        if no == 2:
            ends(session, before)
            connect_anew(shop, session)
            sends(session, *BEHIND[behind])
            if then == "raises":
                raise ZeroDivisionError
            if then == "rolls back":
                session.rollback()
            if then != "goes on":
                return
        put(session, f"{no} after")

    way.handles(shop, do, retry=Retry(immediate=2))
    numbers = [1, 2, 3] if way.together else [2]
    for attempt in (1, 2):
        told = way.attempted(shop, [order(no, attempt=attempt) for no in numbers])
    assert all(isinstance(end, Outcome) and end.acknowledge for end in told), told
    assert runs.count(2) == 1
    row = next(row for row in shop.failures() if row.business_key == "2")
    assert row.state == "broken"
    assert "connected anew" in row.error_text
    accounted(shop, numbers, effects_of_each=("before", "after"), extra=("by it",))
    shop.borrow()


@each_way
def test_a_lost_connection_whose_error_is_let_out_runs_again(shop: Shop, way: Way) -> None:
    """As the error text advises."""
    runs: list[Any] = []

    def do(session: Session, no: Any) -> None:
        runs.append(no)
        put(session, f"{no} before")
        if len(runs) == 1:
            end_the_session(shop, session)
        put(session, f"{no} after")

    way.handles(shop, do, retry=Retry(immediate=2))
    assert way.deliver(shop, [order(2)]) == [Outcome.PROCESSED]
    assert runs == [2, 2]
    assert shop.effects() == ["2 before", "2 after"]


@each_way
@on("mariadb", colour="sync")  # asyncmy's adapter takes no reconnect
def test_a_ping_of_a_connection_that_is_there_changes_nothing(shop: Shop, way: Way) -> None:
    def do(session: Session, no: Any) -> None:
        put(session, f"{no} before")
        driver_of(session).ping(reconnect=True)
        put(session, f"{no} after")

    way.handles(shop, do)
    assert way.deliver(shop, [order(2)]) == [Outcome.PROCESSED]
    assert shop.effects() == ["2 before", "2 after"]


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("writes", [True, False])
def test_behind_a_claim_in_the_callers_transaction_nothing_is_committed(
    request: pytest.FixtureRequest, colour: str, writes: bool
) -> None:
    """The second half would stand without its claim, and the next copy run again."""
    for shop in shops(request, "mariadb", colour, pool_size=3):

        def work(session: Session, shop: Shop = shop) -> None:
            assert shop.eo.claim(session, "reserve", "A-1")
            put(session, "first half")
            connect_anew(shop, session)
            if writes:
                put(session, "second half")

        with pytest.raises(Misuse, match=r"connected anew|had ended before your COMMIT"):
            in_session(shop, work)
        assert (shop.effects(), shop.claims()) == ([], [])
