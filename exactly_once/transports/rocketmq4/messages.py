"""Converts between librocketmq's messages and ours. Opens and sends nothing; called by the rocketmq4 consumer and producer.

librocketmq's C interface reads a property by name and cannot list properties. So the names of a message's properties travel
in another property, see `clients.rocketmq_properties`: a Java consumer finds the properties as usual.
Of another producer's messages we see only the properties that are named in `properties=` of the URL, and those that this
package itself writes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Final

from exactly_once.clients.rocketmq_properties import ORDERING_PROPERTY, internal, named_properties, with_names
from exactly_once.clients.values import keys_of, moment_of, text_of
from exactly_once.errors import ConfigurationError
from exactly_once.message import Message, with_former
from exactly_once.transports.rocketmq4.library import Library

__all__ = [
    "DELAY_LEVELS",
    "MAX_BODY_BYTES",
    "Names",
    "delay_level",
    "levels",
    "message_reader",
    "native_message",
    "queue_of",
]

MAX_BODY_BYTES: Final = 4 * 1024 * 1024  # the broker's default maxMessageSize
MAX_PROPERTIES_BYTES: Final = 32767  # a signed 16-bit length in the protocol

_S, _M, _H = timedelta(seconds=1), timedelta(minutes=1), timedelta(hours=1)
DELAY_LEVELS: Final[tuple[timedelta, ...]] = (
    *(n * _S for n in (1, 5, 10, 30)),
    *(n * _M for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 20, 30)),
    *(n * _H for n in (1, 2)),
)
"""The default of the broker's `messageDelayLevel`; the first is level 1. This protocol has no other delays."""
_UNITS: Final = {"s": _S, "m": _M, "h": _H, "d": 24 * _H}

# They end a name, a value or a property in the protocol, or a string in C.
_SEPARATORS: Final = ("\0", "\1", "\2")


@dataclass(frozen=True, slots=True)
class Names:
    """The names of topics and groups on the broker: the client adds and removes a prefix, the namespace."""

    namespace: str | None = None

    def outside(self, name: str) -> str:
        """Return the broker's name for ours."""
        return f"{self.namespace}%{name}" if self.namespace else name

    def inside(self, name: str) -> str:
        """Return our name for the broker's."""
        return name.removeprefix(f"{self.namespace}%") if self.namespace else name


def message_reader(library: Library, names: Names, properties: Sequence[str]) -> Callable[[int], Message]:
    """Return a function that converts a C message, inside its callback, to ours.

    Args:
        library: The loaded library.
        names: The namespace.
        properties: Property names to read from messages of producers other than ours.
    """
    call, body = library.call, library.body
    topic_of, tags_of, keys_of_message = call.GetMessageTopic, call.GetMessageTags, call.GetMessageKeys
    id_of, born_of, property_of = call.GetMessageId, call.GetMessageBornTimestamp, call.GetMessageProperty
    always = tuple(properties)

    @lru_cache(maxsize=256)
    def topic_name(raw: bytes) -> str:
        return names.inside(raw.decode("utf-8", "replace"))

    def read(handle: int) -> Message:
        def value(name: str) -> bytes | None:
            raw: bytes | None = property_of(handle, name.encode())
            return raw

        keys = keys_of_message(handle)
        message = Message(
            topic_name(topic_of(handle)),
            body(handle),
            tag=text_of(tags_of(handle)) or None,  # the library returns an empty tag for no tag
            key=keys_of(keys) or None,
            ordering_key=text_of(value(ORDERING_PROPERTY)) or None,
            properties=named_properties(value, always),
            message_id=text_of(id_of(handle)) or None,
            born_at=moment_of(born_of(handle)),
        )
        return with_former(message, keys)

    return read


