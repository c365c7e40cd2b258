"""Says which database is used, where that may surprise: one given in code that a setting overrules, a test on the settings' own.

The order is fixed (environment over file over code); these are lines of the log, once in a process. An engine in code says where
the program's tables are, so it is told of any setting in its place; a URL in code is a default, which a variable of the
environment is there to overrule, and a file that happens to lie above the current folder is not. Called by the facade, once the
settings' database is taken.
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
    """Say what holds in the place of what code gives, and that a test uses the database of a file.

    Args:
        name: Of the setting.
        given: What code gives, or None.
        setting: What holds.
    """
    from_file = setting.source.startswith("file ")
    in_code = Setting(given, "code")
    if given is None or setting.source == "code":
        pass
    elif (from_file or not isinstance(given, (str, URL))) and _bare(in_code.shown) != _bare(setting.shown):
        _say(_OVERRULED.format(name=name, given=in_code.shown, used=setting.shown, source=setting.source))
    # a variable of the environment was set on purpose, and a child that a test has started has it from that test
    if from_file and _PYTEST in os.environ:
        _say(_IN_A_TEST.format(used=setting.shown, source=setting.source))


def _bare(shown: str) -> str:
    """A URL alone: `Engine(sqlite:///a.db)` and `sqlite:///a.db` are one database."""
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
    """Return what a test is told where no database is named; nothing where no test runs."""
    return f" In a test, lend it one: {_LEND_ONE}." if _PYTEST in os.environ else ""
