"""Our tables are not where somebody looked for them: which database that is, who else has them, and what to type for that one.

A command without `--database` goes to the database of the settings. Of an engine that the program made, or of a URL that was
typed, it would find another one in order, and say so for ever. Called by whoever misses a table: `alembic`, `dialects`, `store`,
`transports.sql`, the command line.
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
# of an engine all copies share it: with another pool, with other options
_of_the_settings: WeakSet[Dialect] = WeakSet()


def of_the_settings(engine: Engine) -> None:
    """Remember of an engine that its URL is that of the settings, which each command reads for itself."""
    _of_the_settings.add(engine.dialect)


def upgrade_command(engine: Engine, schema: str | None = None) -> str:
    """Return what makes the tables in an engine's database: to be typed, or of one in memory to be written in the program."""
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
    """Say that the tables are not there, and end in what makes them.

    Args:
        engine: Of the database.
        schema: The named schema that was looked in.
        looked_for: The table that was looked for.
        others: Schemas of that database that have them.
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
    """Return the path of a URL's SQLite file, as it has it; None where it has none, or names it in another way."""
    named = url.database
    if url.get_backend_name() != "sqlite" or not named or ":memory:" in named or named.startswith("file:"):
        return None
    return named


def no_file(url: URL, command: str | None) -> ConfigurationError | None:
    """Return what is told where a SQLite file is not there, before connecting makes an empty one; None where it is.

    Args:
        url: Of the database.
        command: What makes it with our tables. None: it is to be made now, and only its folder must be there.
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

    None on MySQL and MariaDB: a schema there is a database, and those of a server may be strangers'.
    """
    if connection.dialect.name != "postgresql":
        return ()
    return [str(name) for name in connection.execute(_OTHERS).scalars()]


def perhaps_dropped(connection: Connection) -> str:
    """Return what to add of a database that has a history of the program's own: a migration may have dropped our tables.

    `alembic revision --autogenerate` writes one that does, where env.py does not leave them out.
    """
    if not inspect(connection).has_table("alembic_version"):
        return ""
    return (
        " (The database has a table alembic_version: if these were there before, the claims went with them, and a copy of an"
        " old message would run again. Then restore them from a backup.)"
    )
