"""A message as it is made by hand, and from what brokers' clients hand out, by their documented attributes and methods."""

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from enum import Enum, IntEnum
from types import SimpleNamespace
from typing import Any

import pytest

from exactly_once import BadKey, Message, keys


class Received:
    """What the client hands out, as far as it is read."""

    def __init__(
        self, *, key: bytes | None, headers: list[tuple[str, bytes | None]] | None, timestamp: tuple[int, int]
    ) -> None:
        self._key, self._headers, self._timestamp = key, headers, timestamp

    def __getattr__(self, name: str) -> Any:
        found = {"topic": "orders", "value": b"\x00{}", "partition": 3, "offset": 17, "key": self._key}
        found |= {"headers": self._headers, "timestamp": self._timestamp, "error": None}
        return lambda: found[name]


def received4(**fields: Any) -> Any:
    """What `rocketmq-client-python` hands out."""
    properties = fields.pop("properties", {})
    found = {"topic": "orders", "body": b"{}", "tags": b"", "keys": b"", "id": "id-1", "reconsume_times": 0}
    return SimpleNamespace(**found | {"born_timestamp": 1, "get_property": properties.get} | fields)


def received5(**fields: Any) -> Any:
    """What `rocketmq-python-client` hands out."""
    found = {"topic": "orders", "body": b"{}", "tag": None, "keys": set(), "message_group": None, "properties": {}}
    found |= {"message_id": "id-1", "born_timestamp": 1, "delivery_attempt": 1, "corrupted": False}
    return SimpleNamespace(**found | fields)


def kafka_key(raw: bytes) -> Any:
    message = Message.from_kafka(Received(key=raw, headers=None, timestamp=(0, 0)))
    assert message.key == message.ordering_key
    return message.key


def kafka_header(raw: bytes) -> str:
    return Message.from_kafka(Received(key=None, headers=[("h", raw)], timestamp=(0, 0))).properties["h"]


def rocketmq4_key(raw: bytes) -> Any:
    return Message.from_rocketmq4(received4(keys=raw)).key


def rocketmq4_tag(raw: bytes) -> Any:
    return Message.from_rocketmq4(received4(tags=raw)).tag


def rocketmq4_property(raw: bytes) -> str:
    message = Message.from_rocketmq4(received4(properties={"h": raw, "__SHARDINGKEY": raw}), properties=["h"])
    assert message.ordering_key == message.properties["h"]
    return message.properties["h"]


class Nowhere(tzinfo):
    def utcoffset(self, _: datetime | None) -> None:
        return None


def test_a_records_place_is_its_id_and_its_key_keeps_order() -> None:
    message = Message.from_kafka(
        Received(key=b"A-1", headers=[("trace", b"x"), ("empty", None)], timestamp=(1, 1_700_000_000_500))
    )
    assert message == Message(
        "orders",
        b"\x00{}",
        key="A-1",
        ordering_key="A-1",
        properties={"trace": "x", "empty": ""},
        message_id="orders/3/17",
        born_at=datetime(2023, 11, 14, 22, 13, 20, 500_000, UTC),
    )


def test_a_record_without_key_headers_and_time_is_a_message_too() -> None:
    message = Message.from_kafka(Received(key=None, headers=None, timestamp=(0, 0)))
    assert (message.key, message.ordering_key, dict(message.properties), message.born_at) == (None, None, {}, None)


def test_a_time_without_a_zone_is_refused_where_the_message_is_made() -> None:
    with pytest.raises(ValueError, match="time zone"):
        Message("orders", b"{}", born_at=datetime(2026, 1, 1))  # noqa: DTZ001


# -- what enters is typed at the door --------------------------------------------------------------------------------


class Tag(str, Enum):  # noqa: UP042  (str() of this older kind is its name)
    CREATED = "created"


class Attempt(IntEnum):
    SECOND = 2


