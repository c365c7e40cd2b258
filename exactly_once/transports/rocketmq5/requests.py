"""Builds RocketMQ's send requests: which messages share a request, and its content. Pure; called by the producer.

The broker stores the messages of one request together, in one queue, or none of them. Only messages of one topic without
an ordering key and without a delay may share a request.
"""

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, Final

from rocketmq.grpc_protocol import Encoding, MessageType, SendMessageRequest
from rocketmq.v5.util import MessageIdCodec, Misc

from exactly_once.clients.rocketmq_properties import with_names
from exactly_once.message import Message
from exactly_once.transports.rocketmq5.endpoints import Endpoints

__all__ = ["Job", "request_of", "together"]

MOST_TOGETHER: Final = 32  # the broker's default for one fetch; more were no faster
MOST_BYTES_TOGETHER: Final = 1024 * 1024  # the broker's limit of 4 MiB is on all bodies and properties of a request
_AROUND_A_BODY: Final = 512  # what the broker adds to a body: ids, addresses, times

Job = tuple[int, Message]
"""The message's index in the answer, and the message."""


def together(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Split the messages of one topic, none with an ordering key, into parts that each share a request."""
    part: list[Job] = []
    filled = 0
    for job in jobs:
        size = _size(job[1])
        if part and (len(part) == MOST_TOGETHER or filled + size > MOST_BYTES_TOGETHER):
            yield part
            part, filled = [], 0
        part.append(job)
        filled += size
    if part:
        yield part


def request_of(proxies: Endpoints, jobs: Sequence[Job], deliver_at: datetime | None) -> Any:
    """Return the request that sends these messages."""
    request = SendMessageRequest()
    for _, message in jobs:
        _fill(request.messages.add(), proxies, message, deliver_at)
    return request


def _fill(one: Any, proxies: Endpoints, message: Message, deliver_at: datetime | None) -> None:
    one.topic.name = proxies.named(message.topic)
    one.body = message.body
    if message.properties:
        # An empty value is dropped on the way, and its name with it.
        plain = all(message.properties.values())
        one.user_properties.update(message.properties if plain else with_names(message.properties))
    system = one.system_properties
    if message.tag:
        system.tag = message.tag
    if message.key:
        system.keys.append(message.key)
    system.message_id = MessageIdCodec().next_message_id()
    system.born_timestamp.GetCurrentTime()  # the client would cut it to whole seconds
    system.born_host = Misc.get_local_ip()
    system.body_encoding = Encoding.IDENTITY
    if message.ordering_key:
        system.message_group = message.ordering_key
        system.message_type = MessageType.FIFO
    elif deliver_at is not None:
        system.delivery_timestamp.FromDatetime(deliver_at)
        system.message_type = MessageType.DELAY
    else:
        system.message_type = MessageType.NORMAL


def _size(message: Message) -> int:
    texts = (message.topic, message.tag or "", message.key or "", *message.properties, *message.properties.values())
    # A character has at most 4 bytes. The limit is ours, and need not be exact.
    return _AROUND_A_BODY + len(message.body or b"") + 4 * sum(map(len, texts))
