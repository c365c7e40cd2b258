"""Writes what others run: SQL for a database administrator, a file for a program's own Alembic history.

It opens no database. Called by `exactly_once.alembic`.
"""

import io
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from exactly_once.alembic.version_table import HEAD, TABLES, VERSION_TABLE, name_of
from exactly_once.alembic.versions import write
from exactly_once.errors import ConfigurationError
from exactly_once.wording.text import stopped

__all__ = ["histories_that_show_our_tables", "history_file", "script", "shows_our_tables"]

DIALECTS: Final = ("postgresql", "mysql", "mariadb", "sqlite")

# Rows of the schedule are only added, never changed: a worker that has read a row relies on it.
ONLY_ADDED: Final = frozenset({"message_cutover"})
COUNTED: Final = ("message_failure", "message_outbox", "message_queue")

FILE: Final = '''"""The tables of exactly_once, version {version}.{what}

Revision ID: {revision}
Revises: {revises}
"""

import exactly_once.alembic

revision = {revision!r}
down_revision = {down_revision!r}
branch_labels = None
depends_on = None

# read by `exactly-once db revision`, which writes the next such file
exactly_once_version = {version}


def upgrade() -> None:
    exactly_once.alembic.upgrade(version={version}{schema})


def downgrade() -> None:
    exactly_once.alembic.downgrade(version={since}{schema})
'''


def script(dialect_name: str, *, schema: str | None, grants_role: str | None, only_grants: bool = False) -> str:
    """Return the SQL that makes our tables from nothing, and the rights of the role with which workers log in.

    Args:
        dialect_name: One of `DIALECTS`.
        schema: The named schema.
        grants_role: That role.
        only_grants: The tables exist: only the rights.
    """
    from alembic.migration import MigrationContext
    from alembic.operations import Operations

    if dialect_name not in DIALECTS:
        raise ConfigurationError(f"There is no SQL for {dialect_name!r}. There is for {', '.join(DIALECTS)}.")
    if grants_role is not None and dialect_name == "sqlite":
        raise ConfigurationError(
            "SQLite has no roles: who may write the file may write the tables. Leave --grants out."
        )
    if only_grants and grants_role is None:
        raise ConfigurationError("--only-grants needs the role that gets them: --grants ROLE")
    out = io.StringIO()
    context = MigrationContext.configure(
        dialect_name=dialect_name,
        opts={"as_sql": True, "output_buffer": out, "dialect_opts": {"paramstyle": "named"}},
    )
    # If DDL is transactional, the script is all or nothing, as the upgrade is.
    transactional = dialect_name in ("postgresql", "sqlite")
    what = "rights on the tables" if only_grants else "tables"
    print(f"-- the {what} of exactly_once, version {name_of(HEAD)}, for {dialect_name}", file=out)
    print("BEGIN;\n" if transactional else "", file=out)
    if not only_grants:
        write(Operations(context), schema, up_to=HEAD)
    if grants_role is not None:
        print(
            f"-- what a worker may do: nothing that changes or drops a table, and in {VERSION_TABLE} only look",
            file=out,
        )
        for statement in _grants(context.dialect, dialect_name, schema, grants_role):
            print(f"{statement};\n", file=out)
    print("COMMIT;" if transactional else "", end="\n" if transactional else "", file=out)
    return out.getvalue()


def _grants(dialect: Any, dialect_name: str, schema: str | None, role: str) -> list[str]:
    quote = dialect.identifier_preparer.quote
    prefix = f"{quote(schema)}." if schema else ""
    if dialect_name == "postgresql":
        who = quote(role)
        statements = [f"GRANT USAGE ON SCHEMA {quote(schema)} TO {who}"] if schema else []
    else:
        # 'name'@'host' is an account. A bare name is a role, or the account from every host.
        user, at, host = role.partition("@")
        who = "@".join(_text(part.strip("'`")) for part in ((user, host) if at else (user,)))
        statements = []
    for table in sorted(TABLES - {VERSION_TABLE}):
        rights = "SELECT, INSERT" if table in ONLY_ADDED else "SELECT, INSERT, UPDATE, DELETE"
        statements.append(f"GRANT {rights} ON {prefix}{table} TO {who}")
    statements.append(f"GRANT SELECT ON {prefix}{VERSION_TABLE} TO {who}")
    if dialect_name == "postgresql":
        sequences = ", ".join(f"{prefix}{table}_id_seq" for table in COUNTED)
        statements.append(f"GRANT USAGE ON SEQUENCE {sequences} TO {who}")
    return statements


def _text(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "''") + "'"


