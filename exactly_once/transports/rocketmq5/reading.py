"""Makes deliveries of what came off the wire. Never raises: a message that cannot be read is handed out as it came, and says so.

The client's own conversion checks sums. It would unpack what zlib has packed, to any length; it knows neither LZ4 nor ZSTD,
which Java's client writes; and it raises for the whole batch where one body is bad. So bodies are unpacked here. Called by
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
from exactly_once.transports.rocketmq5.session import Grip, describe

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
        raw: As it came off the wire.
        topic: As handlers know it, without its namespace, which the proxy may or may not have taken off.
        grip: What holds it.
    """
    # the proxy says GZIP of whatever is packed
    is_packed = raw.system_properties.body_encoding == Encoding.GZIP
    try:
        # the client would unpack to any length; and its sum is that of the packed body
        message = _message(raw, ReceivedMessage().fromProtobuf(_as_it_came(raw) if is_packed else raw), topic)
    except Exception as error:
        return _damaged(raw, topic, grip, error)
    if not is_packed:
        return Delivery(message, grip)
    message, unread = packed_messages.opened(packed_messages.unread(message, packed.named(raw.body)))
    return Delivery(message, grip, unread=unread)


def _damaged(raw: Any, topic: str, grip: Grip, error: Exception) -> Delivery:
    told = error if isinstance(error, BadBody) else BadBody(f"The message cannot be read: {describe(error)}.")
    try:
        received = ReceivedMessage().fromProtobuf(_as_it_came(raw))
        message = _message(raw, _Unchecked(received), topic)
    except Exception:  # not even its properties: what names it is kept, and its bytes
        message = Message(topic, raw.body, message_id=grip.message_id)
    return Delivery(packed_messages.unread(message, _DAMAGED), grip, unread=told)


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
    # several were spelled in the sender's order, which the client's set forgets
    return with_former(message, " ".join(keys)) if len(keys) > 1 else message
