"""Finds what a statement leaves in its session although its first word does not say so. Reads each suspicious text once.

Examples: `SELECT ... INTO TEMP`, `set_config(..., false)`, `UPDATE pg_settings`, a MySQL variable that a SELECT fills, and the
settings in the body of a DO block.
It first searches for fixed words, so nearly every text costs no more than that. Only a text that has them is read word by
word, outside its strings and comments. The body of a function or a procedure is not in the text: of those we know only the
server's own functions, by name. Called by `keywords`.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Final, NamedTuple

from exactly_once.database.dialects.statements import Grammar, statements

__all__ = ["Left", "left"]


class Left(NamedTuple):
    """What stays in the session.

    Args:
        session: A keyword, spelled as people write it.
        unless: Names of parameters, in capitals. If each of them is true, nothing stays in the session.
    """

    session: str
    unless: tuple[str, ...] = ()


Judge = Callable[[list[str]], str | None]
"""Says what one statement, given as tokens, changes in the session."""

# Functions of PostgreSQL itself, by name: what they change lasts until the session ends.
_FUNCTIONS: Final = frozenset({"SETSEED", "DBLINK_CONNECT", "DBLINK_CONNECT_U"})
_SET_CONFIG: Final = "SET_CONFIG"
_SETTINGS: Final = "PG_SETTINGS"  # a view: an UPDATE of it is a SET
_TEMPORARY: Final = ("TEMP", "TEMPORARY")
_WORDS: Final = tuple(sorted(name.lower() for name in _FUNCTIONS | {_SET_CONFIG, _SETTINGS}))
# A comment may be in between: then the text is read word by word.
_INTO_VARIABLE: Final = re.compile(r"into\s*(?:@|/\*|--|#)")
_INTO_TEMPORARY: Final = re.compile(r"into\s*(?:(?:global|local|table|temp|temporary|unlogged)\b|\"?pg_temp|/\*|--)")
# What may be between INTO and the new table.
_ASIDE: Final = frozenset({"GLOBAL", "LOCAL", "TABLE", "UNLOGGED"})
# The INTO of a statement that fills an existing table.
_FILLS: Final = re.compile(r"(?>\s+|--[^\n\r]*|/\*(?:[^*/]|\*(?!/)|/(?!\*))*+\*/)*+(?:insert|merge)\s+into\b")
_BOOLEAN: Final = ("BOOL", "BOOLEAN")
_TRUE: Final = frozenset({"1", "on", "t", "true", "y", "yes"})
_LONGEST: Final = 16  # tokens; a last argument that means "true" has no more
# In a block of PL/pgSQL a statement begins after these.
_BEGINS: Final = frozenset({"BEGIN", "THEN", "ELSE", "LOOP"})


def left(statement: str, grammar: Grammar, judge: Judge, *, block: bool) -> Left | None:
    """Say what a text leaves in its session, beyond what the first words of its statements say.

    Args:
        statement: The text, before its values are inserted.
        grammar: How its server reads it.
        judge: What the first words of a statement say; for statements in the body of a DO block.
        block: The text may contain such a block.
    """
    if not _may_leave(statement, grammar) and not block:
        return None
    whole = statements(statement, grammar, whole=True)
    if grammar.dialect == "mysql":
        return _together(map(_variable, whole))
    if grammar.dialect == "postgresql":
        return _together(_postgresql(tokens, grammar, judge) for tokens in whole)
    return None


def _may_leave(statement: str, grammar: Grammar) -> bool:
    """Search for fixed words anywhere in the text: for a long text of values we can afford no more."""
    if grammar.dialect == "mysql":
        return ":=" in statement or ("@" in statement and _INTO_VARIABLE.search(statement.lower()) is not None)
    if grammar.dialect == "postgresql":
        lowered = statement.lower()
        return any(word in lowered for word in _WORDS) or _may_make(lowered)
    return False


def _may_make(lowered: str) -> bool:
    fills = _FILLS.match(lowered)
    if fills is None:
        return _INTO_TEMPORARY.search(lowered) is not None
    # It fills a table of that name; only another statement could make a table.
    return ";" in lowered and _INTO_TEMPORARY.search(lowered, fills.end()) is not None


def _together(found: Iterable[Left | None]) -> Left | None:
    """Return the first finding without conditions. If all have some, return the last one with the parameters of all."""
    unless: list[str] = []
    session = None
    for each in found:
        if each is None:
            continue
        if not each.unless:
            return each
        session = each.session
        unless += each.unless
    return None if session is None else Left(session, tuple(unless))


# -- MySQL and MariaDB -------------------------------------------------------------------------------------------------


def _variable(tokens: list[str]) -> Left | None:
    written = any(pair in ((":", "="), ("INTO", "@")) for pair in pairwise(tokens))
    return Left("@variable") if written else None


# -- PostgreSQL --------------------------------------------------------------------------------------------------------


def _postgresql(tokens: list[str], grammar: Grammar, judge: Judge) -> Left | None:
    if tokens[0] == "DO":
        return _block(tokens, grammar, judge)
    if _into_temporary(tokens):
        return Left("SELECT INTO TEMPORARY")
    return _together(_changes(tokens))


def _into_temporary(tokens: list[str]) -> bool:
    selects = [False]  # one entry for each open bracket
    for index, word in enumerate(tokens):
        if word == "(":
            selects.append(False)
        elif word == ")":
            if selects[1:2]:  # a leading bracket is no token
                selects.pop()
        elif word == "SELECT":
            selects[-1] = True
        elif word == "INTO":
            if tokens[index - 1] in ("INSERT", "MERGE") and not selects[-1]:
                continue  # INTO a table of that name
            target = [each for each in tokens[index + 1 : index + 4] if each not in _ASIDE][:1]
            if target and (target[0] in _TEMPORARY or target[0].removeprefix('"').upper() == "PG_TEMP"):
                return True
    return False


def _changes(tokens: list[str]) -> Iterator[Left | None]:
    """Find the calls and updates that change the session. Looks at each token once, however deep the calls are nested."""
    opened: list[
        tuple[bool, int]
    ] = []  # for each bracket: whether it belongs to set_config, and where its last argument begins
    for index, word in enumerate(tokens):
        match word:
            case "(" | "[":
                name = tokens[index - 1].removeprefix('"').upper() if index and word == "(" else ""
                if name in _FUNCTIONS:
                    yield Left(name.lower())
                opened.append((name == _SET_CONFIG, index + 1))
            case ",":
                if opened:
                    opened[-1] = (opened[-1][0], index + 1)
            case ")" | "]":
                sets, begins = opened.pop() if opened else (False, 0)
                if sets:
                    yield _set(tokens[begins:index] if index - begins <= _LONGEST else [])
            case "UPDATE":
                if _updates_settings(tokens[index + 1 : index + 6]):
                    yield Left("UPDATE " + _SETTINGS.lower())


def _updates_settings(tokens: list[str]) -> bool:
    target = [word.removeprefix('"').upper() for word in tokens if word not in ("ONLY", "(")]
    return (target[2:3] if target[1:2] == ["."] else target[:1]) == [_SETTINGS]


def _set(local: list[str]) -> Left | None:
    """Say what `set_config` leaves, by its last argument, which limits the change to the transaction."""
    if local[:1] == ["IS_LOCAL"] and local[1:3] in (["=", ">"], [":", "="]):  # a named argument
        local = local[3:]
    if local[:2] == ["CAST", "("] and local[-3:-2] == ["AS"] and local[-2] in _BOOLEAN:
        local = local[2:-3]
    elif local[-3:-1] == [":", ":"] and local[-1] in _BOOLEAN:
        local = local[:-3]
    if len(local) == 1 and (local[0] == "TRUE" or (local[0][0] == "'" and local[0][1:].strip().lower() in _TRUE)):
        return None
    # a parameter as psycopg writes it: %(name)s
    named = local[2:3] if local[:2] == ["%", "("] and local[3:] == [")", "S"] else []
    return Left(_SET_CONFIG.lower(), tuple(named))


def _block(tokens: list[str], grammar: Grammar, judge: Judge) -> Left | None:
    """A DO block: we can read its body, in PL/pgSQL and between dollars, but not a text that it executes."""
    bodies = [word[1:] for word in tokens if word[0] == "$" and word != "$"]
    if not bodies or ("LANGUAGE" in tokens and "PLPGSQL" not in tokens):
        return Left("DO")
    within = (inner for body in bodies for inner in statements(body, grammar, whole=True))
    found = _together(_in_a_block(inner, judge) for inner in within)
    return None if found is None else Left(found.session)


def _in_a_block(tokens: list[str], judge: Judge) -> Left | None:
    if "EXECUTE" in tokens:
        return Left("EXECUTE")
    for index in range(len(tokens)):
        if index == 0 or tokens[index - 1] in _BEGINS:
            changed = judge(tokens[index:])
            if changed is not None:
                return Left(changed)
    return _together(_changes(tokens))
