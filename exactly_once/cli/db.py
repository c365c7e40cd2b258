"""`exactly-once db`: makes or upgrades the tables, checks them, or writes down what would make them.

It decides nothing about the schema: `exactly_once.alembic` does the work. Errors are one paragraph on standard error.
Exit codes: 0 done, 1 the work failed (`check`: the tables are not ready), 2 wrong usage.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Annotated, Final

import typer
from sqlalchemy import URL, Connection
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from exactly_once import alembic
from exactly_once.alembic.emptied import emptied_of_head
from exactly_once.alembic.lock import with_connection
from exactly_once.alembic.offline import histories_that_show_our_tables, shows_our_tables
from exactly_once.alembic.version_table import VERSION_TABLE
from exactly_once.configuration.config import Config, load
from exactly_once.database.driver_choice import check_driver
from exactly_once.database.errors.not_made import no_file, of_the_settings
from exactly_once.database.errors.unusable import denied, is_denied, is_read_only, no_schemas, read_only, unusable
from exactly_once.database.probe import try_to_write
from exactly_once.database.schema import tables
from exactly_once.database.url import database_url
from exactly_once.errors import ConfigurationError, ExactlyOnceError, SchemaError, StoreUnavailable
from exactly_once.wording.redaction import redacted
from exactly_once.wording.text import stopped

__all__ = ["app"]

app = typer.Typer(
    name="db",
    help="The tables of exactly_once: make them, check them, write down what makes them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_TYPED: Final = "--database"

DatabaseOption = Annotated[
    str | None,
    typer.Option("--database", "-d", metavar="URL", help="Else EXACTLY_ONCE_DATABASE, or as the settings say."),
]
SchemaOption = Annotated[
    str | None,
    typer.Option(
        "--schema", "-s", metavar="NAME", envvar="EXACTLY_ONCE_SCHEMA", help="The named schema of our tables."
    ),
]


@app.command()
def upgrade(database: DatabaseOption = None, schema: SchemaOption = None) -> None:
    """Make the tables, or upgrade them to this version. Safe to run several times at once."""
    with _beside_a_history(), _one_paragraph():
        urls, source, schema = _told(database, schema)
        for url in urls:
            with _at(url, source, schema, changing=True):
                before, put_back = with_connection(url, partial(_before, schema=schema))
                alembic.upgrade(url, schema=schema)
                now, trouble = with_connection(url, partial(_after, schema=schema, source=source))
            if trouble:
                raise SchemaError(trouble)
            if before == now:
                said = f"at version {now} already; nothing to do"
            elif put_back:
                said = f"version {now}; the row of {VERSION_TABLE} is put back"
            elif before:
                said = f"version {now}, was {before}"
            else:
                said = f"version {now}; the tables are made"
            typer.echo(f"{_shown(url)}: {said}{_in_a_schema(schema)}")


@app.command()
def check(database: DatabaseOption = None, schema: SchemaOption = None) -> None:
    """Say whether the tables are ready for this version; exit with 1 if not."""
    with _beside_a_history(), _one_paragraph():
        urls, source, schema = _told(database, schema)
        troubles: list[str] = []
        for url in urls:
            try:
                with _at(url, source, schema):
                    command = "exactly-once db upgrade" + (
                        f" --database {quote(_shown(url))}" if source == _TYPED else ""
                    )
                    if (lacking := no_file(url, command)) is not None:
                        raise lacking
                    troubles += filter(None, [with_connection(url, partial(_checked, schema=schema, source=source))])
            except ExactlyOnceError as error:
                troubles.append(str(error))
        if troubles:
            raise SchemaError("\n".join(troubles))
        for url in urls:
            typer.echo(f"{_shown(url)}: ready.")


@app.command()
def sql(
    database: DatabaseOption = None,
    schema: SchemaOption = None,
    dialect: Annotated[
        str | None,
        typer.Option("--dialect", metavar="NAME", help="postgresql, mysql, mariadb or sqlite. Else the URL's."),
    ] = None,
    grants: Annotated[
        str | None,
        typer.Option("--grants", metavar="ROLE", help="Add the least rights this role of the workers needs."),
    ] = None,
    only_grants: Annotated[
        bool, typer.Option("--only-grants", help="Only these rights: the tables are there already.")
    ] = False,
) -> None:
    """Print the SQL that makes the tables, for another person to run. Opens no database."""
    with _one_paragraph(wrong_usage=(ConfigurationError,)):
        if dialect is None:
            urls, _, schema = _told(database, schema)
            dialects = {url.get_backend_name() for url in urls}
            if len(dialects) > 1:
                raise ConfigurationError(
                    f"The databases are of several kinds. Say --dialect, one of: {', '.join(dialects)}"
                )
            (dialect,) = dialects
        else:
            schema = schema or load().schema.value
        typer.echo(alembic.sql(dialect, schema=schema, grants_role=grants, only_grants=only_grants), nl=False)


@app.command()
def revision(
    schema: SchemaOption = None,
    directory: Annotated[
        Path | None, typer.Option("--directory", metavar="DIR", help="The folder with your env.py and versions/.")
    ] = None,
    config: Annotated[
        Path, typer.Option("--config", "-c", metavar="FILE", help="Your alembic.ini, where --directory is not given.")
    ] = Path("alembic.ini"),
    down_revision: Annotated[
        str | None, typer.Option("--down-revision", metavar="ID", help="The revision it follows. Else your one head.")
    ] = None,
) -> None:
    """Write one file into your own Alembic history that makes the tables: one history, one head."""
    with _one_paragraph():
        path = alembic.revision(directory, config=config, schema=schema, down_revision=down_revision)
        typer.echo(f"{path} is written. Type: alembic upgrade head")
        if (env := shows_our_tables(path)) is not None:
            _would_drop(env)


def _would_drop(env: Path) -> None:
    typer.echo(
        f"{env} does not name include_name: the next `alembic revision --autogenerate` would propose to drop our tables."
        " Write there: context.configure(..., include_name=exactly_once.alembic.include_name)",
        err=True,
    )


@contextmanager
def _beside_a_history() -> Iterator[None]:
    """At the end, warn of an Alembic history in this folder that would drop the tables, whatever the result of the work."""
    try:
        yield
    finally:
        for env in histories_that_show_our_tables():
            _would_drop(env)


def _before(connection: Connection, schema: str | None) -> tuple[str | None, bool]:
    """The version before an upgrade, and whether its row was deleted."""
    return alembic.current(connection, schema=schema), emptied_of_head(connection, schema)


def _after(connection: Connection, schema: str | None, source: str) -> tuple[str | None, str | None]:
    """The version after an upgrade, and what is wrong with it: it may be newer than this program knows."""
    _of(connection, source)
    return alembic.current(connection, schema=schema), alembic.check(connection, schema)


def _in_a_schema(schema: str | None) -> str:
    """Say in which schema the tables are: a program without that setting finds no tables, or makes others."""
    if schema is None:
        return "."
    told = (
        "" if load().schema.value == schema else f" Programs must be told: export EXACTLY_ONCE_SCHEMA={quote(schema)}"
    )
    return f" in the schema {schema}.{told}"


def _of(connection: Connection, source: str) -> None:
    if source != _TYPED:
        of_the_settings(connection.engine)


def _checked(connection: Connection, schema: str | None, source: str) -> str | None:
    _of(connection, source)
    if (trouble := alembic.check(connection, schema)) is not None:
        return trouble
    try:
        try_to_write(connection, tables(schema).idempotent)
    except DBAPIError as error:
        connection.rollback()
        if is_denied(error) or is_read_only(error):
            raise
        # Any other error says nothing about the tables: a worker may hold the lock of the file just now.
    return None


def _told(database: str | None, schema: str | None) -> tuple[list[URL], str, str | None]:
    """Return the databases, where they were named, and the schema: from the command line, else from the settings."""
    try:
        settings = load()
        urls = [_kept(database_url(url)) for url in ([database] if database else _urls(settings))]
        schema = schema or settings.schema.value
        if schema and any(url.get_backend_name() == "sqlite" for url in urls):
            raise no_schemas(schema)
    except ConfigurationError as error:
        raise typer.BadParameter(str(error)) from error
    return urls, _TYPED if database else settings.database.source, schema


def _kept(url: URL) -> URL:
    check_driver(url)
    if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
        raise ConfigurationError(
            "A SQLite database in memory is gone with this command. Give it a file: sqlite:///orders.db"
        )
    return url


def _urls(settings: Config) -> list[str]:
    value = settings.database.value
    if isinstance(value, dict):
        return [str(url) for url in value.values()]
    if value is None:
        raise ConfigurationError(
            "No database is given. Type: export EXACTLY_ONCE_DATABASE=postgresql+psycopg://user:password@host/name, or say"
            f" --database URL ({settings.looked})."
        )
    return [str(value)]


def _shown(url: URL) -> str:
    return redacted(url)


@contextmanager
def _one_paragraph(*, wrong_usage: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    try:
        yield
    except typer.BadParameter as error:
        typer.echo(error.message, err=True)
        raise typer.Exit(2) from error
    except (ExactlyOnceError, SQLAlchemyError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2 if isinstance(error, wrong_usage) else 1) from error


@contextmanager
def _at(url: URL, source: str, schema: str | None, *, changing: bool = False) -> Iterator[None]:
    """Add to a database error which database it was, and where that was named."""
    try:
        yield
    except DBAPIError as error:
        if is_denied(error):
            raise StoreUnavailable(denied(error, url, schema=schema, changing=changing)) from error
        if is_read_only(error):
            raise StoreUnavailable(f"{read_only(url)} ({source})") from error
        raise StoreUnavailable(_refused(url, source, unusable(error, url))) from error
    except OSError as error:  # some async drivers raise this if no server listens
        raise StoreUnavailable(_refused(url, source, error.strerror or str(error) or type(error).__name__)) from error


def _refused(url: URL, source: str, said: str) -> str:
    return (
        f"{_shown(url)} refused, or does not answer: {stopped(said)} Mend that, or the URL ({source}); then type the command"
        " again."
    )
