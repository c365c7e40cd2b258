"""Small pieces of error sentences: a stranger's text made safe to print, and what was probably meant. Pure."""

from collections.abc import Iterable

__all__ = ["escaped", "listed", "probably", "storable"]


def escaped(text: str, limit: int = 60) -> str:
    """Cut a stranger's text and escape what could break or forge a log line; readable letters of any script stay.

    Example:
        >>> escaped("A-1" + chr(10) + "INFO all is well")
        'A-1\\\\nINFO all is well'
    """
    cut = text[:limit]
    if not cut.isprintable():
        cut = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)
    return cut + "..." if len(text) > limit else cut


def listed(names: Iterable[str], *, most: int = 12) -> str:
    """Names for a sentence, sorted, the rest counted.

    Example:
        >>> listed(["b", "a"])
        'a, b'
    """
    every = sorted(names)
    rest = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + rest if every else "none"


def probably(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean ...?" for a misspelled name, or nothing when no known name is close.

    Example:
        >>> probably("topik", ["topic", "tag"])
        " Did you mean 'topic'?"
    """
    from difflib import get_close_matches  # costs an import that only errors need

    folded = {candidate.replace("_", "").lower(): candidate for candidate in known}
    close = get_close_matches(name.replace("_", "").lower(), folded, n=2, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(folded[match]) for match in close)}?" if close else ""


def storable(text: str | None, limit_bytes: int) -> str | None:
    """Make a broker's text fit a column: a message that cannot be stored could neither be kept nor acknowledged.

    Args:
        text: As it came.
        limit_bytes: What the column holds, in bytes of UTF-8.

    Returns:
        The text with NUL and lone surrogates written as escapes; cut, by bytes, where it is longer than that.

    Example:
        >>> storable("a\\0b", 255)
        'a\\\\0b'
    """
    if text is None or (text.isascii() and len(text) <= limit_bytes and "\0" not in text):  # nearly every one
        return text
    data = text.replace("\0", "\\0").encode("utf-8", "backslashreplace")
    return data[:limit_bytes].decode("utf-8", "ignore")
