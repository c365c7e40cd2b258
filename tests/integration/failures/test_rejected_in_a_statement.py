"""Reject and RetryLater that a type of the application's raises mean what they mean anywhere, although SQLAlchemy wraps them.

Their words are not repeated: what is raised over a value that is bound may quote it.
"""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import String, TypeDecorator, insert, table
from sqlalchemy.orm import Session
from sqlalchemy.sql import column

from exactly_once import Outcome, Reject, Retry, RetryLater
from tests.integration.shop import COLOURS, DIALECTS, Shop, order, put, shops
from tests.integration.ways import WAYS, Way

pytestmark = pytest.mark.nightly(meet=2)
each_way = pytest.mark.parametrize("way", WAYS, ids=str)
GROUNDS = [(dialect, colour) for dialect in DIALECTS for colour in COLOURS]
MANY = Retry(immediate=0, delays=[0.01], max_attempts=9)


class Sku(TypeDecorator[str]):
    """Refuses what is no number of an article, as well-kept code does at its edge."""

    impl = String(200)
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        if value == "unknown":
            raise Reject("no such article")
        if value == "later":
            raise RetryLater(timedelta(seconds=3600))
        return value


EFFECT = table("effect", column("text", Sku()))


@pytest.fixture(scope="module", params=GROUNDS, ids="-".join)
def ground(request: pytest.FixtureRequest) -> Iterator[Shop]:
    yield from shops(request, *request.param, pool_size=3)


@pytest.fixture
def shop(ground: Shop) -> Shop:
    ground.clear()
    return ground


@each_way
def test_a_message_that_its_type_rejects_is_parked_at_once(shop: Shop, way: Way) -> None:
    runs: list[Any] = []

    def do(session: Session, no: Any) -> None:
        runs.append(no)
        put(session, f"{no} before")
        session.execute(insert(EFFECT).values(text="unknown" if no == 1 else "known"))

    way.handles(shop, do, retry=MANY)
    assert way.deliver(shop, [order(1), order(2)]) == [Outcome.DEAD, Outcome.PROCESSED]
    row = shop.failure()
    assert (row.state, row.error_class) == ("dead", "Reject")
    assert row.error_text.startswith("Reject for a value of the statement [in: INSERT INTO effect")
    assert runs.count(1) <= 2  # of a batch once with the other, and once alone
    assert sorted(shop.effects()) == ["2 before", "known"]


@each_way
def test_a_message_that_its_type_wants_later_is_asked_for_then(shop: Shop, way: Way) -> None:
    def do(session: Session, no: Any) -> None:
        session.execute(insert(EFFECT).values(text="later"))

    way.handles(shop, do, retry=MANY)
    assert way.deliver(shop, [order(1)]) == [Outcome.FAILED]
    assert shop.failure().error_class == "RetryLater"
    assert shop.effects() == []
