"""Packed bodies of RocketMQ, unpacked where the package for it is installed; else kept as they came.

A message whose body cannot be read is still a message: a transport hands it out with its bytes and with what is wrong, its
handlers record it, and the broker is told that it is done. Its `unread` says so for later: the pump unpacks it then, if it
can. Called by the RocketMQ transports and by the pump. Pure, but for the import of a package.

Java's client packs bodies of more than 4 KiB: by zlib, or by what `rocketmq.message.compressType` names; clients of RocketMQ 5
pack by gzip, too. All but zlib write frames, which begin with bytes of their own, and a body may have several of them, which
are read as Java reads them: https://github.com/lz4/lz4/blob/dev/doc/lz4_Frame_format.md, RFC 8878, RFC 1952. Of zlib it reads
one stream, and leaves out what stands behind it.
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
"""A body that grows beyond is not unpacked: a few bytes may stand for all memory there is."""
_FRAMES: Final[Mapping[str, bytes]] = MappingProxyType(
    {"lz4": b"\x04\x22\x4d\x18", "zstd": b"\x28\xb5\x2f\xfd", "gzip": b"\x1f\x8b"}
)
_ZLIB: Final = "zlib"
_GZIP_WINDOW: Final = 16 + zlib.MAX_WBITS
# frames need not tell their size, and no package bounds what ZSTD makes of them: so piece by piece, each of 32 MiB at most.
# And of a piece alone is copied what stands behind a frame: a body may have half a million of them
_PIECE: Final = 1024
UNREADABLE: Final = "The body cannot be unpacked ({why}); it is kept as it came."


def named(body: bytes) -> str:
    """Return the name of what a body is packed by: of the frame it begins with, else zlib, which has no sure beginning.

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
    """Return what all frames of a body hold; or `one` of them, whatever stands behind it."""
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
"""By what each is read; of a name it returns what makes a reader of one frame."""
