"""Chooses the dialect for an engine. Imports a server's module only when its driver is asked for. Opens nothing."""

from collections.abc import Callable
from sys import intern
from typing import TYPE_CHECKING, Final, cast

from sqlalchemy import Engine

from exactly_once.database.dialects.contract import BatchClaims, Dialect, LeaseClaims
from exactly_once.errors import ConfigurationError

if TYPE_CHECKING:
    from exactly_once.database.dialects.postgresql import PostgreSQL
    from exactly_once.database.dialects.sqlite import SQLite

__all__ = ["batch_claims_for", "dialect_for", "lease_claims_for"]

_KNOWN: Final = frozenset(
    {
        ("postgresql", "psycopg"),
        ("mysql", "pymysql"),
        ("mysql", "asyncmy"),
        ("mariadb", "pymysql"),
        ("mariadb", "asyncmy"),
        ("sqlite", "pysqlite"),
        ("sqlite", "aiosqlite"),
    }
)
"""Servers and drivers whose duplicate-key errors are known to be recognised."""


def dialect_for(
    engine: Engine,
    schema: Callable[[], str | None],
    *,
    looked_up: bool = False,
    durable: bool = True,
    kept_as: str = "",
) -> Dialect:
    """Return the dialect for `engine`'s server and driver.

    Args:
        engine: An engine of the application, or ours.
        schema: Returns the database schema of our tables. Asked at the first claim, and may connect.
        looked_up: It is where a new connection finds our tables, and nobody has named it: a later connection that finds them
            elsewhere is refused.
        durable: Commits wait for the disk, whatever the session says.
        kept_as: The key under which a connection's details are kept; see `Dialect.kept_as`.

    Raises:
        ConfigurationError: The driver was never tested: its duplicate-key error might not be recognised.
    """
    name, driver = engine.dialect.name, engine.dialect.driver.removesuffix("_async")
    if (name, driver) not in _KNOWN:
        ways = ", ".join(sorted(f"{n}+{d}" for n, d in _KNOWN))
        raise ConfigurationError(
            f"The database driver {name}+{driver} is not one this package knows how to claim with. Use one of: {ways}."
        )
    quote = engine.dialect.identifier_preparer.quote_schema

    def table() -> str:
        named = schema()
        return f"{quote(named)}.message_idempotent" if named else "message_idempotent"

    found_in = schema if looked_up else None
    return _class_of(name)(table, found_in, durable=durable, kept_as=intern(f"exactly_once.seen {kept_as} {durable}"))


def _class_of(name: str) -> Callable[..., Dialect]:
    match name:
        case "postgresql":
            from exactly_once.database.dialects.postgresql import PostgreSQL

            return PostgreSQL
        case "sqlite":
            from exactly_once.database.dialects.sqlite import SQLite

            return SQLite
        case _:
            from exactly_once.database.dialects.mysql import MySQL

            return MySQL


def lease_claims_for(dialect: Dialect) -> LeaseClaims:
    """Return the claims with a lease for the server of `dialect`."""
    match dialect.name:
        case "postgresql":
            from exactly_once.database.dialects import postgresql_lease

            return postgresql_lease.Claims(cast("PostgreSQL", dialect))
        case "sqlite":
            from exactly_once.database.dialects import sqlite_lease

            return sqlite_lease.Claims(cast("SQLite", dialect))
        case _:
            from exactly_once.database.dialects import mysql_lease

            return mysql_lease.Claims(dialect)


def batch_claims_for(dialect: Dialect) -> BatchClaims:
    """Return the batch claims for the server of `dialect`."""
    match dialect.name:
        case "postgresql":
            from exactly_once.database.dialects import postgresql_batch

            return postgresql_batch.Claims(dialect)
        case "sqlite":
            from exactly_once.database.dialects import sqlite_batch

            return sqlite_batch.Claims(cast("SQLite", dialect))
        case _:
            from exactly_once.database.dialects import mysql_batch

            return mysql_batch.Claims(dialect)
