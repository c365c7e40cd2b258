"""Up, down, check and print: each opens the database that it is given, or uses the connection of the caller's.

The names are those of `exactly_once.alembic`, whose docstring says what holds for all of them.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from exactly_once.alembic.versions import (
    HEAD,
    TABLES,
    climb,
    descend,
    name_of,
    operations_on,
    recorded,
    write,
)
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
    """Return the version this package brings, as `current` gives it: "0002"."""
    return name_of(HEAD)


def upgrade(database: "Database | None" = None, *, schema: str | None = None, version: Version = "head") -> None:
    """Bring our tables to `version`; do nothing where they are there already.

    Safe to call from many programs at once: one works, the others wait and find it done. A connection that is in a
    transaction stays in it: the caller commits. (MySQL and MariaDB commit at every CREATE all the same; a run that was
    killed there is finished by the next.)

    Args:
        database: URL, Engine or Connection. None: inside a migration of your own Alembic history, whose connection is
            used.
        schema: The named schema, made on PostgreSQL where it is missing. None: where the connection looks first.
        version: A number, or "head".

    Raises:
        SchemaError: A table of one of our names is there that we did not make; or the database is newer than `version`
            can say.
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
    """Take our tables back to `version`; 0 drops them all, with every claim, failure and queued message in them.

    The named schema itself stays: it may hold tables of others.

    Args:
        database: As for `upgrade`.
        version: A number. Versions above it are undone, newest first.
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
    """Return the version of our tables in this database, "0001"; None where there are none."""

    def work(connection: "Connection") -> str | None:
        found = recorded(connection, schema)
        return name_of(found) if found else None

    return _on(database, work)


def check(connection: "Connection", schema: str | None = None) -> str | None:
    """Return None where our tables are ready for this package, else a sentence that ends in the command to type.

    One version ahead is ready too: a migration stays usable by the release before it, so that the database can be
    upgraded while old workers run.
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
    """Tell `alembic revision --autogenerate` not to see our tables, which your models do not have.

    Without it Alembic proposes to drop them.

    Args:
        name: What Alembic passes.
        type_: What Alembic passes: "schema", "table", "column" and so on.
        parent_names: What Alembic passes.
        schema: Where our tables are. Left out, our names are not seen in any schema; say it (with functools.partial)
            if a table of yours has one of our names in another schema.

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
        schema: The named schema, made on PostgreSQL where it is missing.
        grants_role: Who the workers log in as. It gets the least that is enough: rows of our tables, no tables. On
            MySQL and MariaDB a role, or an account as "name@host".
        only_grants: The tables are there: return only what gives the role its rights.

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
    """Write one file into your own Alembic history that brings our tables, and return its path.

    Args:
        directory: The folder that has your env.py and versions/. None: as `config` says.
        config: Your alembic.ini.
        schema: The named schema.
        down_revision: The revision it follows. None: your one head.
        version: The version of our tables to bring.

    Raises:
        ConfigurationError: Your history was not found, has several heads, or brings this version already.
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
