"""Finds the database schema that our tables are in, where nobody has named it; once for a database.

Statements name it from then on. Without a name the server would look for the table along the search path of the connection
(PostgreSQL) or in its current database (MySQL and MariaDB), and a handler that had the connection before may have changed
either: claims would be written into another schema's table. For the same reason it is asked on a connection that no handler
and no caller has had, and that no `checkout` listener has set up: where it names the tenant, it would be the one who came
first, another in each process. Called by `store`, and by the first door for engines that are the caller's.
"""

from typing import Final

from sqlalchemy import Engine, text
from sqlalchemy.pool import NullPool

from exactly_once.errors import ConfigurationError, SchemaError

__all__ = ["schema_in"]

_PATH: Final = text(
    "SELECT place.name FROM unnest(current_schemas(false)) WITH ORDINALITY AS place (name, number)"
    " JOIN pg_catalog.pg_namespace AS known ON known.nspname = place.name"
    " JOIN pg_catalog.pg_class AS found ON found.relnamespace = known.oid AND found.relname = 'message_idempotent'"
    " ORDER BY place.number"
)
_DATABASE: Final = text("SELECT DATABASE()")
_BY_A_LISTENER: Final = (
    ". Or, if a `checkout` listener of this engine's pool names their schema: what it sets may differ each time, so say it"
    " yourself: ExactlyOnce(schema=...), or EXACTLY_ONCE_SCHEMA=..."
)


def schema_in(engine: Engine) -> str | None:
    """Return the schema (on MySQL and MariaDB the database) in which a new connection of this engine finds our tables.

    Args:
        engine: Its pool is not used; a connection is made as the pool would make it (`connect` listeners are called,
            `checkout` listeners are not), and closed.

    Raises:
        SchemaError: There are no tables of ours.
        ConfigurationError: Several schemas of the search path have them, and nobody has said which is meant.
    """
    if engine.dialect.name == "sqlite":
        return "main"  # else a temporary table, or one of an attached file, of the same name would be taken
    listeners = engine.pool.dispatch
    as_made = [(each, name) for name in ("first_connect", "connect") for each in getattr(listeners, name)]
    pool = NullPool(engine.pool._creator, events=as_made)  # noqa: SLF001
    apart = Engine(pool, engine.dialect, engine.url)
    try:
        with apart.connect() as connection:
            if engine.dialect.name == "postgresql":
                found = [str(name) for name in connection.execute(_PATH).scalars()]
            else:
                database = connection.execute(_DATABASE).scalar()
                found = [str(database)] if database else []
            connection.rollback()
    finally:
        apart.dispose()
    if not found:
        raise SchemaError(
            "The tables of exactly_once are not in this database (looked for message_idempotent); nothing ran."
            " Type: exactly-once db upgrade" + (_BY_A_LISTENER if listeners.checkout else "")
        )
    if len(found) > 1:
        raise ConfigurationError(
            f"Several schemas of the search path have our tables: {', '.join(found)}. Claims in one of them would not be"
            f" seen in another. Say which holds yours: ExactlyOnce(schema={found[0]!r}), or"
            f" EXACTLY_ONCE_SCHEMA={found[0]}. Until now it was the first of them."
        )
    return found[0]
