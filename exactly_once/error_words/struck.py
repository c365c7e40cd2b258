"""Strikes what may be a customer's out of a sentence of a database's: what no developer wrote. Pure.

A sentence of a server is made of the server's words and of what was put into them: names, or values. Which is which the sentence
does not say, and a list of the sentences that quote values never ends. So a quoted piece stays only if the developer wrote it:
if it stands in the text of the statement, outside its literals, or the server itself reports it as the name of a table, a column
or a constraint. What was bound to the statement is struck between quotation marks, and where it has a digit. So is a number of
five digits or more.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

__all__ = ["WORD", "bound", "code_of", "shown", "without_bound", "without_numbers", "without_quoted"]

WORD: Final = re.compile(r"\w+")
STRUCK: Final = "..."
_NUMBER: Final = re.compile(r"[0-9]{5,}")
_OURS: Final = re.compile(r"(\w+\.)?(message_[a-z_]+|exactly_once_version)")
_PLACE: Final = re.compile(r"\$[0-9]+|\?|end of input", re.IGNORECASE)
_ENDS: Final = {'"': '"', "'": "'", "`": "`", "«": "»", "»": "«", "„": "“”", "“": "”", "「": "」", "\u2018": "\u2019"}
_EVERY_MARK: Final = frozenset("".join((*_ENDS, *_ENDS.values())))
_DIGIT: Final = re.compile("[0-9]")
_LEAST_WORD: Final = 3
_LEAST_PIECE: Final = 5  # of a word: 't' || :name
_MOST_CHARACTERS: Final = 2_000_000  # of what is bound; more is not looked through, and nothing of the sentence is told
_STATEMENT_CHARACTERS: Final = 500


def shown(statement: str, *, doubled: bool) -> str:
    """Return the beginning of a statement, up to its first literal: an application may have written a value into it.

    Args:
        statement: Its text.
        doubled: What stands in double quotes is a literal, too (MySQL).
    """
    text = " ".join(statement.split())[:_STATEMENT_CHARACTERS]
    marks = ("'", "$$", '"') if doubled else ("'", "$$")
    literal = min((at for mark in marks if (at := text.find(mark)) >= 0), default=-1)
    return without_numbers(text if literal < 0 else text[:literal] + STRUCK)


def code_of(statement: str | None, *, doubled: bool = False) -> frozenset[str]:
    """Return the words of a statement that stand in none of its literals, in small letters."""
    if not statement:
        return frozenset()
    if doubled:
        statement = statement.replace('"', "'")
    if "\\" in statement or "$$" in statement:  # where a literal ends is not known here
        first = min(at for mark in ("\\", "$$", "'") if (at := statement.find(mark)) >= 0)
        statement = statement[:first]
    else:
        statement = " ".join(statement.split("'")[::2])  # 'it''s' is two literals with nothing between
    return frozenset(word.lower() for word in WORD.findall(statement))


def bound(parameters: Any) -> frozenset[str] | None:
    """Return the words of all values bound to a statement, in small letters; None where there are too many to look through."""
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
    """Strike each word that was bound, or has a bound one in it, and that the developer did not write himself.

    Args:
        text: A server's sentence.
        values: The words that were bound.
        known: Those that may stay.
        own_words: It is the application's (RAISE, SIGNAL), and a value may stand anywhere. Else the server's own words stay where
            they are outside all quotation marks, for a long text that was bound may have each of them.
    """
    if not values:
        return text
    kept = frozenset(known)
    marks = [n for n, mark in enumerate(text) if mark in _EVERY_MARK and not _is_apostrophe(text, n)]
    first, last = (0, len(text)) if own_words else (marks[0], marks[-1]) if marks else (len(text), 0)

    def strike(found: re.Match[str]) -> str:
        word = found[0].lower()
        if word in kept or len(word) < _LEAST_WORD or not (first <= found.start() < last or _DIGIT.search(word)):
            return found[0]
        return STRUCK if word in values or _has_piece(word, values) else found[0]

    return WORD.sub(strike, text)


def _has_piece(word: str, values: frozenset[str]) -> bool:
    most = len(word)
    return any(
        word[start:end] in values
        for start in range(most)
        for end in range(start + _LEAST_PIECE, min(most, start + 255) + 1)
    )


def without_quoted(text: str, known: Iterable[str]) -> str:
    """Strike what stands in quotation marks and the developer did not write.

    From the first such piece to the last mark of all: a value may have marks in it.
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
    """Strike each number that may be a card's, an account's or a telephone's.

    Example:
        >>> without_numbers("no partition for value 4111111111111111 (errno 1526)")
        'no partition for value # (errno 1526)'
    """
    return _NUMBER.sub("#", text)
