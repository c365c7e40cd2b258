"""Where our tables are found changes while a program runs: claims would stay where they were, and effects would go elsewhere.

An operator gives the login another search path (a copy of all tables in another schema), or a connection leads to another
database. Nothing runs then, and the sentence says what to do: after a restart, copies of what went to the other schema would
run again.
"""

from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

import exactly_once.alembic
from exactly_once import ConfigurationError, Outcome
from tests.integration.shop import COLOURS, GROUP, Shop, order, shops
from tests.integration.ways import ALONE, IN_A_BATCH, UNDER_A_LEASE, Way
from tests.waiting import until

_names = count(1)
EACH_WAY = [ALONE, IN_A_BATCH, UNDER_A_LEASE]


def effect(session: Any, no: object) -> None:
    session.execute(text("INSERT INTO effect (text) VALUES (:no)"), {"no": str(no)})  # along the path


class Blue:
    """A login whose path begins with `blue`, beside a copy of all tables in `green`."""

    def __init__(self, shop: Shop) -> None:
        self.shop, self.login = shop, f"app_{next(_names)}_{make_url(shop.url).database}"
        url = make_url(shop.url).set(username=self.login, password="secret")
        self.run(f"CREATE ROLE {self.login} LOGIN PASSWORD 'secret'")
        for schema in ("blue", "green"):
            self.run(f"CREATE SCHEMA {schema}")
            exactly_once.alembic.upgrade(shop.url, schema=schema)
            self.run(
                f"CREATE TABLE {schema}.effect (LIKE public.effect INCLUDING ALL)",
                f"GRANT ALL ON SCHEMA {schema} TO {self.login}",
                f"GRANT ALL ON ALL TABLES IN SCHEMA {schema} TO {self.login}",
            )
        self.run(f"GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO {self.login}")
        self.path("blue")
        self.engine: Engine = create_engine(url)
        self.async_engine = create_async_engine(url)

    def run(self, *statements: str) -> None:
        with self.shop.outside.begin() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)

    def path(self, schema: str) -> None:
        """New sessions have it."""
        self.run(
            f"ALTER ROLE {self.login} SET search_path = {schema}",
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{self.login}'",
        )

    def effects(self, schema: str) -> list[str]:
        with self.shop.outside.connect() as connection:
            return sorted(connection.exec_driver_sql(f"SELECT text FROM {schema}.effect").scalars())

    def end(self) -> None:
        self.engine.dispose()
        self.shop.await_(self.async_engine.dispose())
        self.run(f"DROP OWNED BY {self.login}", f"DROP ROLE {self.login}")


@pytest.fixture(params=COLOURS)
def blue(request: pytest.FixtureRequest) -> Iterator[Blue]:
    for shop in shops(request, "postgres", request.param):
        made = Blue(shop)
        yield made
        made.end()


@pytest.mark.parametrize("way", EACH_WAY, ids=str)
def test_messages_are_held_while_new_sessions_find_other_tables(blue: Blue, way: Way) -> None:
    shop = blue.shop
    shop.fresh_eo(blue.engine, blue.async_engine)
    way.handles(shop, effect)
    url = f"memory://elsewhere-{way.name.replace(' ', '-')}-{shop.colour}"
    with shop.eo.worker(url, concurrency=1) as worker, shop.eo.producer(url) as producer:
        producer.send_all([order(1), order(2)])
        until(lambda: worker.counts.acked == 2, "the first are done")
        blue.path("green")
        producer.send_all([order(3), order(4)])
        until(lambda: worker.counts.held > 0, "they are held")
        assert blue.effects("green") == []
        blue.path("blue")
        until(lambda: worker.counts.acked == 4, "they are done")
        assert worker.counts.redelivered == 0
    assert blue.effects("blue") == ["1", "2", "3", "4"]


@pytest.mark.parametrize("way", EACH_WAY, ids=str)
def test_whoever_processes_gets_a_sentence_that_says_what_to_do(blue: Blue, way: Way) -> None:
    shop = blue.shop
    shop.fresh_eo(blue.engine, blue.async_engine)
    way.handles(shop, effect)
    assert way.deliver(shop, [order(1)]) == [Outcome.PROCESSED]
    blue.path("green")

    def refused() -> str | None:
        try:
            assert way.deliver(shop, [order(2)]) == [Outcome.WAITING]  # of a connection that was cut
        except ConfigurationError as error:
            return str(error)
        return None

    until(refused, "it is refused")
    assert "in blue.message_idempotent, and a new connection finds that table in green" in str(refused())
    assert blue.effects("green") == []


def test_a_schema_that_is_named_is_no_search_paths(blue: Blue) -> None:
    shop = blue.shop
    shop.fresh_eo(blue.engine, blue.async_engine, schema="blue")
    ALONE.handles(shop, effect)
    assert ALONE.deliver(shop, [order(1)]) == [Outcome.PROCESSED]
    blue.path("green")
    until(lambda: ALONE.deliver(shop, [order(2)]) == [Outcome.PROCESSED], "it goes on")
    assert ALONE.deliver(shop, [order(2)]) == [Outcome.DUPLICATE]


@pytest.mark.parametrize("colour", COLOURS)
def test_on_mariadb_a_connection_that_leads_to_another_database_is_refused(
    request: pytest.FixtureRequest, colour: str
) -> None:
    for shop in shops(request, "mariadb", colour):
        other = f"{make_url(shop.url).database}_green"
        with shop.outside.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {other}")
        database: list[str] = []
        for engine in (shop.engine, shop.async_engine.sync_engine):

            @event.listens_for(engine, "do_connect")
            def leads(dialect: Any, record: Any, cargs: Any, cparams: Any, database: list[str] = database) -> None:
                cparams.update({("db" if "db" in cparams else "database"): database[0]} if database else {})

        shop.fresh_eo(group=GROUP)
        ALONE.handles(shop, effect)
        assert ALONE.deliver(shop, [order(1)]) == [Outcome.PROCESSED]
        database.append(other)
        shop.engine.dispose()
        shop.await_(shop.async_engine.dispose())
        with pytest.raises(ConfigurationError, match=f"a new connection finds that table in {other}"):
            ALONE.deliver(shop, [order(2)])
        with shop.outside.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {other}")
