"""Logs which database is used if that may surprise: a setting overrules one in code, or a test uses the settings' database.

The order is fixed (environment over file over code); each of these is logged once in a process. An engine in code says where
the program's tables are, so any setting that overrules it is logged. A URL in code is a default: a variable of the
environment is meant to overrule it, but a file that happens to lie above the current folder is not. Called by the facade, once
it has chosen the settings' database.
"""

import os
from functools import lru_cache
from typing import Any, Final

from sqlalchemy import URL

from exactly_once.configuration.config import Setting
from exactly_once.wording.steady_log import steady

__all__ = ["lend_one", "say_which"]

_PYTEST: Final = "PYTEST_CURRENT_TEST"
"""Set by pytest while a test runs."""

_log = steady("exactly_once.config")


def say_which(name: str, given: Any, setting: Setting[Any]) -> None:
    """Log which value applies instead of the code's, and that a test uses the database of a file.

    Args:
        name: The name of the setting.
        given: The value in code, or None.
        setting: The value that applies.
    """
    from_file = setting.source.startswith("file ")
    in_code = Setting(given, "code")
    if given is None or setting.source == "code":
        pass
    elif (from_file or not isinstance(given, (str, URL))) and _bare(in_code.shown) != _bare(setting.shown):
        _say(_OVERRULED.format(name=name, given=in_code.shown, used=setting.shown, source=setting.source))
    # An environment variable was set on purpose, and a child process inherits it from the test that started it.
    if from_file and _PYTEST in os.environ:
        _say(_IN_A_TEST.format(used=setting.shown, source=setting.source))


def _bare(shown: str) -> str:
    """Return the URL alone: `Engine(sqlite:///a.db)` and `sqlite:///a.db` are the same database."""
    return shown.partition("(")[2].removesuffix(")") or shown


@lru_cache
def _say(text: str) -> None:
    _log.warning("%s", text)


_OVERRULED: Final = (
    "The {name} in the code ({given}) is not used: {source} says {used}, and settings win over the code. Take one of them away;"
    " or call eo.bind(engine), which wins over both."
)
_LEND_ONE: Final = "`with bound(eo, eo_database):` (exactly_once.testing)"
"""How a test gives an application a database."""
_IN_A_TEST: Final = (
    "A test uses {used}, the database of {source}: what it writes stays there, and the next run finds duplicates. Lend it one of"
    f" its own: {_LEND_ONE}."
)


def lend_one() -> str:
    """Return a hint for a test that names no database; empty outside of tests."""
    return f" In a test, lend it one: {_LEND_ONE}." if _PYTEST in os.environ else ""
