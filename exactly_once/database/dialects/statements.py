"""Splits a text into its statements as its server does. `statement_effects` tells what each statement is.

It knows what may hide a semicolon or a word: quotes and comments, nothing else. If a server would find an
error (an unclosed quote), this reads to the end: the server runs nothing from there on.

It knows no grammar: a body between BEGIN ATOMIC and END comes as several pieces.
"""

import re
from collections.abc import Iterator
from typing import Final, Literal, NamedTuple

__all__ = ["MARIADB", "MYSQL", "POSTGRESQL", "SQLITE", "Grammar", "statements"]


class Grammar(NamedTuple):
    """How one connection's server reads a text.

    Args:
        dialect: The name of its server.
        backslash: A backslash escapes in '...': `standard_conforming_strings` is off (PostgreSQL, which reports it by
            itself), `NO_BACKSLASH_ESCAPES` is not set (MySQL and MariaDB, whose status flags tell it).
        ansi_quotes: "..." is a name on MySQL and MariaDB, not a string.
        mariadb: It is MariaDB, and not MySQL.
        version: As in executable comments of MySQL and MariaDB: 80036 is 8.0.36, 101106 is 10.11.6.
            0 is unknown: then a text is read twice, with all such comments executed, and with none that has a version.
    """

    dialect: Literal["postgresql", "mysql", "sqlite"]
    backslash: bool = False
    ansi_quotes: bool = False
    mariadb: bool = False
    version: int = 0


POSTGRESQL: Final = Grammar("postgresql")
MYSQL: Final = Grammar("mysql", backslash=True)
MARIADB: Final = Grammar("mysql", backslash=True, mariadb=True)
SQLITE: Final = Grammar("sqlite")

# How many tokens of a statement are kept, unless its first word needs all of them.
_HEAD: Final = 8
_WHOLE: Final = frozenset({"CALL", "CREATE", "DECLARE", "EXECUTE", "EXPLAIN", "GET", "LOAD", "SET"})

_LETTER: Final = r"A-Za-z_\x80-\U0010ffff"
_TOKENS: Final = {
    "postgresql": re.compile(
        r"(?P<blank>[ \t\n\r\f\v]+|--[^\n\r]*)|(?P<string>[eEbBxX]?')"
        # A dollar within a word is no quote. A number is no word, but a string directly after one is an error in any case.
        rf"|(?P<word>[{_LETTER}0-9][{_LETTER}0-9$]*)|(?P<dollar>\$(?:[{_LETTER}][{_LETTER}0-9]*)?\$)"
        r"|(?P<end>;)|(?P<name>\")|(?P<comment>/\*)|(?P<other>.)",
        re.DOTALL,
    ),
    "mysql": re.compile(
        r"(?P<blank>[ \t\n\r\f\v]+|\#[^\n]*|--(?=[\x00-\x20\x7f]|\Z)[^\n]*)|(?P<string>['\"])"
        rf"|(?P<word>[{_LETTER}0-9$]+)|(?P<end>;)|(?P<name>`)|(?P<comment>/\*)|(?P<other>.)",
        re.DOTALL,
    ),
    "sqlite": re.compile(
        r"(?P<blank>[ \t\n\r\f\v\ufeff]+|--[^\n]*)|(?P<string>')"
        rf"|(?P<word>[{_LETTER}0-9$]+)|(?P<end>;)|(?P<name>[\"`\[])|(?P<comment>/\*)|(?P<other>.)",
        re.DOTALL,
    ),
}  # fmt: skip
# Text to skip once the first words are known. It ends at a whole word, because a word before a quote may change
# how the quote is read.
_DULL: Final = {
    "postgresql": re.compile(rf"[^;'\"$/\-]+(?<![{_LETTER}0-9])"),
    "mysql": re.compile(r"[^;'\"`/*#\-]+"),
    "sqlite": re.compile(r"[^;'\"`\[/\-]+"),
}
_CLOSING: Final = {"[": "]"}
_NESTED: Final = re.compile(r"/\*|\*/")
_EXECUTED: Final = re.compile(r"/\*(M?)!([0-9]{5,6})?")
_BLANK: Final = re.compile(r"[ \t\n\r\f\v]+|--[^\n\r]*")


