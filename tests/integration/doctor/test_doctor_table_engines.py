"""`doctor` names the tables that no transaction rolls back, and what a failing handler leaves there."""

from collections.abc import Iterator

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from exactly_once import Outcome
from exactly_once.doctor.looking import Mark, examine
from tests.integration.shop import DIALECTS, Shop, order, put, shops


@pytest.fixture(params=DIALECTS)
def ground(request: pytest.FixtureRequest) -> Iterator[Shop]:
    yield from shops(request, request.param, "sync", pool_size=20)


def told(shop: Shop) -> list[str]:
    found = [each for each in examine(shop.eo, None) if "rolls these tables back" in each.text]
    assert all(each.mark is Mark.WARN for each in found)
    return [each.text for each in found]


def test_tables_that_roll_nothing_back_are_named(shop: Shop) -> None:
    """Of other databases, and of ours, nothing is said."""

    def do(session: Session) -> None:
        put(session, "undone")
        if shop.dialect == "mariadb":
            session.execute(text("INSERT INTO stays (n) VALUES (1)"))
        raise ValueError("no")

    shop.handles(do)
    assert told(shop) == []
    if shop.dialect != "mariadb":
        return
    with shop.outside.begin() as connection:
        connection.execute(text("CREATE TABLE stays (n INT) ENGINE=MyISAM"))
        connection.execute(text("CREATE TABLE also (n INT) ENGINE=Aria"))
    try:
        assert shop.process(order()) is Outcome.FAILED
        assert shop.effects() == []
        with shop.outside.connect() as connection:
            assert connection.execute(text("SELECT count(*) FROM stays")).scalar_one() == 1, "what is warned of"
        (text_,) = told(shop)
        assert "rolls these tables back: also (Aria), stays (MyISAM)." in text_
        assert "stays when it fails, and is written again by the next run" in text_
        assert text_.endswith("ALTER TABLE also ENGINE=InnoDB")
    finally:
        with shop.outside.begin() as connection:
            connection.execute(text("DROP TABLE stays, also"))
