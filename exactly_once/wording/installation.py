"""How this package was installed, and whether another distribution's files lie over its own.

Two distributions of the Python index bring a package of this name: this one, and `exactly-once`, which is another project. pip
knows no such conflict: whichever is installed last overwrites files of the other, and to uninstall either takes them from both.

Asked when an error is told, and by `doctor`; imports nothing of the package, for that may be the other one's.
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
"""Another project's."""


def version() -> str:
    """Return the version of this installation; `unknown` where its metadata is not there, as in a copied folder."""
    found = _installed(DISTRIBUTION)
    return "unknown" if found is None else found.version


def to_install(extra: str) -> str:
    """Return the command that adds optional packages to this installation, as it was made.

    Args:
        extra: Names of extras, separated by commas.

    Example:
        >>> to_install("redis")  # in a checkout that was installed with -e
        "pip install -e '.[redis]'"
    """
    return f"pip install {source(extra)}"


def source(extra: str | None = None) -> str:
    """Return what pip is to install to make this installation again, for a command line: with optional packages, or without."""
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
    """Say that the other distribution is installed beside this one, and what to type; None where it is not."""
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
    """Where pip took it from (PEP 610, https://peps.python.org/pep-0610/); nothing for what came from an index."""
    found = _installed(DISTRIBUTION)
    written = None if found is None else found.read_text("direct_url.json")
    return {} if written is None else dict(json.loads(written))


def _without_password(url: str) -> str:
    """Return a URL without user and password; over SSH with the user, which is no secret, and without whom nobody gets in."""
    parts = urlsplit(url)
    userinfo, _, host = parts.netloc.rpartition("@")
    user = userinfo.partition(":")[0] if parts.scheme == "ssh" else ""
    return parts._replace(netloc=f"{user}@{host}" if user else host).geturl()


def _quoted(text: str) -> str:
    """Return a text as a shell takes it for one argument; always in quotes, for what an error tells looks alike then."""
    return quoted if (quoted := quote(text)).startswith("'") else f"'{text}'"
