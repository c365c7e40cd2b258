"""Empty databases, without our tables, for the tests of how the tables get there; and a shop on each for the core's."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, make_url

from exactly_once.testing.databases import DatabaseServer
from tests.integration.shop import COLOURS, DIALECTS, Shop, shops
from tests.services import mariadb as mariadb_service
from tests.services.need import require

# the files that take longest: one that began at the end would run alone, with the other processes idle
FIRST = (
    "test_hidden_commits",
    "test_connection_settings",
    "test_failures",
    "test_cli",
    "test_ends_badly",
    "test_alembic_ways_in",
    "test_conformance_sql",
    "test_fork",
    "test_pooler",
    "test_alembic_together",
    "test_lease_traces",
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put those files first, and leave all else as it is."""
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))


@pytest.fixture(params=DIALECTS)
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database, on each dialect in turn."""
    yield from _empty(request, request.param, tmp_path)


@pytest.fixture
def empty_postgres_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    yield from _empty(request, "postgres", tmp_path)


@pytest.fixture
def empty_mariadb_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    yield from _empty(request, "mariadb", tmp_path)


@pytest.fixture
def empty_engine(empty_url: str) -> Iterator[Engine]:
    engine = create_engine(empty_url)
    yield engine
    engine.dispose()


def _empty(request: pytest.FixtureRequest, dialect: str, folder: Path) -> Iterator[str]:
    if dialect == "sqlite":
        yield f"sqlite:///{folder / 'shop.db'}"
        return
    # only the server of that URL is used
    server = DatabaseServer(make_url(request.getfixturevalue(f"{dialect}_url")), source="url")
    url = server.create(upgraded=False)
    yield url.render_as_string(hide_password=False)
    server.drop(url)


@pytest.fixture(
    scope="session",
    params=[(dialect, colour) for dialect in DIALECTS for colour in COLOURS],
    ids=[f"{dialect}-{colour}" for dialect in DIALECTS for colour in COLOURS],
)
def ground(request: pytest.FixtureRequest) -> Iterator[Shop]:
    """A shop on each dialect in each colour, kept for the session."""
    yield from shops(request, *request.param)


@pytest.fixture
def shop(ground: Shop) -> Shop:
    """That shop, emptied."""
    ground.clear()
    return ground


_STRICT = {"innodb-rollback-on-timeout": "ON", "innodb-snapshot-isolation": "ON"}


@pytest.fixture(scope="module")
def strict_server() -> Iterator[DatabaseServer]:
    """A MariaDB that undoes the whole transaction where others undo a statement."""
    require(mariadb_service)
    with mariadb_service.MariaDB(settings=_STRICT) as server:
        yield DatabaseServer(server.url, source="url")


@pytest.fixture(scope="module", params=COLOURS)
def strict_ground(request: pytest.FixtureRequest, strict_server: DatabaseServer) -> Iterator[Shop]:
    url = strict_server.create()
    with Shop("mariadb", request.param, url.render_as_string(hide_password=False)) as shop:
        yield shop
    strict_server.drop(url)


@pytest.fixture
def strict(strict_ground: Shop) -> Shop:
    strict_ground.clear()
    return strict_ground
