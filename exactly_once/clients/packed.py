"""Unpacks packed bodies of RocketMQ if the package for it is installed; else keeps them as they came.

A message whose body cannot be read is still a message. A transport hands it out with its bytes and with the reason, its
handlers record it, and it is acknowledged. Its `unread` field remembers the packing: the pump unpacks the body later, if it
can. Called by the RocketMQ transports and by the pump. Pure, except for the import of a package.

Java's client packs bodies of more than 4 KiB, with zlib or with the method that `rocketmq.message.compressType` names. Clients of
RocketMQ 5 use gzip, too. All but zlib write frames, which begin with a known magic number. A body may have several frames, which
are read as Java reads them: https://github.com/lz4/lz4/blob/dev/doc/lz4_Frame_format.md, RFC 8878, RFC 1952. For zlib this reads
one stream, and ignores bytes after it.
"""

import zlib
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from types import MappingProxyType
from typing import Any, Final

from exactly_once.errors import BadBody, MissingExtra
from exactly_once.exceptions.words import words_of

__all__ = ["MOST_BYTES", "READERS", "UNREADABLE", "named", "unpacked"]

MOST_BYTES: Final = 128 * 1024 * 1024
"""A body that would become larger is not unpacked: a few bytes can expand to fill all memory."""
_FRAMES: Final[Mapping[str, bytes]] = MappingProxyType(
    {"lz4": b"\x04\x22\x4d\x18", "zstd": b"\x28\xb5\x2f\xfd", "gzip": b"\x1f\x8b"}
)
_ZLIB: Final = "zlib"
_GZIP_WINDOW: Final = 16 + zlib.MAX_WBITS
# Frames need not state their size, and no package limits the output of ZSTD. So we feed it piece by piece: each gives
# at most 32 MiB.
# After the end of a frame only the rest of a piece is copied: a body may have half a million frames.
_PIECE: Final = 1024
UNREADABLE: Final = "The body cannot be unpacked ({why}); it is kept as it came."


def named(body: bytes) -> str:
    """Return the name of a body's compression: by its first bytes for frames, else zlib, which has no certain first bytes.

    Example:
        >>> named(b"\x28\xb5\x2f\xfd..."), named(b"x\x9c...")
        ('zstd', 'zlib')
    """
    return next((name for name, magic in _FRAMES.items() if body.startswith(magic)), _ZLIB)


def unpacked(name: str, body: bytes) -> bytes:
    """Return a body unpacked.

    Args:
        name: "lz4", "zstd", "gzip" or "zlib".
        body: As it came.

    Raises:
        BadBody: It is damaged, or too long, or the package for it is not installed; the sentence says which.
    """
    try:
        return _read(READERS[name](), body, one=name == _ZLIB)
    except ImportError:
        missing = MissingExtra(f"A body packed by {name.upper()}", "compression")
        raise BadBody(
            f"{missing}. It is kept as it came. Once that is installed: exactly-once failures requeue"
        ) from None
    except Exception as error:  # of the package's own class
        raise BadBody(UNREADABLE.format(why=f"{name.upper()}: {words_of(error)}")) from error


def _read(reader_of_one: Callable[[], Any], body: bytes, *, one: bool) -> bytes:
    """Return the contents of all frames of a body; with `one`, of the first frame, ignoring bytes after it."""
    parts: list[bytes] = []
    size = 0
    reader = reader_of_one()
    for start in range(0, len(body), _PIECE):
        rest = body[start : start + _PIECE]
        while rest:
            if reader.eof:
                if one:
                    return b"".join(parts)
                reader = reader_of_one()
            parts.append(reader.decompress(rest))
            size += len(parts[-1])
            if size > MOST_BYTES:
                raise ValueError(f"it has more than {MOST_BYTES} bytes")
            rest = (reader.unused_data or b"") if reader.eof else b""
    if not reader.eof:
        raise ValueError("its end is missing")
    return b"".join(parts)


def _lz4() -> Callable[[], Any]:
    reader: Callable[[], Any] = import_module("lz4.frame").LZ4FrameDecompressor
    return reader


def _zstd() -> Callable[[], Any]:
    reader: Callable[[], Any] = import_module("zstandard").ZstdDecompressor().decompressobj
    return reader


READERS: Final[Mapping[str, Callable[[], Callable[[], Any]]]] = MappingProxyType(
    {
        "lz4": _lz4,
        "zstd": _zstd,
        "gzip": lambda: partial(zlib.decompressobj, _GZIP_WINDOW),
        _ZLIB: lambda: zlib.decompressobj,
    }
)
"""For each compression, a function that returns a maker of readers for one frame."""
