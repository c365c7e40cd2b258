"""Lets one program at a time change the schema: opens the database, takes the server's lock, works, releases the lock.

It never decides what the work is. Called by `exactly_once.alembic` and `migrations/env.py`.

Two programs that upgrade one empty database at the same moment must both succeed. Each waits here before it looks at
the version, so the second finds the work done. PostgreSQL: an advisory lock of the transaction. It also works behind a pooler,
because nothing is prepared by name and nothing is set for longer than the transaction. MySQL and MariaDB: GET_LOCK,
because every CREATE there ends the transaction. SQLite: BEGIN IMMEDIATE.
"""

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final, TypeVar

from sqlalchemy import URL, Connection, Dialect, Engine, create_engine, event, pool, text

from exactly_once.database.characters import utf8_args
from exactly_once.database.connections.pooler import IDLE_MS, LINK
from exactly_once.database.driver_choice import check_driver, with_driver
from exactly_once.database.errors.not_made import no_file
from exactly_once.database.errors.unusable import silent
from exactly_once.database.url import database_url
from exactly_once.errors import ConfigurationError, SchemaError, StoreUnavailable
from exactly_once.wording.redaction import redacted

__all__ = ["Database", "schema_lock", "with_connection"]

Database = str | URL | Engine | Connection

T = TypeVar("T")

WAIT_SECONDS: Final = 120
# One wait on GET_LOCK. Short: else a read_timeout in the caller's URL would end it with an error.
MYSQL_WAIT_SECONDS: Final = 2
CONNECT_SECONDS: Final = 5  # a server that does not accept within this time counts as away
# For the transaction alone, and never looser than the server's own; 0 there means no limit.
_BOUND: Final = (
    "SELECT set_config(name, least(nullif(setting::bigint, 0), nullif(reset_val::bigint, 0), :idle_ms)::text, true)"
    " FROM pg_settings WHERE name = 'idle_in_transaction_session_timeout'"
)


def with_connection(database: Database, work: Callable[[Connection], T]) -> T:
    """Run `work` with a connection to `database`, opened and closed here unless `database` is already a connection.

    Args:
        database: A URL with a sync or an async driver, an engine, or a connection. In a program with an async engine:
            `await connection.run_sync(exactly_once.alembic.upgrade)`.
        work: The work; it commits by itself.

    Raises:
        ConfigurationError: An async engine or connection was given, or the URL's driver is not installed.
        StoreUnavailable: The server at the URL's port does not speak MySQL.
    """
    if isinstance(database, Connection):
        _ask_for_a_pooler(database)
        return work(database)
    if isinstance(database, Engine):
        with _plain(database).connect() as connection:
            _ask_for_a_pooler(connection)
            return work(connection)
    if not isinstance(database, (str, URL)):
        raise ConfigurationError(
            f"{type(database).__name__} is async, and this function is not. Type: "
            "async with engine.connect() as connection: await connection.run_sync(exactly_once.alembic.upgrade)"
        )
    url = with_driver(database_url(database))
    check_driver(url)
    if (lacking := no_file(url, None)) is not None:
        raise lacking
    if url.get_backend_name() in ("mysql", "mariadb") and (told := silent(url)) is not None:
        raise StoreUnavailable(f"{redacted(url)} does not answer: {told}")
    if url.get_dialect().is_async:
        # In a thread of its own: the caller's thread may be running a loop, and asyncio allows one loop in a thread.
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(lambda: asyncio.run(_on_async(url, work))).result()
    engine = create_engine(url, poolclass=pool.NullPool, connect_args=_connect_args(url))
    _begin_as_sessions_do(engine)
    with _plain(engine).connect() as connection:
        return work(connection)


async def _on_async(url: URL, work: Callable[[Connection], T]) -> T:
    from sqlalchemy.ext.asyncio import create_async_engine

    engine = create_async_engine(url, poolclass=pool.NullPool, connect_args=_connect_args(url))
    _begin_as_sessions_do(engine.sync_engine)
    if engine.dialect.name != "sqlite":
        engine = engine.execution_options(isolation_level="READ COMMITTED")
    async with engine.connect() as connection:
        return await connection.run_sync(work)


def _begin_as_sessions_do(engine: Engine) -> None:
    """Behind a pooler, ignore the role and the search path that strangers left. A caller's engine is not changed."""
    if _is_psycopg(engine.dialect):
        from exactly_once.database.dialects.schema_lookup import as_sessions_begin

        event.listen(engine, "begin", as_sessions_begin)


