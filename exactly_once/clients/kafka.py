"""Reads a record of `confluent-kafka`, `aiokafka` or `kafka-python`.

Imports no client library. Called by `Message.from_kafka`.
"""

from typing import Any, Final

from exactly_once.clients.values import moment_of, text_of

__all__ = ["NO_RECORD", "fields_of"]

_SKIP: Final = "Skip it: if m is None or m.error(): continue"
NO_RECORD: Final = (
    "from_kafka takes one record that came, not {kind}: poll() of confluent-kafka returns None where nothing came in time, and"
    f" other methods return several. {_SKIP}"
)


def fields_of(received: Any) -> tuple[dict[str, Any], Any]:
    """Return the fields for a message of ours, and its key as it came.

    Args:
        received: The client's own `Message` or `ConsumerRecord`.

    Raises:
        ValueError: It is an error of the client, which confluent-kafka returns in the form of a message.
        AttributeError: It is no such record.
    """
    return _of_record(received) if not callable(received.topic) else _of_confluent(received)


def _of_confluent(received: Any) -> tuple[dict[str, Any], Any]:
    if (error := received.error()) is not None:
        raise ValueError(f"from_kafka was given no message but an error of the client: {error}. {_SKIP}")
    kind, moment_ms = received.timestamp()
    sent = received.key()
    key = text_of(sent)
    fields = {
        "topic": received.topic(),
        "body": received.value(),
        "key": key,
        "ordering_key": key,
        # `headers` is None if there are none, and a header's value may be None.
        "properties": {name: text_of(value) or "" for name, value in received.headers() or ()},
        "message_id": f"{received.topic()}/{received.partition()}/{received.offset()}",
        "born_at": moment_of(moment_ms) if kind else None,
    }
    return fields, sent


def _of_record(record: Any) -> tuple[dict[str, Any], Any]:
    """Of a `ConsumerRecord`, whose fields are not methods. A record without a timestamp has -1 or None."""
    key = text_of(record.key)
    fields = {
        "topic": record.topic,
        "body": record.value,
        "key": key,
        "ordering_key": key,
        "properties": {name: text_of(value) or "" for name, value in record.headers or ()},
        "message_id": f"{record.topic}/{record.partition}/{record.offset}",
        "born_at": moment_of(record.timestamp),
    }
    return fields, record.key
