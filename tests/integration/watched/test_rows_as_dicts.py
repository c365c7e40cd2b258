"""A handler makes dicts of the rows it reads, on the driver's own connection, and leaves it so.

SQLAlchemy reads a row by place, and of a dict it gets the names; so do we. Who has the connection next is to see nothing of it.
"""

import sqlite3
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from exactly_once import Outcome
from tests.integration.shop import Shop, order, put
from tests.integration.ways import WAYS, Way

P, F = Outcome.PROCESSED, Outcome.FAILED


def dicts(shop: Shop, session: Session) -> None:
    driver: Any = session.connection().connection.driver_connection
    if shop.dialect == "postgres":
        from psycopg.rows import dict_row

        driver.row_factory = dict_row
    elif shop.dialect == "sqlite":
        driver.row_factory = sqlite3.Row
        driver.text_factory = bytes
    elif shop.is_async:
        from asyncmy.cursors import DictCursor

        driver._cursor_cls = DictCursor
    else:
        from pymysql.cursors import DictCursor as Dicts

        driver.cursorclass = Dicts


@pytest.mark.parametrize("raises", [False, True], ids=["returns", "raises"])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_rows_of_the_next_one_are_as_before(shop: Shop, way: Way, raises: bool) -> None:
    read: list[Any] = []

    def do(session: Session, no: Any) -> None:
        put(session, f"{no}")
        if no == 1 and not read:
            dicts(shop, session)
            if raises:
                raise OSError("the other service is away")
            return
        read.append(session.execute(text("SELECT text FROM effect WHERE text = 'made'")).scalar_one())

    with shop.outside.begin() as connection:
        connection.execute(text("INSERT INTO effect (text) VALUES ('made')"))
    way.handles(shop, do)
    first = way.deliver(shop, [order(1)])
    assert first == ([F] if raises else [P])
    assert way.deliver(shop, [order(2), order(3)]) == [P, P]
    assert way.deliver(shop, [order(1, attempt=2)]) == ([P] if raises else [Outcome.DUPLICATE])
    assert set(read) == {"made"}
    assert sorted(shop.effects()) == ["1", "2", "3", "made"]
