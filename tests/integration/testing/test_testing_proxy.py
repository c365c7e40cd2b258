"""The proxy does what the tests built on it believe: shown with nothing but the database drivers."""

import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from time import monotonic

import pytest
from sqlalchemy import Engine, NullPool, create_engine, text
from sqlalchemy.exc import DBAPIError

from tests.services.proxy import Proxy, far_away


@pytest.fixture(params=["postgres", "mariadb"])
def url(request: pytest.FixtureRequest) -> str:
    found: str = request.getfixturevalue(f"{request.param}_url")
    with create_engine(found, poolclass=NullPool).begin() as connection:
        connection.execute(text("CREATE TABLE shelf (item INTEGER PRIMARY KEY)"))
    return found


@pytest.fixture
def proxy(url: str) -> Iterator[Proxy]:
    with Proxy(url) as started:
        yield started


@pytest.fixture
def engine(proxy: Proxy) -> Iterator[Engine]:
    made = create_engine(proxy.url)
    yield made
    made.dispose()


def put(engine: Engine, item: int) -> None:
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO shelf VALUES (:item)"), {"item": item})


def items(url: str) -> list[int]:
    with create_engine(url, poolclass=NullPool).connect() as connection:
        return list(connection.scalars(text("SELECT item FROM shelf ORDER BY item")))


def test_what_passes_through_is_unchanged(engine: Engine, url: str, proxy: Proxy) -> None:
    for item in range(3):
        put(engine, item)
    assert items(url) == [0, 1, 2]
    assert proxy.commits >= 3
    assert proxy.cuts == 0


def test_a_connection_cut_before_commit_has_written_nothing(engine: Engine, url: str, proxy: Proxy) -> None:
    put(engine, 1)
    proxy.cut_before_commit()
    with pytest.raises(DBAPIError):
        put(engine, 2)
    assert proxy.cuts == 1
    assert items(url) == [1]
    put(engine, 3)
    assert items(url) == [1, 3]


def test_a_connection_cut_after_commit_has_written(engine: Engine, url: str, proxy: Proxy) -> None:
    put(engine, 1)
    proxy.cut_after_commit()
    with pytest.raises(DBAPIError):
        put(engine, 2)
    assert proxy.cuts == 1
    assert items(url) == [1, 2]


def test_the_nth_commit_is_the_one_that_is_cut(engine: Engine, url: str, proxy: Proxy) -> None:
    put(engine, 0)  # SQLAlchemy's first connection asks the server about itself, and commits
    proxy.cut_before_commit(nth=3)
    put(engine, 1)
    put(engine, 2)
    with pytest.raises(DBAPIError):
        put(engine, 3)
    assert items(url) == [0, 1, 2]


def test_a_cut_at_any_statement(engine: Engine, url: str, proxy: Proxy) -> None:
    put(engine, 1)
    proxy.cut_at(re.compile(rb"INSERT INTO shelf"), "before")
    with pytest.raises(DBAPIError):
        put(engine, 2)
    assert items(url) == [1]


def test_a_parsed_statement_is_cut_too(postgres_url: str) -> None:
    import psycopg

    # the extended protocol, which psycopg uses for COMMIT in pipeline mode
    with Proxy(postgres_url) as proxy:
        connection = psycopg.connect(proxy.url.replace("+psycopg", ""))
        connection.execute("CREATE TABLE shelf (item integer)")
        connection.commit()
        proxy.cut_after_commit()
        with pytest.raises(psycopg.OperationalError), connection.pipeline():  # noqa: PT012
            connection.execute("INSERT INTO shelf VALUES (1)")
            connection.commit()
        assert proxy.cuts == 1
    assert items(postgres_url) == [1]


def test_a_delay_is_paid_once_for_each_round_trip(url: str) -> None:
    with Proxy(url, delay=timedelta(milliseconds=20)) as proxy:
        engine = create_engine(proxy.url)
        with engine.connect() as connection:
            connection.execute(text("SELECT 1"))
            before, started = proxy.round_trips, monotonic()
            for _ in range(3):  # psycopg prepares at the fifth, which costs a trip of its own
                connection.execute(text("SELECT 1"))
            assert monotonic() - started >= 0.12
            assert proxy.round_trips - before == 3
        engine.dispose()


def test_a_stalled_reply_arrives_when_the_network_is_back(engine: Engine, proxy: Proxy, url: str) -> None:
    import threading

    put(engine, 1)
    proxy.stall("replies")
    waiting = threading.Thread(target=put, args=(engine, 2))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    proxy.resume()
    waiting.join(10)
    assert items(url) == [1, 2]


def test_a_server_that_went_down_refuses_and_comes_back(engine: Engine, proxy: Proxy, url: str) -> None:
    put(engine, 1)
    proxy.go_down()
    for _ in range(2):
        with pytest.raises(DBAPIError):
            put(engine, 2)
    proxy.come_up()
    put(engine, 3)
    assert items(url) == [1, 3]


def test_a_proxy_in_a_process_of_its_own_adds_its_delay(url: str, tmp_path: Path) -> None:
    with far_away(url, timedelta(milliseconds=20), tmp_path) as distant:
        engine = create_engine(distant)
        with engine.connect() as connection:
            started = monotonic()
            connection.execute(text("SELECT 1"))
            assert monotonic() - started >= 0.04
        engine.dispose()
