"""Chooses the database server for tests, and makes a new database with our tables for each test.

It never touches a database that it did not create. Called by the fixtures; usable without pytest. The choice, in order:

1. `EXACTLY_ONCE_TEST_DATABASE`, a SQLAlchemy URL whose user may create databases;
2. a container, if a container engine answers, of the image `EXACTLY_ONCE_TEST_IMAGE` (default postgres:17);
3. the embedded PostgreSQL.

`EXACTLY_ONCE_TEST_SOURCE`, one of url, container, embedded, forces one: then it is an error if that one is missing.
"""

import os
import secrets
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Literal, cast

from sqlalchemy import URL, Engine, NullPool, create_engine, make_url, text
from sqlalchemy.exc import OperationalError

import exactly_once.alembic
from exactly_once.errors import ConfigurationError, MissingExtra
from exactly_once.testing.child import ServerFailed, wait_until
from exactly_once.testing.postgres import EmbeddedPostgres
from exactly_once.wording.redaction import redacted

__all__ = ["DatabaseServer", "Source", "choose", "engine_missing"]

Source = Literal["url", "container", "embedded"]

URL_VARIABLE: Final = "EXACTLY_ONCE_TEST_DATABASE"
IMAGE_VARIABLE: Final = "EXACTLY_ONCE_TEST_IMAGE"
SOURCE_VARIABLE: Final = "EXACTLY_ONCE_TEST_SOURCE"
DEFAULT_IMAGE: Final = "postgres:17"
PROBE_S: Final = 3  # a container engine that does not answer by then counts as absent


class DatabaseServer:
    """A server on which new databases are made.

    Args:
        url: Its URL, with a user who may create databases. For SQLite, any `sqlite://` URL.
        source: Where it came from.
        close: Ends the server, if we started it.
    """

    def __init__(self, url: str | URL, *, source: Source, close: Callable[[], None] = lambda: None) -> None:
        self.url = make_url(url)
        self.source = source
        self.dialect = self.url.get_backend_name()
        self._template: str | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._closing = ExitStack()
        self._closing.callback(close)

    def __str__(self) -> str:
        return f"{self.dialect} from {self.source}: {redacted(self.url)}"

    def close(self) -> None:
        """Drop our remaining databases, and end the server if we started it. Idempotent."""
        self._closing.close()

    def create(self, *, upgraded: bool = True) -> URL:
        """Make a new database and return its URL.

        Args:
            upgraded: With our tables in it. On PostgreSQL that costs no more: they are copied from a template.
        """
        name = f"exactly_once_test_{secrets.token_hex(6)}"
        if self.dialect == "sqlite":
            return self._upgraded(self._file(name), upgraded)
        if self.dialect != "postgresql":
            self._execute(f"CREATE DATABASE `{name}` CHARACTER SET utf8mb4")
            return self._upgraded(self.url.set(database=name), upgraded)
        if upgraded:
            self._execute(f'CREATE DATABASE "{name}" TEMPLATE "{self._upgraded_template()}"')
        else:
            self._execute(f'CREATE DATABASE "{name}"')
        return self.url.set(database=name)

    def drop(self, url: URL) -> None:
        """Drop a database that `create` made, and cut the connections that still use it."""
        if self.dialect == "sqlite":
            for file in Path(cast(str, url.database)).parent.glob(f"{Path(cast(str, url.database)).name}*"):
                file.unlink()
        elif self.dialect == "postgresql":
            self._execute(f'DROP DATABASE IF EXISTS "{url.database}" WITH (FORCE)')
        else:
            self._execute(f"DROP DATABASE IF EXISTS `{url.database}`")

    @contextmanager
    def fresh(self, *, upgraded: bool = True) -> Iterator[Engine]:
        """Return an Engine on a new database for the block; dispose and drop afterwards."""
        url = self.create(upgraded=upgraded)
        engine = create_engine(url)
        try:
            yield engine
        finally:
            engine.dispose()
            self.drop(url)

    def _upgraded_template(self) -> str:
        if self._template is None:
            url = self.create(upgraded=False)
            self._closing.callback(self.drop, url)
            self._upgraded(url, True)
            self._template = cast(str, url.database)
        return self._template

    def _upgraded(self, url: URL, upgraded: bool) -> URL:
        if upgraded:
            engine = create_engine(url, poolclass=NullPool)  # a connection left in a pool would lock the template
            exactly_once.alembic.upgrade(engine)
            engine.dispose()
        return url

    def _file(self, name: str) -> URL:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="exactly-once-sqlite-")
            self._closing.callback(self._folder.cleanup)
        return self.url.set(database=str(Path(self._folder.name) / f"{name}.db"))

    def _execute(self, statement: str) -> None:
        # The names are ours, of hexadecimal digits: nothing to quote.
        engine = create_engine(self.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(statement))


