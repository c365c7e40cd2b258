"""Upgrades, downgrades, checks and prints our tables. Each function opens the given database, or uses the caller's connection.

The functions are those of `exactly_once.alembic`. The docstring of that package says what holds for all of them.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from exactly_once.alembic.version_table import HEAD, TABLES, name_of, recorded
from exactly_once.alembic.versions import climb, descend, operations_on, write
from exactly_once.errors import ConfigurationError
from exactly_once.wording.redaction import redacted

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from exactly_once.alembic.lock import Database

__all__ = [
    "check",
    "current",
    "downgrade",
    "head",
    "include_name",
    "revision",
    "sql",
    "upgrade",
]

Version = int | Literal["head"]

T = TypeVar("T")


def head() -> str:
    """Return the newest version in this package, in the form of `current`: "0002"."""
    return name_of(HEAD)


def upgrade(database: "Database | None" = None, *, schema: str | None = None, version: Version = "head") -> None:
    """Upgrade our tables to `version`. Does nothing if they have that version already.

    Many programs may call this at the same time: one works, the others wait and find it done. If the connection is in a
    transaction, it stays open: the caller commits. (MySQL and MariaDB commit at every CREATE all the same. If a run is killed
    there, the next run finishes it.)

    Args:
        database: URL, Engine or Connection. None: inside a migration of your own Alembic history; its connection is used.
        schema: The named schema. On PostgreSQL it is created if it is missing. None: the connection's default schema.
        version: A number, or "head".

    Raises:
        SchemaError: There is a table with one of our names that we did not make, or another program held the lock too long.
        ConfigurationError: `version` does not exist, or no database was given outside a migration.

    Example:
        exactly_once.alembic.upgrade("postgresql+psycopg://app@localhost/shop", schema="messaging")
    """
    target = _number(version)
    if database is None:
        _inside_a_migration(schema, up_to=target)
        return

    def work(connection: "Connection") -> None:
        from exactly_once.alembic.lock import schema_lock

        with schema_lock(connection, schema):
            climb(operations_on(connection), schema, target)

    _on(database, work)


def downgrade(database: "Database | None" = None, *, version: Version, schema: str | None = None) -> None:
    """Downgrade our tables to `version`. 0 drops all of them, with every claim, failure and queued message.

    The named schema itself stays: it may have tables of others.

    Args:
        database: As for `upgrade`.
        version: A number. Versions above it are undone, the newest first.
        schema: As for `upgrade`.
    """
    target = _number(version)
    if database is None:
        _inside_a_migration(schema, down_to=target)
        return

    def work(connection: "Connection") -> None:
        from exactly_once.alembic.lock import schema_lock

        with schema_lock(connection, schema):
            descend(operations_on(connection), schema, target)

    _on(database, work)


def current(database: "Database", *, schema: str | None = None) -> str | None:
    """Return the version of our tables in this database, such as "0001". None: there are none."""

    def work(connection: "Connection") -> str | None:
        found = recorded(connection, schema)
        return name_of(found) if found else None

    return _on(database, work)


def check(connection: "Connection", schema: str | None = None) -> str | None:
    """Return None if our tables are ready for this package, else a text that ends in the command to type.

    One version ahead is ready, too: a migration stays usable by the release before it, so that the database can be upgraded while
    old workers run.
    """
    found = recorded(connection, schema)
    place = f"the schema {schema} of {_place(connection)}" if schema else _place(connection)
    if found is None:
        from exactly_once.alembic.emptied import emptied, told
        from exactly_once.database.errors.not_made import not_made, other_schemas, perhaps_dropped, upgrade_command

        if emptied(connection, schema):
            return told(connection, schema, place, upgrade_command(connection.engine, schema))
        missing = not_made(connection.engine, schema=schema, others=other_schemas(connection))
        return missing + perhaps_dropped(connection)
    if found < HEAD:
        from exactly_once.database.errors.not_made import upgrade_command

        return (
            f"The tables of exactly_once in {place} are at version {name_of(found)}, and this program needs {head()}. "
            f"Type: {upgrade_command(connection.engine, schema)}"
        )
    if found > HEAD + 1:
        return (
            f"The tables of exactly_once in {place} are at version {name_of(found)}, and this program knows {head()} "
            "and the one after it. Install a newer release of exactly_once."
        )
    return None


def include_name(
    name: str | None, type_: str, parent_names: Mapping[str, str | None], *, schema: str | None = "anywhere"
) -> bool:
    """Hide our tables, which your models do not have, from `alembic revision --autogenerate`.

    Without this Alembic proposes to drop them.

    Args:
        name: Passed by Alembic.
        type_: Passed by Alembic: "schema", "table", "column" and so on.
        parent_names: Passed by Alembic.
        schema: The schema of our tables. Without it our names are hidden in every schema. Give it (with functools.partial) if a
            table of yours has one of our names in another schema.

    Example:
        context.configure(..., include_name=exactly_once.alembic.include_name)

    Source: https://alembic.sqlalchemy.org/en/latest/autogenerate.html (omitting names from the autogenerate process)
    """
    if type_ != "table" or name not in TABLES:
        return True
    return schema not in ("anywhere", parent_names.get("schema_name"))


def sql(
    dialect_name: str, *, schema: str | None = None, grants_role: str | None = None, only_grants: bool = False
) -> str:
    """Return the SQL that `upgrade` would run on an empty database, for an administrator to run.

    Args:
        dialect_name: "postgresql", "mysql", "mariadb" or "sqlite".
        schema: The named schema. On PostgreSQL it is created if it is missing.
        grants_role: The role as which workers log in. It gets the smallest rights that are enough: to read and write rows of our
            tables, not to create or change tables. On MySQL and MariaDB a role, or an account such as "name@host".
        only_grants: The tables exist: return only the statements that give the role its rights.

    Raises:
        ConfigurationError: We have no tables for this dialect, or it has no roles, or no role is named.
    """
    from exactly_once.alembic.offline import script

    return script(dialect_name, schema=schema, grants_role=grants_role, only_grants=only_grants)


def revision(
    directory: str | os.PathLike[str] | None = None,
    *,
    config: str | os.PathLike[str] = "alembic.ini",
    schema: str | None = None,
    down_revision: str | None = None,
    version: Version = "head",
) -> Path:
    """Write a file into your own Alembic history that upgrades our tables, and return its path.

    Args:
        directory: The folder with your env.py and versions/. None: the folder that `config` names.
        config: Your alembic.ini.
        schema: The named schema.
        down_revision: The revision that it follows. None: your only head.
        version: The version of our tables.

    Raises:
        ConfigurationError: Your history was not found, has several heads, or has this version already.
    """
    from exactly_once.alembic.offline import history_file

    return history_file(
        None if directory is None else Path(directory),
        config=Path(config),
        schema=schema,
        down_revision=down_revision,
        version=_number(version),
    )


def _number(version: Version) -> int:
    number = HEAD if version == "head" else version
    if not 0 <= number <= HEAD:
        raise ConfigurationError(f"There is no schema version {version!r}: this package brings 0 to {HEAD} and head.")
    return number


def _on(database: "Database", work: "Callable[[Connection], T]") -> T:
    from exactly_once.alembic.lock import with_connection

    return with_connection(database, work)


def _place(connection: "Connection") -> str:
    return redacted(connection.engine.url)


def _inside_a_migration(schema: str | None, *, up_to: int | None = None, down_to: int | None = None) -> None:
    from alembic import op

    from exactly_once.alembic.lock import schema_lock

    try:
        context = op.get_context()
    except NameError as error:
        raise ConfigurationError(
            "Without a database, upgrade() and downgrade() work inside a migration of your own Alembic history only. "
            "Elsewhere type: exactly_once.alembic.upgrade(url)"
        ) from error
    if context.as_sql:
        write(op, schema, up_to=up_to, down_to=down_to)
        return
    with schema_lock(op.get_bind(), schema):
        if up_to is not None:
            climb(op, schema, up_to)
        if down_to is not None:
            descend(op, schema, down_to)
