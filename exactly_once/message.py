"""One message as the application sees it, whatever broker carried it. Data only."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final, NoReturn

from exactly_once.clients import kafka, rocketmq5
from exactly_once.clients.values import AS_HEX, formerly

__all__ = ["Message", "with_former"]


class _Properties(dict[str, str]):
    """Properties that cannot be changed: the record of a failed message contains what came, not what a handler made of it.

    A dict, not a read-only view of one, so that json, pickle and `|` accept it.
    """

    __slots__ = ()

    def _fixed(self, *_: object, **__: object) -> NoReturn:
        raise TypeError(
            "the properties of a message cannot be changed. For another message with more of them write"
            " dataclasses.replace(message, properties={**message.properties, 'name': 'value'})"
        )

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _fixed

    def __reduce__(self) -> tuple[Any, ...]:
        return _Properties, (dict(self),)


_NONE: Final = _Properties()


@dataclass(frozen=True, slots=True)
class Message:
    """One message, as received or to be sent.

    Args:
        topic: Where it was, or is to be, published.
        body: The message's bytes; None is a tombstone (Kafka) or a message without a body.
        tag: RocketMQ's tag, by which handlers select messages.
        key: The broker's *message key*; not the business key, which the handler's `key=` names.
        ordering_key: Messages of one ordering key are handled in order, if the handler asks for it.
        properties: The user's own string properties (Kafka: headers).
        message_id: The broker's id; new on each resend, so never an identity.
        born_at: When the producer made it, by the producer's clock, timezone-aware; kept in UTC. A time that no database stores
            (before the year 1000, after 9998) becomes None.
        attempt: The delivery count as reported by the broker, from 1.
        unread: Set by the code that reads a broker's message, if the body is as it came, packed or damaged: the name of the
            compression, or another word for what is wrong. Not a property, because a sender could set that.
        former: Set by the code that reads a broker's message: the fields that the previous release spelled differently, in its
            spelling. A message that was begun under that spelling ends under it. The field goes with the next release.

    The fields are checked here, at the line that must be repaired: a message with other types could later be neither stored nor
    acknowledged. Subclasses of str, bytes and int are converted to the plain value: an Enum of texts to its text.

    Raises:
        TypeError: A field has another type; the sentence names it and says what to write.
        ValueError: `born_at` has no time zone; `attempt` is below 1.

    Example:
        >>> Message("orders", b'{"order_no": "A-1"}', tag="created").tag
        'created'
    """

    topic: str
    body: bytes | None
    tag: str | None = field(default=None, kw_only=True)
    key: str | None = field(default=None, kw_only=True)
    ordering_key: str | None = field(default=None, kw_only=True)
    properties: Mapping[str, str] = field(default_factory=lambda: _NONE, kw_only=True, hash=False)
    message_id: str | None = field(default=None, kw_only=True)
    born_at: datetime | None = field(default=None, kw_only=True)
    attempt: int = field(default=1, kw_only=True)
    unread: str | None = field(default=None, kw_only=True, repr=False)
    former: Mapping[str, Any] | None = field(default=None, kw_only=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Runs once for each message, so likely cases first: each line is one check of a type.
        body, tag, key, ordering_key = self.body, self.tag, self.key, self.ordering_key
        message_id, attempt, born_at, properties = self.message_id, self.attempt, self.born_at, self.properties
        if not (
            type(self.topic) is str
            and (type(body) is bytes or body is None)
            and (tag is None or type(tag) is str)
            and (key is None or type(key) is str)
            and (ordering_key is None or type(ordering_key) is str)
            and (message_id is None or type(message_id) is str)
            and (self.unread is None or type(self.unread) is str)
            and type(attempt) is int
            and attempt >= 1
        ):
            for name in ("topic", "tag", "key", "ordering_key", "message_id", "unread"):
                object.__setattr__(self, name, _text(name, getattr(self, name)))
            object.__setattr__(self, "body", _body(body))
            object.__setattr__(self, "attempt", _attempt(attempt))
        if type(properties) is not _Properties:
            object.__setattr__(self, "properties", _fixed_properties(properties))
        usual = type(born_at) is datetime and born_at.tzinfo is UTC and 1970 <= born_at.year < 9999
        if born_at is not None and not usual:
            object.__setattr__(self, "born_at", _stored_anywhere(born_at))

    @classmethod
    def from_rocketmq(cls, received: Any) -> "Message":
        """Convert a received message of `rocketmq-python-client` (RocketMQ 5, gRPC) to ours.

        Args:
            received: The client's own `Message`, as `SimpleConsumer.receive` or a listener gets it.

        Raises:
            BadBody: The body does not match its checksum, so it is not what the producer sent.
            TypeError: It is no message, or another client's.

        Example:
            return SUCCESS if eo.process(Message.from_rocketmq(m)).acknowledge else FAILURE
        """
        try:
            fields, keys = rocketmq5.fields_of(received)
            message = cls(**fields)
        except AttributeError as error:
            if error.obj is not received:
                raise  # of the client
            raise _not_received("from_rocketmq", "rocketmq-python-client", received, error.name) from None
        return with_former(message, keys)

    @classmethod
    def from_rocketmq4(cls, received: Any, *, properties: Iterable[str] = ()) -> "Message":
        """Convert a message that a callback of `rocketmq-client-python` (remoting protocol) received; call
        this inside the callback.

        The whole body is read, also after a NUL byte, where the client's own `body` ends. `attempt` is 1 plus the number of
        times the message was sent back. This client does not count processes that died with the message in hand.

        Args:
            received: The client's own `ReceivedMessage`.
            properties: Names to look for: this client cannot list properties. Those that our producer sent are found anyway.

        Raises:
            ConfigurationError: This build of librocketmq does not tell how long a body is.
            TypeError: It is no message, or another client's.

        Example:
            return SUCCESS if eo.process(Message.from_rocketmq4(m)).acknowledge else LATER
        """
        from exactly_once.clients import rocketmq4  # brings ctypes

        try:
            fields, keys = rocketmq4.fields_of(received, properties)
            message = cls(**fields)
        except AttributeError as error:
            if error.obj is not received:
                raise  # of the client
            raise _not_received("from_rocketmq4", "rocketmq-client-python", received, error.name) from None
        return with_former(message, keys)

    @classmethod
    def from_kafka(cls, received: Any) -> "Message":
        """Convert a received record of `confluent-kafka`, `aiokafka` or `kafka-python` to our message.

        Headers become properties. If a header occurs several times, the last one counts; a header without a
        value becomes an empty text.
        The ordering key is the record's key, by which Kafka keeps order. If a key or a header is not UTF-8, it becomes the
        character U+FDD0 and its bytes in hexadecimal, so that two different ones stay different. An invalid time (microseconds
        instead of milliseconds) is left out. The id is the record's position, so a producer's resend has another id.

        Args:
            received: The client's own `Message` or `ConsumerRecord`, its value as bytes.

        Raises:
            TypeError: It is no record: `poll()` returns None if nothing came, and other methods return several records at once.
            ValueError: It is an error of the client, which confluent-kafka returns in the form of a message.

        Example:
            m = consumer.poll(1.0)
            if m is not None and m.error() is None:
                outcome = eo.process(Message.from_kafka(m))
        """
        if received is None or isinstance(received, (list, tuple, dict)):
            raise TypeError(kafka.NO_RECORD.format(kind=_kind(received)))
        try:
            fields, sent = kafka.fields_of(received)
            message = cls(**fields)
        except AttributeError as error:
            if error.obj is not received:
                raise  # of the client
            raise _not_received("from_kafka", "Kafka's client", received, error.name) from None
        return with_former(message, sent)


def with_former(message: Message, keys: bytes | str | None) -> Message:
    """Set `former` of a message if the previous release spelled its key, tag or properties differently.

    Args:
        message: A message read from a broker's client.
        keys: Its message key, as it came.
    """
    before = keys.decode("utf-8", "replace") if isinstance(keys, bytes) else keys
    found: dict[str, Any] = {"key": before} if before and before != message.key else {}
    # Runs once for each message, and nearly never finds anything: each line looks for one character.
    if message.tag is not None and AS_HEX in message.tag:
        found["tag"] = formerly(message.tag)
    if message.ordering_key is not None and AS_HEX in message.ordering_key:
        found["ordering_key"] = formerly(message.ordering_key)
    if message.properties and AS_HEX in "".join(message.properties.values()):
        found["properties"] = {name: formerly(text) for name, text in message.properties.items()}
    return message if not found else replace(message, former=found)


def _text(name: str, value: object) -> str | None:
    if type(value) is str or (value is None and name != "topic"):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # not str(value), which is an Enum's name
    allowed = "str" if name == "topic" else "str or None"
    mend = f"{name}={name}.decode()" if isinstance(value, (bytes, bytearray)) else f"{name}=str({name})"
    raise TypeError(f"the {name} of a message is {allowed}, not {_kind(value)}. Write {mend}")


def _body(value: object) -> bytes | None:
    if value is None or isinstance(value, bytes):
        return value if value is None or type(value) is bytes else bytes(value)
    raise TypeError(
        f"the body of a message is bytes or None, not {_kind(value)}. Text: body.encode(); an object:"
        " json.dumps(body).encode()"
    )


def _attempt(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"the attempt of a message is an int, not {_kind(value)}. Write attempt=int(attempt)")
    if value < 1:
        raise ValueError(f"the attempt of a message counts its deliveries from 1, so it cannot be {int(value)}")
    return int(value)


def _fixed_properties(value: object) -> _Properties:
    if not value and type(value) is dict:
        return _NONE
    if type(value) is not dict and not isinstance(value, Mapping):
        raise TypeError(
            f"the properties of a message are a dict of str to str, not {_kind(value)}. Write properties=dict(properties)"
        )
    found = _Properties(value)
    for name, text in found.items():
        if type(name) is not str or type(text) is not str:
            return _Properties(_property(name, text) for name, text in found.items())
    return found


def _property(name: object, text: object) -> tuple[str, str]:
    if not isinstance(name, str):
        raise TypeError(f"the name of a message's property is a str, not {_kind(name)}: {name!r}")
    if not isinstance(text, str):
        mend = (
            f"properties[{name!r}].decode()" if isinstance(text, (bytes, bytearray)) else f"str(properties[{name!r}])"
        )
        raise TypeError(f"the property {name!r} of a message is a str, not {_kind(text)}. Write {mend}")
    return str.__str__(name), str.__str__(text)


def _stored_anywhere(value: object) -> datetime | None:
    """Return a time in a form that every database stores; None if there is one that does not store it.

    In UTC: PostgreSQL takes no offset above 16 hours. As a plain datetime: a subclass may print itself differently.
    """
    if not isinstance(value, datetime):
        raise TypeError(
            f"born_at of a message is a datetime with a time zone or None, not {_kind(value)}. Of milliseconds since 1970:"
            " datetime.fromtimestamp(born_at / 1000, UTC)"
        )
    offset = value.utcoffset()
    if offset is None:
        raise ValueError(f"born_at={value!r} has no time zone; write datetime(..., tzinfo=UTC)")
    plain = datetime(value.year, value.month, value.day, value.hour, value.minute, value.second, value.microsecond, UTC)
    try:
        at = plain - offset
    except OverflowError:
        return None
    return at if 1000 <= at.year <= 9998 else None


def _not_received(name: str, client: str, given: object, missing: str | None) -> TypeError:
    """Return the error for a value that is no message of that client."""
    mend = "a body alone becomes a message by Message(topic, body)"
    if isinstance(given, Message):
        mend = "give it to eo.process as it is"
    elif isinstance(given, (list, tuple, set)):
        mend = "call it for each"
    return TypeError(f"{name} takes what {client} received, not {_kind(given)} (it has no {missing!r}): {mend}.")


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__
