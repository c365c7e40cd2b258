"""Parses messages in the format of a broker's log, without librocketmq. Opens nothing; called by `ahead`.

The format is that of `MessageDecoder` in Apache RocketMQ, the same in 4.x and 5.x. Numbers are big-endian. With the
second of the two magic numbers, the length of the topic has two bytes.
"""

import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Final, NamedTuple

from exactly_once.clients import packed
from exactly_once.clients.rocketmq_properties import ORDERING_PROPERTY, named_properties
from exactly_once.clients.values import keys_of, moment_of, text_of
from exactly_once.errors import BadBody
from exactly_once.message import Message, with_former
from exactly_once.transports import packed_messages

__all__ = ["Stored", "read_stored", "stored_in"]

_MAGIC_2: Final = 0xDAA320AB
_PACKED: Final = 0x1  # a flag: the body is compressed
_BORN_V6, _STORED_V6 = 0x10, 0x20  # flags: an address has 16 bytes
_HEAD: Final = struct.Struct(">IIIIIQQI")  # size, magic, checksum, queue, flag, offset, position in the log, flags
_V4, _V6 = 8, 20  # bytes of an address with its port


class Stored(NamedTuple):
    """One message."""

    topic: bytes
    offset: int
    is_packed: bool
    body: bytes
    properties: Mapping[bytes, bytes]
    born_ms: int
    place: str
    """Its name if its producer gave it no id."""

    @property
    def deadly(self) -> bool:
        """Whether it would crash librocketmq, which unpacks every packed body as zlib."""
        if not self.is_packed:
            return False
        try:
            packed.unpacked("zlib", self.body)
        except BadBody:
            return True
        return False

    @property
    def tag(self) -> str | None:
        """Its tag."""
        return text_of(self.properties.get(b"TAGS")) or None


def stored_in(data: bytes) -> Iterator[Stored]:
    """Yield the messages of a broker's answer."""
    start = 0
    while start < len(data):
        size, magic, _, _, _, offset, physical, flags = _HEAD.unpack_from(data, start)
        at = start + _HEAD.size
        (born_ms,) = struct.unpack_from(">Q", data, at)
        at += 8 + (_V6 if flags & _BORN_V6 else _V4) + 8
        host = data[at : at + (_V6 if flags & _STORED_V6 else _V4)]
        at += len(host) + 4 + 8
        (length,) = struct.unpack_from(">I", data, at)
        body = data[at + 4 : at + 4 + length]
        at += 4 + length
        width = 2 if magic == _MAGIC_2 else 1
        length = int.from_bytes(data[at : at + width], "big")
        topic = data[at + width : at + width + length]
        at += width + length
        (length,) = struct.unpack_from(">H", data, at)
        pairs = (pair.partition(b"\1") for pair in data[at + 2 : at + 2 + length].split(b"\2") if pair)
        properties = {name: value for name, _, value in pairs}
        place = (host + struct.pack(">Q", physical)).hex().upper()
        yield Stored(topic, offset, bool(flags & _PACKED), body, properties, born_ms, place)
        start += size


def read_stored(stored: Stored, inside: Callable[[str], str], also: tuple[str, ...]) -> tuple[Message, BadBody | None]:
    """Return the message as librocketmq would have given it to us; or with its body as it came, and the reason.

    Args:
        stored: As the log has it.
        inside: Converts the broker's name of a topic to ours.
        also: Property names to read from messages of producers other than ours.
    """

    def value(name: str) -> bytes | None:
        return stored.properties.get(name.encode())

    keys = value("KEYS") or b""
    message = Message(
        inside((value("RETRY_TOPIC") or stored.topic).decode("utf-8", "replace")),
        stored.body,
        tag=stored.tag,
        key=keys_of(keys) or None,
        ordering_key=text_of(value(ORDERING_PROPERTY)) or None,
        properties=named_properties(value, also),
        message_id=text_of(value("UNIQ_KEY")) or stored.place,
        born_at=moment_of(stored.born_ms),
    )
    message = with_former(message, keys)
    if not stored.is_packed:
        return message, None
    return packed_messages.unpack(packed_messages.mark_unread(message, packed.named(stored.body)))