class Text(str):
    pass


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"topic": None}, "the topic of a message is str, not None"),
        ({"topic": b"orders"}, r"the topic of a message is str, not bytes. Write topic=topic.decode\(\)"),
        ({"body": "{}"}, r"the body of a message is bytes or None, not str. Text: body.encode\(\)"),
        ({"body": {"a": 1}}, "the body of a message is bytes or None, not dict"),
        ({"body": bytearray(b"{}")}, "the body of a message is bytes or None, not bytearray"),
        ({"tag": b"x"}, r"the tag of a message is str or None, not bytes. Write tag=tag.decode\(\)"),
        ({"key": b"A"}, r"the key of a message is str or None, not bytes. Write key=key.decode\(\)"),
        ({"key": 4711}, r"the key of a message is str or None, not int. Write key=str\(key\)"),
        ({"ordering_key": 12}, r"the ordering_key of a message is str or None, not int"),
        ({"message_id": 4711}, r"the message_id of a message is str or None, not int"),
        ({"attempt": "2"}, r"the attempt of a message is an int, not str. Write attempt=int\(attempt\)"),
        ({"attempt": True}, "the attempt of a message is an int, not bool"),
        ({"attempt": 1.0}, "the attempt of a message is an int, not float"),
        ({"attempt": None}, "the attempt of a message is an int, not None"),
        ({"properties": None}, "the properties of a message are a dict of str to str, not None"),
        ({"properties": [("h", "x")]}, "the properties of a message are a dict of str to str, not list"),
        ({"properties": {"h": b"x"}}, r"the property 'h' of a message is a str, not bytes. Write properties\['h'\]"),
        ({"properties": {"h": None}}, "the property 'h' of a message is a str, not None"),
        ({"properties": {1: "x"}}, "the name of a message's property is a str, not int"),
        ({"born_at": 1_700_000_000}, "born_at of a message is a datetime with a time zone or None, not int"),
        ({"born_at": date(2026, 1, 1)}, "born_at of a message is a datetime with a time zone or None, not date"),
    ],
    ids=str,
)
def test_a_field_of_a_wrong_type_is_refused_by_its_name(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(TypeError, match=says):
        Message(**{"topic": "orders", "body": b"{}", **fields})
    with pytest.raises(TypeError, match=says):
        replace(Message("orders", b"{}"), **fields)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"attempt": 0}, "counts its deliveries from 1"),
        ({"attempt": -3}, "counts its deliveries from 1"),
        ({"born_at": datetime(2026, 1, 1, tzinfo=Nowhere())}, "no time zone"),
    ],
    ids=lambda value: repr(value).partition(" at 0x")[0],
)
def test_a_number_or_a_time_that_cannot_be_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Message("orders", b"{}", **fields)


@pytest.mark.parametrize(
    "moment",
    [datetime.max.replace(tzinfo=UTC), datetime.min.replace(tzinfo=timezone(timedelta(hours=2)))],
    ids=["last", "first"],
)
def test_a_time_that_no_database_stores_is_none(moment: datetime) -> None:
    assert Message("orders", b"", born_at=moment).born_at is None


def test_subclasses_of_plain_types_are_kept_as_the_plain_value() -> None:
    fields = {"tag": Tag.CREATED, "key": Text("A-1"), "attempt": Attempt.SECOND, "properties": {Text("h"): Tag.CREATED}}
    message = Message(Text("orders"), b"{}", **fields)  # type: ignore[arg-type]
    assert message == Message("orders", b"{}", tag="created", key="A-1", attempt=2, properties={"h": "created"})
    assert [type(value) for value in (message.topic, message.tag, message.key, message.attempt)] == [str, str, str, int]
    assert [type(part) for part in next(iter(message.properties.items()))] == [str, str]


def test_text_with_half_of_a_surrogate_pair_is_taken() -> None:
    message = Message("orders", b"{}", key="\ud800", properties={"h": "\ud800"})
    assert (message.key, message.properties["h"]) == ("\ud800", "\ud800")


def test_properties_cannot_be_changed_by_whoever_gave_or_got_them() -> None:
    given = {"trace": "x"}
    message = Message("orders", b"{}", properties=given)
    given["trace"] = "y"
    changes: list[Callable[[Any], object]] = [
        lambda found: found.update(trace="z"),
        lambda found: found.__setitem__("trace", "z"),
        lambda found: found.pop("trace"),
        lambda found: found.clear(),
        lambda found: found.setdefault("h", "z"),
        lambda found: found.__ior__({"h": "z"}),
    ]
    for change in changes:
        for one in (message, Message("orders", b"{}"), Message("orders", b"{}", properties={})):
            with pytest.raises(TypeError, match="properties of a message cannot be changed"):
                change(one.properties)
    assert message.properties == {"trace": "x"}
    assert Message("orders", b"{}").properties == {}


