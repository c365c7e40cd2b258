"""What Alembic sees in a database, and a script that is run there by hand."""

from typing import Any

import psycopg
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, create_engine, make_url

import exactly_once.alembic
from exactly_once.database.schema import Tables


def differences(connection: Connection, schema: str | None = None) -> list[Any]:
    context = MigrationContext.configure(
        connection,
        opts={
            "version_table": exactly_once.alembic.VERSION_TABLE,
            "version_table_schema": schema,
            "compare_type": True,
            "compare_server_default": True,
            "include_schemas": schema is not None,
            "include_name": lambda name, type_, parents: type_ != "schema" or name == schema,
        },
    )
    return list(compare_metadata(context, Tables(schema).metadata))


def run(url: str, script: str) -> None:
    """Run a script as an administrator's client would, with the driver alone."""
    if url.startswith("postgresql"):
        with psycopg.connect(make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)) as pg:
            pg.autocommit = True
            pg.execute(script.encode())
        return
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for statement in script.split(";\n"):
            if statement.strip():
                connection.exec_driver_sql(statement.replace("%", "%%") if "mysql" in url else statement)
    engine.dispose()
