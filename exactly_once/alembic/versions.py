"""Our migrations, run one by one: the versions that exist, the version of a database, and the steps up and down.

It opens, locks and commits nothing: the caller holds the lock (`lock`). Called by `exactly_once.alembic`.

Migrations get an `Operations` of our own, which is never installed as `alembic.op`. That is one global of the process: a
user's migration that called us, or another thread, would lose its own. Inside a user's migration they get the user's.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from exactly_once.alembic import emptied
from exactly_once.alembic.version_table import HEAD, TABLES, VERSION_TABLE, name_of, recorded, version_table
from exactly_once.errors import SchemaError
from exactly_once.wording.redaction import redacted

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = [
    "climb",
    "descend",
    "operations_on",
    "refuse_strangers",
    "sweep",
    "write",
]


def _folder() -> Path:
    """Return the folder of the migrations: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).parent.parent
    inside = package / "migrations"
    return inside if inside.is_dir() else package.parent / "migrations"


def operations_on(connection: "Connection") -> Any:
    from alembic.migration import MigrationContext
    from alembic.operations import Operations

    return Operations(MigrationContext.configure(connection))


def write(operations: Any, schema: str | None, *, up_to: int | None = None, down_to: int | None = None) -> None:
    """Write statements without a database: upwards from nothing, downwards from the newest version."""
    from sqlalchemy.schema import CreateSchema

    if up_to is not None:
        if schema is not None and operations.get_context().dialect.name == "postgresql":
            operations.execute(CreateSchema(schema, if_not_exists=True))
        for version in range(1, up_to + 1):
            _step_up(operations, schema, version)
    if down_to is not None:
        for version in range(HEAD, down_to, -1):
            _step_down(operations, schema, version)


def climb(operations: Any, schema: str | None, target: int) -> None:
    connection = operations.get_bind()
    found = recorded(connection, schema) or 0
    if not found:
        refuse_strangers(connection, schema)
        found = _put_back(connection, schema)
    for version in range(found + 1, target + 1):
        _step_up(operations, schema, version)


def _put_back(connection: "Connection", schema: str | None) -> int:
    """If the row of the version was deleted, restore it and return the version; 0 if there are no tables of ours."""
    from exactly_once.database.errors.not_made import upgrade_command

    if emptied.emptied_of_head(connection, schema):
        connection.execute(version_table(schema).insert().values(version_num=name_of(HEAD)))
        return HEAD
    if emptied.emptied(connection, schema):
        place = redacted(connection.engine.url)
        raise SchemaError(emptied.told(connection, schema, place, upgrade_command(connection.engine, schema)))
    return 0


def descend(operations: Any, schema: str | None, target: int) -> None:
    connection = operations.get_bind()
    found = recorded(connection, schema) or 0
    if found > HEAD:
        raise SchemaError(
            f"The tables of exactly_once are at version {name_of(found)}, and this package knows how to undo "
            f"{name_of(HEAD)} and older. Nothing was changed. Install a newer release of exactly_once."
        )
    if not found and connection.dialect.has_table(connection, VERSION_TABLE, schema=schema):
        found = 1  # a run was killed: some of the tables exist
    for version in range(found, target, -1):
        _step_down(operations, schema, version)


def _step_up(operations: Any, schema: str | None, version: int) -> None:
    from sqlalchemy.schema import CreateTable

    table = version_table(schema)
    if version == 1:
        operations.execute(CreateTable(table, if_not_exists=True))
    _migration(version).upgrade(schema=schema, operations=operations)
    if version == 1:
        # IGNORE: on MySQL another program's migration may have this row, not yet committed, although its tables are committed.
        row = table.insert().prefix_with("IGNORE", dialect="mysql").prefix_with("IGNORE", dialect="mariadb")
        operations.execute(row.values(version_num=_literal(version)))
    else:
        operations.execute(table.update().values(version_num=_literal(version)))


def _step_down(operations: Any, schema: str | None, version: int) -> None:
    from sqlalchemy.schema import DropTable

    table = version_table(schema)
    # Recorded first: if the run is killed after this, MySQL has lost some tables, and an upgrade must know that it
    # has to make them.
    if version == 1:
        operations.execute(table.delete())
    else:
        operations.execute(table.update().values(version_num=_literal(version - 1)))
    _migration(version).downgrade(schema=schema, operations=operations)
    if version == 1:
        operations.execute(DropTable(table, if_exists=True))


def _literal(version: int) -> Any:
    # A literal: a script for an administrator has no parameters.
    from sqlalchemy import literal_column

    return literal_column(f"'{name_of(version)}'")


def _migration(version: int) -> Any:
    from alembic.script import ScriptDirectory

    return ScriptDirectory(str(_folder())).get_revision(name_of(version)).module


def refuse_strangers(connection: "Connection", schema: str | None) -> None:
    """Raise if a table has one of our names and was not made by us.

    The version table comes first: if it exists without a row, a run of ours was killed on MySQL or MariaDB, and
    the other tables are ours.
    """
    from sqlalchemy import inspect

    there = TABLES & set(inspect(connection).get_table_names(schema=schema))
    if VERSION_TABLE in there:
        return
    if there:
        place = redacted(connection.engine.url)
        raise SchemaError(
            f"{place} has a table {', '.join(sorted(there))} that "
            "these migrations did not make. Nothing was changed. Rename or drop it, or keep our tables in a schema of "
            "their own: exactly-once db upgrade --schema messaging"
        )


def sweep(connection: "Connection", schema: str | None) -> None:
    """Drop the version table if it is empty and alone, as it is after `alembic downgrade base`."""
    from sqlalchemy import inspect

    if recorded(connection, schema) is None and TABLES & set(inspect(connection).get_table_names(schema=schema)) == {
        VERSION_TABLE
    }:
        version_table(schema).drop(connection)
