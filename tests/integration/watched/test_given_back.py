"""A handler gives its pooled connection back while it runs: `session.connection().connection.close()`, as for a raw connection.

The kind: from then on the driver's connection is a neighbour's. What the first one's end does to it (a rollback, a look at its
state) would strike the neighbour: its message would be kept as broken although nobody did anything wrong in it.
"""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy.orm import Session

from exactly_once import Outcome
from tests.integration.shop import COLOURS, DIALECTS, Shop, order, put, shops
from tests.integration.threads import in_thread
from tests.integration.ways import ALONE, UNDER_A_LEASE, WAYS, Way

pytestmark = pytest.mark.nightly(meet=2)

P, F = Outcome.PROCESSED, Outcome.FAILED


@pytest.fixture(params=DIALECTS)
def shop_of_one(request: pytest.FixtureRequest) -> Iterator[Shop]:
    """For threads, with one connection, which both must have."""
    yield from shops(request, request.param, "sync")


def by_the_pool(session: Session) -> None:
    session.connection().connection.close()


def by_the_session(session: Session) -> None:
    session.close()


GIVEN_BACK: dict[str, Callable[[Session], None]] = {
    "connection.connection.close()": by_the_pool,
    "session.close()": by_the_session,
}


@pytest.mark.parametrize("how", GIVEN_BACK)
@pytest.mark.parametrize("end", ["returns", "raises"])
def test_a_neighbour_on_the_same_connection_is_not_struck(shop_of_one: Shop, how: str, end: str) -> None:
    shop = shop_of_one
    given_back, neighbour_wrote, first_ended = threading.Event(), threading.Event(), threading.Event()

    def do(session: Session, no: Any) -> None:
        put(session, f"{no} before")
        if no == 1:
            GIVEN_BACK[how](session)
            given_back.set()
            assert neighbour_wrote.wait(10)
            if end == "raises":
                raise ZeroDivisionError
        else:
            neighbour_wrote.set()
            assert first_ended.wait(10)
            put(session, f"{no} after")

    ALONE.handles(shop, do)
    ends: dict[int, Any] = {}

    def first() -> None:
        try:
            ends[1] = shop.process(order(1))
        finally:
            first_ended.set()

    with in_thread(first):
        assert given_back.wait(10)
        # the failure of the first is written down through the pool, so it waits for the neighbour: let it go on
        threading.Timer(0.5, first_ended.set).start()
        ends[2] = shop.process(order(2))
    assert ends[2] is P, shop.failures()
    assert ends[1] is F
    assert [row.business_key for row in shop.failures()] == ["1"]
    shop.assert_kept("2 before", "2 after", claims=["2"])


@pytest.mark.parametrize("how", GIVEN_BACK)
def test_other_code_that_gets_that_connection_commits_as_ever(shop_of_one: Shop, how: str) -> None:
    shop = shop_of_one

    def do(session: Session, no: Any) -> None:
        put(session, f"{no} before")
        GIVEN_BACK[how](session)
        with Session(shop.engine) as other, other.begin():
            put(other, "other")

    ALONE.handles(shop, do)
    assert shop.process(order(1)) is F
    assert shop.failure().error_class == "Misuse"
    assert "left the transaction" in shop.failure().error_text
    shop.assert_kept("other", claims=[])


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_connection_that_was_given_back_is_a_failure_that_says_so(shop: Shop, way: Way) -> None:
    fails = [True]

    def do(session: Session, no: Any) -> None:
        put(session, f"{no} before")
        if fails:
            by_the_pool(session)

    way.handles(shop, do)
    ends = way.attempted(shop, [order(1), order(2)])
    assert P not in ends, ends
    assert {row.error_class for row in shop.failures()} == {"Misuse"}
    assert all("pooled connection" in row.error_text for row in shop.failures())
    assert shop.effects() == []
    fails.clear()
    assert way.attempted(shop, [order(1, attempt=2), order(2, attempt=2)]) == [P, P]
    shop.assert_kept("1 before", "2 before", claims=["1", "2"])


@pytest.mark.parametrize("way", [ALONE, UNDER_A_LEASE], ids=str)
@pytest.mark.parametrize("colour", COLOURS)
def test_what_was_committed_before_it_was_given_back_is_broken(
    request: pytest.FixtureRequest, colour: str, way: Way
) -> None:
    for shop in shops(request, "postgres", colour, pool_size=2):

        def do(session: Session, no: Any) -> None:
            put(session, f"{no} before")
            pooled = session.connection().connection
            pooled.dbapi_connection.commit()  # type: ignore[union-attr]
            pooled.close()

        way.handles(shop, do)
        (end,) = way.attempted(shop, [order(1)])
        assert end is not P
        assert [row.state for row in shop.failures()] == ["broken"]
        assert shop.effects() == ["1 before"]


@pytest.mark.parametrize("way", [ALONE, UNDER_A_LEASE], ids=str)
@pytest.mark.parametrize("when", ["before", "after"], ids=["before its first statement", "after it"])
def test_a_connection_that_was_detached_from_the_pool_is_watched_to_the_end(shop: Shop, way: Way, when: str) -> None:
    """It has its own copy of what stands in the pool's `info`, and is closed and not given to another."""

    def do(session: Session, no: Any) -> None:
        if when == "after":
            put(session, f"{no} before")
        session.connection().detach()
        if when == "before":
            put(session, f"{no} before")
        put(session, f"{no} after")
        match no:
            case 2:
                raise ZeroDivisionError
            case 3:
                session.commit()
            case 4:
                session.connection().connection.dbapi_connection.commit()  # type: ignore[union-attr]
                raise ZeroDivisionError

    way.handles(shop, do)
    ends = [way.attempted(shop, [order(no)])[0] for no in (1, 2, 3, 4)]
    assert ends[:3] == [P, F, F]
    states = {row.business_key: row.state for row in shop.failures()}
    assert states == {"2": "retrying", "3": "retrying", "4": "broken"}
    assert shop.effects() == ["1 before", "1 after", "4 before", "4 after"]
    shop.borrow()
