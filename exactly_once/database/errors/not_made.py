"""Our tables are missing in a database: says which database, which schemas have them, and which command makes them there.

A command without `--database` uses the database of the settings. If the program made its own engine, or a person typed a URL,
that command would check another database, find it in order, and say so each time. Called by `alembic`, `dialects`, `store`,
`transports.sql` and the command line when a table is missing.
"""

import os
from collections.abc import Sequence
from shlex import quote
from typing import Final
from weakref import WeakSet

from sqlalchemy import URL, Connection, Dialect, Engine, inspect, text

from exactly_once.database.in_memory import in_memory
from exactly_once.errors import ConfigurationError, SchemaError
from exactly_once.wording.redaction import HIDDEN, redacted
from exactly_once.wording.text import listed

__all__ = ["file_of", "no_file", "not_made", "of_the_settings", "other_schemas", "perhaps_dropped", "upgrade_command"]

_OTHERS: Final = text(
    "SELECT place.nspname FROM pg_catalog.pg_class AS found JOIN pg_catalog.pg_namespace AS place"
    " ON place.oid = found.relnamespace"
    " WHERE found.relname = 'message_idempotent' AND found.relkind IN ('r', 'p') ORDER BY 1"
)
# By dialect, which all copies of an engine share: those with another pool, or with other options.
_of_the_settings: WeakSet[Dialect] = WeakSet()


def of_the_settings(engine: Engine) -> None:
    """Remember that an engine's URL comes from the settings. Each command reads the settings for itself."""
    _of_the_settings.add(engine.dialect)


def upgrade_command(engine: Engine, schema: str | None = None) -> str:
    """Return what makes the tables in an engine's database: a command to type, or for one in memory the code to write."""
    if in_memory(engine):
        return "exactly_once.alembic.upgrade(engine)"
    command = "exactly-once db upgrade"
    named = ""
    if engine.dialect not in _of_the_settings:
        shown = redacted(engine.url)
        command += f" --database {quote(shown)}"
        named = f" (with the password in place of {HIDDEN})" if HIDDEN in shown else ""
    if schema and engine.dialect.name != "sqlite" and schema != engine.dialect.default_schema_name:
        command += f" --schema {quote(schema)}"
    return command + named


def not_made(
    engine: Engine, *, schema: str | None = None, looked_for: str = "", others: Sequence[str] = (), ran: str = ""
) -> str:
    """Say that the tables are not there, and end with what makes them.

    Args:
        engine: Its database.
        schema: The named schema that we looked in.
        looked_for: The table that we looked for.
        others: Schemas of that database that have the tables.
        ran: What became of the work, such as "nothing ran".
    """
    if engine.dialect.name == "sqlite" or schema == engine.dialect.default_schema_name:
        schema = None
    where = f"the schema {schema} of {redacted(engine.url)}" if schema else redacted(engine.url)
    said = f"The tables of exactly_once are not in {where}"
    said += f" (looked for {looked_for})" if looked_for else ""
    said += f"; {ran}." if ran else "."
    command = upgrade_command(engine, schema)
    if in_memory(engine):
        return f"{said} Write in the program: {command}"
    if not others:
        return f"{said} Type: {command}"
    have = f"schema {others[0]} has" if len(others) == 1 else f"schemas {listed(others, most=5)} have"
    return (
        f"{said} The {have} them: if that is yours, type: export EXACTLY_ONCE_SCHEMA={quote(others[0])}. Only to make others,"
        f" type: {command}"
    )


def file_of(url: URL) -> str | None:
    """Return the path of a URL's SQLite file as the URL has it; None if it has no file, or names it as a `file:` URI."""
    named = url.database
    if url.get_backend_name() != "sqlite" or not named or ":memory:" in named or named.startswith("file:"):
        return None
    return named


def no_file(url: URL, command: str | None) -> ConfigurationError | None:
    """Return the error for a SQLite file that does not exist, before connecting makes an empty one. None if it exists.

    Args:
        url: Of the database.
        command: The command that makes the file with our tables. None: the caller makes it now, and only its folder must exist.
    """
    named = file_of(url)
    if named is None or os.path.exists(named):
        return None
    path = os.path.abspath(named)
    if not os.path.isdir(folder := os.path.dirname(path)):
        return ConfigurationError(f"There is no folder {folder} for {redacted(url)}. Make it, or mend the URL.")
    if command is None:
        return None
    return SchemaError(
        f"There is no file {path} ({redacted(url)}), and none was made. Mend the URL, or make it with our tables in it."
        f" Type: {command}"
    )


def other_schemas(connection: Connection) -> Sequence[str]:
    """Return the schemas of this database that have a table of claims.

    Empty on MySQL and MariaDB: a schema there is a database, and other databases of a server may be strangers'.
    """
    if connection.dialect.name != "postgresql":
        return ()
    return [str(name) for name in connection.execute(_OTHERS).scalars()]


def perhaps_dropped(connection: Connection) -> str:
    """Return a hint for a database with an Alembic history of the program's own: a migration may have dropped our tables.

    `alembic revision --autogenerate` writes such a migration unless env.py leaves our tables out.
    """
    if not inspect(connection).has_table("alembic_version"):
        return ""
    return (
        " (The database has a table alembic_version: if these were there before, the claims went with them, and a copy of an"
        " old message would run again. Then restore them from a backup.)"
    )
