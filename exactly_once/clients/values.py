"""Converts a broker client's values to text and time: never two different values to the same result, never an error. Pure.

Keys, tags and headers are bytes for a broker, and texts for us. If we replaced bytes that are not UTF-8, two
keys would become one, and the second message would be taken for a duplicate of the first. Called wherever a
client's message is read.
"""

from datetime import UTC, datetime
from typing import Any, Final

__all__ = ["AS_HEX", "formerly", "keys_of", "moment_of", "text_of"]

AS_HEX: Final = "\ufdd0"
"""A character that Unicode reserves for a program's own use: no readable text begins with it."""
_END_MS: Final = 253_402_300_800_000  # the year 10000, which neither Python nor a database can represent


def text_of(raw: Any) -> Any:
    """Return a client's key, tag or header as text.

    Args:
        raw: The bytes; or a text that the client has made of them. Any other value is returned unchanged: it is refused, by
            the field's name, when a message is made of it.

    Returns:
        The text, if it is UTF-8. Other bytes become U+FDD0 and their hexadecimal digits. So does a text that begins with
        U+FDD0 itself; thus no two inputs have the same text.

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
    """Return RocketMQ's keys of one message as one text: sorted, each once, separated by a blank.

    Clients return them as a text in the sender's order, or as a set, which has no order. With one spelling for
    all readers, a message has one key, whichever client received it.

    Args:
        raw: The text or its bytes, with blanks between keys; or the keys. Any other value is returned unchanged.

    Example:
        >>> keys_of(b"order-7 buyer-3"), keys_of({"order-7", "buyer-3"}), keys_of(b"order-7 ")
        ('buyer-3 order-7', 'buyer-3 order-7', 'order-7')
    """
    if isinstance(raw, bytes):
        if b" " not in raw:
            return text_of(raw)  # nearly every message has one key
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
    """Return what `text_of` returned in the previous release: bytes that are not UTF-8 became a text that other bytes shared.

    Example:
        >>> formerly(text_of(bytes([0x8a, 0x91]))) == formerly(text_of(bytes([0x8b, 0x92])))
        True
    """
    if not text.startswith(AS_HEX):
        return text
    try:
        return bytes.fromhex(text[1:]).decode("utf-8", "replace")
    except ValueError:  # not from a client: made by hand
        return text


def moment_of(milliseconds: Any) -> datetime | None:
    """Return a client's time. None if it is none: nothing, zero, negative, or past the year 9999.

    Args:
        milliseconds: Since 1970. A producer that counts in microseconds gives a year far beyond any calendar.

    Example:
        >>> moment_of(1_700_000_000_500), moment_of(1_700_000_000_500_000)
        (datetime.datetime(2023, 11, 14, 22, 13, 20, 500000, tzinfo=datetime.timezone.utc), None)
    """
    if isinstance(milliseconds, (int, float)) and 0 < milliseconds < _END_MS:
        return datetime.fromtimestamp(milliseconds / 1000, UTC)
    return None