def native_message(library: Library, names: Names, message: Message, level: int) -> int:
    """Return a new C message with the content of ours; the caller must destroy it.

    Raises:
        ValueError: Something in it cannot be carried by this broker.
    """
    call = library.call
    body = message.body or b""
    if not body:
        raise ValueError(f"RocketMQ does not carry a message without a body (topic {message.topic}).")
    if len(body) > MAX_BODY_BYTES:
        raise ValueError(f"The body for topic {message.topic} has {len(body)} bytes; at most {MAX_BODY_BYTES} fit.")
    properties = dict(_checked_properties(message))
    if message.ordering_key is not None:
        properties[ORDERING_PROPERTY] = message.ordering_key
    handle: int = call.CreateMessage(_wire("topic", names.outside(message.topic)))
    try:
        library.check("SetByteMessageBody", call.SetByteMessageBody(handle, body, len(body)))
        if message.tag is not None:
            library.check("SetMessageTags", call.SetMessageTags(handle, _wire("tag", message.tag)))
        if message.key is not None:
            library.check("SetMessageKeys", call.SetMessageKeys(handle, _wire("key", message.key)))
        for name, value in properties.items():
            status = call.SetMessageProperty(handle, _wire("property name", name), _wire(f"property {name}", value))
            library.check("SetMessageProperty", status)
        if level:
            library.check("SetDelayTimeLevel", call.SetDelayTimeLevel(handle, level))
    except BaseException:
        # Else librocketmq never frees it: 98 MB for a thousand messages of 100 kB.
        call.DestroyMessage(handle)
        raise
    return handle


def levels(text: str) -> tuple[timedelta, ...]:
    """Return the delay levels of a text like the broker's `messageDelayLevel`; commas are allowed, too.

    Raises:
        ConfigurationError: It is not a list of whole numbers, each with s, m, h or d.

    Example:
        >>> levels("1s,2m")
        (datetime.timedelta(seconds=1), datetime.timedelta(seconds=120))
    """
    parts = text.replace(",", " ").split()
    if not parts or not all(part[-1] in _UNITS and part[:-1].isascii() and part[:-1].isdigit() for part in parts):
        raise ConfigurationError(
            f"The option delay_levels must be the broker's messageDelayLevel, such as 1s,5s,1m,2h, not {text!r}."
        )
    return tuple(int(part[:-1]) * _UNITS[part[-1]] for part in parts)


def delay_level(delay: timedelta | None, table: Sequence[timedelta] = DELAY_LEVELS) -> int:
    """Return the smallest level that waits at least that long; 0 for no delay.

    Raises:
        ValueError: It is longer than the longest level.

    Example:
        >>> delay_level(timedelta(seconds=7))
        3
    """
    if delay is None or delay <= timedelta(0):
        return 0
    fitting = [(length, level) for level, length in enumerate(table, start=1) if length >= delay]
    if not fitting:
        raise ValueError(f"RocketMQ's delay levels end at {max(table)}; a delay of {delay} cannot be asked for.")
    return min(fitting)[1]


@lru_cache(maxsize=65536)
def queue_of(ordering_key: str, queues: int) -> int:
    """Return the queue of an ordering key: the one that the Java client's `SelectMessageQueueByHash` chooses for that string.

    Example:
        >>> queue_of("order-1", 4)
        2
    """
    units = ordering_key.encode("utf-16-be", "surrogatepass")
    hashed = 0
    for high, low in zip(units[::2], units[1::2], strict=True):
        hashed = (31 * hashed + (high << 8 | low)) & 0xFFFFFFFF
    signed = hashed - (1 << 32) if hashed & 0x80000000 else hashed
    # Java's remainder has the sign of the dividend; that client then takes its absolute value.
    return abs(signed) % queues


def _checked_properties(message: Message) -> dict[str, str]:
    if not message.properties:
        return {}
    for name in message.properties:
        if not name or internal(name):
            raise ValueError(f"The property name {name!r} is RocketMQ's own; give it another one.")
    every = with_names(message.properties)
    if sum(len(n.encode()) + len(v.encode()) + 2 for n, v in every.items()) > MAX_PROPERTIES_BYTES:
        raise ValueError(f"The properties of a message for {message.topic} exceed {MAX_PROPERTIES_BYTES} bytes.")
    return every


def _wire(what: str, text: str) -> bytes:
    if any(separator in text for separator in _SEPARATORS):
        raise ValueError(f"The {what} {text!r} contains a character that RocketMQ uses as separator (U+0000 to 2).")
    return text.encode()
