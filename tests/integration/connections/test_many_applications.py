"""Many `ExactlyOnce` objects on one engine: for each test or request. What is done to a connection is done once."""

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import event

from exactly_once import Outcome
from tests.integration.outside import by_other_code
from tests.integration.shop import COLOURS, DIALECTS, Shop, order, put, shops
from tests.integration.ways import ALONE, UNDER_A_LEASE, Way

P, D = Outcome.PROCESSED, Outcome.DUPLICATE
MANY = 1100  # more than Python allows of calls within calls


@pytest.fixture(params=[(dialect, colour) for dialect in DIALECTS for colour in COLOURS], ids=" ".join)
def shop(request: pytest.FixtureRequest) -> Iterator[Shop]:
    yield from shops(request, *request.param)


def handles(shop: Shop, way: Way) -> None:
    way.handles(shop, lambda session, no: put(session, str(no)))


def connects(shop: Shop) -> list[Any]:
    made: list[Any] = []
    engine = shop.async_engine.sync_engine if shop.is_async else shop.engine
    event.listen(engine, "connect", lambda dbapi, record: made.append(dbapi))
    return made


def test_many_claim_on_one_connection(request: pytest.FixtureRequest) -> None:
    for shop in shops(request, "sqlite", "async"):
        for _ in range(MANY):
            shop.fresh_eo()
            handles(shop, ALONE)
            assert shop.process(order(1)) in (P, D)
        assert shop.effects() == ["1"]


@pytest.mark.parametrize("way", [ALONE, UNDER_A_LEASE], ids=str)
def test_two_that_take_turns_do_not_throw_each_others_connections_away(shop: Shop, way: Way) -> None:
    applications = []
    for _ in range(2):
        applications.append(shop.fresh_eo())
        handles(shop, way)
    made = connects(shop)
    for no in range(6):
        shop.eo = applications[no % 2]
        assert shop.process(order(no)) is P
    assert len(made) <= 3  # one that all use, and one for each application to look where its tables are


@pytest.mark.parametrize("way", [ALONE, UNDER_A_LEASE], ids=str)
@pytest.mark.parametrize("left", ["SET client_encoding = 'LATIN1'", "SET statement_timeout = 1"])
@pytest.mark.parametrize("colour", COLOURS)
def test_the_second_learns_nothing_of_what_was_left_behind_the_first(
    request: pytest.FixtureRequest, colour: str, left: str, way: Way
) -> None:
    for shop in shops(request, "postgres", colour):
        handles(shop, way)
        assert shop.process(order("ä")) is P
        by_other_code(shop, left)
        shop.fresh_eo()
        handles(shop, way)
        assert [shop.process(order(no)) for no in ("ä", "ö", "ö")] == [D, P, D]
        assert shop.claims() == ["ä", "ö"]