def history_file(
    directory: Path | None, *, config: Path, schema: str | None, down_revision: str | None, version: int
) -> Path:
    """Write one migration into a program's own Alembic history and return its path."""
    from alembic.util import rev_id

    scripts = _history(directory, config)
    heads = scripts.get_heads()
    if down_revision is None and len(heads) > 1:
        raise ConfigurationError(
            f"Your history in {scripts.dir} has {len(heads)} heads: {', '.join(sorted(heads))}. Nothing was written. "
            "Type: alembic merge heads, or say which with --down-revision"
        )
    known = {
        getattr(revision.module, "exactly_once_version", 0): revision.path for revision in scripts.walk_revisions()
    }
    since = max(known, default=0)
    if since >= version:
        raise ConfigurationError(
            f"Your history brings the tables of exactly_once to version {name_of(since)} already, in {known[since]}. "
            "Nothing was written."
        )
    revises = down_revision if down_revision is not None else next(iter(heads), None)
    if revises is not None and scripts.get_revision(revises) is None:
        raise ConfigurationError(f"Your history in {scripts.dir} has no revision {revises}. Nothing was written.")
    revision = rev_id()
    folder = Path(scripts.version_locations[0] if scripts.version_locations else scripts.versions)
    path = folder / f"{revision}_exactly_once_{name_of(version)}.py"
    path.write_text(
        FILE.format(
            version=version,
            since=since,
            revision=revision,
            revises=revises or "",
            down_revision=revises,
            schema=f", schema={schema!r}" if schema else "",
            what=f" The files before it brought version {since}." if since else "",
        )
    )
    return path


def shows_our_tables(path: Path) -> Path | None:
    """Return the env.py of a history file if it hides no tables from Alembic's comparison; else None.

    It may do so in a module that it imports, which we do not see here.
    """
    for folder in path.absolute().parents:
        env = folder / "env.py"
        if env.is_file():
            written = env.read_text(encoding="utf-8", errors="replace")
            if "include_name" in written or "include_object" in written:
                return None
            return Path(os.path.relpath(env)) if env.is_relative_to(Path.cwd()) else env
    return None


def histories_that_show_our_tables(config: Path = Path("alembic.ini")) -> list[Path]:
    """Return each env.py in this folder's histories that hides no tables. Of one that cannot be read, nothing is known."""
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    folders = [Path(), *_folders_of_histories()] if _is_history(Path()) else _folders_of_histories()
    if config.is_file():
        with suppress(Exception):  # whatever its parser raises: nothing here depends on it
            folders = [Path(ScriptDirectory.from_config(Config(config)).dir)]
    found: list[Path] = []
    for folder in folders:
        with suppress(OSError):  # we may not read it
            if (folder / "env.py").is_file() and (env := shows_our_tables(folder / "versions")) is not None:
                found.append(env)
    return found


def _folders_of_histories() -> list[Path]:
    found = sorted({*Path().glob("*/env.py"), *Path().glob("*/*/env.py")})
    return [each.parent for each in found if _is_history(each.parent)]


def _is_history(folder: Path) -> bool:
    return (folder / "env.py").is_file() and ((folder / "versions").is_dir() or (folder / "script.py.mako").is_file())


def _no_env(directory: Path) -> str:
    if known := _folders_of_histories():
        meant = f"Did you mean {' or '.join(f'--directory {each}' for each in known[:3])}?"
    else:
        meant = "Type: alembic init migrations; or without a history of your own: exactly-once db upgrade"
    return f"There is no env.py in {directory}, so Alembic would not see what is written there. Nothing was written. {meant}"


def _history(directory: Path | None, config: Path) -> Any:
    from alembic.config import Config
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    if directory is None and not config.is_file():
        raise ConfigurationError(
            f"There is no {config} here, so your Alembic history was not found. Type the command where {config} is, or "
            "say --directory, the folder that has env.py and versions/"
        )
    if directory is not None and directory.name == "versions" and (directory.parent / "env.py").is_file():
        directory = directory.parent
    try:
        if directory is not None and not (directory / "env.py").is_file():
            raise ConfigurationError(_no_env(directory))
        scripts = ScriptDirectory.from_config(Config(config)) if directory is None else ScriptDirectory(str(directory))
        if not (Path(scripts.dir) / "env.py").is_file():
            raise ConfigurationError(_no_env(Path(scripts.dir)))
        Path(scripts.versions).mkdir(exist_ok=True)
        scripts.get_heads()
    except (CommandError, OSError) as error:
        raise ConfigurationError(
            f"Your Alembic history cannot be read: {stopped(str(error))} Nothing was written."
        ) from error
    return scripts
