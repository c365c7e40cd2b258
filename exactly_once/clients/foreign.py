"""What a broker's client hands out, as text and as a time: never two different things as one, never an error. Pure.

Keys, tags and headers are bytes to a broker, and ours are texts. Replacing what is no UTF-8 would make two keys one, and
the second message would be taken for a duplicate of the first. Called by everything that reads a message of a client.
"""

from datetime import UTC, datetime
from typing import Any, Final

__all__ = ["AS_HEX", "formerly", "keys_of", "moment_of", "text_of"]

AS_HEX: Final = "\ufdd0"
"""Unicode keeps this one for a program's own use: no text that is meant to be read begins with it."""
_END_MS: Final = 253_402_300_800_000  # the year 10000, which neither Python nor a database can write


def text_of(raw: Any) -> Any:
    """Return what a client handed out for a key, a tag or a header, as text.

    Args:
        raw: The bytes; or a text that the client has made of them. Anything else is returned as it is: it is refused, by
            its name, where a message is made of it.

    Returns:
        The text of UTF-8. What is no UTF-8 becomes U+FDD0 and its bytes in hexadecimal; so does a text that begins with
        U+FDD0 itself, and thus no two inputs have one text.

    Example:
        >>> text_of(b"A-1"), text_of(bytes([0x8a, 0x91]))
        ('A-1', '\\ufdd08a91')
    """
    if isinstance(raw, bytes):
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            return AS_HEX + raw.hex()
        if text.isascii() or not text.startswith(AS_HEX):
            return text
        return AS_HEX + raw.hex()
    if isinstance(raw, str) and raw.startswith(AS_HEX):
        return AS_HEX + raw.encode("utf-8", "surrogatepass").hex()
    return raw


def keys_of(raw: Any) -> Any:
    """Return RocketMQ's keys of one message as one text: in order, each once, a blank between two.

    Clients hand them out as a text in the sender's order, or as a set, which has none. Spelled alike by every reader, a message
    has one key, whichever client brings it.

    Args:
        raw: The text or its bytes, with blanks between keys; or the keys. Anything else is returned as it is.

    Example:
        >>> keys_of(b"order-7 buyer-3"), keys_of({"order-7", "buyer-3"}), keys_of(b"order-7 ")
        ('buyer-3 order-7', 'buyer-3 order-7', 'order-7')
    """
    if isinstance(raw, bytes):
        if b" " not in raw:
            return text_of(raw)  # what nearly every message has
        parts: Any = raw.split(b" ")
    elif isinstance(raw, str):
        parts = raw.split(" ")
    elif isinstance(raw, (set, frozenset, list, tuple)):
        if len(raw) == 1:
            (raw,) = raw
            return keys_of(raw)
        parts = [part for each in raw for part in each.split(" ")]
    else:
        return raw
    return " ".join(sorted({text_of(part) for part in parts if part}))


def formerly(text: str) -> str:
    """Return what `text_of` gave in the release before: of bytes that are no UTF-8 a text that others shared.

    Example:
        >>> formerly(text_of(bytes([0x8a, 0x91]))) == formerly(text_of(bytes([0x8b, 0x92])))
        True
    """
    if not text.startswith(AS_HEX):
        return text
    try:
        return bytes.fromhex(text[1:]).decode("utf-8", "replace")
    except ValueError:  # of no client: somebody made it by hand
        return text


def moment_of(milliseconds: Any) -> datetime | None:
    """Return the time a client handed out; None for what is none: nothing, zero, negative, or past the year 9999.

    Args:
        milliseconds: Since 1970. A producer that counts in microseconds names a year far beyond any calendar.

    Example:
        >>> moment_of(1_700_000_000_500), moment_of(1_700_000_000_500_000)
        (datetime.datetime(2023, 11, 14, 22, 13, 20, 500000, tzinfo=datetime.timezone.utc), None)
    """
    if isinstance(milliseconds, (int, float)) and 0 < milliseconds < _END_MS:
        return datetime.fromtimestamp(milliseconds / 1000, UTC)
    return None
