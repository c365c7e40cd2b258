"""Detects that the row of the version table was deleted while our tables exist, and tells the version of the tables.

A clean-up of tests that empties every table does that. Without the row nothing shows that the tables are ours, and an
upgrade would find them in its way. The row is restored only if every table has exactly the columns of this version.
Decides nothing else. Called by `check`, `climb`, and the command line.
"""

from typing import TYPE_CHECKING

from exactly_once.alembic.version_table import HEAD, TABLES, VERSION_TABLE, name_of, recorded

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["emptied", "emptied_of_head", "told"]


def emptied(connection: "Connection", schema: str | None) -> bool:
    """Say whether the row of the version was deleted.

    On MySQL and MariaDB a killed run leaves the same, with some of the tables. So there it is true only if all tables exist.
    """
    if recorded(connection, schema) is not None:
        return False
    from sqlalchemy import inspect

    there = TABLES & set(inspect(connection).get_table_names(schema=schema))
    if VERSION_TABLE not in there or there == {VERSION_TABLE}:
        return False
    return connection.dialect.name not in ("mysql", "mariadb") or emptied_of_head(connection, schema)


def emptied_of_head(connection: "Connection", schema: str | None) -> bool:
    """Say whether the tables are exactly as this version makes them, and the version table is empty."""
    from sqlalchemy import inspect

    from exactly_once.database.schema import tables

    if recorded(connection, schema) is not None:
        return False
    looking = inspect(connection)
    if not set(looking.get_table_names(schema=schema)) >= TABLES:
        return False
    return all(
        {column["name"] for column in looking.get_columns(table.name, schema=schema)} == set(table.columns.keys())
        for table in tables().metadata.tables.values()
    )


def told(connection: "Connection", schema: str | None, place: str, command: str) -> str:
    """Say what happened, and which command restores the row.

    Args:
        connection: A connection to that database.
        schema: The named schema.
        place: The database, in words.
        command: The command that upgrades it.
    """
    happened = (
        f"The tables of exactly_once are in {place}, and the table {VERSION_TABLE} is empty: something deleted its row, such as"
        " a clean-up of tests that empties every table. Leave that table out there."
    )
    if emptied_of_head(connection, schema):
        return f"{happened} To put the row back, type: {command}"
    table = f"{schema}.{VERSION_TABLE}" if schema else VERSION_TABLE
    return (
        f"{happened} Which version they are of cannot be seen: they are not as version {name_of(HEAD)} makes them. Put back the"
        f" row that was there, such as '{name_of(HEAD - 1)}' in {table}.version_num. Or, if nothing in them is needed:"
        " exactly_once.alembic.downgrade(URL, version=0), and upgrade again."
    )
