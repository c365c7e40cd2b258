"""The servers tests run against: each is started once a session, when the first test asks; each test has its own database.

Servers: `eo_server` (PostgreSQL, as `exactly_once.testing` chooses it), `mariadb_server`, `german_postgres_server`,
`redis_server`; and `own_postgres`, `own_mariadb`, `own_redis`, which are the test's own, to kill and restart. A fresh
database with our tables in it: `postgres_url`, `mariadb_url`, `sqlite_url`, `german_postgres_url`; `database` is an
Engine on one, on each dialect in turn. `redis_url` is an empty Redis.

`figure` takes what a test measured, for the summary over all tiers.
"""

import gc
from collections.abc import Callable, Iterator

import pymysql
import pytest
from hypothesis import HealthCheck, settings
from sqlalchemy import Engine, create_engine

from exactly_once.testing.databases import DatabaseServer
from exactly_once.testing.postgres import EmbeddedPostgres
from tests import length
from tests.meeting import chosen
from tests.services import mariadb as mariadb_service
from tests.services import postgres_debian
from tests.services import redis as redis_service
from tests.services.need import need, require

# a machine that does other things too is slow, and no input is to blame for it
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")

# PyMySQL reads all certificates of the machine for each new connection, which takes 30 ms, also for a server without any
_new_context = pymysql.Connection._create_ssl_ctx
_context_without_certificates = _new_context(pymysql.Connection(defer_connect=True), {})
pymysql.Connection._create_ssl_ctx = lambda self, given: (
    _new_context(self, given) if given else _context_without_certificates
)

pytest_plugins = ["exactly_once.testing.fixtures"]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what means nothing, and leave to `make nightly` what only it runs."""
    left = {item for item in items if not _means_something(item)}
    if not length.WHOLE:
        left |= {item for item in items if _nightly_only(item)}
        left |= _met_already([item for item in items if item not in left])
    if left:
        config.hook.pytest_deselected(items=[item for item in items if item in left])
        items[:] = [item for item in items if item not in left]


def pytest_collection_finish() -> None:
    """Keep the thousands of tests from being looked through by each collection of garbage."""
    gc.collect()
    gc.freeze()


def _means_something(item: pytest.Item) -> bool:
    return all(mark.args[0](**_parameters(item)) for mark in item.iter_markers("where"))


def _nightly_only(item: pytest.Item) -> bool:
    return any(mark.kwargs.get("only") for mark in item.iter_markers("nightly"))


def _met_already(items: list[pytest.Item]) -> set[pytest.Item]:
    tests: dict[tuple[str, int], list[pytest.Item]] = {}
    for item in items:
        asked = [mark.kwargs["meet"] for mark in item.iter_markers("nightly") if "meet" in mark.kwargs]
        if asked:  # the test's own mark comes before its file's
            tests.setdefault((item.nodeid.partition("[")[0], asked[0]), []).append(item)
    left: set[pytest.Item] = set()
    for (_, meet), of_one in tests.items():
        kept = chosen([_parameters(item) for item in of_one], meet)
        left.update(set(of_one) - {of_one[place] for place in kept})
    return left


def _parameters(item: pytest.Item) -> dict[str, object]:
    return item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Takes what was measured, in words; it is said in the summary over all tiers."""
    return lambda told: request.node.user_properties.append(("figure", told))


@pytest.fixture(scope="session")
def mariadb_server() -> Iterator[DatabaseServer]:
    """A MariaDB that fresh databases are made on."""
    require(mariadb_service)
    with mariadb_service.MariaDB() as server:
        yield DatabaseServer(server.url, source="url")


@pytest.fixture(scope="session")
def german_postgres_server() -> Iterator[DatabaseServer]:
    """A PostgreSQL whose error messages are in German."""
    need(postgres_debian.missing_language())
    with postgres_debian.speaking() as server:
        yield DatabaseServer(server.url, source="url")


@pytest.fixture(scope="session")
def redis_server() -> Iterator[redis_service.Redis]:
    """A Redis that keeps nothing on disk."""
    require(redis_service)
    with redis_service.Redis() as server:
        yield server


@pytest.fixture(scope="session")
def sqlite_server() -> Iterator[DatabaseServer]:
    """Makes fresh SQLite files."""
    server = DatabaseServer("sqlite://", source="url")
    yield server
    server.close()


@pytest.fixture
def postgres_url(eo_server: DatabaseServer) -> Iterator[str]:
    """The URL of a fresh PostgreSQL database with our tables in it."""
    if eo_server.dialect != "postgresql":
        pytest.skip(f"the test database is {eo_server.dialect}")
    yield from _fresh(eo_server)


@pytest.fixture
def german_postgres_url(german_postgres_server: DatabaseServer) -> Iterator[str]:
    """The URL of a fresh database with our tables in it, on a PostgreSQL whose messages are in German."""
    yield from _fresh(german_postgres_server)


@pytest.fixture
def mariadb_url(mariadb_server: DatabaseServer) -> Iterator[str]:
    """The URL of a fresh MariaDB database with our tables in it."""
    yield from _fresh(mariadb_server)


@pytest.fixture
def sqlite_url(sqlite_server: DatabaseServer) -> Iterator[str]:
    """The URL of a fresh SQLite file with our tables in it."""
    yield from _fresh(sqlite_server)


@pytest.fixture
def redis_url(redis_server: redis_service.Redis) -> str:
    """The URL of an empty Redis, with nothing left of the test before."""
    redis_server.tell("FLUSHALL")
    redis_server.tell("SCRIPT", "FLUSH")
    return redis_server.url


@pytest.fixture(params=["postgres", "mariadb", "sqlite"])
def database(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """An Engine on a fresh database with our tables in it, on each dialect in turn."""
    engine = create_engine(request.getfixturevalue(f"{request.param}_url"))
    yield engine
    engine.dispose()


@pytest.fixture
def own_postgres() -> Iterator[EmbeddedPostgres]:
    """A PostgreSQL of this test's own, to kill, stop and restart."""
    with EmbeddedPostgres() as server:
        yield server


@pytest.fixture
def own_mariadb() -> Iterator[mariadb_service.MariaDB]:
    """A MariaDB of this test's own, to kill, stop and restart."""
    require(mariadb_service)
    with mariadb_service.MariaDB() as server:
        yield server


@pytest.fixture
def own_redis() -> Iterator[redis_service.Redis]:
    """A Redis of this test's own, to kill, pause and restart; a killed one forgets nothing."""
    require(redis_service)
    with redis_service.Redis(persistent=True) as server:
        yield server


def _fresh(server: DatabaseServer) -> Iterator[str]:
    url = server.create()
    yield url.render_as_string(hide_password=False)
    server.drop(url)
