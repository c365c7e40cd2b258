"""Fingerprints: which payloads are the same, and what can be said of two that are not."""

import random
from json import dumps, loads
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from exactly_once.database.schema import FINGERPRINT_BYTES
from exactly_once.errors import BadBody, ConfigurationError
from exactly_once.handlers.body import NOT_JSON, parse_json
from exactly_once.handlers.fingerprint import (
    BEYOND,
    GONE,
    OTHER_SET,
    Differs,
    FingerprintRule,
    NotCompared,
    Same,
    compare,
    differing_paths,
    maker,
)
from exactly_once.message import Message

BODY = maker()

names = st.text(min_size=1, max_size=8)
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=5), max_leaves=12
)
objects = st.dictionaries(names, values, min_size=1, max_size=60)


def made(body: bytes | None, rule: FingerprintRule = BODY) -> bytes:
    return rule.of(Message("orders", body), parse_json(body))


def of(value: Any, rule: FingerprintRule = BODY) -> bytes:
    return made(dumps(value).encode(), rule)


def named(old: Any, new: Any, rule: FingerprintRule = BODY) -> tuple[str, ...] | None:
    body = dumps(new).encode()
    return differing_paths(of(old, rule), rule, Message("orders", body), loads(body))


def shuffled(value: Any, turn: random.Random) -> Any:
    if isinstance(value, dict):
        members = [(name, shuffled(inner, turn)) for name, inner in value.items()]
        turn.shuffle(members)
        return dict(members)
    return [shuffled(inner, turn) for inner in value] if isinstance(value, list) else value