def _connect_args(url: URL) -> dict[str, Any]:
    bounded = url.get_dialect().driver.removesuffix("_async") in ("psycopg", "pymysql", "asyncmy")
    limit = {"connect_timeout": CONNECT_SECONDS} if bounded and "connect_timeout" not in url.query else {}
    return limit | utf8_args(url) | _unprepared(url)


def _unprepared(url: URL) -> dict[str, None]:
    # For a single use preparing gains nothing, and behind a pooler, detected or not, a name may be a stranger's statement.
    return {"prepare_threshold": None} if _is_psycopg(url.get_dialect()) else {}


def _ask_for_a_pooler(connection: Connection) -> None:
    """Behind a pooler, let psycopg prepare nothing on a connection of the caller."""
    if _is_psycopg(connection.dialect) and LINK not in connection.info:
        from exactly_once.database.dialects.postgresql_pooler import look

        look(connection.connection.dbapi_connection, connection.info)


def _is_psycopg(dialect: Dialect | type[Dialect]) -> bool:
    return (dialect.name, dialect.driver.removesuffix("_async")) == ("postgresql", "psycopg")


def _plain(engine: Engine) -> Engine:
    # Under REPEATABLE READ the snapshot is older than the wait for the lock, so a program that waited would not see
    # the other's work. Under AUTOCOMMIT the lock would end with the statement that took it.
    if engine.dialect.name == "sqlite":
        return engine
    return engine.execution_options(isolation_level="READ COMMITTED")


@contextmanager
def schema_lock(connection: Connection, schema: str | None) -> Iterator[None]:
    """Hold the schema lock of this database. Create `schema` if it is missing, and commit at the end.

    If the caller has begun a transaction, the caller commits it; PostgreSQL and SQLite then keep the lock until
    that commit. A crash anywhere in here ends the connection, and with it the lock.

    Raises:
        SchemaError: Another program held the lock for two minutes.
    """
    _ask_for_a_pooler(connection)
    if connection.in_transaction():
        with _locked(connection, schema):
            yield
        return
    if connection.dialect.name in ("mysql", "mariadb"):
        # Around the transaction: if the lock were released before the commit, the next program could begin too early.
        with _locked(connection, schema):
            connection.commit()
            with connection.begin():
                yield
        connection.commit()
        return
    with connection.begin():
        if connection.dialect.name == "postgresql":
            connection.execute(text(_BOUND), {"idle_ms": IDLE_MS})
        with _locked(connection, schema):
            yield


@contextmanager
def _locked(connection: Connection, schema: str | None) -> Iterator[None]:
    match connection.dialect.name:
        case "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _number(schema)})
            # Checked first: IF NOT EXISTS needs the right to create even if there is nothing to create.
            if schema is not None and not connection.dialect.has_schema(connection, schema):
                connection.exec_driver_sql(f"CREATE SCHEMA {connection.dialect.identifier_preparer.quote(schema)}")
            yield
        case "mysql" | "mariadb":
            name = connection.execute(text("SELECT CONCAT(COALESCE(:schema, DATABASE()), '')"), {"schema": schema})
            lock = f"exactly_once:{hashlib.sha256(str(name.scalar()).encode()).hexdigest()[:40]}"
            _take_mysql(connection, lock)
            try:
                yield
            finally:
                # After an error that broke the connection the server has already released the lock.
                if not connection.invalidated:
                    connection.execute(text("SELECT RELEASE_LOCK(:lock)"), {"lock": lock})
        case "sqlite":
            _begin_immediate(connection)
            yield
        case other:
            raise ConfigurationError(f"There are tables for PostgreSQL, MySQL, MariaDB and SQLite; not for {other}.")


def _number(schema: str | None) -> int:
    digest = hashlib.sha256(f"exactly_once schema {schema or ''}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def _take_mysql(connection: Connection, lock: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    statement = text("SELECT GET_LOCK(:lock, :seconds)")
    while not connection.execute(statement, {"lock": lock, "seconds": MYSQL_WAIT_SECONDS}).scalar():
        if time.monotonic() > deadline:
            raise SchemaError(
                f"Another program has been changing the schema for {WAIT_SECONDS} seconds. Nothing was changed here. "
                "Look at SHOW PROCESSLIST, then type the command again."
            )


def _begin_immediate(connection: Connection) -> None:
    # A transaction that the driver has already begun (by an event of the caller, or a statement before ours) is used as it is.
    if getattr(connection.connection.driver_connection, "in_transaction", False):
        return
    before = connection.exec_driver_sql("PRAGMA busy_timeout").scalar()
    connection.exec_driver_sql(f"PRAGMA busy_timeout = {WAIT_SECONDS * 1000}")
    try:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    finally:
        connection.exec_driver_sql(f"PRAGMA busy_timeout = {before}")
