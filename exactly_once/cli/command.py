"""The command `exactly-once`: imports the chosen subcommand alone, and turns errors into a paragraph and an exit code.

Exit codes: 0 done, 1 the work failed, 2 wrong usage or settings, 143 ended by a second signal. Help must be quick, so
it imports nothing that a subcommand needs. Each subcommand is a module of this package, with `command` or, for several, `app`.
"""

import os
import re
import shlex
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any, Final

import typer

__all__ = ["main"]

VERBS: Final = {
    "run": "Run a worker until SIGTERM: receive, handle, acknowledge.",
    "process": "Feed recorded messages from a file through the handlers.",
    "send": "Send one message, or those of a file.",
    "handlers": "Show the handlers and where each setting comes from; rename one.",
    "db": "Make the tables, check them, write down what makes them.",
    "failures": "List, show, requeue and discard messages that failed.",
    "steps": "Show the recorded steps of a message; resolve one for which a person knows what happened.",
    "doctor": "Look at database, broker and handlers, and say what to do.",
}
_APPLICATION: Final = re.compile(r"[^\W\d]\w*(\.\w+)*:[^\W\d]\w*(\.\w+)*")
TRACEBACK: Final = "EXACTLY_ONCE_TRACEBACK"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    traceback = os.environ.get(TRACEBACK, "") not in ("", "0") or "--traceback" in given
    given = [argument for argument in given if argument != "--traceback"]
    if (line := _other_form(given)) is not None:
        form = "bare, without --app" if given[0] == "run" else "behind --app"
        typer.echo(f"`{given[0]}` takes the application {form}. Type: exactly-once {shlex.join(line)}", err=True)
        raise SystemExit(2)
    try:
        _application(next((argument for argument in given if not argument.startswith("-")), None))(given)
    except Exception as error:
        if traceback:
            raise
        text, code = _clash(error) or _told(error)
        typer.echo(text, err=True)
        raise SystemExit(code) from None


def _application(verb: str | None) -> Any:
    app = typer.Typer(
        name="exactly-once",
        help="Exactly-once effects for SQLAlchemy message handlers.",
        epilog="Settings come from EXACTLY_ONCE_... in the environment, then [tool.exactly_once] in pyproject.toml. "
        "--traceback, anywhere, shows where an error comes from.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # square brackets in our texts are names of settings
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def everything(
        version: Annotated[
            bool, typer.Option("--version", is_eager=True, callback=_say_version, help="Say which version this is.")
        ] = False,
    ) -> None:
        """Exactly-once effects for SQLAlchemy message handlers."""

    for name, about in VERBS.items():
        if name != verb:
            app.command(name, help=about)(_not_now)
            continue
        module = import_module(f"{__package__}.{name}")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=name, help=about)
        else:
            app.command(name, help=module.command.__doc__)(module.command)
    return app


def _other_form(given: Sequence[str]) -> Sequence[str] | None:
    """Return the line that was meant if the application was typed in another subcommand's form; None for any other line.

    `run` takes it bare, the others after --app. Only lines that would be refused: no key and no handler's name
    is mistaken for it.
    """
    verb, *rest = given or [""]
    if verb == "run":
        for n, argument in enumerate(rest):
            if argument.startswith("--app=") or (argument in ("--app", "-a") and n + 1 < len(rest)):
                value = argument.partition("=")[2] if "=" in argument else rest[n + 1]
                return [verb, *rest[:n], value, *rest[n + (1 if "=" in argument else 2) :]]
        return None
    if verb not in ("handlers", "doctor", "process", "failures") or any(
        argument in ("--app", "-a") or argument.startswith("--app=") for argument in rest
    ):
        return None
    for n, argument in enumerate(rest):
        value_of_an_option = n > 0 and rest[n - 1].startswith("-") and rest[n - 1] != "-"
        if _APPLICATION.fullmatch(argument) and not value_of_an_option and (verb != "handlers" or n == 0):
            return [verb, *rest[:n], "--app", *rest[n:]]
    return None


def _say_version(asked: bool) -> None:
    if asked:
        from exactly_once.wording.installation import version

        typer.echo(f"exactly_once {version()}")
        raise typer.Exit


def _not_now() -> None:
    raise AssertionError("a verb that was not asked for")


def _clash(error: Exception) -> tuple[str, int] | None:
    """For an error about a missing name or module: say whether another project's files have overwritten ours."""
    from exactly_once.wording.installation import clash

    told = clash() if isinstance(error, ImportError) else None
    return None if told is None else (f"{error}. {told}", 2)


def _told(error: Exception) -> tuple[str, int]:
    """Return the paragraph for a person, and the exit code."""
    from sqlalchemy.exc import DBAPIError, SQLAlchemyError

    from exactly_once.errors import ConfigurationError, ExactlyOnceError
    from exactly_once.exceptions.words import place_of, words_of

    if isinstance(error, ConfigurationError):
        return str(error), 2
    if isinstance(error, ExactlyOnceError):
        return str(error), 1
    if isinstance(error, DBAPIError):
        # The driver's own words only: SQLAlchemy's text repeats the statement and its values.
        return f"The database refused: {words_of(error)}", 1
    if isinstance(error, (SQLAlchemyError, OSError)):
        return f"{type(error).__name__}: {words_of(error)}", 1
    # An error may have no text, such as that of a bare `assert`.
    said = f"{type(error).__name__}: {words}" if (words := words_of(error)) else type(error).__name__
    return f"{said}{place_of(error)}. Type the command again with --traceback to see where.", 1
