"""What a statement leaves in its session, though its first word does not say so: found once for each text that may.

`SELECT ... INTO TEMP`, `set_config(..., false)`, a variable of MySQL's that a SELECT fills, and what the body of a DO block sets.
A search for fixed words comes first, so nearly every text costs no more than that; only a text that has them is read word by
word, outside its strings and comments. What a function or a procedure does is not there to be read: of those only the
server's own are known, by their names. Called by `keywords`.
"""

import re
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Final, NamedTuple

from exactly_once.dialects.statements import Grammar, statements

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
_TEMPORARY: Final = ("TEMP", "TEMPORARY")
_WORDS: Final = tuple(sorted(name.lower() for name in _FUNCTIONS | {_SET_CONFIG}))
# a comment may stand between: then it is read word by word
_INTO_VARIABLE: Final = re.compile(r"into\s*(?:@|/\*|--|#)")
_INTO_TEMPORARY: Final = re.compile(r"into\s*(?:local\b|global\b|\"?(?:pg_)?temp|/\*|--)")
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
        return any(word in lowered for word in _WORDS) or _INTO_TEMPORARY.search(lowered) is not None
    return False


def _together(found: Iterable[Left | None]) -> Left | None:
    """Of several the one that no parameter takes back; else the last, with all their parameters."""
    unless: tuple[str, ...] = ()
    session = None
    for each in found:
        if each is None:
            continue
        if not each.unless:
            return each
        session, unless = each.session, unless + each.unless
    return None if session is None else Left(session, unless)


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
    return _functions(tokens)


def _into_temporary(tokens: list[str]) -> bool:
    if tokens[0] in ("INSERT", "MERGE"):
        return False  # into a table of that name
    for index, word in enumerate(tokens):
        if word == "INTO":
            target = [each for each in tokens[index + 1 : index + 3] if each not in ("LOCAL", "GLOBAL")][:1]
            if target and (target[0] in _TEMPORARY or target[0].removeprefix('"').upper() == "PG_TEMP"):
                return True
    return False


def _functions(tokens: list[str]) -> Left | None:
    return _together(_called(tokens, index) for index in range(len(tokens) - 1))


def _called(tokens: list[str], index: int) -> Left | None:
    if tokens[index + 1] != "(":
        return None
    name = tokens[index].removeprefix('"').upper()
    if name in _FUNCTIONS:
        return Left(name.lower())
    if name != _SET_CONFIG:
        return None
    local = _last_argument(tokens, index + 2)
    if local[:1] == ["IS_LOCAL"]:  # named: is_local => true, or :=
        local = local[3:]
    if local[:1] == ["TRUE"] and len(local) == 1:
        return None
    # a parameter as psycopg writes it: %(name)s, with or without a cast
    named = local[2:3] if local[:2] == ["%", "("] and local[3:5] == [")", "S"] else []
    return Left(_SET_CONFIG.lower(), tuple(named))


def _last_argument(tokens: list[str], begins: int) -> list[str]:
    depth, argument = 0, begins
    for index in range(begins, len(tokens)):
        word = tokens[index]
        if word == "," and depth == 0:
            argument = index + 1
        elif word in "([":
            depth += 1
        elif word in ")]":
            depth -= 1
            if depth < 0:
                return tokens[argument:index]
    return []


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
    return _functions(tokens)
