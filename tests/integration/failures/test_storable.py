"""Whatever happened can be written down: on databases and connections whose character set lacks characters, and of errors
that cannot say what they are."""

import json
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import NullPool, create_engine, make_url, text
from sqlalchemy.exc import PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

import exactly_once.alembic
from exactly_once import BadKey, ExactlyOnce, Lease, Message, Outcome, Retry
from exactly_once.alembic import ready
from exactly_once.database.store import Store
from exactly_once.errors import ConfigurationError, SendFailed
from exactly_once.testing.databases import DatabaseServer
from tests.integration.shop import COLOURS, Shop

pytestmark = pytest.mark.nightly(meet=2)

ONE = Retry(immediate=0, max_attempts=1)
XIN, EMOJI = "鑫", "🦆"


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def rows(url: str, table: str = "message_failure") -> list[Any]:
    with create_engine(url, poolclass=NullPool, connect_args=_utf8(url)).connect() as connection:
        return list(connection.execute(text(f"SELECT * FROM {table} ORDER BY 1")).all())


def _utf8(url: str) -> dict[str, str]:
    return {"client_encoding": "utf8"} if url.startswith("postgresql") else {}


def strange(no: object = "A-1", **more: Any) -> Message:
    """A message with characters that few character sets have, wherever there may be some."""
    given: dict[str, Any] = {
        "tag": EMOJI,
        "key": XIN,
        "ordering_key": f"{XIN}{EMOJI}",
        "properties": {"who": f"{XIN} {EMOJI} é", "nul": "\0", EMOJI: "x"},
        "message_id": f"id-{EMOJI}",
    }
    return Message("orders", json.dumps({"no": no, "who": EMOJI}, ensure_ascii=False).encode(), **(given | more))


def raises(error: BaseException) -> Callable[[Session], None]:
    def fail(session: Session) -> None:
        raise error

    return fail


# -- any database: errors and messages that are hard to write down -----------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [Mute(), ValueError("\0\ud800 " + EMOJI), ValueError(EMOJI * 9000), type("Errör" * 90, (Exception,), {})(EMOJI)],
    ids=["mute", "surrogate", "long", "class"],
)
def test_an_error_that_cannot_say_what_it_is_is_recorded_and_parked(shop: Shop, error: BaseException) -> None:
    shop.handles(raises(error), retry=ONE)
    assert shop.process(strange()) is Outcome.DEAD
    row = shop.failure()
    assert (row.state, row.attempts, row.business_key) == ("dead", 1, "A-1")
    assert json.loads(row.properties) == dict(strange().properties)
    assert row.body == strange().body


@pytest.mark.parametrize(
    "more",
    [
        {"born_at": datetime(1, 1, 1, tzinfo=UTC)},
        {"born_at": datetime.max.replace(tzinfo=UTC)},
        {"message_id": "i" * 5000},
        {"tag": EMOJI * 300, "key": XIN * 900, "ordering_key": "k" * 5000},
        {"message_id": "\ud800", "tag": "\0"},
    ],
    ids=["first-year", "last-year", "long-id", "long-texts", "surrogate"],
)
def test_a_message_with_any_fields_is_recorded(shop: Shop, more: dict[str, Any]) -> None:
    shop.handles(raises(ValueError("no")), retry=ONE)
    assert shop.process(strange(**more)) is Outcome.DEAD
    assert shop.failure().body == strange().body


def test_two_messages_without_a_key_whose_long_ids_begin_alike_are_two_failures(shop: Shop) -> None:
    shop.handles(raises(ValueError("no")), retry=ONE)
    for end in "ab":
        assert shop.process(Message("orders", b"{}", message_id="i" * 400 + end)) is Outcome.DEAD
    assert len(shop.failures()) == 2


# -- MariaDB, where the connection lacks characters ---------------------------------------------------------------------


@pytest.fixture(params=[(colour, charset) for colour in COLOURS for charset in ("utf8", "latin1", "ascii")], ids=str)
def narrow_shop(request: pytest.FixtureRequest, mariadb_server: DatabaseServer) -> Iterator[Shop]:
    colour, charset = request.param
    url = mariadb_server.create()
    try:
        narrow = url.update_query_dict({"charset": charset})
        with Shop("mariadb", colour, narrow.render_as_string(hide_password=False)) as shop:
            yield shop
    finally:
        mariadb_server.drop(url)


