"""The TOML file with the settings: the one that is named, else the nearest pyproject.toml from the current folder upwards.

A file that was found and not named is believed only where it belongs to who runs the program, or to root: it says which database
is used and which modules are imported, and into a folder such as /tmp anybody may write one. So does git. Called by `config`.
"""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from exactly_once.errors import ConfigurationError
from exactly_once.wording import escaped

__all__ = ["CONFIG_VARIABLE", "settings_table", "told"]

CONFIG_VARIABLE: Final = "EXACTLY_ONCE_CONFIG"
_ROOT: Final = 0


def settings_table(named: str | Path | None, directory: Path) -> tuple[dict[str, Any], Path]:
    """Return the settings in the file, and the file.

    Args:
        named: The file, by whom runs the program; None to look for one.
        directory: Where to look, and in the folders above.

    Raises:
        ConfigurationError: It cannot be read, or it was found and is another user's.
    """
    if named is not None:
        path = Path(named)
        content, _ = _toml(path)
        inner = _section(content, path)
        if inner is None and path.name != "pyproject.toml":
            inner = content
        return dict(inner or {}), path
    for folder in (directory.absolute(), *directory.absolute().parents):
        path = folder / "pyproject.toml"
        if path.is_file():
            content, owner = _toml(path)
            section = _section(content, path)
            if section is not None and not _is_trusted(owner):
                raise ConfigurationError(
                    f"The settings file {path} belongs to another user (uid {owner}; this program runs as uid {os.geteuid()}), so"
                    " nothing in it is used: it would say which database is used and which modules are imported here. If you"
                    f" trust it, name it: {CONFIG_VARIABLE}={path}"
                )
            return dict(section or {}), path
    return {}, directory / "pyproject.toml"


def _is_trusted(owner: int) -> bool:
    if not hasattr(os, "geteuid"):  # Windows knows no such number
        return True
    me = os.geteuid()
    # behind sudo the files are those of whoever typed it
    return owner in (me, _ROOT) or (me == _ROOT and os.environ.get("SUDO_UID") == str(owner))


def _section(content: Mapping[str, Any], path: Path) -> Mapping[str, Any] | None:
    tool = content.get("tool", {})
    section = tool.get("exactly_once", tool.get("exactly-once")) if isinstance(tool, Mapping) else None
    if section is not None and not isinstance(section, Mapping):
        raise ConfigurationError(f"{path}: [tool.exactly_once] must be a table")
    return section


def _toml(path: Path) -> tuple[dict[str, Any], int]:
    """Return what is in it, and whose it is: asked of the open file, which nobody can change for another one."""
    try:
        with path.open("rb") as file:
            return tomllib.load(file), os.fstat(file.fileno()).st_uid
    except (OSError, ValueError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise ConfigurationError(f"the settings file {path} cannot be read: {told(error)}") from error


def told(error: Exception) -> str:
    """Say why a file cannot be read."""
    return (error.strerror or type(error).__name__) if isinstance(error, OSError) else escaped(str(error), 200)
