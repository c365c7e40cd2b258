"""`exactly-once db`: make or mend the tables, check them, or write down for others what would make them.

It decides nothing about the schema: `exactly_once.alembic` does the work. Errors are one paragraph on standard error.
Exit codes: 0 done, 1 the work failed (`check`: the tables are not ready), 2 wrong usage.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from sqlalchemy import URL
from sqlalchemy.exc import DBAPIError, NoSuchModuleError, SQLAlchemyError

from exactly_once import alembic
from exactly_once.alembic.lock import with_connection
from exactly_once.config import Config, load
from exactly_once.database_url import database_url
from exactly_once.errors import ConfigurationError, SchemaError
from exactly_once.installation import to_install
from exactly_once.redaction import redacted, struck

__all__ = ["app"]

app = typer.Typer(
    name="db",
    help="The tables of exactly_once: make them, check them, write down what makes them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

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
    """Make the tables, or bring them to this version. Several at once are safe."""
    with _one_paragraph():
        urls, schema = _told(database, schema)
        for url in urls:
            before = alembic.current(url, schema=schema)
            alembic.upgrade(url, schema=schema)
            now = alembic.current(url, schema=schema)
            if before == now:
                typer.echo(f"{_shown(url)}: at version {now} already; nothing to do.")
            else:
                typer.echo(
                    f"{_shown(url)}: version {now}" + (f", was {before}." if before else "; the tables are made.")
                )


@app.command()
def check(database: DatabaseOption = None, schema: SchemaOption = None) -> None:
    """Say whether the tables are ready for this version; exit with 1 if not."""
    with _one_paragraph():
        urls, schema = _told(database, schema)
        troubles = [with_connection(url, partial(alembic.check, schema=schema)) for url in urls]
        if any(troubles):
            raise SchemaError("\n".join(trouble for trouble in troubles if trouble))
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
) -> None:
    """Print the SQL that makes the tables, for somebody else to run. No database is opened."""
    with _one_paragraph(wrong_usage=(ConfigurationError,)):
        if dialect is None:
            urls, schema = _told(database, schema)
            dialects = {url.get_backend_name() for url in urls}
            if len(dialects) > 1:
                raise ConfigurationError(
                    f"The databases are of several kinds. Say --dialect, one of: {', '.join(dialects)}"
                )
            (dialect,) = dialects
        else:
            schema = schema or load().schema.value
        typer.echo(alembic.sql(dialect, schema=schema, grants_role=grants), nl=False)


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


def _told(database: str | None, schema: str | None) -> tuple[list[URL], str | None]:
    """The databases and the schema: what the command line says, else the settings."""
    try:
        settings = load()
        urls = [_kept(database_url(url)) for url in ([database] if database else _urls(settings))]
    except ConfigurationError as error:
        raise typer.BadParameter(str(error)) from error
    return urls, schema or settings.schema.value


def _kept(url: URL) -> URL:
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
            "No database is given. Set EXACTLY_ONCE_DATABASE, for example to postgresql+psycopg://user@host/database, "
            "or say --database URL."
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
    # OSError: what some async drivers raise where no server listens
    except (ConfigurationError, SQLAlchemyError, ModuleNotFoundError, OSError) as error:
        typer.echo(_sentence(error), err=True)
        raise typer.Exit(2 if isinstance(error, wrong_usage) else 1) from error


def _sentence(error: Exception) -> str:
    match error:
        case DBAPIError():
            first = struck(str(error.orig).strip()).splitlines()[0] if error.orig else type(error).__name__
            return f"The database refused, or does not answer: {first}. Mend that, then type the command again."
        case NoSuchModuleError():
            return (
                "There is no such database driver. It looks like postgresql+psycopg://user:password@host:5432/database"
            )
        case ModuleNotFoundError():
            return (
                f"The URL asks for the driver {error.name}, which is not installed. Name another in it, as in "
                f"mysql+pymysql://, or type: {to_install('mysql,sqlite')}"
            )
        case OSError():
            return f"The database does not answer: {error.strerror or error}. Mend that, then type the command again."
        case _:
            return str(error)
