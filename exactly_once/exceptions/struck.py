"""Redacts what may be a customer's value in the text of a database error: everything that no developer wrote. Pure.

A server's sentence consists of the server's own words and of inserted names or values. The sentence does not say which is
which, and a list of all sentences with values would never be complete. So a quoted piece stays only if the developer wrote it:
if it occurs in the text of the statement, outside its literals, or if the server itself reports it as the name of
a table, a column or a constraint. Bound values are redacted inside quotation marks, and elsewhere if they have a digit. A
number of five digits or more is redacted, too.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

__all__ = [
    "TOO_MUCH",
    "WORD",
    "Sought",
    "bound",
    "code_of",
    "shown",
    "sought",
    "without_bound",
    "without_numbers",
    "without_parameters",
    "without_quoted",
]

WORD: Final = re.compile(r"\w+")
TOO_MUCH: Final = object()
"""Replaces the bound values if there are too many to search for."""
STRUCK: Final = "..."
# Five digits in a row, or nine in groups, as on cards and in telephone numbers; a date has eight.
_NUMBER: Final = re.compile(r"\d{5,}|\d(?:[\s./\u2010-\u2015-]{0,3}\d){8,}")
_OURS: Final = re.compile(r"(\w+\.)?(message_[a-z_]+|exactly_once_version)")
_PLACE: Final = re.compile(r"\$[0-9]+|\?|end of input", re.IGNORECASE)
_ENDS: Final = {'"': '"', "'": "'", "`": "`", "«": "»", "»": "«", "„": "“”", "“": "”", "「": "」", "\u2018": "\u2019"}
_EVERY_MARK: Final = frozenset("".join((*_ENDS, *_ENDS.values())))
_DIGIT: Final = re.compile(r"\d")
_LEAST_WORD: Final = 3
_LONGEST_WORD: Final = 255  # the longest word of a developer, and the longest value in one piece
_LEAST_PIECE: Final = 5  # of a word: 't' || :name
_MOST_CHARACTERS: Final = 2_000_000  # of bound values; with more we do not search, and show nothing of the sentence
_STATEMENT_CHARACTERS: Final = 500
_LOOKED_AT: Final = 20_000  # of a statement, or of an application's text
_MOST_FORMS: Final = 2_000  # values that are searched for as a whole; with more, word by word
_CUT_OFF: Final = " .\u2026'\")]}"  # these may follow a value that was cut short

# The beginnings of text that is not code: a comment, a literal, or a quoted name.
_BEGINS: Final = re.compile(r"""--[^\n]*|/\*|'|"|`|(?<![\w$])\$(?:[^\W\d]\w*)?\$""")
_BEGINS_ON_MYSQL: Final = re.compile(_BEGINS.pattern + r"|\#[^\n]*")
_COMMENT_MARK: Final = re.compile(r"/\*|\*/")


def shown(statement: str, *, doubled: bool) -> str:
    """Return the beginning of a statement, up to its first literal: an application may have written a value into it.

    Args:
        statement: Its text; comments are left out.
        doubled: A text in double quotes is a literal, too (MySQL, SQLite).
    """
    told: list[str] = []
    for what, part in _parts(statement[:_LOOKED_AT], doubled=doubled):
        if what == "literal":
            told.append(STRUCK)
            break
        told.append(part if what == "code" else " ")
    return without_numbers(" ".join("".join(told).split()))[:_STATEMENT_CHARACTERS]


def code_of(statement: str | None, *, doubled: bool = False) -> frozenset[str]:
    """Return the words of a statement outside its literals and comments, in lower case."""
    if not statement:
        return frozenset()
    code = (part for what, part in _parts(statement, doubled=doubled) if what == "code")
    return frozenset(word.lower() for part in code for word in WORD.findall(part))


