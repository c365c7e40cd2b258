"""What `alembic upgrade head` runs in a checkout; programs call `exactly_once.alembic` instead.

The database is `-x url=...`, else `sqlalchemy.url`, else EXACTLY_ONCE_DATABASE (or another source of the settings). The schema is
`-x schema=...`, else EXACTLY_ONCE_SCHEMA. An async URL runs on an event loop of its own. The version table is ours alone, so that
this history is not mixed with a program's own Alembic history in the same database.
"""

from alembic import context
from alembic.util import CommandError
from sqlalchemy import Connection, make_url
from sqlalchemy.schema import CreateSchema

from exactly_once.alembic.lock import schema_lock, with_connection
from exactly_once.alembic.version_table import VERSION_TABLE
from exactly_once.alembic.versions import refuse_strangers, sweep
from exactly_once.configuration.config import load
from exactly_once.database.schema import tables
from exactly_once.errors import ConfigurationError

given = context.get_x_argument(as_dictionary=True)
try:
    settings = load()
except ConfigurationError as error:
    raise CommandError(str(error)) from error  # Alembic shows this error as one line
schema = given.get("schema") or settings.schema.value
database = given.get("url") or context.config.get_main_option("sqlalchemy.url") or settings.database.value
if not isinstance(database, str):
    raise CommandError(
        "One database must be given. Type: export EXACTLY_ONCE_DATABASE=postgresql+psycopg://user:password@host/name, or say:"
        f" alembic -x url=URL upgrade head ({settings.looked})"
    )
url = make_url(database)


def online(connection: Connection) -> None:
    with schema_lock(connection, schema):
        refuse_strangers(connection, schema)
        context.configure(
            connection=connection,
            target_metadata=tables(schema).metadata,
            version_table=VERSION_TABLE,
            version_table_schema=schema,
            include_schemas=schema is not None,
            # compare only our own tables: there may be others in the same database
            include_name=lambda name, type_, parents: (
                type_ != "table" or f"{parents['schema_qualified_table_name']}" in tables(schema).metadata.tables
            ),
        )
        context.run_migrations(schema=schema)
        sweep(connection, schema)


def offline() -> None:
    context.configure(
        url=url,
        version_table=VERSION_TABLE,
        version_table_schema=schema,
        literal_binds=True,
        dialect_opts={"paramstyle": "named"},
    )
    with context.begin_transaction():
        if schema is not None and url.get_backend_name() == "postgresql":
            context.execute(CreateSchema(schema, if_not_exists=True))
        context.run_migrations(schema=schema)


if context.is_offline_mode():
    offline()
else:
    with_connection(url, online)