def test_a_message_with_properties_can_be_copied_pickled_and_written_as_json() -> None:
    message = Message("orders", b"{}", properties={"trace": "x"})
    assert pickle.loads(pickle.dumps(message)) == copy.deepcopy(message) == message
    assert json.dumps(message.properties) == '{"trace": "x"}'
    assert asdict(message)["properties"] == {"trace": "x"}
    with pytest.raises(TypeError):
        pickle.loads(pickle.dumps(message)).properties["trace"] = "y"


# -- what brokers hand out becomes text without two becoming one -----------------------------------------------------

STRANGE = [
    *(
        b"\x8a\x91",
        b"\x8b\x92",
        b"\xff",
        b"\xfe\xff",
        b"ab\xff",
        b"\xed\xa0\x80",
        b"\xef\xbf\xbd",
        b"\xef\xbf\xbd\xef\xbf\xbd",
    ),
    *("\ufdd0".encode(), "\ufdd08a91".encode(), "\ufdd0x".encode(), b"8a91", b"efb790", b"A-1", "Zürich".encode()),
]


@pytest.mark.parametrize("read", [kafka_key, kafka_header, rocketmq4_key, rocketmq4_tag, rocketmq4_property])
def test_bytes_that_are_no_text_stay_as_many_as_they_were(read: Callable[[bytes], str]) -> None:
    found = [read(raw) for raw in STRANGE]
    assert len(set(found)) == len(STRANGE)
    assert found[0] == "\ufdd08a91"
    assert found[-2:] == ["A-1", "Zürich"], "a valid key keeps its identity"
    assert all(text.encode() for text in found), "each can be stored"


def test_a_text_the_client_has_made_is_read_as_its_bytes_would_be() -> None:
    for text in ("A-1", "\ufdd08a91", "Zürich"):
        assert kafka_key(text) == kafka_key(text.encode())  # type: ignore[arg-type]


def test_a_record_with_an_empty_key_is_none_without_a_key() -> None:
    empty = Message.from_kafka(Received(key=b"", headers=None, timestamp=(0, 0)))
    none = Message.from_kafka(Received(key=None, headers=None, timestamp=(0, 0)))
    assert [(one.key, one.ordering_key) for one in (empty, none)] == [("", ""), (None, None)]


def test_what_becomes_too_long_for_a_business_key_is_a_bad_key() -> None:
    rule = keys.extractor(keys.message_key())
    with pytest.raises(BadKey, match="at most 255 fit"):
        rule.of(Message.from_kafka(Received(key=b"\xff" * 127, headers=None, timestamp=(0, 0))), None)
    rule.of(Message.from_kafka(Received(key=b"\xff" * 126, headers=None, timestamp=(0, 0))), None)


@pytest.mark.parametrize("moment", [0, -1, -(10**18), 1_700_000_000_500_000, 10**18, 10**30, None, "1700000000500"])
def test_a_time_out_of_range_is_none(moment: Any) -> None:
    assert Message.from_kafka(Received(key=None, headers=None, timestamp=(1, moment))).born_at is None
    assert Message.from_rocketmq(received5(born_timestamp=moment)).born_at is None
    assert Message.from_rocketmq4(received4(born_timestamp=moment)).born_at is None


def test_a_field_the_client_has_already_decoded_to_an_object_is_refused_by_its_name() -> None:
    with pytest.raises(TypeError, match="the key of a message is str or None, not int"):
        Message.from_kafka(Received(key=12, headers=None, timestamp=(0, 0)))  # type: ignore[arg-type]


# -- several keys of one message are spelled in one way --------------------------------------------------------------

SEVERAL = [
    ("order-7 buyer-3", "buyer-3 order-7"),
    ("buyer-3 order-7", "buyer-3 order-7"),
    ("order-7 buyer-3 order-7", "buyer-3 order-7"),
    (" order-7  buyer-3 ", "buyer-3 order-7"),
    ("order-7 ", "order-7"),
    ("order-7", "order-7"),
    ("Zürich Aarau", "Aarau Zürich"),
    ("a\tb", "a\tb"),
    ("\ufdd0x a", "a \ufdd0efb79078"),
]


@pytest.mark.parametrize(("sent", "spelled"), SEVERAL, ids=[repr(sent) for sent, _ in SEVERAL])
def test_every_reader_spells_several_keys_alike(sent: str, spelled: str) -> None:
    assert Message.from_rocketmq4(received4(keys=sent.encode())).key == spelled
    assert Message.from_rocketmq(received5(keys=set(sent.split(" ")))).key == spelled


