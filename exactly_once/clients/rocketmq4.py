"""Reads a message of `rocketmq-client-python`, with its whole body. Opens nothing; imports no client library.

The client's own `.body` is a C string: it ends at the first NUL byte, and the rest is silently lost. Called by
`Message.from_rocketmq4` and by the rocketmq4 transport.

There are two ways to learn the length. Newer builds of librocketmq have `GetMessageBodyLength`. Older ones have no such
function, but keep bodies in the reference-counted `std::string` of the old GNU ABI, whose length is 24 bytes before
its characters. We trust neither: each is first tested on bodies of our own, and a library that fails both is refused.
"""

import ctypes
import sys
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, Final

from exactly_once.clients.rocketmq_properties import ORDERING_PROPERTY, named_properties
from exactly_once.clients.values import keys_of, moment_of, text_of
from exactly_once.errors import ConfigurationError

__all__ = ["body_reader", "fields_of", "whole_body"]

# Length, capacity and reference count come before the characters, one machine word each.
_LENGTH_BEFORE_TEXT: Final = 3 * ctypes.sizeof(ctypes.c_size_t)
_SAMPLES: Final = (b"\0", b"plain", b"a\0b\0", bytes(range(256)) * 40)

BodyOf = Callable[[int], bytes]
"""Reads the body of the C message at this address."""


def fields_of(received: Any, properties: Iterable[str]) -> tuple[dict[str, Any], Any]:
    """Return the fields for a message of ours, and its keys as they came.

    Args:
        received: The client's own `ReceivedMessage`, inside the callback that received it.
        properties: Names to look for, beside those that our producer sent.

    Raises:
        ConfigurationError: This build of librocketmq does not tell how long a body is.
        AttributeError: It is no such message.
    """
    keys = received.keys
    fields = {
        "topic": received.topic,
        "body": whole_body(received),
        "tag": text_of(received.tags) or None,  # this client returns an empty tag for no tag
        "key": keys_of(keys) or None,
        "ordering_key": text_of(received.get_property(ORDERING_PROPERTY)) or None,
        "properties": dict(named_properties(received.get_property, properties)),
        "message_id": received.id,
        "born_at": moment_of(received.born_timestamp),
        "attempt": 1 + received.reconsume_times,
    }
    return fields, keys


def whole_body(message: Any) -> bytes:
    """Return all bytes of a received message's body, including NUL bytes and everything after them.

    Args:
        message: A `ReceivedMessage` of `rocketmq.client`, inside the callback that received it; or anything with `.body`.

    Returns:
        The body; empty if it has none.

    Raises:
        ConfigurationError: This build of librocketmq does not tell how long a body is.
    """
    handle = getattr(message, "_handle", None)
    ffi = sys.modules.get("rocketmq.ffi")
    if handle is None or ffi is None:
        return bytes(message.body or b"")
    return body_reader(ffi.dll._name)(handle)  # noqa: SLF001  (where ctypes keeps a library's path)


@lru_cache(maxsize=4)
def body_reader(library: str) -> BodyOf:
    """Return a reader of bodies for one librocketmq, after a test that it reads them whole.

    Args:
        library: The path from which it was loaded.

    Raises:
        ConfigurationError: No way of learning a body's length passed the test.
    """
    # PyDLL keeps the interpreter's lock during a call. These calls take well under a microsecond; a thread that releases the lock
    # in a busy process must queue for it again behind every other thread.
    dll = ctypes.PyDLL(library)
    for name, arguments in (
        ("CreateMessage", [ctypes.c_char_p]),
        ("GetMessageBody", [ctypes.c_void_p]),
    ):
        getattr(dll, name).argtypes = arguments
        getattr(dll, name).restype = ctypes.c_void_p
    dll.SetByteMessageBody.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int]
    dll.DestroyMessage.argtypes = [ctypes.c_void_p]
    for reader in _readers(dll):
        if _gives_back_what_was_put_in(dll, reader):
            return reader
    raise ConfigurationError(
        f"The librocketmq at {library} does not tell how long a message's body is, so bodies with a NUL byte would be "
        "cut short without an error; nothing was started. Install a build that has GetMessageBodyLength, or on x86-64 "
        "Linux the one inside the wheel rocketmq==0.4.4."
    )


def _readers(dll: ctypes.PyDLL) -> list[BodyOf]:
    start_of = dll.GetMessageBody
    at, number_at = ctypes.string_at, ctypes.c_size_t.from_address

    def by_old_string(handle: int) -> bytes:
        start = start_of(handle)
        return at(start, number_at(start - _LENGTH_BEFORE_TEXT).value) if start else b""

    try:
        length_of = dll.GetMessageBodyLength
    except AttributeError:
        return [by_old_string]
    length_of.argtypes, length_of.restype = [ctypes.c_void_p], ctypes.c_int

    def by_function(handle: int) -> bytes:
        start = start_of(handle)
        return at(start, length_of(handle)) if start else b""

    return [by_function, by_old_string]


def _gives_back_what_was_put_in(dll: ctypes.PyDLL, reader: BodyOf) -> bool:
    for sample in _SAMPLES:
        message = dll.CreateMessage(b"self-test")
        try:
            dll.SetByteMessageBody(message, sample, len(sample))
            # The length first: a wrong one may be any number, and we must not read so many bytes.
            if _length(dll, message, reader) != len(sample) or reader(message) != sample:
                return False
        finally:
            dll.DestroyMessage(message)
    return True


def _length(dll: ctypes.PyDLL, message: int, reader: BodyOf) -> int:
    if reader.__name__ == "by_function":
        return int(dll.GetMessageBodyLength(message))
    start = dll.GetMessageBody(message)
    return ctypes.c_size_t.from_address(start - _LENGTH_BEFORE_TEXT).value if start else -1