def _parts(statement: str, *, doubled: bool) -> Iterator[tuple[str, str]]:
    """Cut a statement into ("code", text), ("comment", "") and ("literal", ""). Stops at one whose end is not known."""
    begins = _BEGINS_ON_MYSQL if doubled else _BEGINS
    at = 0
    while (found := begins.search(statement, at)) is not None:
        yield "code", statement[at : found.start()]
        mark, at = found[0], found.end()
        if mark[0] in "-#":
            yield "comment", ""
            continue
        if mark == "/*":
            yield "comment", ""
            at = _end_of_comment(statement, at)
        elif mark == "`" or (mark == '"' and not doubled):
            end = statement.find(mark, at)
            if end >= 0:
                yield "code", statement[at - 1 : end + 1]
            at = end + 1 if end >= 0 else -1
        else:
            yield "literal", ""
            # After a backslash a quotation mark may not end the literal.
            end = -1 if "\\" in statement and mark in "'\"" else statement.find(mark, at)
            at = end + len(mark) if end >= 0 else -1
        if at < 0:
            return
    yield "code", statement[at:]


def _end_of_comment(statement: str, at: int) -> int:
    """Return where a comment ends; -1 if it does not. Comments nest, as on PostgreSQL; elsewhere too much counts as comment."""
    depth = 1
    for found in _COMMENT_MARK.finditer(statement, at):
        depth += 1 if found[0] == "/*" else -1
        if not depth:
            return found.end()
    return -1


def bound(parameters: Any) -> frozenset[str] | None:
    """Return the words of all bound values, in lower case; None if there are too many to search for."""
    if parameters is TOO_MUCH:
        return None
    found: set[str] = set()
    left = _MOST_CHARACTERS
    for value in _values(parameters):
        text = value.decode("utf-8", "replace") if isinstance(value, (bytes, bytearray)) else str(value)
        left -= len(text) + 1
        if left < 0:
            return None
        found.update(word.lower() for word in WORD.findall(text) if len(word) >= _LEAST_WORD)
    return frozenset(found)


def _values(given: Any) -> Iterator[Any]:
    if isinstance(given, Mapping):
        given = given.values()
    elif not isinstance(given, (list, tuple)):
        if given is not None and not isinstance(given, bool):
            yield given
        return
    for each in given:
        yield from _values(each)


def without_bound(text: str, values: frozenset[str], known: Iterable[str], *, own_words: bool = False) -> str:
    """Redact each word that was bound, or contains a bound word, unless the developer wrote it.

    Args:
        text: A server's sentence.
        values: The bound words.
        known: Words that may stay.
        own_words: The sentence is the application's (RAISE, SIGNAL), and may contain a value anywhere. Else words
            outside quotation marks are the server's and stay: a long bound text may contain each of them.
    """
    if not values:
        return text
    kept = frozenset(known)
    marks = [n for n, mark in enumerate(text) if mark in _EVERY_MARK and not _is_apostrophe(text, n)]
    first, last = (0, len(text)) if own_words else (marks[0], marks[-1]) if marks else (len(text), 0)

    begins = cache(lambda: _begins(values))

    def strike(found: re.Match[str]) -> str:
        word = found[0].lower()
        if word in kept or len(word) < _LEAST_WORD or not (first <= found.start() < last or _DIGIT.search(word)):
            return found[0]
        return STRUCK if word in values or _has_piece(word, values, begins()) else found[0]

    return WORD.sub(strike, text)


@dataclass(frozen=True, slots=True)
class Sought:
    """Bound values of statements, prepared for searching."""

    words: frozenset[str] | None
    """None if there are too many to search for."""
    forms: Sequence[str] | None
    """The values in each form that they may have in a text, the longest first; None if so many that we search word by word."""


def sought(parameters: Any) -> Sought:
    """Prepare the values that were bound to one or several statements.

    Values of one or two characters are not searched for: they occur everywhere.
    """
    words = bound(parameters)  # counts the characters first
    if words is None:
        return Sought(None, None)
    forms: set[str] = set()
    for value in _values(parameters):
        forms.update(_forms(value))
        if len(forms) > _MOST_FORMS:
            return Sought(words, None)
    return Sought(words, sorted(forms, key=len, reverse=True))


