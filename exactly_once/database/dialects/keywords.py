"""Reads, by the first words of each statement in a text, whether a handler may send it, and what it changes.

One reading of each text gives two answers. *Refused*: it would end the handler's transaction. *Session*: it changes the
connection for later users.

It reads first words, not SQL; the exceptions are the names of functions that take a lock of the session, and what `leftovers`
looks for. So it cannot see what other functions and procedures do: a SET or a COMMIT in a procedure, a trigger
or a prepared text.
`unseen` says that a statement runs a text that we cannot read. Then the dialect's witnesses tell what became of the transaction.
"""

import re
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from itertools import product
from typing import Final

from exactly_once.database.dialects.leftovers import left
from exactly_once.database.dialects.statement_effects import JUDGES, Read, opens_body
from exactly_once.database.dialects.statements import Grammar, statements

__all__ = ["LOCK", "Read", "read", "reader"]


# Nearly every statement that is ever sent is one of these: a single statement, known by its first word.
_FIRST: Final = re.compile(r"\s*([A-Za-z]+)")
_PLAIN: Final = {
    spelling: Read(spelling.upper())
    for word in ("DELETE", "INSERT", "SELECT", "UPDATE", "WITH")
    for spelling in (word, word.lower())
}

# These locks belong to the session, so they outlive the transaction in an idle connection of the pool; others wait for ever.
_LOCKS: Final = {
    "postgresql": re.compile(r"\bpg_(?:try_)?advisory_(?:un)?lock", re.IGNORECASE),
    "mysql": re.compile(r"\b(?:GET_LOCK|RELEASE_(?:ALL_)?LOCKS?)\b", re.IGNORECASE),
}
LOCK: Final = "a lock of the session"

_REMEMBERED: Final = 32_768
"""Characters. A longer text is read each time: it contains its values, so it does not come again, and would fill the memory."""


@cache
def reader(grammar: Grammar) -> Callable[[str], Read]:
    """Return a reader for texts of one grammar, which remembers what it read. Ask for it once, not for each text.

    Example:
        `reader(POSTGRESQL)("SELECT 1; SET ROLE clerk").session` is `"SET"`.
    """

    @lru_cache(maxsize=1024)
    def remembered(statement: str) -> Read:
        return _read(statement, grammar)

    def read(statement: str) -> Read:
        return remembered(statement) if len(statement) < _REMEMBERED else _read(statement, grammar)

    return read


def read(statement: str, grammar: Grammar) -> Read:
    """Read a text that is about to be sent.

    Args:
        statement: The text, before its values are put in.
        grammar: How its server reads it.
    """
    return reader(grammar)(statement)


def _read(statement: str, grammar: Grammar) -> Read:
    said = _told(statement, grammar)
    if said.refused is not None:
        return said
    locks = _LOCKS.get(grammar.dialect)
    if locks is not None and "lock" in (lowered := statement.lower()) and locks.search(lowered):
        return said._replace(session=LOCK)  # a lock counts more than any other change: the connection is closed at once
    if said.session is None:

        def judge(tokens: list[str]) -> str | None:
            return JUDGES[grammar.dialect](tokens).session

        for possible in (grammar, *_possible(statement, grammar)):
            found = left(statement, possible, judge, block=said.unseen is not None)
            if found is not None:
                return said._replace(session=found.session, unless=found.unless)
    return said


def _told(statement: str, grammar: Grammar) -> Read:
    if ";" not in statement:
        found = _FIRST.match(statement)
        if found is not None and (plain := _PLAIN.get(found[1])) is not None:
            return plain
    for possible in _possible(statement, grammar):
        if (said := _judged(statement, possible)).refused is not None:
            return said
    return _judged(statement, grammar)


def _possible(statement: str, grammar: Grammar) -> Iterator[Grammar]:
    """Yield the other ways in which a server may read a text. The text is refused if any of them refuses it."""
    if grammar.dialect != "mysql":
        return
    if not grammar.version and "!" in statement:
        yield grammar._replace(version=1)  # no comment with a version is executed
    if ";" in statement and "sql_mode" in statement.lower():
        # Its first statement may change how the server reads the others.
        for backslash, ansi_quotes in product((True, False), repeat=2):
            yield grammar._replace(backslash=backslash, ansi_quotes=ansi_quotes)


def _judged(statement: str, grammar: Grammar) -> Read:
    judge = JUDGES[grammar.dialect]
    first, session, unseen, body = "", None, None, False
    for tokens in statements(statement, grammar):
        first = first or (tokens[0] if tokens[0].isalpha() else "")
        if body and tokens[0] == "END":
            body = False  # the END of a function or trigger that is created, and does not run now
            continue
        said = judge(tokens)
        if said.refused is not None:
            return Read(first, said.refused)
        session, unseen = session or said.session, unseen or said.unseen
        body = body or opens_body(tokens, grammar)
    return Read(first, None, session, unseen)
