"""Bodies as RocketMQ's Java client packs them, unpacked where the package for it is installed; else kept as they came.

A message whose body cannot be read is still a message: a transport hands it out with its bytes and with what is wrong, its
handlers record it, and the broker is told that it is done. `UNREAD_PROPERTY` among its properties says so for later: the pump
unpacks it then, if it can. Called by the RocketMQ transports and by the pump. Pure, but for the import of a package.

Java's client packs bodies of more than 4 KiB: by zlib, or by what `rocketmq.message.compressType` names. LZ4 and ZSTD are whole
frames, which begin with their own four bytes: https://github.com/lz4/lz4/blob/dev/doc/lz4_Frame_format.md, RFC 8878.
"""

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from types import MappingProxyType
from typing import Final

from exactly_once.error_words import words_of
from exactly_once.errors import BadBody, MissingExtra
from exactly_once.message import Message
from exactly_once.rocketmq_properties import UNREAD_PROPERTY

__all__ = ["MOST_BYTES", "named", "opened", "unpacked", "unread"]

MOST_BYTES: Final = 128 * 1024 * 1024
"""A body that grows beyond is not unpacked: a few bytes may stand for all memory there is."""
_FRAMES: Final[Mapping[str, bytes]] = MappingProxyType({"lz4": b"\x04\x22\x4d\x18", "zstd": b"\x28\xb5\x2f\xfd"})
_PIECE: Final = 1024
_UNREADABLE: Final = "The body cannot be unpacked ({why}); it is kept as it came."


def named(body: bytes) -> str | None:
    """Return the name of the compression whose frame this is; None if it is neither LZ4's nor ZSTD's."""
    start = body[:4]
    return next((name for name, magic in _FRAMES.items() if start == magic), None)


def unpacked(name: str, body: bytes) -> bytes:
    """Return a body unpacked.

    Args:
        name: "lz4" or "zstd".
        body: As it came.

    Raises:
        BadBody: It is damaged, or too long, or the package for it is not installed; the sentence says which.
    """
    try:
        found, whole = {"lz4": _lz4, "zstd": _zstd}[name](body)
    except ImportError:
        missing = MissingExtra(f"A body packed by {name.upper()}", "compression")
        raise BadBody(
            f"{missing}. It is kept as it came. Once that is installed: exactly-once failures requeue"
        ) from None
    except Exception as error:  # of the package's own class
        raise BadBody(_UNREADABLE.format(why=f"{name.upper()}: {words_of(error)}")) from error
    if len(found) > MOST_BYTES:
        raise BadBody(_UNREADABLE.format(why=f"{name.upper()}: it has more than {MOST_BYTES} bytes"))
    if not whole:
        raise BadBody(_UNREADABLE.format(why=f"{name.upper()}: its end is missing"))
    return found


def unread(message: Message, name: str) -> Message:
    """Return a message marked as one whose body is not read.

    Args:
        message: With its body as it came.
        name: The compression, or another word for what is wrong.
    """
    return replace(message, properties={**message.properties, UNREAD_PROPERTY: name})


def opened(message: Message) -> tuple[Message, BadBody | None]:
    """Return a kept message with its body read; or as it is, and why it cannot be.

    Args:
        message: As the failure store keeps it.
    """
    name = message.properties.get(UNREAD_PROPERTY)
    if name is None:
        return message, None
    if name not in _FRAMES or message.body is None:
        return message, BadBody(_UNREADABLE.format(why=name))
    try:
        body = unpacked(name, message.body)
    except BadBody as error:
        return message, error
    kept = {each: value for each, value in message.properties.items() if each != UNREAD_PROPERTY}
    return replace(message, body=body, properties=kept), None


def _lz4(body: bytes) -> tuple[bytes, bool]:
    reader = import_module("lz4.frame").LZ4FrameDecompressor()
    return reader.decompress(body, MOST_BYTES + 1), reader.eof


def _zstd(body: bytes) -> tuple[bytes, bool]:
    reader = import_module("zstandard").ZstdDecompressor().decompressobj()
    parts: list[bytes] = []
    size = 0
    # Java's client writes frames that do not tell their size, and this call has no limit: so piece by piece
    for start in range(0, len(body), _PIECE):
        parts.append(reader.decompress(body[start : start + _PIECE]))
        size += len(parts[-1])
        if reader.eof or size > MOST_BYTES:
            break
    return b"".join(parts), reader.eof
