"""Business keys: what may be one, and where it is read."""

import json
import re
from contextlib import suppress
from enum import IntEnum, StrEnum
from functools import partial
from json import dumps, loads
from operator import attrgetter
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from sqlalchemy.orm import Session

from exactly_once import keys
from exactly_once.errors import BadKey, ConfigurationError
from exactly_once.handlers.plan import plan
from exactly_once.keys import canonical, check_key, check_name, extractor
from exactly_once.message import Message

MESSAGE = Message("orders", b"{}", tag="created", key="A-1", properties={"event": "e-7"})

usable = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=63)


def test_a_text_and_the_number_it_shows_are_one_key() -> None:
    assert check_key(12) == check_key("12") == "12"
    assert check_key(-5) == "-5"


def test_a_uuid_of_a_body_is_a_key_as_it_is_spelled_and_one_key_as_the_page_says() -> None:
    page = (Path(__file__).parents[3] / "docs" / "explanation" / "what-can-still-go-wrong.md").read_text()
    [function] = re.findall(r"`key=(lambda message: UUID.*?)`", page)
    read_as_uuid = eval(function, {"UUID": UUID, "json": json})

    class Order(BaseModel):
        id: UUID

    def reserve(session: Session, order: Order) -> None: ...

    small = "550e8400-e29b-41d4-a716-446655440000"
    messages = [Message("orders", json.dumps({"id": text}).encode()) for text in (small, small.upper())]
    spelled, one = (plan(reserve, topic="orders", key=key) for key in ("id", read_as_uuid))
    assert [spelled.read(message).key for message in messages] == [small, small.upper()]
    assert [one.read(message).key for message in messages] == [small, small]


def test_a_uuid_and_its_text_are_one_key() -> None:
    """`eo.claim(session, "reserve", order.id)` of a row whose id is a UUID; and what a key function returns."""
    text = "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"

    class Theirs(UUID):
        def __str__(self) -> str:
            return "another"

    assert check_key(UUID(text)) == check_key(Theirs(text)) == check_key(text) == text
    assert canonical(["created", UUID(text)]) == canonical(["created", text])
    assert extractor(lambda message: UUID(text)).of(MESSAGE, None) == text


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (None, "null"),
        (True, "bool"),
        (12.0, "float"),
        (["A"], "list"),
        ({"a": 1}, "dict"),
        (b"A", "bytes"),
        ("", "empty"),
        ("A\0B", "NUL"),
        ("é\0", "NUL"),
        ("\ud83d", "surrogate"),
        ("x" * 256, "256 bytes"),
        ("é" * 128, "256 bytes"),
        (10**255, "digits"),
        pytest.param(-(10**5000), "digits", id="5,001 digits"),
    ],
)
def test_what_cannot_be_a_key_is_refused_with_the_reason(value: object, why: str) -> None:
    with pytest.raises(BadKey, match=why):
        check_key(value)


@pytest.mark.parametrize("value", ["x" * 255, "é" * 127, "a ", " a", "A", "a", "é", "e\u0301", "😀", "a'b\"c", "a\nb"])
def test_what_can_be_a_key_is_kept_exactly(value: str) -> None:
    assert check_key(value) == value


def test_enumerations_are_their_values() -> None:
    class Number(IntEnum):
        ONE = 1

    class Word(StrEnum):
        ONE = "one"

    assert (check_key(Number.ONE), check_key(Word.ONE)) == ("1", "one")
    assert type(check_key(Word.ONE)) is str


def test_a_refused_key_is_shown_cut_and_escaped() -> None:
    with pytest.raises(BadKey) as refused:
        check_key("line\nbreak" + "x" * 1000)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 200


@given(st.lists(usable | st.integers(), min_size=2, max_size=3))
def test_a_key_of_several_parts_is_their_json_array_and_loses_nothing(parts: list[str | int]) -> None:
    texts = [str(part) for part in parts]
    if len(dumps(texts, separators=(",", ":"), ensure_ascii=False).encode()) > 255:
        with pytest.raises(BadKey, match="at most 255"):
            canonical(parts)
    else:
        assert loads(canonical(parts)) == texts


@given(st.lists(usable, min_size=2, max_size=3), st.lists(usable, min_size=2, max_size=3))
def test_different_parts_are_different_keys(one: list[str], other: list[str]) -> None:
    with suppress(BadKey):
        assert (canonical(one) == canonical(other)) == (one == other)


@given(st.text(max_size=300) | st.integers() | st.floats() | st.none() | st.booleans())
def test_a_key_is_either_refused_or_fits_every_server(value: object) -> None:
    try:
        key = check_key(value)
    except BadKey:
        return
    assert 0 < len(key.encode()) <= 255
    assert "\0" not in key
    assert key == str(value)


def test_one_part_is_itself_and_several_are_compact_json() -> None:
    assert canonical(["Ä-1"]) == "Ä-1"
    assert canonical(["Ä", 1, 'say "x"']) == '["Ä","1","say \\"x\\""]'


def test_every_part_of_a_key_is_checked() -> None:
    for parts in (["a", ""], ["a", None], ["a", True], [], ["a", 1.5], ["a" * 200, "b" * 200]):
        with pytest.raises(BadKey):
            canonical(parts)