def test_a_failure_is_kept_whole_over_a_connection_that_lacks_its_characters(narrow_shop: Shop) -> None:
    shop, message = narrow_shop, strange(XIN)
    shop.handles(raises(ValueError(f"no {EMOJI} {XIN}")), retry=Retry(immediate=0, max_attempts=2))
    assert [shop.process(message) for _ in range(2)] == [Outcome.FAILED, Outcome.DEAD]
    row = shop.failure()
    assert (row.state, row.attempts, row.body) == ("dead", 2, message.body)
    assert json.loads(row.properties) == dict(message.properties)
    assert "\\U0001f986" in row.error_text
    assert EMOJI in row.tag or "\\U0001f986" in row.tag


def test_a_message_with_a_strange_id_and_key_is_processed_over_such_a_connection(narrow_shop: Shop) -> None:
    narrow_shop.handles(lambda session: None)
    assert narrow_shop.process(strange(XIN)) is Outcome.PROCESSED
    assert narrow_shop.process(strange(XIN)) is Outcome.DUPLICATE
    if "latin1" not in narrow_shop.url and "ascii" not in narrow_shop.url:
        assert narrow_shop.claims() == [XIN]


@pytest.mark.parametrize("charset", ["utf8", "latin1"])
def test_a_start_over_a_connection_that_lacks_characters_is_refused_with_the_url_to_write(
    mariadb_url: str, charset: str
) -> None:
    url = make_url(mariadb_url).update_query_dict({"charset": charset})
    store = Store("default", url)
    with pytest.raises(ConfigurationError, match=re.escape("charset=utf8mb4")):
        ready.problem(store)
    store.close()
    right = Store("default", mariadb_url)
    assert ready.problem(right) is None
    right.close()


# -- PostgreSQL, where the database lacks characters --------------------------------------------------------------------