@given(values, st.randoms(use_true_random=False), st.sampled_from([None, 1, "\t"]))
def test_order_of_members_and_white_space_do_not_matter(value: Any, turn: random.Random, indent: Any) -> None:
    other = made(dumps(shuffled(value, turn), indent=indent, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    assume(parse_json(dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")) is not NOT_JSON)
    assert compare(of(value), other) == Same()


@given(objects, st.data())
def test_any_changed_leaf_makes_another_payload(value: dict[str, Any], data: st.DataObject) -> None:
    at: Any = value
    while True:
        place = data.draw(st.sampled_from(list(at) if isinstance(at, dict) else range(len(at))))
        if isinstance(at[place], (dict, list)) and at[place]:
            at = at[place]
        else:
            break
    before, old_text = of(value), dumps(at[place])
    at[place] = data.draw(leaves)
    assume(dumps(at[place]) != old_text)
    assert compare(before, of(value)) == Differs()


@given(values | objects)
def test_a_fingerprint_is_never_longer_than_its_column(value: Any) -> None:
    assert 20 <= len(of(value)) <= FINGERPRINT_BYTES


@given(st.binary(max_size=50) | st.none())
def test_every_body_has_a_fingerprint(body: bytes | None) -> None:
    assert 20 <= len(made(body)) <= FINGERPRINT_BYTES
    assert compare(made(body), made(body)) == Same()


@given(objects)
def test_the_digest_is_that_of_sorted_compact_json(value: dict[str, Any]) -> None:
    from hashlib import blake2b

    canonical = dumps(loads(dumps(value)), sort_keys=True, separators=(",", ":")).encode()
    assert of(value)[4:20] == blake2b(canonical, digest_size=16).digest()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (b'{"a": 1}', b'{"a": 1.0}'),
        (b'{"a": 1}', b'{"a": "1"}'),
        (b'{"a": 1}', b'{"a": true}'),
        (b'{"a": null}', b"{}"),
        (b'{"a": [1, 2]}', b'{"a": [2, 1]}'),
        (b'{"a": {"b": 1}}', b'{"a.b": 1}'),
        (b"\x00\xff", b"\x00\xfe"),
        (b"", None),
        (b"no json", b"no json "),
    ],
)
def test_these_payloads_differ(one: bytes | None, other: bytes | None) -> None:
    assert compare(made(one), made(other)) == Differs()


def test_half_a_surrogate_pair_in_a_body_does_not_break_anything() -> None:
    assert compare(made(b'{"a": "\\ud800"}'), made(b'{"a":"\\ud800"}')) == Same()


@pytest.mark.parametrize(
    ("new", "told"),
    [
        ({"no": 1, "qty": 3, "to": {"street": "x", "zip": "y"}}, ("qty",)),
        ({"no": 1, "qty": 2, "to": {"street": "x", "zip": "z"}}, ("to.zip",)),
        ({"no": 2, "qty": 3, "to": {"street": "a", "zip": "z"}}, ("no", "qty", "to.street", "to.zip")),
        ({"no": 1, "qty": 2, "to": {"street": "x", "zip": "y"}, "gift": True}, ("gift",)),
        ({"no": 1, "qty": 2, "to": {"street": "x", "zip": "y", "door": 4}}, ("to.door",)),
        ({"no": 1, "qty": 2}, (GONE,)),
        ({"no": 1, "qty": 2, "to": {"street": "x"}}, (GONE,)),
        ({"no": 1, "qty": 2, "to": None}, ("to", GONE)),
        ({"no": 1, "qty": 9, "to": {"street": "x"}}, ("qty", GONE)),
        ({}, (GONE,)),
        ([1], None),
        ("text", None),
    ],
)
def test_a_conflict_names_the_members_that_differ(new: Any, told: tuple[str, ...] | None) -> None:
    assert named({"no": 1, "qty": 2, "to": {"street": "x", "zip": "y"}}, new) == told


def test_a_conflict_in_one_of_many_members_is_named() -> None:
    old = {f"m{i:02}": i for i in range(49)}
    for name in old:
        assert named(old, old | {name: "other"}) == (name,)


def test_what_lies_beyond_the_remembered_members_is_said_to() -> None:
    old = {f"m{i:02}": i for i in range(60)}
    assert named(old, old | {"m10": "other"}) == ("m10",)
    assert named(old, old | {"m59": "other"}) == (BEYOND,)
    assert named(old, {"a": 1} | old) == (OTHER_SET,)


def test_many_objects_go_a_level_deeper_only_while_they_fit() -> None:
    old: dict[str, Any] = {f"o{i}": {f"m{j}": i * j for j in range(10)} for i in range(8)}
    assert len(of(old)) <= FINGERPRINT_BYTES
    for i in range(8):
        new = old | {f"o{i}": old[f"o{i}"] | {"m7": "other"}}
        assert named(old, new) == ((f"o{i}.m7",) if i < 4 else (f"o{i}",))


def test_an_object_that_no_longer_fits_one_level_deeper_is_still_compared() -> None:
    inner = {f"i{i}": i for i in range(10)}
    small: dict[str, Any] = {"inner": inner, "x": 1}
    big: dict[str, Any] = small | {f"m{i:02}": i for i in range(45)}
    assert named(small, big) == tuple(f"m{i:02}" for i in range(45))
    assert named(big, small | {"x": 2}) == ("x", GONE)


@given(st.dictionaries(names, leaves, min_size=1, max_size=20), st.data())
def test_a_changed_member_of_a_flat_object_is_named_alone(value: dict[str, Any], data: st.DataObject) -> None:
    from zlib import crc32

    name = data.draw(st.sampled_from(sorted(value)))
    new = value | {name: data.draw(leaves)}
    assume(dumps(new[name]) != dumps(value[name]))
    quoted = dumps(name)
    texts = [f"{quoted}:{dumps(each[name])}".encode() for each in (value, new)]
    assume(
        crc32(texts[0]) & 0xFFFF != crc32(texts[1]) & 0xFFFF
    )  # 2 bytes may agree by chance; the digest then stands alone
    assert named(value, new) == (name,)


def test_only_the_chosen_members_count() -> None:
    rule = maker(["amount", "order.no"])
    old = {"amount": 5, "order": {"no": 1, "at": "10:00"}, "sent": "10:00"}
    assert compare(of(old, rule), of(old | {"sent": "10:07"}, rule)) == Same()
    new = {"amount": 6, "order": {"no": 1}}
    assert compare(of(old, rule), of(new, rule)) == Differs()
    assert named(old, new, rule) == ("amount",)
    assert compare(of(old, rule), of(old, maker(("order.no", "amount")))) == Same()


def test_an_absent_member_is_not_a_null_one() -> None:
    rule = maker(["a"])
    assert compare(of({}, rule), of({"a": None}, rule)) == Differs()


def test_a_function_chooses() -> None:
    def amount(message: Message) -> str:
        return message.properties["amount"]

    rule = maker(amount)
    one = rule.of(Message("orders", b"1", properties={"amount": "5"}), None)
    assert compare(one, rule.of(Message("orders", b"2", properties={"amount": "5"}), None)) == Same()
    assert compare(one, rule.of(Message("orders", b"1", properties={"amount": "6"}), None)) == Differs()
    with pytest.raises(BadBody, match="amount"):
        rule.of(Message("orders", b"1"), None)


def test_none_compares_nothing() -> None:
    rule = maker(None)
    assert of({"a": 1}, rule) == b""
    assert compare(of({"a": 1}, rule), of({"a": 2}, rule)) == NotCompared()


def first(message: Message) -> bytes:
    return b""


def test_another_selection_is_a_duplicate_that_was_not_compared() -> None:
    rules = [BODY, maker(["a"]), maker(["b"]), maker(first), maker(None)]
    for one in rules:
        for other in rules:
            if one is not other:
                assert compare(of({"a": 1}, one), of({"a": 2}, other)) == NotCompared()


def test_another_format_is_not_compared() -> None:
    stored = of({"a": 1})
    assert compare(bytes([stored[0] + 1]) + stored[1:], of({"a": 2})) == NotCompared()


@pytest.mark.parametrize("spec", ["bod", [], 5, ["a..b"], str, object()])
def test_a_wrong_selection_is_refused_when_it_is_written(spec: Any) -> None:
    with pytest.raises(ConfigurationError):
        maker(spec)


def test_nothing_is_named_where_nothing_is_known() -> None:
    message = Message("orders", b"{}")
    for stored in (b"", made(b"raw"), of({"a": 1}, maker(["a"]))):
        assert differing_paths(stored, BODY, message, {}) is None
    assert differing_paths(of({"a": 1}), BODY, Message("orders", b"raw"), NOT_JSON) is None
