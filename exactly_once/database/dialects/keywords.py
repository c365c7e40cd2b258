"""Reads what a handler sends, by the first words of each statement in a text: may it be sent, and what does it change.

Two answers come from one reading, once for each text. *Refused*: it would end the handler's transaction. *Session*: the
connection is not what it was for whoever has it next.

It reads first words and no SQL, but for the names of the functions that take a lock of the session, and what `leftovers` looks
for. So it cannot see what other functions and procedures do: a SET or a COMMIT in a procedure, a trigger or a prepared text.
`unseen` says that a statement runs a text which is not there to read; the transaction's own witnesses tell what became of it.
"""

import re
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from itertools import product
from typing import Final

from exactly_once.database.dialects.leftovers import left
from exactly_once.database.dialects.statements import Grammar, statements
from exactly_once.database.dialects.verbs import JUDGES, Read, opens_body

__all__ = ["LOCK", "Read", "read", "reader"]


# nearly all that is ever sent, told without reading it: one statement, known by its first word
_FIRST: Final = re.compile(r"\s*([A-Za-z]+)")
_PLAIN: Final = {
    spelling: Read(spelling.upper())
    for word in ("DELETE", "INSERT", "SELECT", "UPDATE", "WITH")
    for spelling in (word, word.lower())
}

# of the session, so they outlive the transaction in an idle connection of the pool; whoever waits for one waits for ever
_LOCKS: Final = {
    "postgresql": re.compile(r"\bpg_(?:try_)?advisory_(?:un)?lock", re.IGNORECASE),
    "mysql": re.compile(r"\b(?:GET_LOCK|RELEASE_(?:ALL_)?LOCKS?)\b", re.IGNORECASE),
}
LOCK: Final = "a lock of the session"

_REMEMBERED: Final = 32_768
"""Characters. A longer text is read each time: its values stand in it, it does not come again, and many fill the memory."""


@cache
def reader(grammar: Grammar) -> Callable[[str], Read]:
    """Return what reads texts of one grammar, and remembers what it read: ask for it once, not for each text.

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
        return said._replace(session=LOCK)  # whatever else it changes: with a lock the connection is closed at once
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
    """Yield the other ways in which a server may read a text: it is refused if it is by any of them."""
    if grammar.dialect != "mysql":
        return
    if not grammar.version and "!" in statement:
        yield grammar._replace(version=1)  # no comment that has a version is executed
    if ";" in statement and "sql_mode" in statement.lower():
        # its first statement may change how the server reads the others
        for backslash, ansi_quotes in product((True, False), repeat=2):
            yield grammar._replace(backslash=backslash, ansi_quotes=ansi_quotes)


def _judged(statement: str, grammar: Grammar) -> Read:
    judge = JUDGES[grammar.dialect]
    first, session, unseen, body = "", None, None, False
    for tokens in statements(statement, grammar):
        first = first or (tokens[0] if tokens[0].isalpha() else "")
        if body and tokens[0] == "END":
            body = False  # of a function or a trigger that is made, and does not run now
            continue
        said = judge(tokens)
        if said.refused is not None:
            return Read(first, said.refused)
        session, unseen = session or said.session, unseen or said.unseen
        body = body or opens_body(tokens, grammar)
    return Read(first, None, session, unseen)
