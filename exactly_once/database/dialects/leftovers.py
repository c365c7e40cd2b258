"""What a statement leaves in its session, though its first word does not say so: found once for each text that may.

`SELECT ... INTO TEMP`, `set_config(..., false)`, `UPDATE pg_settings`, a variable of MySQL's that a SELECT fills, and what the
body of a DO block sets.
A search for fixed words comes first, so nearly every text costs no more than that; only a text that has them is read word by
word, outside its strings and comments. What a function or a procedure does is not there to be read: of those only the
server's own are known, by their names. Called by `keywords`.
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
        session: A keyword as people write it.
        unless: The parameters that say whether it does: it does not where each of them is true. In capitals.
    """

    session: str
    unless: tuple[str, ...] = ()


Judge = Callable[[list[str]], str | None]
"""Says of one statement's tokens what it changes in the session."""

# of PostgreSQL's own functions, by name: what they change ends with the session
_FUNCTIONS: Final = frozenset({"SETSEED", "DBLINK_CONNECT", "DBLINK_CONNECT_U"})
_SET_CONFIG: Final = "SET_CONFIG"
_SETTINGS: Final = "PG_SETTINGS"  # a view: an UPDATE of it is a SET
_TEMPORARY: Final = ("TEMP", "TEMPORARY")
_WORDS: Final = tuple(sorted(name.lower() for name in _FUNCTIONS | {_SET_CONFIG, _SETTINGS}))
# a comment may stand between: then it is read word by word
_INTO_VARIABLE: Final = re.compile(r"into\s*(?:@|/\*|--|#)")
_INTO_TEMPORARY: Final = re.compile(r"into\s*(?:(?:global|local|table|temp|temporary|unlogged)\b|\"?pg_temp|/\*|--)")
# what stands between INTO and what is made
_ASIDE: Final = frozenset({"GLOBAL", "LOCAL", "TABLE", "UNLOGGED"})
# the INTO of what fills a table that is there
_FILLS: Final = re.compile(r"(?>\s+|--[^\n\r]*|/\*(?:[^*/]|\*(?!/)|/(?!\*))*+\*/)*+(?:insert|merge)\s+into\b")
_BOOLEAN: Final = ("BOOL", "BOOLEAN")
_TRUE: Final = frozenset({"1", "on", "t", "true", "y", "yes"})
_LONGEST: Final = 16  # tokens: no last argument that says "true" has more
# behind these a statement begins in a block of PL/pgSQL
_BEGINS: Final = frozenset({"BEGIN", "THEN", "ELSE", "LOOP"})


def left(statement: str, grammar: Grammar, judge: Judge, *, block: bool) -> Left | None:
    """Say what a text leaves in its session, beside what the first words of its statements say.

    Args:
        statement: The text, before its values are put in.
        grammar: How its server reads it.
        judge: What the first words of a statement say, for those in the body of a DO block.
        block: There may be such a block in it.
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
    """Look for fixed words, wherever they stand: in a long text of values this is all that is affordable."""
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
    # a table of that name is filled, and only another statement could make one
    return ";" in lowered and _INTO_TEMPORARY.search(lowered, fills.end()) is not None


def _together(found: Iterable[Left | None]) -> Left | None:
    """Of several the one that no parameter takes back; else the last, with all their parameters."""
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
    selects = [False]  # for each bracket that is open
    for index, word in enumerate(tokens):
        if word == "(":
            selects.append(False)
        elif word == ")":
            if selects[1:2]:  # leading brackets are no tokens
                selects.pop()
        elif word == "SELECT":
            selects[-1] = True
        elif word == "INTO":
            if tokens[index - 1] in ("INSERT", "MERGE") and not selects[-1]:
                continue  # into a table of that name
            target = [each for each in tokens[index + 1 : index + 4] if each not in _ASIDE][:1]
            if target and (target[0] in _TEMPORARY or target[0].removeprefix('"').upper() == "PG_TEMP"):
                return True
    return False


def _changes(tokens: list[str]) -> Iterator[Left | None]:
    """Find the calls and the updates that change the session: each token once, however deep they stand in each other."""
    opened: list[tuple[bool, int]] = []  # for each bracket: of set_config, and where its last argument begins
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
    """Say what `set_config` leaves, by its last argument: whether it is for the transaction alone."""
    if local[:1] == ["IS_LOCAL"] and local[1:3] in (["=", ">"], [":", "="]):  # named
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
    """A DO block: its body is there to be read, in PL/pgSQL and between dollars; a text that it runs is not."""
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
