"""The TOML file with the settings: the named file, else the nearest pyproject.toml from the current folder upwards.

A file that was found, not named, is trusted only if it belongs to the user who runs the program, or to root. So must the folder
in which it was found, and a link that leads to it. The reason: the file decides which database is used and which modules are
imported. In a folder such as /tmp anybody may create one, or a link to another file of ours; and the owner of a folder may move a
file of ours there. Git has the same rule. Called by `config`.
"""

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from stat import S_ISLNK
from typing import Any, Final

from exactly_once.errors import ConfigurationError
from exactly_once.wording.text import escaped

__all__ = ["CONFIG_VARIABLE", "settings_table", "told"]

CONFIG_VARIABLE: Final = "EXACTLY_ONCE_CONFIG"
_ROOT: Final = 0
_VARIABLE: Final = re.compile(r"(export\s+)?[A-Z_][A-Z0-9_]*=")


def settings_table(named: str | Path | None, directory: Path) -> tuple[dict[str, Any], Path]:
    """Return the settings in the file, and the file.

    Args:
        named: The file that the user named; None to look for one.
        directory: Where to look, also in the folders above.

    Raises:
        ConfigurationError: It cannot be read, or it was found and belongs to another user.
    """
    if named is not None:
        path = Path(named)
        _refuse_variables(path)
        content, _ = _toml(path)
        inner = _section(content, path)
        if inner is None and path.name != "pyproject.toml":
            inner = content
        return dict(inner or {}), path
    for folder in (directory.absolute(), *directory.absolute().parents):
        path = folder / "pyproject.toml"
        if path.is_file():
            try:
                content, opened = _toml(path)
                section = _section(content, path)
            except ConfigurationError as error:
                if (theirs := _another_users(path, None)) is None:
                    raise
                raise ConfigurationError(
                    f"{error}. {theirs}: have them mend it, or name a settings file of your own: {CONFIG_VARIABLE}=FILE"
                ) from error
            if section is not None and (theirs := _another_users(path, opened)) is not None:
                raise ConfigurationError(
                    f"{theirs}, so nothing in it is used: it would say which database is used and which modules are imported"
                    f" here. If you trust it, name it: {CONFIG_VARIABLE}={path}"
                )
            return dict(section or {}), path
    return {}, directory / "pyproject.toml"


def _another_users(path: Path, opened: os.stat_result | None) -> str | None:
    """Say what belongs to another user: the file, a link that leads to it, or its folder; else None.

    Args:
        path: Where it was found.
        opened: The status of the open file: its name may belong to a different file by now.
    """
    try:
        named = path.lstat()
        asked = (
            (f"The settings file {path}", opened or path.stat()),
            (f"The link to the settings file, {path},", named),
            (f"The folder of the settings file {path}", path.parent.stat()),
        )
    except OSError as error:
        raise ConfigurationError(f"the settings file {path} cannot be read: {told(error)}") from error
    for what, found in asked:
        if not _is_trusted(found.st_uid):
            return f"{what} belongs to another user (uid {found.st_uid}; this program runs as uid {os.geteuid()})"
    if opened is not None and not S_ISLNK(named.st_mode) and not os.path.samestat(opened, named):
        return f"The settings file {path} was replaced while it was read"
    return None


def _is_trusted(owner: int) -> bool:
    if not hasattr(os, "geteuid"):  # Windows has no such number
        return True
    me = os.geteuid()
    # Under sudo the files belong to the user who typed it.
    return owner in (me, _ROOT) or (me == _ROOT and os.environ.get("SUDO_UID") == str(owner))


def _section(content: Mapping[str, Any], path: Path) -> Mapping[str, Any] | None:
    tool = content.get("tool", {})
    section = tool.get("exactly_once", tool.get("exactly-once")) if isinstance(tool, Mapping) else None
    if section is not None and not isinstance(section, Mapping):
        raise ConfigurationError(f"{path}: [tool.exactly_once] must be a table")
    return section


def _refuse_variables(path: Path) -> None:
    """Refuse a file such as `.env`: it may even be valid TOML, if its values are in quotes.

    Raises:
        ConfigurationError: Each of its lines is NAME=value.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return  # reading it as TOML reports that
    said = [line for each in lines if (line := each.strip()) and not line.startswith("#")]
    if said and all(map(_VARIABLE.match, said)):
        raise ConfigurationError(
            f"the settings file {path} has lines NAME=value, which belong into the environment: set -a; . {quote(str(path))}; set"
            f' +a. What {CONFIG_VARIABLE} names is read as TOML, with lines such as group = "inventory"'
        )


def _toml(path: Path) -> tuple[dict[str, Any], os.stat_result]:
    """Return the file's contents, and the status of the open file: its owner cannot be exchanged by replacing the file."""
    try:
        with path.open("rb") as file:
            return tomllib.load(file), os.fstat(file.fileno())
    except (OSError, ValueError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise ConfigurationError(f"the settings file {path} cannot be read: {told(error)}") from error


def told(error: Exception) -> str:
    """Say why a file cannot be read."""
    return (error.strerror or type(error).__name__) if isinstance(error, OSError) else escaped(str(error), 200)
