"""Finds the application of a command: `shop.consumers:eo`, a module and the name of its `ExactlyOnce` object."""

import os
import sys
from importlib import import_module
from pathlib import Path, PurePath
from shlex import quote
from typing import Annotated

import typer

from exactly_once.alembic import ready
from exactly_once.app import ExactlyOnce
from exactly_once.database.store import Store
from exactly_once.errors import ConfigurationError, ExactlyOnceError, StoreUnavailable
from exactly_once.exceptions.words import place_of
from exactly_once.wording.text import escaped, stopped

__all__ = ["AppOption", "TransportOption", "application", "one_store", "repeated", "usable"]

AppOption = Annotated[
    str, typer.Option("--app", "-a", metavar="MODULE:NAME", help="The application: shop.consumers:eo")
]
TransportOption = Annotated[
    str | None,
    typer.Option("--transport", "-t", metavar="URL", help="Else EXACTLY_ONCE_TRANSPORT, or as the settings say."),
]


def application(reference: str) -> ExactlyOnce:
    """Import a module and return the `ExactlyOnce` object that the reference names.

    Raises:
        ConfigurationError: There is no such module or object; the text says which is missing, and what there is.
    """
    module_name, colon, attribute = reference.partition(":")
    if meant := _module_meant(module_name):
        kind = "file" if module_name.endswith(".py") else "path"
        named = "" if attribute else " and the name of its ExactlyOnce object, such as"
        told = f"{escaped(meant)}:{escaped(attribute or 'eo')}"
        raise ConfigurationError(f"{escaped(module_name)} is a {kind}; type its module{named or ':'} {told}")
    if not colon or not module_name or not attribute:
        raise ConfigurationError(f"{escaped(reference)!r} names no application. It looks like shop.consumers:eo")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does, so that the command works in the program's folder
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ConfigurationError(
                f"There is no module {error.name!r} here ({here}) or among what is installed. Type the command in the"
                " folder that holds it, or install it."
            ) from error
        raise ConfigurationError(f"Importing {module_name} failed: {error}{_where(error)}.") from error
    except ExactlyOnceError:
        raise
    except Exception as error:  # the user's module: whatever it raises, we cannot start
        raise ConfigurationError(
            f"Importing {module_name} failed: {type(error).__name__}: {escaped(str(error), 300)}{_where(error)}."
        ) from error
    found = module
    attribute = attribute.removesuffix("()")  # it names the same function, and gets the same answer
    for name in attribute.split("."):
        found = getattr(found, name, None)  # type: ignore[assignment]
    if isinstance(found, ExactlyOnce):
        return found
    raise ConfigurationError(_not_there(module_name, module, attribute, found))


def _module_meant(name: str) -> str | None:
    """Return the module if a file was typed instead; None for a text that may be a module's name."""
    if not name.endswith(".py") and "/" not in name and os.sep not in name:
        return None
    path = PurePath(name)
    if path.is_absolute() and Path(path).is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    if path.is_absolute() or ".." in path.parts:
        path = PurePath(path.name)  # relative to the folder of the file
    inner = path.with_suffix("") if path.suffix == ".py" else path
    return ".".join(inner.parent.parts if inner.name == "__init__" else inner.parts)


def _not_there(module_name: str, module: object, attribute: str, found: object) -> str:
    there = sorted(name for name, value in vars(module).items() if isinstance(value, ExactlyOnce))
    have = f"It has: {', '.join(f'{module_name}:{name}' for name in there)}." if there else "It has no such object."
    if found is None:
        return f"{module_name} has no ExactlyOnce object named {attribute!r}. {have}"
    kind = (
        "class"
        if isinstance(found, type)
        else "function"
        if callable(found)
        else f"value of type {type(found).__name__}"
    )
    is_what = f"is a {kind}, and no ExactlyOnce object"
    if callable(found) and not there:
        return (
            f"{module_name}:{attribute} {is_what}. A command imports, and calls nothing: write at the end of {module_name}"
            f" `eo = {attribute}()`, or what of that is the ExactlyOnce, and type {module_name}:eo"
        )
    return f"{module_name}:{attribute} {is_what}. {have}"


def _where(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return ""  # its text says where
    if mine := place_of(error):
        return mine
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return "" if last is None else f" ({last.tb_frame.f_code.co_filename}, line {last.tb_lineno})"


def repeated(app: str | None = None, group: str | None = None, database: str | None = None) -> str:
    """Return these options as they were typed, for a command to type next.

    Example:
        >>> repeated("shop.consumers:eo")
        ' --app shop.consumers:eo'
    """
    given = {"--app": app, "--group": group, "--database": database}
    return "".join(f" {name} {quote(value)}" for name, value in given.items() if value)


def one_store(eo: ExactlyOnce, database: str | None) -> Store:
    """Return the application's database, or the named one of several, after a check that it can be used.

    Raises:
        StoreUnavailable: It does not answer.
        ConfigurationError: There is no such database, or it cannot be used, or there are several and none is named.
    """
    stores = eo.stores
    if database is not None and database not in stores:
        raise ConfigurationError(f"There is no database named {database!r}; there are: {', '.join(stores)}.")
    if database is None and len(stores) > 1:
        # Ids repeat in each database, and a database that we did not look at would seem to have no dead letters.
        raise ConfigurationError(
            f"There are several databases, each with failures of its own: {', '.join(stores)}. Say which:"
            f" --database {next(iter(stores))}"
        )
    store = stores[database] if database is not None else next(iter(stores.values()))
    usable(store)
    return store


def usable(store: Store) -> None:
    """Check that a database can be used, before anything is begun in it.

    Raises:
        StoreUnavailable: It does not answer.
        ConfigurationError: Our tables are missing, or it refuses us; the text has the command that repairs it.
    """
    if (problem := ready.problem(store)) is not None:
        raise StoreUnavailable(f"{stopped(problem)} Start it, or mend EXACTLY_ONCE_DATABASE.")
