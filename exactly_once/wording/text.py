"""Small parts of error sentences: untrusted text made safe to print or to store, and suggestions for a misspelling. Pure."""

import json
import re
from collections.abc import Iterable
from typing import Final

__all__ = ["EVERY", "THREE_BYTES", "escaped", "json_line", "listed", "probably", "stopped", "storable", "taken"]

EVERY: Final = "utf-8"
"""The character set that has every character."""
THREE_BYTES: Final = "utf8mb3"
"""MySQL's older utf8, which ends at U+FFFF: no emoji, and not every Chinese name. Python has no codec for it."""

_BEYOND_THREE_BYTES: Final = re.compile("[\U00010000-\U0010ffff]")


def escaped(text: str, limit: int = 60) -> str:
    """Cut an untrusted text and escape what could break or forge a log line. Readable letters of any script stay.

    Example:
        >>> escaped("A-1" + chr(10) + "INFO all is well")
        'A-1\\\\nINFO all is well'
    """
    cut = text[:limit]
    if not cut.isprintable():
        cut = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)
    return cut + "..." if len(text) > limit else cut


def json_line(value: object) -> str:
    """Return JSON in one line for a terminal or a pipe. Readable letters of any script stay; terminal control characters do not.

    JSON itself escapes characters below the blank, not those that change the writing direction or colour, or clear the screen.

    Example:
        >>> json_line({"key": "caf\u00e9 \u202e"})
        '{"key": "caf\u00e9 \\\\u202e"}'
    """
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isprintable() else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def listed(names: Iterable[str], *, most: int = 12) -> str:
    """Return names for a sentence: sorted, with the number of those that are left out.

    Example:
        >>> listed(["b", "a"])
        'a, b'
    """
    every = sorted(names)
    rest = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + rest if every else "none"


def probably(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean ...?" for a misspelled name, or nothing if no known name is close.

    Example:
        >>> probably("topik", ["topic", "tag"])
        " Did you mean 'topic'?"
    """
    from difflib import get_close_matches  # costs an import that only errors need

    folded = {candidate.replace("_", "").lower(): candidate for candidate in known}
    close = get_close_matches(name.replace("_", "").lower(), folded, n=2, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(folded[match]) for match in close)}?" if close else ""


def taken(topic: str, tags: Iterable[str]) -> str:
    """Return a subscription in short form.

    Example:
        >>> taken("orders", ["created", "paid"])
        'orders:created|paid'
    """
    every = "|".join(sorted(tags))
    return f"{topic}:{every}" if every else topic


def stopped(text: str) -> str:
    """End another program's sentence with a full stop, so that ours can follow.

    Example:
        >>> stopped("a proxy whose server is away?"), stopped("no route to host")
        ('a proxy whose server is away?', 'no route to host.')
    """
    ended = text.rstrip()
    return ended if ended.rstrip(")\"'").endswith((".", "?", "!")) else f"{ended}."


def storable(
    text: str | None, limit_bytes: int | None = None, characters: str = EVERY, *, limit: int | None = None
) -> str | None:
    """Make an untrusted text fit a column: a message that cannot be stored could neither be kept nor acknowledged.

    Args:
        text: As it came.
        limit_bytes: The size of the column in bytes of UTF-8.
        characters: The character set of the connection: `EVERY`, `THREE_BYTES`, or a Python codec.
        limit: The size of the column in characters.

    Returns:
        The text, with escapes for NUL, lone surrogates and characters that the set lacks; cut to the column's size.

    Example:
        >>> storable("a\\0b", 255)
        'a\\\\0b'
        >>> storable("caf\u00e9 \u946b", 255, "iso8859-1")
        'caf\u00e9 \\\\u946b'
    """
    if text is None:
        return None
    if not text.isascii() or "\0" in text:
        text = text.replace("\0", "\\0")
        if characters == THREE_BYTES:
            text = _BEYOND_THREE_BYTES.sub(lambda found: f"\\U{ord(found[0]):08x}", text)
            characters = EVERY
        text = text.encode(characters, "backslashreplace").decode(characters)
    if limit is not None:
        text = text[:limit]
    if limit_bytes is not None and len(text) * 4 > limit_bytes:  # else no need to count
        text = text.encode()[:limit_bytes].decode("utf-8", "ignore")
    return text
