"""Which statements a handler may not send, by their first words; shared by the dialects, decided once a statement text.

It reads no SQL: what hides from it (a procedure, an executable comment, an exotic quote) is noticed by the driver's
transaction state after the statement was sent. It refuses early what people write.
"""

import re
from functools import lru_cache
from typing import NamedTuple

__all__ = ["IMPLICIT_COMMITS", "Read", "first_words", "refused"]

_WORDS = re.compile(
    r"(?:\s|;|\(|--[^\n]*(?:\n|$)|#[^\n]*(?:\n|$)|/\*.*?\*/)*([A-Za-z]+)(?:\s+([A-Za-z]+))?(?:\s+([A-Za-z]+))?",
    re.DOTALL,
)

# what a semicolon may stand in without ending a statement
_QUOTED = re.compile(
    r"""'(?:[^'\\]|\\.|'')*'|"(?:[^"\\]|\\.|"")*"|`[^`]*`|\$(\w*)\$.*?\$\1\$|--[^\n]*|/\*.*?\*/""", re.DOTALL
)
# functions, procedures and triggers hold statements of their own, which do not run now
_BODIES = frozenset({"CREATE", "ALTER", "DO"})

_ENDS = frozenset({"COMMIT", "BEGIN", "START", "END", "ABORT"})

# MySQL and MariaDB commit the open transaction before any of these, without a word
IMPLICIT_COMMITS = frozenset(
    {
        "ALTER", "ANALYZE", "CACHE", "CHANGE", "CHECK", "CREATE", "DROP", "FLUSH", "GRANT", "INSTALL", "LOAD", "LOCK",
        "OPTIMIZE", "RENAME", "REPAIR", "RESET", "REVOKE", "TRUNCATE", "UNINSTALL", "UNLOCK",
    }
)  # fmt: skip


class Read(NamedTuple):
    """What a statement would do."""

    refused: str | None = None
    session: str | None = None
    context: str | None = None
    calls: bool = False


def first_words(statement: str) -> tuple[str, str, str]:
    """Return the first three words of a statement in capitals, comments and brackets skipped; empty where there are none."""
    found = _WORDS.match(statement)
    if found is None:
        return "", "", ""
    first, second, third = (word.upper() if word else "" for word in found.groups())
    return first, second, third


@lru_cache(maxsize=1024)
def refused(statement: str, ddl_commits: bool) -> str | None:
    """Return the keyword by which a handler would end its transaction with this statement, None if it would not."""
    if ";" in statement and first_words(statement)[0] not in _BODIES:
        # drivers that send several statements in one text would send what stands behind the first
        for each in _QUOTED.sub(" ", statement).split(";"):
            if (found := _refused(each, ddl_commits)) is not None:
                return found
        return None
    return _refused(statement, ddl_commits)


def _refused(statement: str, ddl_commits: bool) -> str | None:
    first, second, third = first_words(statement)
    if first == "ROLLBACK":
        # ROLLBACK TO [SAVEPOINT] x is how savepoints end, and those are fine
        return None if second == "TO" or (second in ("WORK", "TRANSACTION") and third == "TO") else first
    if first in _ENDS:
        return first
    if first == "PREPARE" and second == "TRANSACTION":
        return "PREPARE TRANSACTION"
    if ddl_commits and first in IMPLICIT_COMMITS:
        if second == "TEMPORARY":
            return None  # temporary tables do not commit
        return first
    if ddl_commits and first == "SET" and second.lower() == "autocommit":
        return "SET autocommit"
    return None


@lru_cache(maxsize=1024)
def read(statement: str, ddl_commits: bool) -> Read:
    first = first_words(statement)[0]
    return Read(refused(statement, ddl_commits), None, None, ddl_commits and first == "CALL")