def test_keys_of_blanks_alone_are_none() -> None:
    assert Message.from_rocketmq4(received4(keys=b"  ")).key is None
    assert Message.from_rocketmq(received5(keys={""})).key is None


def test_several_keys_one_of_which_is_no_text_stay_apart() -> None:
    found = [rocketmq4_key(raw) for raw in (b"a \x8a\x91", b"a \x8b\x92", b"\x8a\x91 a")]
    assert found == ["a \ufdd08a91", "a \ufdd08b92", "a \ufdd08a91"]


def test_what_the_release_before_spelled_otherwise_goes_along() -> None:
    message = Message.from_rocketmq4(received4(keys=b"b a", tags=b"\xff", properties={"h": b"\xfe"}), properties=["h"])
    assert message.former == {"key": "b a", "tag": "\ufffd", "properties": {"h": "\ufffd"}}
    assert Message.from_kafka(Received(key=b"\xff", headers=[("h", b"x")], timestamp=(0, 0))).former == {
        "key": "\ufffd",
        "ordering_key": "\ufffd",
    }
    assert Message.from_kafka(Received(key=b"b a", headers=None, timestamp=(0, 0))).former is None
    assert Message.from_rocketmq4(received4(keys=b"a")).former is None
    assert Message.from_rocketmq(received5(keys={"b", "a"})).former is None, "it was sorted there before"
    assert replace(message, attempt=2).former == message.former
    assert message == replace(message, former=None)


def record(**fields: Any) -> Any:
    """A `ConsumerRecord`: aiokafka's and kafka-python's are alike."""
    found: dict[str, Any] = {"topic": "orders", "partition": 3, "offset": 17, "timestamp": 1_700_000_000_500}
    found |= {"timestamp_type": 0, "key": b"A-1", "value": b"{}", "headers": (("shop", b"eu"), ("empty", None))}
    return SimpleNamespace(**found | fields)


def test_a_record_of_aiokafka_is_read_as_confluents() -> None:
    told = Received(key=b"A-1", headers=[("shop", b"eu"), ("empty", None)], timestamp=(1, 1_700_000_000_500))
    assert Message.from_kafka(record(value=b"\x00{}")) == Message.from_kafka(told)
    assert Message.from_kafka(record(value=None)).body is None
    assert Message.from_kafka(record(key=b"\x8a\x91")).key == kafka_key(b"\x8a\x91")
    assert Message.from_kafka(record(key=None, headers=(), timestamp=-1)).born_at is None
    with pytest.raises(TypeError, match=r"the body of a message is bytes or None, not dict"):
        Message.from_kafka(record(value={"no": 1}))  # a value_deserializer made it


@pytest.mark.parametrize("nothing", [None, [], [record()], {}], ids=["poll", "consume", "batch", "getmany"])
def test_what_is_no_record_of_kafkas_is_told_with_what_to_write(nothing: Any) -> None:
    with pytest.raises(
        TypeError, match=r"takes one record that came, not (None|list|dict): .*if m is None or m.error\(\): continue"
    ):
        Message.from_kafka(nothing)


def test_an_error_in_the_shape_of_a_message_is_none() -> None:
    """Its value() is the error's text, which must not become a body."""
    event = SimpleNamespace(
        **{
            name: lambda value=value: value
            for name, value in {
                "topic": "orders",
                "error": "KafkaError{code=UNKNOWN_TOPIC_OR_PART}",
                "value": b"Broker: Unknown topic or partition",
            }.items()
        }
    )
    with pytest.raises(ValueError, match=r"no message but an error of the client: KafkaError.*m.error\(\)"):
        Message.from_kafka(event)


@pytest.mark.parametrize("name", ["from_rocketmq", "from_rocketmq4", "from_kafka"])
@pytest.mark.parametrize(
    "given", [b"{}", "A-1", Message("orders", b"{}"), 7, SimpleNamespace(topic="orders")], ids=repr
)
def test_what_no_client_received_is_named(name: str, given: Any) -> None:
    mend = "eo.process as it is" if isinstance(given, Message) else r"Message\(topic, body\)"
    with pytest.raises(TypeError, match=rf"{name} takes what .* received, not {type(given).__name__} .*{mend}"):
        getattr(Message, name)(given)


def test_an_error_inside_of_what_was_received_stays_what_it_is() -> None:
    class Theirs:
        @property
        def corrupted(self) -> bool:
            return None.nothing  # type: ignore[attr-defined, no-any-return]

    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'nothing'"):
        Message.from_rocketmq(Theirs())