def without_parameters(text: str, values: Sought) -> str | None:
    """Redact the bound values of a statement in a text of the application, where they occur unchanged.

    Also in the form in which Python or JSON writes them, and cut short at the end; and the numbers in them.

    Args:
        text: Its text; only its beginning is searched and returned.
        values: The bound values.

    Returns:
        The text; None if there is too much to search for.
    """
    words, forms = values.words, values.forms
    if words is None:
        return None
    text = text[:_LOOKED_AT]
    if forms is None:
        return without_bound(text, words, (), own_words=True)
    for form in forms:
        if form in text:
            part = len(form) >= _LEAST_PIECE and _DIGIT.search(form)  # else "Ann" would be redacted in "Annual"
            text = re.sub(re.escape(form) if part else rf"(?<!\w){re.escape(form)}(?!\w)", STRUCK, text)
    # Before any other redaction: the value is searched for as it was bound.
    left = text.rstrip(_CUT_OFF)
    for form in forms:
        at = left.rfind(form[:_LEAST_PIECE]) if len(form) > _LEAST_PIECE else -1
        if at >= 0 and form.startswith(left[at:]):
            text = f"{text[:at]}{STRUCK}"
            break
    # A part of a value, such as a member of JSON, if it cannot be a word of the application.
    return WORD.sub(lambda found: STRUCK if _is_number_of(found[0].lower(), words) else found[0], text)


def _is_number_of(word: str, words: frozenset[str]) -> bool:
    return len(word) >= _LEAST_PIECE and word in words and _DIGIT.search(word) is not None


def _forms(value: Any) -> Iterator[str]:
    if isinstance(value, (bytes, bytearray)):
        yield from (form for form in (repr(bytes(value)), bytes(value).hex()) if len(value) >= _LEAST_WORD)
        value = value.decode("utf-8", "replace")
    text = str(value)
    for form in (
        text,
        repr(value),
        repr(text)[1:-1],
        json.dumps(text)[1:-1],
        json.dumps(text, ensure_ascii=False)[1:-1],
    ):
        if len(form) >= _LEAST_WORD:
            yield form


def _has_piece(word: str, values: frozenset[str], begins: frozenset[str]) -> bool:
    most = len(word)
    if most > _LONGEST_WORD:
        return True  # no developer's word, and to test each piece of it would take seconds
    return any(
        word[start:end] in values
        for start in range(most - _LEAST_PIECE + 1)
        if word[start : start + _LEAST_PIECE] in begins
        for end in range(start + _LEAST_PIECE, most + 1)
    )


def _begins(values: frozenset[str]) -> frozenset[str]:
    return frozenset(word[:_LEAST_PIECE] for word in values if len(word) >= _LEAST_PIECE)


def without_quoted(text: str, known: Iterable[str]) -> str:
    """Redact text in quotation marks that the developer did not write.

    From the first such piece to the last mark of all: a value may contain marks.
    """
    kept = frozenset(known)
    at = 0
    while at < len(text):
        mark = text[at]
        if mark not in _ENDS or _is_apostrophe(text, at):
            at += 1
            continue
        end = next((n for n in range(at + 1, len(text)) if text[n] in _ENDS[mark]), -1)
        piece = text[at + 1 : end] if end > 0 else ""
        if end < 0 or not _is_known(piece.strip(), kept):
            last = max(
                (n for n in range(at + 1, len(text)) if text[n] in _EVERY_MARK and not _is_apostrophe(text, n)),
                default=len(text) - 1,
            )
            return f"{text[: at + 1]}{STRUCK}{text[last] if last > at and end > 0 else ''}{text[last + 1 :]}"
        at = end + 1
    return text


def _is_apostrophe(text: str, at: int) -> bool:
    return text[at] == "'" and 0 < at < len(text) - 1 and text[at - 1].isalnum() and text[at + 1].isalnum()  # doesn't


def _is_known(piece: str, known: frozenset[str]) -> bool:
    if _PLACE.fullmatch(piece) or _OURS.fullmatch(piece):
        return True
    words = WORD.findall(piece)
    return all(word.lower() in known for word in words)


def without_numbers(text: str) -> str:
    """Redact each number that may be a card's, an account's or a telephone's.

    Example:
        >>> without_numbers("no partition for value 4111111111111111 (errno 1526)")
        'no partition for value # (errno 1526)'
    """
    return _NUMBER.sub("#", text)