def choose() -> DatabaseServer:
    """Return the server that this environment asks for, or the first available one. The caller closes it.

    Raises:
        ConfigurationError: A forced source is not available, or is misspelt.
        MissingExtra: Nothing else was found, and the embedded PostgreSQL is not installed.
    """
    forced = os.environ.get(SOURCE_VARIABLE)
    match forced:
        case "url":
            return _from_url()
        case "container":
            return _from_container()
        case "embedded":
            return _embedded()
        case None | "":
            pass
        case _:
            raise ConfigurationError(f"{SOURCE_VARIABLE} is {forced!r}; it must be url, container or embedded.")
    if os.environ.get(URL_VARIABLE):
        return _from_url()
    if engine_missing() is None:
        try:
            return _from_container()
        except ServerFailed as error:
            # The engine is there but the image is not: tests should also run in an office without a registry.
            warnings.warn(f"{error} The embedded PostgreSQL is used instead.", stacklevel=2)
    return _embedded()


def engine_missing() -> str | None:
    """Say why no container can be started here, or return None."""
    try:
        import docker
        import testcontainers.core.container  # noqa: F401
    except ImportError:
        return "testcontainers is not installed (pip install testcontainers)"
    try:
        client = docker.from_env(timeout=PROBE_S)
        try:
            client.ping()
        finally:
            client.close()
    except Exception as error:  # its own errors, those of requests and urllib3, OSError: all mean "no engine"
        return f"no container engine answers ({type(error).__name__})"
    return None


def _from_url() -> DatabaseServer:
    url = os.environ.get(URL_VARIABLE)
    if not url:
        raise ConfigurationError(f"Set {URL_VARIABLE} to the URL of a server whose user may create databases.")
    return DatabaseServer(url, source="url")


def _from_container() -> DatabaseServer:
    if reason := engine_missing():
        raise ConfigurationError(f"A test database in a container was asked for, but {reason}.")
    image = os.environ.get(IMAGE_VARIABLE) or DEFAULT_IMAGE
    container = _postgres_container()(image, driver="psycopg")
    try:
        container.start()
        url = container.get_connection_url()
        # start() asks inside the container. Outside, its port is published a moment later if several start at once.
        wait_until(lambda: _answers(url), what=f"the container answers at {redacted(make_url(url))}", patience_s=30)
    except Exception as error:
        with suppress(Exception):  # it may not have been created
            container.stop()
        raise ServerFailed(f"The container of {image} did not start: {error}.") from error
    return DatabaseServer(url, source="container", close=container.stop)


def _answers(url: str) -> bool:
    engine = create_engine(url, poolclass=NullPool)
    try:
        engine.connect().close()
    except OperationalError:
        return False
    return True


def _postgres_container() -> Any:
    try:
        from testcontainers.community.postgres import PostgresContainer  # since 4.15
    except ImportError:
        from testcontainers.postgres import PostgresContainer
    return PostgresContainer


def _embedded() -> DatabaseServer:
    try:
        server = EmbeddedPostgres()
    except MissingExtra as error:
        raise MissingExtra("A test database, when no URL and no container engine is given,", error.extra) from error
    try:
        server.start()
    except BaseException:
        server.close()
        raise
    return DatabaseServer(server.url, source="embedded", close=server.close)