def statements(text: str, grammar: Grammar, *, whole: bool = False) -> Iterator[list[str]]:
    """Yield the first tokens of each statement; all tokens of SET, CREATE, CALL and some others.

    A word comes in capitals; a quoted name as `"` and the name; a string as `'` alone; everything else character by
    character. Comments and leading brackets are left out. Time is linear in the length of the text.

    Args:
        text: What is sent.
        grammar: How its server reads it.
        whole: Yield all tokens of every statement, and the contents of PostgreSQL's strings: after `'` as they are written,
            between dollars after `$`.
    """
    dialect = grammar.dialect
    if dialect == "postgresql":
        text = text.partition("\0")[0]  # libpq sends nothing after it
    match, dull = _TOKENS[dialect].match, _DULL[dialect].match
    tokens: list[str] = []
    head = len(text) if whole else _HEAD
    room, position, executing = head, 0, False
    while found := (not room and dull(text, position)) or match(text, position):
        kind, start, position = found.lastgroup, position, found.end()
        token = ""
        if kind == "blank" or kind is None:
            continue
        if kind == "end":
            if tokens:
                yield tokens
            tokens, room, executing = [], head, False
            continue
        if kind == "word":
            if room:
                token = found[0].upper()
                if not tokens and token in _WHOLE:
                    room = len(text)
        elif kind == "comment":
            if dialect != "mysql" or (executed := _EXECUTED.match(text, start)) is None:
                position = _commented(text, position, depth=0 if dialect == "postgresql" else 1)
            elif _executes(executed, grammar):
                executing, position = True, executed.end()
            elif executed[1] and not grammar.mariadb:
                position = _commented(text, position, depth=1)
            else:
                position = _commented(text, executed.end(), depth=2)
            continue
        elif kind == "other":
            if executing and text.startswith("*/", start):
                executing, position = False, start + 2
                continue
            if found[0] not in "(\0" or tokens:
                token = found[0]
        else:
            position, token = _quoted(text, start, position, found[0], grammar, whole=whole)
        if room and token:
            tokens.append(token)
            room -= 1
            if not room and text.find(";", position) < 0:
                break
    if tokens:
        yield tokens


def _quoted(text: str, start: int, position: int, opening: str, grammar: Grammar, *, whole: bool) -> tuple[int, str]:
    """Return where a quote that has opened ends, and its token."""
    if grammar.dialect == "postgresql":
        if opening[0] == "$":
            end = text.find(opening, position)
            if end < 0:
                return len(text), "'"
            return end + len(opening), "$" + text[position:end] if whole else "'"
        if opening != '"':
            escapes = opening[0] in "eE" or (opening == "'" and grammar.backslash)
            end = _continued(text, position, escapes)
            return end, text[start : end - 1] if whole and opening == "'" else "'"
    is_name = opening in "`[" or (opening == '"' and (grammar.dialect != "mysql" or grammar.ansi_quotes))
    end = _closed(text, position, _CLOSING.get(opening, opening), grammar.backslash and not is_name)
    # A doubled quote comes as two tokens, and does no harm.
    return end, '"' + text[start + 1 : end - 1] if is_name else "'"


def _closed(text: str, position: int, quote: str, escapes: bool) -> int:
    """Return where a quote ends: after its closing quote, or at the end of the text."""
    while (end := text.find(quote, position)) >= 0:
        inside = text[position:end]
        if not escapes or (len(inside) - len(inside.rstrip("\\"))) % 2 == 0:
            return end + 1
        position = end + 1
    return len(text)


def _continued(text: str, position: int, escapes: bool) -> int:
    """Return where a PostgreSQL string ends.

    It goes on after a doubled quote, and on the next line, with the same escape rule.
    """
    while True:
        end = position = _closed(text, position, "'", escapes)
        while found := _BLANK.match(text, position):
            position = found.end()
        between = text[end:position]
        if not text.startswith("'", position) or (between and "\n" not in between and "\r" not in between):
            return end
        position += 1


def _commented(text: str, position: int, *, depth: int) -> int:
    """Return where a comment ends that has begun. `depth` limits how deep comments nest; 0 is no limit."""
    inside = 1
    while found := _NESTED.search(text, position):
        if found[0] == "*/":
            inside -= 1
        elif inside != depth:
            inside += 1
        else:
            position = found.start() + 1  # the star may be the one that closes
            continue
        position = found.end()
        if inside == 0:
            return position
    return len(text)


def _executes(comment: re.Match[str], grammar: Grammar) -> bool:
    """Return whether the server runs what an executable comment holds."""
    if comment[1] and not grammar.mariadb:
        return False  # MySQL reads it as an ordinary comment
    if comment[2] is None or not grammar.version:
        return True
    version = int(comment[2])
    # MariaDB does not execute comments for MySQL 5.7 and later.
    if grammar.mariadb and not comment[1] and 50700 <= version <= 99999:
        return False
    return version <= grammar.version