@pytest.fixture
def encoded(eo_server: DatabaseServer) -> Iterator[Callable[[str], str]]:
    """Makes a PostgreSQL database in an encoding, with our tables, and returns its URL."""
    if eo_server.dialect != "postgresql":
        pytest.skip(f"the test database is {eo_server.dialect}")
    names: list[str] = []
    outside = create_engine(eo_server.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")

    def make(encoding: str, *, upgraded: bool = True) -> str:
        names.append(f"encoded_{encoding.lower()}_{len(names)}")
        with outside.connect() as connection:
            connection.exec_driver_sql(
                f"CREATE DATABASE {names[-1]} TEMPLATE template0 ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C'"
            )
        url = make_url(eo_server.url).set(database=names[-1]).render_as_string(hide_password=False)
        if upgraded:
            exactly_once.alembic.upgrade(url)
        return url

    yield make
    with outside.connect() as connection:
        for name in names:
            connection.exec_driver_sql(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


GUARDS: dict[str, dict[str, Any]] = {
    "alone": {},
    "group": {"batch": 10},
    "lease": {"guard": Lease(timedelta(seconds=30))},
}


def application(url: str, colour: str, **more: Any) -> ExactlyOnce:
    eo = ExactlyOnce(url, group="shop")
    if colour == "async":

        @eo.handler("orders", name="handler", key="no", retry=ONE, **more)
        async def awaited(session: AsyncSession, body: dict[str, Any]) -> None:
            await session.execute(text("INSERT INTO done VALUES (1)"))
    else:

        @eo.handler("orders", name="handler", key="no", retry=ONE, **more)
        def plain(session: Session, body: dict[str, Any]) -> None:
            session.execute(text("INSERT INTO done VALUES (1)"))

    return eo


def table_of_effects(url: str) -> None:
    with create_engine(url, poolclass=NullPool, connect_args=_utf8(url)).begin() as connection:
        connection.execute(text("CREATE TABLE done (n integer)"))


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("encoding", ["LATIN1", "EUC_JP"])
def test_a_key_that_the_database_lacks_is_parked_and_its_neighbours_run(
    encoded: Callable[[str], str], colour: str, guard: str, encoding: str
) -> None:
    url = encoded(encoding)
    table_of_effects(url)
    eo = application(url, colour, **GUARDS[guard])
    with (
        eo.worker(f"memory://{colour}-{guard}-{encoding}", concurrency=2) as worker,
        eo.producer(f"memory://{colour}-{guard}-{encoding}") as producer,
    ):
        producer.send_all([strange(no, message_id=None) for no in ("A-1", EMOJI, "A-2", f"{XIN}{EMOJI}", "A-3")])
        worker.drain()
        outcomes = worker.counts.outcomes
    assert (outcomes["processed"], outcomes["dead"]) == (3, 2)
    assert len(rows(url, "done")) == 3
    first, second = rows(url)
    assert {first.business_key, second.business_key} >= {"\\U0001f986"}
    assert (first.state, first.error_class) == ("dead", "BadKey")
    assert first.error_text.isascii()
    assert "character set" in first.error_text
    assert json.loads(first.properties) == dict(strange().properties)


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("more", [{}, {"ordered": True}], ids=["unordered", "ordered"])
def test_such_a_key_is_parked_by_the_second_door(
    encoded: Callable[[str], str], colour: str, more: dict[str, Any]
) -> None:
    url = encoded("LATIN1")
    with Shop("postgres", colour, url, options={"connect_args": {"client_encoding": "utf8"}}) as shop:
        shop.handles(lambda session: None, retry=ONE, **more)
        assert [shop.process(strange(XIN)) for _ in range(2)] == [Outcome.DEAD, Outcome.DEAD]
        assert shop.failure().business_key == "\\u946b"
        assert shop.process(strange("café", ordering_key="another")) is Outcome.PROCESSED
        assert shop.claims() == ["café"]


def test_a_claim_of_such_a_key_raises_a_sentence_and_the_transaction_cannot_be_committed(
    encoded: Callable[[str], str],
) -> None:
    url = encoded("LATIN1")
    table_of_effects(url)
    engine = create_engine(url, connect_args={"client_encoding": "utf8"})
    eo = ExactlyOnce(engine, group="shop")
    with Session(engine) as session:
        session.execute(text("INSERT INTO done VALUES (1)"))
        with pytest.raises(BadKey, match="character set"):
            eo.claim(session, "handler", XIN)
        with pytest.raises(PendingRollbackError):
            session.commit()
    with Session(engine) as session:
        assert eo.claim(session, "handler", "A-1")
    engine.dispose()
    assert rows(url, "done") == []


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("guard", GUARDS)
def test_a_database_in_sql_ascii_takes_every_key_and_keeps_every_failure(
    encoded: Callable[[str], str], colour: str, guard: str
) -> None:
    url = encoded("SQL_ASCII")
    table_of_effects(url)
    eo = application(url, colour, **GUARDS[guard])
    where = f"memory://ascii-{colour}-{guard}"
    with eo.worker(where, concurrency=2) as worker, eo.producer(where) as producer:
        producer.send_all([strange(no) for no in (XIN, EMOJI, "A-1")])
        producer.send(Message("orders", b"{}", tag=EMOJI))
        worker.drain()
        assert worker.counts.outcomes["processed"] == 3
    (row,) = rows(url)
    assert (row.state, row.tag) == ("dead", EMOJI)


def test_an_engine_that_reads_bytes_of_sql_ascii_is_refused_with_what_to_type(encoded: Callable[[str], str]) -> None:
    engine = create_engine(encoded("SQL_ASCII"))
    with pytest.raises(ConfigurationError, match="client_encoding"):
        ready.problem(Store("default", engine))
    engine.dispose()


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_the_start_warns_of_a_database_that_lacks_characters(
    encoded: Callable[[str], str], encoding: str, caplog: pytest.LogCaptureFixture
) -> None:
    url = encoded(encoding)
    table_of_effects(url)
    with application(url, "sync").worker(f"memory://warned-{encoding}"):
        pass
    assert encoding in caplog.text


def test_what_a_person_decides_is_written_down_in_the_characters_of_the_database(
    encoded: Callable[[str], str],
) -> None:
    from exactly_once.failures import decisions

    url = encoded("LATIN1")
    with Shop("postgres", "sync", url, options={"connect_args": {"client_encoding": "utf8"}}) as shop:
        shop.handles(lambda session: None, retry=ONE)
        shop.process(strange(XIN))
        with shop.engine.begin() as connection:
            chosen = decisions.Chosen(group="shop", key=XIN)
            assert decisions.count(connection, shop.tables, chosen) == 1
            decisions.requeue(connection, shop.tables, chosen, by=f"{XIN}\ud800", why=f"{EMOJI}\0é", per_second=None)
            assert decisions.discard(connection, shop.tables, chosen, by="x" * 999, why=EMOJI) == 1
        row = shop.failure()
        assert (row.state, row.decided_by, row.decided_why) == ("discarded", "x" * 255, "\\U0001f986")
        assert shop.process(strange(XIN)) is Outcome.DEAD


def test_the_queue_in_a_table_refuses_what_would_come_back_as_another_text_and_takes_what_stands_beside_it(
    encoded: Callable[[str], str],
) -> None:
    url = encoded("LATIN1")
    table_of_effects(url)
    eo = application(url, "sync")
    with eo.worker("sql://") as worker, eo.producer("sql://") as producer:
        with pytest.raises(SendFailed, match="lacks a character of the tag"):
            producer.send(strange("A-1", key=None, ordering_key=None))
        producer.send(Message("orders", strange("A-2").body, tag="café", properties=strange().properties))
        worker.drain()
        assert worker.counts.outcomes["processed"] == 1
    assert rows(url) == []