@pytest.mark.parametrize(
    ("spec", "parsed", "key"),
    [
        ("order_no", {"order_no": "A-1"}, "A-1"),
        ("order_no", {"order_no": 12}, "12"),
        ("order.no", {"order": {"no": 7}}, "7"),
        ("lines.0.sku", {"lines": [{"sku": "lamp"}]}, "lamp"),
        ("0", {"0": "a member named as a number"}, "a member named as a number"),
        (keys.path("order.no"), {"order": {"no": 7}}, "7"),
        (keys.tag(), None, "created"),
        (keys.message_key(), None, "A-1"),
        (keys.property("event"), None, "e-7"),
        (keys.call(lambda m: m.topic + "!"), None, "orders!"),
        (lambda m: 5, None, "5"),
        ((keys.tag(), "order_no"), {"order_no": 12}, '["created","12"]'),
        (["order_no"], {"order_no": 12}, "12"),
    ],
)
def test_a_key_is_read_where_its_parts_say(spec: keys.KeySpec, parsed: object, key: str) -> None:
    assert extractor(spec).of(MESSAGE, parsed) == key


@pytest.mark.parametrize(
    ("spec", "parsed"),
    [
        ("order_no", {}),
        ("order_no", {"order_no": None}),
        ("order_no", {"order_no": True}),
        ("order_no", {"order_no": 1.0}),
        ("order_no", {"order_no": ["A"]}),
        ("order_no", {"order_no": {"no": 1}}),
        ("order_no", ["order_no"]),
        ("order_no", "order_no"),
        ("order_no", None),
        ("order.no", {"order": "no"}),
        ("lines.1", {"lines": ["a"]}),
        ("lines.-1", {"lines": ["a"]}),
        ("lines.99999999999999999999", {"lines": ["a"]}),
        ("lines.²", {"lines": ["a", "b", "c"]}),
        (keys.property("missing"), {}),
        (keys.call(lambda m: 1 / 0), {}),
        (keys.call(lambda m: None), {}),
    ],
)
def test_a_message_without_a_usable_key_is_refused(spec: keys.KeySpec, parsed: object) -> None:
    with pytest.raises(BadKey):
        extractor(spec).of(MESSAGE, parsed)


def test_a_bare_message_has_neither_tag_nor_message_key() -> None:
    for part in (keys.tag(), keys.message_key(), keys.property("event")):
        with pytest.raises(BadKey):
            extractor(part).of(Message("orders", None), None)


def test_a_rule_knows_what_it_reads() -> None:
    assert extractor((keys.tag(), "order_no")).has_tag
    assert extractor("order_no").needs_json
    assert not extractor("order_no").has_tag
    assert not extractor(keys.message_key()).needs_json
    assert extractor(keys.call(lambda m: 1)).opaque


@pytest.mark.parametrize("spec", [(), [], "", "a..b", ".a", 5, None, (None,), keys.tag, (keys.path, "a"), str])
def test_a_wrong_key_option_is_refused_when_it_is_written(spec: object) -> None:
    with pytest.raises(ConfigurationError):
        extractor(spec)  # type: ignore[arg-type]


def test_forgotten_parentheses_are_named() -> None:
    with pytest.raises(ConfigurationError, match=r"keys\.tag\(\.\.\.\)"):
        extractor(keys.tag)  # type: ignore[arg-type]


def test_names_have_limits_in_bytes() -> None:
    assert check_name("é" * 32, 64, "group") == "é" * 32
    for bad in ("é" * 33, "", "a\0", "\ud800", None, 5):
        with pytest.raises(ConfigurationError, match="group"):
            check_name(bad, 64, "group")


@pytest.mark.parametrize(
    "function",
    [lambda order: order.order_no, lambda order: order["order_no"], lambda order: str(order.order_no) + order.sku],
)
def test_a_key_function_that_takes_the_message_for_its_body_is_told_so(function: Any) -> None:
    with pytest.raises(BadKey, match=r'gets the Message, not the body.*write key="order_no"'):
        extractor(function).of(MESSAGE, {"order_no": "A-1"})


def test_a_key_function_that_fails_by_itself_is_told_nothing_of_messages() -> None:
    def of_the_body(message: Message) -> str:
        return str(loads(message.body or b"{}").order_no)

    with pytest.raises(BadKey, match="failed on this message: AttributeError") as caught:
        extractor(of_the_body).of(MESSAGE, {})
    assert "not the body" not in str(caught.value)


class _Numbers:
    def of(self, message: Message) -> str:
        return message.topic

    def of_two(self, message: Message, body: object) -> str:
        return message.topic


def test_a_key_function_takes_one_parameter() -> None:
    for function in (lambda message, body: "", lambda: "", _Numbers().of_two, lambda message, *, body: ""):
        with pytest.raises(ConfigurationError, match=r"a function of one parameter, the Message"):
            extractor(function)  # type: ignore[arg-type]
    for good in (
        lambda message, sep="-": message.topic,
        lambda *messages: messages[0].topic,
        _Numbers().of,
        partial(lambda prefix, message: message.topic, "p"),
        attrgetter("topic"),
    ):
        assert extractor(good).of(MESSAGE, None) == "orders"  # type: ignore[arg-type]
