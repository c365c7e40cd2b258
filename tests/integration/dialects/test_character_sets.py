"""A session of MySQL or MariaDB in another character set, or in which backslashes escape nothing: our values are what they are.

The kind: a driver escapes a value in the client, by what it believes of the session, and the server reads it by what the session
is. A key that comes out as another one is a claim that no copy meets, and the effect happens twice; a value whose end is read
elsewhere is SQL. Set by the handler itself, or left in the pool by other code of the program.
"""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from exactly_once import Message, Outcome
from exactly_once.failures.due import message_of
from tests.integration.grounds import ground_on
from tests.integration.outside import by_other_code
from tests.integration.shop import COLOURS, Shop, put
from tests.integration.ways import ALONE, WAYS, Way

pytestmark = pytest.mark.nightly(meet=2)

P, D, F = Outcome.PROCESSED, Outcome.DUPLICATE, Outcome.FAILED
each_way = pytest.mark.parametrize("way", WAYS, ids=str)

SET = {
    "gbk": "SET NAMES gbk",
    "of the client alone": "SET character_set_client = sjis",
    "of results alone": "SET character_set_results = utf16",
    "no escapes": "SET sql_mode = 'STRICT_TRANS_TABLES,NO_BACKSLASH_ESCAPES'",
}
# as a tuple a key is JSON: what stands behind a character is a quote, and a backslash is doubled
KEYS = ("中", "a\\b", "a'b", 'a"b')


@pytest.fixture(params=COLOURS)
def mariadb(request: pytest.FixtureRequest) -> Iterator[Shop]:
    yield from ground_on(request, "mariadb", request.param)


def body_of(given: dict[str, str]) -> bytes:
    return json.dumps(given, ensure_ascii=False).encode()


def named(key: str, **more: Any) -> Message:
    return Message("orders", body_of({"no": key, "b": "1"}), message_id="m-1", **more)


@each_way
@pytest.mark.parametrize("how", SET)
def test_a_key_is_the_same_key_on_a_connection_that_other_code_left_so(mariadb: Shop, way: Way, how: str) -> None:
    way.handles(mariadb, lambda session, no: put(session, "effect"), key=("no", "b"))
    assert way.deliver(mariadb, [named("first")]) == [P]
    by_other_code(mariadb, SET[how])
    assert [way.deliver(mariadb, [named(key)]) for key in KEYS] == [[P]] * len(KEYS)
    for engine in (mariadb.engine, mariadb.async_engine.sync_engine):  # as a restart: connections that nobody had
        engine.dispose(close=False)
    assert [way.deliver(mariadb, [named(key)]) for key in KEYS] == [[D]] * len(KEYS)
    assert len(mariadb.effects()) == 1 + len(KEYS)


@each_way
@pytest.mark.parametrize("how", SET)
def test_a_key_is_the_same_key_where_its_handler_sets_it(mariadb: Shop, way: Way, how: str) -> None:
    def do(session: Session, no: Any) -> None:
        session.execute(text(SET[how]))
        put(session, "effect")

    way.handles(mariadb, do, key=("no", "b"))
    assert [way.deliver(mariadb, [named(key)]) for key in KEYS] == [[P]] * len(KEYS)
    assert [way.deliver(mariadb, [named(key)]) for key in KEYS] == [[D]] * len(KEYS)
    assert len(mariadb.effects()) == len(KEYS)


@pytest.mark.parametrize("how", SET)
def test_what_fails_is_kept_as_it_came_and_comes_back_as_it_was(mariadb: Shop, how: str) -> None:
    """In each column of ours that takes text or bytes of the message, on a connection that was left so."""

    def do(session: Session, no: Any) -> None:
        raise ValueError("中' \\")

    ALONE.handles(mariadb, do, key=("no", "b"))
    first = named("first")
    assert mariadb.process(first) is F
    by_other_code(mariadb, SET[how])
    given = Message(
        "orders",
        body_of({"no": "中' \\", "b": "1"}),
        tag="中'",
        key="中\\",
        ordering_key="中'\\",
        message_id="中'\\",
        properties={"中'": "ä\\"},
    )
    assert mariadb.process(given) is F
    kept = next(row for row in mariadb.failures() if row.message_id != first.message_id)
    assert message_of(kept) == Message(**{name: getattr(given, name) for name in _FIELDS}, attempt=2)
    assert kept.error_text.startswith("中' \\")


_FIELDS = ("topic", "body", "tag", "key", "ordering_key", "message_id", "properties", "born_at")


def test_a_row_is_read_as_it_is_on_a_connection_that_was_left_so(mariadb: Shop) -> None:
    def do(session: Session, no: Any) -> None:
        raise ValueError("中")

    ALONE.handles(mariadb, do)
    assert mariadb.process(Message("orders", body_of({"no": "中"}), message_id="中", properties={"中": "ä"})) is F
    with mariadb.engine.connect() as connection:
        connection.exec_driver_sql("SET NAMES latin1")
        row = connection.execute(mariadb.tables.failure.select()).one()
    assert (row.message_id, row.state) == ("中", "retrying")
    assert message_of(row).properties == {"中": "ä"}
    assert row.error_text.startswith("中")
