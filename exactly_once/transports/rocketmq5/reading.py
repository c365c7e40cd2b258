"""Makes deliveries of received messages. Never raises: an unreadable message is handed out as it came, marked as unread.

The client's own conversion verifies checksums. But it would unpack zlib bodies to any length; it knows neither LZ4 nor ZSTD,
which Java's client writes; and it raises for the whole batch if one body is bad. So bodies are unpacked here. Called by
the consumer.
"""

from dataclasses import replace
from typing import Any, Final

from rocketmq import Message as ReceivedMessage
from rocketmq.grpc_protocol import Encoding

from exactly_once.clients import packed
from exactly_once.errors import BadBody
from exactly_once.message import Message, with_former
from exactly_once.transports import packed_messages
from exactly_once.transports.contract import Delivery
from exactly_once.transports.rocketmq5.group_client import Grip, describe

__all__ = ["delivery"]

_DAMAGED: Final = "damaged"


class _Unchecked:
    """A received message whose body is taken as it is."""

    corrupted = False

    def __init__(self, received: Any) -> None:
        self._received = received

    def __getattr__(self, name: str) -> Any:
        return getattr(self._received, name)


def delivery(raw: Any, topic: str, grip: Grip) -> Delivery:
    """Return a delivery of one message.

    Args:
        raw: The message in the protocol's form.
        topic: Its name for handlers, without its namespace, which the proxy may or may not have removed.
        grip: The receipt handle and its endpoint.
    """
    # The proxy reports GZIP for every packed body.
    is_packed = raw.system_properties.body_encoding == Encoding.GZIP
    try:
        # The client would unpack to any length; and the checksum is that of the packed body.
        message = _message(raw, ReceivedMessage().fromProtobuf(_as_it_came(raw) if is_packed else raw), topic)
    except Exception as error:
        return _damaged(raw, topic, grip, error)
    if not is_packed:
        return Delivery(message, grip)
    message, unread = packed_messages.unpack(packed_messages.mark_unread(message, packed.named(raw.body)))
    return Delivery(message, grip, unread=unread)


def _damaged(raw: Any, topic: str, grip: Grip, error: Exception) -> Delivery:
    reason = error if isinstance(error, BadBody) else BadBody(f"The message cannot be read: {describe(error)}.")
    try:
        received = ReceivedMessage().fromProtobuf(_as_it_came(raw))
        message = _message(raw, _Unchecked(received), topic)
    except Exception:  # not even its properties can be read: its id and its bytes are kept
        message = Message(topic, raw.body, message_id=grip.message_id)
    return Delivery(packed_messages.mark_unread(message, _DAMAGED), grip, unread=reason)


def _as_it_came(raw: Any) -> Any:
    plain = type(raw)()
    plain.CopyFrom(raw)
    plain.system_properties.body_encoding = Encoding.IDENTITY
    return plain


def _message(raw: Any, received: Any, topic: str) -> Message:
    message = Message.from_rocketmq(received)
    if message.topic != topic:
        message = replace(message, topic=topic)
    keys = raw.system_properties.keys
    # Several keys were written in the sender's order, which the client's set loses.
    return with_former(message, " ".join(keys)) if len(keys) > 1 else message
