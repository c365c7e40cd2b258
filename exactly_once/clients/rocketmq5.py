"""Reads a message of `rocketmq-python-client` (RocketMQ 5, gRPC).

Imports no client library. Called by `Message.from_rocketmq`.
"""

from typing import Any

from exactly_once.clients.rocketmq_properties import listed_properties
from exactly_once.clients.values import keys_of, moment_of, text_of
from exactly_once.errors import BadBody

__all__ = ["fields_of"]


def fields_of(received: Any) -> tuple[dict[str, Any], str]:
    """Return the fields for a message of ours, and its keys as they came.

    Args:
        received: The client's own `Message`.

    Raises:
        BadBody: The body does not match its checksum.
        AttributeError: It is no such message.
    """
    if received.corrupted:
        raise BadBody(f"The body of message {received.message_id} of {received.topic} does not match its checksum.")
    keys = received.keys  # a set, nearly always of one key
    fields = {
        "topic": received.topic,
        "body": received.body,
        "tag": text_of(received.tag),
        "key": keys_of(keys) or None,
        "ordering_key": text_of(received.message_group),
        "properties": listed_properties(received.properties) if received.properties else {},
        "message_id": received.message_id,
        "born_at": moment_of(received.born_timestamp),
        "attempt": received.delivery_attempt or 1,
    }
    return fields, " ".join(sorted(keys))
