"""How this package was installed, and whether another distribution's files have overwritten its own.

Two distributions of the Python index contain a package of this name: this one, and `exactly-once`, which is another project. pip
does not detect that conflict: the one that is installed last overwrites files of the other, and uninstalling
either removes files of both.

Asked when an error is reported, and by `doctor`. Imports nothing of the package, which may be the other project's.
"""

import json
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from shlex import quote
from typing import Any, Final
from urllib.parse import urlsplit
from urllib.request import url2pathname

__all__ = ["DISTRIBUTION", "clash", "source", "to_install", "version"]

DISTRIBUTION: Final = "sqlalchemy-exactly-once"
OTHER: Final = "exactly-once"
"""The other project's distribution."""


def version() -> str:
    """Return the version of this installation; `unknown` if its metadata is missing, as in a copied folder."""
    found = _installed(DISTRIBUTION)
    return "unknown" if found is None else found.version


def to_install(extra: str) -> str:
    """Return the command that adds optional packages to this installation, in the way it was installed.

    Args:
        extra: Names of extras, separated by commas.

    Example:
        >>> to_install("redis")  # in a checkout that was installed with -e
        "pip install -e '.[redis]'"
    """
    return f"pip install {source(extra)}"


def source(extra: str | None = None) -> str:
    """Return the argument with which pip would make this installation again, with or without optional packages."""
    origin = _origin()
    url, extras = str(origin.get("url", "")), "" if extra is None else f"[{extra}]"
    file = Path(url2pathname(urlsplit(url).path)) if url.startswith("file:") else None
    within = f"#subdirectory={inside}" if (inside := origin.get("subdirectory")) else ""
    if "dir_info" in origin and file is not None:
        here = "." if file == Path.cwd() else str(file)
        return f"{'-e ' if origin['dir_info'].get('editable') else ''}{_quoted(f'{here}{extras}')}"
    if "vcs_info" in origin:
        made = origin["vcs_info"]
        revision = f"@{asked}" if (asked := made.get("requested_revision")) else ""
        at = f"{made.get('vcs', 'git')}+{_without_password(url)}{revision}{within}"
        return _quoted(f"{DISTRIBUTION}{extras} @ {at}")
    if "archive_info" in origin and file is not None and not within:
        return _quoted(f"{file}{extras}")
    if "archive_info" in origin:
        return _quoted(f"{DISTRIBUTION}{extras} @ {_without_password(url)}{within}")
    return _quoted(f"{DISTRIBUTION}{extras}")


def clash() -> str | None:
    """Say that the other distribution is installed beside this one, and what to type; None if it is not."""
    if _installed(OTHER) is None:
        return None
    return (
        f"Two distributions are installed that both bring a package exactly_once: {DISTRIBUTION}, which is this one, and"
        f" {OTHER}, another project's. Each has overwritten files of the other. Type: pip uninstall {OTHER} && pip install"
        f" --force-reinstall --no-deps {source()}"
    )


def _installed(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def _origin() -> dict[str, Any]:
    """The origin that pip recorded (PEP 610, https://peps.python.org/pep-0610/); nothing for a package from an index."""
    found = _installed(DISTRIBUTION)
    written = None if found is None else found.read_text("direct_url.json")
    return {} if written is None else dict(json.loads(written))


def _without_password(url: str) -> str:
    """Return a URL without user and password. Over SSH the user stays: it is no secret, and nobody can log in without it."""
    parts = urlsplit(url)
    userinfo, _, host = parts.netloc.rpartition("@")
    user = userinfo.partition(":")[0] if parts.scheme == "ssh" else ""
    return parts._replace(netloc=f"{user}@{host}" if user else host).geturl()


def _quoted(text: str) -> str:
    """Return a text as a single shell argument, always in quotes, so that all commands in errors look alike."""
    return quoted if (quoted := quote(text)).startswith("'") else f"'{text}'"
