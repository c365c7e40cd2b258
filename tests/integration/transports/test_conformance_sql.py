"""The conformance suite over `sql://` on PostgreSQL, MariaDB and SQLite."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Protocol

import pytest
from sqlalchemy import Engine, create_engine

from exactly_once.database.schema import tables
from exactly_once.testing.conformance import Conformance, Harness, ServedHarness, ServerConformance
from exactly_once.testing.postgres import EmbeddedPostgres
from exactly_once.transports.contract import Surroundings, Transport
from exactly_once.transports.registry import transport_from
from tests.services import mariadb
from tests.services.need import require

_names = count()


class Server(Protocol):
    def kill(self) -> None: ...
    def start(self) -> None: ...


class SqlHarness(Harness):
    patience = timedelta(seconds=20)
    short_invisible = timedelta(seconds=1)

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def transport(self, *, invisible: timedelta | None = None) -> Transport:
        option = f"?invisible_s={invisible.total_seconds()}" if invisible else ""
        return transport_from(f"sql://{option}", Surroundings(engine=lambda: self.engine))

    def topic(self, *, ordered: bool = False, delayed: bool = False) -> str:
        return f"topic-{next(_names)}"

    def group(self, *, ordered: bool = False) -> str:
        return f"group-{next(_names)}"


class ServedSqlHarness(SqlHarness, ServedHarness):
    def __init__(self, engine: Engine, server: Server) -> None:
        super().__init__(engine)
        self._server = server

    def stop_server(self) -> None:
        self._server.kill()

    def start_server(self) -> None:
        self._server.start()

    def unreachable(self) -> Transport:
        nobody = create_engine(self.engine.url.set(host="127.0.0.1", port=1))
        return transport_from("sql://", Surroundings(engine=lambda: nobody))


@pytest.fixture(scope="module")
def postgres() -> Iterator[EmbeddedPostgres]:
    with EmbeddedPostgres() as server:
        yield server


@pytest.fixture(scope="module")
def maria() -> Iterator[mariadb.MariaDB]:
    require(mariadb)
    with mariadb.MariaDB() as server:
        yield server


@pytest.fixture(scope="module")
def postgres_engine(postgres: EmbeddedPostgres) -> Iterator[Engine]:
    yield from _with_tables(postgres.create_database("queue"))


@pytest.fixture(scope="module")
def mariadb_engine(maria: mariadb.MariaDB) -> Iterator[Engine]:
    # as administrators have it after one UPDATE too wide: each statement of ours names a key, and gets along with it
    yield from _with_tables(maria.create_database("queue") + "?init_command=SET%20sql_safe_updates%20%3D%201")


@pytest.fixture(scope="module")
def sqlite_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    yield from _with_tables(f"sqlite:///{tmp_path_factory.mktemp('queue') / Path('queue.db')}")


def _with_tables(url: str) -> Iterator[Engine]:
    engine = create_engine(url, pool_size=20)
    tables().metadata.create_all(engine)
    yield engine
    engine.dispose()


class TestPostgreSQL(ServerConformance, Conformance):
    @pytest.fixture
    def harness(self, postgres_engine: Engine, postgres: EmbeddedPostgres) -> Harness:
        return ServedSqlHarness(postgres_engine, postgres)


class TestMariaDB(ServerConformance, Conformance):
    @pytest.fixture
    def harness(self, mariadb_engine: Engine, maria: mariadb.MariaDB) -> Harness:
        return ServedSqlHarness(mariadb_engine, maria)


class TestSQLite(Conformance):
    @pytest.fixture
    def harness(self, sqlite_engine: Engine) -> Harness:
        return SqlHarness(sqlite_engine)
