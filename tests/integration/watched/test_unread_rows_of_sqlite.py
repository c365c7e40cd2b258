"""Results that the application keeps, and whose rows nobody reads: on SQLite such a statement keeps the file's lock.

Our savepoint could not be released then: each delivery waited for a database that was said not to answer, the messages behind it
waited, too, and nobody else could write, until Python collected the result.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.orm import Session

from exactly_once import Outcome
from tests.integration.shop import EFFECT, Shop, order, put, shops
from tests.integration.ways import WAYS, Way

each_way = pytest.mark.parametrize("way", WAYS, ids=str)
P, F = Outcome.PROCESSED, Outcome.FAILED


@pytest.fixture(params=["sync", "async"])
def shop(request: pytest.FixtureRequest) -> Iterator[Shop]:
    yield from shops(request, "sqlite", request.param, pool_size=3, options={"connect_args": {"timeout": 2}})


STATEMENTS: dict[str, Any] = {
    "text": text("INSERT INTO effect (text) VALUES ('a'), ('b') RETURNING id"),
    "core": insert(EFFECT).values([{"text": "a"}, {"text": "b"}]).returning(EFFECT.c.id),
    "a select": select(EFFECT.c.id),
}


@each_way
@pytest.mark.parametrize("then", ["returns", "raises"])
@pytest.mark.parametrize("statement", STATEMENTS)
def test_a_result_that_is_kept_keeps_no_lock(shop: Shop, way: Way, statement: str, then: str) -> None:
    kept: list[Any] = []

    def do(session: Session, no: Any) -> None:
        if no == 1:
            put(session, "1")
            put(session, "2")
            kept.append(session.execute(STATEMENTS[statement]))
            if then == "raises":
                raise ValueError("no stock")
        else:
            put(session, "neighbour")

    way.handles(shop, do)
    assert way.deliver(shop, [order(1)]) == [P if then == "returns" else F]
    written = ["a", "b"] if statement != "a select" else []
    assert sorted(shop.effects()) == (["1", "2", *written] if then == "returns" else [])
    with shop.outside.begin() as connection:  # somebody else writes
        connection.execute(insert(EFFECT).values(text="outside"))
    assert way.deliver(shop, [order(2)]) == [P]
    assert kept
    shop.borrow()
