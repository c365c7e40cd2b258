"""One message as the application sees it, whatever broker carried it. Data only."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from exactly_once.errors import BadBody

__all__ = ["Message"]


@dataclass(frozen=True, slots=True)
class Message:
    """One message, as received or to be sent.

    Args:
        topic: Where it was, or is to be, published.
        body: The bytes carried; None is a tombstone (Kafka) or a message without a body.
        tag: RocketMQ's tag, by which handlers choose.
        key: The *message key*, the broker's; not the business key, which the handler's `key=` names.
        ordering_key: Messages of one ordering key are handled in order, where the handler asks for it.
        properties: The user's own string properties (Kafka: headers).
        message_id: The broker's id; new on each resend, so never an identity.
        born_at: When the producer made it, by the producer's clock, timezone-aware.
        attempt: The delivery count as the broker tells it, from 1.

    Raises:
        ValueError: `born_at` has no time zone.
        TypeError: The body is neither bytes nor None.

    Example:
        >>> Message("orders", b'{"order_no": "A-1"}', tag="created").tag
        'created'
    """

    topic: str
    body: bytes | None
    tag: str | None = field(default=None, kw_only=True)
    key: str | None = field(default=None, kw_only=True)
    ordering_key: str | None = field(default=None, kw_only=True)
    properties: Mapping[str, str] = field(default_factory=dict, kw_only=True, hash=False)
    message_id: str | None = field(default=None, kw_only=True)
    born_at: datetime | None = field(default=None, kw_only=True)
    attempt: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        # here, where the line to mend is: later such a message could neither be stored nor acknowledged
        if self.body is not None and not isinstance(self.body, bytes):
            raise TypeError(
                f"the body of a message is bytes or None, not {type(self.body).__name__}. Text: body.encode(); an object:"
                " json.dumps(body).encode()"
            )
        if self.born_at is not None and self.born_at.tzinfo is None:
            raise ValueError(f"born_at={self.born_at!r} has no time zone; write datetime(..., tzinfo=UTC)")

    @classmethod
    def from_rocketmq(cls, received: Any) -> "Message":
        """Return what a client of `rocketmq-python-client` (RocketMQ 5, gRPC) received, as ours.

        Args:
            received: The client's own `Message`, as `SimpleConsumer.receive` or a listener hands it out.

        Raises:
            BadBody: The body does not match its checksum, so it is not what the producer sent.

        Example:
            return SUCCESS if eo.process(Message.from_rocketmq(m)).acknowledge else FAILURE
        """
        if received.corrupted:
            raise BadBody(f"The body of message {received.message_id} of {received.topic} does not match its checksum.")
        born_ms = received.born_timestamp
        return cls(
            received.topic,
            received.body,
            tag=received.tag,
            key=" ".join(sorted(received.keys)) or None,  # a set; nearly always of one
            ordering_key=received.message_group,
            properties=dict(received.properties),
            message_id=received.message_id,
            born_at=datetime.fromtimestamp(born_ms / 1000, UTC) if born_ms else None,
            attempt=received.delivery_attempt or 1,
        )

    @classmethod
    def from_rocketmq4(cls, received: Any, *, properties: Iterable[str] = ()) -> "Message":
        """Return what a callback of `rocketmq-client-python` (remoting protocol) received, as ours; call it inside.

        The whole body is read, also behind a NUL byte, where the client's own `body` ends. `attempt` is 1 plus the
        times the message was sent back; a process that died with it in hand is not counted by this client.

        Args:
            received: The client's own `ReceivedMessage`.
            properties: Names to look for: this client cannot list properties. Those our producer sent are found anyway.

        Raises:
            ConfigurationError: This build of librocketmq does not tell how long a body is.

        Example:
            return SUCCESS if eo.process(Message.from_rocketmq4(m)).acknowledge else LATER
        """
        from exactly_once.rocketmq4_body import ORDERING_PROPERTY, named_properties, whole_body  # brings ctypes

        ordering_key = received.get_property(ORDERING_PROPERTY)
        return cls(
            received.topic,
            whole_body(received),
            tag=_text(received.tags),
            key=_text(received.keys),
            ordering_key=_text(ordering_key),
            properties=dict(named_properties(received.get_property, properties)),
            message_id=received.id,
            born_at=datetime.fromtimestamp(received.born_timestamp / 1000, UTC),
            attempt=1 + received.reconsume_times,
        )

    @classmethod
    def from_kafka(cls, received: Any) -> "Message":
        """Return what `confluent-kafka`'s consumer received, as ours.

        Headers become properties; of one that stands several times, the last. The ordering key is the record's key, by
        which Kafka keeps order. The id is the record's place, which a producer's resend does not share.

        Args:
            received: The client's own `Message`, without an error.

        Example:
            outcome = await eo.aprocess(Message.from_kafka(consumer.poll(1.0)))
        """
        kind, moment_ms = received.timestamp()
        key = _text(received.key())
        return cls(
            received.topic(),
            received.value(),
            key=key,
            ordering_key=key,
            # `headers` is None where there are none, and a header's value may be None
            properties={name: _text(value) or "" for name, value in received.headers() or ()},
            message_id=f"{received.topic()}/{received.partition()}/{received.offset()}",
            born_at=datetime.fromtimestamp(moment_ms / 1000, UTC) if kind else None,
        )


def _text(raw: Any) -> str | None:
    return raw.decode("utf-8", "replace") if isinstance(raw, bytes) and raw else raw or None
