"""The table that records the version of ours: its name, its form, and what it says.

Called by the modules here that write it, and by those that ask for it.
"""

from typing import TYPE_CHECKING, Final

from exactly_once.database.errors.unusable import nameless, no_schemas

if TYPE_CHECKING:
    from sqlalchemy import Connection, Table

__all__ = ["HEAD", "TABLES", "VERSION_TABLE", "name_of", "recorded", "version_table"]

VERSION_TABLE: Final = "exactly_once_version"
HEAD: Final = 2
TABLES: Final = frozenset(
    {
        "message_idempotent",
        "message_step",
        "message_failure",
        "message_outbox",
        "message_queue",
        "message_queue_group",
        "message_cutover",
        VERSION_TABLE,
    }
)


def name_of(version: int) -> str:
    return f"{version:04d}"


def recorded(connection: "Connection", schema: str | None) -> int | None:
    dialect = connection.dialect
    if schema is None and dialect.name in ("mysql", "mariadb") and dialect.default_schema_name is None:
        raise nameless(connection.engine.url)
    if schema is not None and dialect.name == "sqlite" and schema not in dialect.get_schema_names(connection):
        raise no_schemas(schema)  # nor is it the name of an attached file
    # The catalog is asked first: on PostgreSQL a failed SELECT would abort the caller's transaction.
    if not dialect.has_table(connection, VERSION_TABLE, schema=schema):
        return None
    found = connection.execute(version_table(schema).select()).scalar()
    return int(found) if found is not None else None


def version_table(schema: str | None) -> "Table":
    # In the form of Alembic's own, so that either may write it.
    from sqlalchemy import Column, MetaData, PrimaryKeyConstraint, String, Table

    return Table(
        VERSION_TABLE,
        MetaData(),
        Column("version_num", String(32), nullable=False),
        PrimaryKeyConstraint("version_num", name=f"{VERSION_TABLE}_pkc"),
        schema=schema,
    )
