"""A step's result is stored and read back as it was, or refused: nothing of it is renamed or lost without a word."""

import warnings
from dataclasses import dataclass
from datetime import date
from enum import Enum
from typing import Any

import pytest
from pydantic import BaseModel, Field, PrivateAttr, SecretStr
from pydantic_core.core_schema import no_info_plain_validator_function, to_string_ser_schema

from exactly_once.handlers.steps import coder


class Name(str):
    """Equal to nothing but itself."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__


class Kind(Enum):
    ONE = "1"


REFUSED: list[Any] = [
    {1: "a", "1": "b"},
    {1: "a"},
    {None: "a"},
    {True: "a", "true": "b"},
    {1.5: "a"},
    {(1, 2): "a"},
    {Kind.ONE: "a"},
    {Name("a"): 1, Name("a") + "": 2},
    {"deep": [{"er": ({2: "a"},)}]},
    [{1: "a"}],
    float("nan"),
    {"a", "b"},
    b"bytes",
    object(),
]


@pytest.mark.parametrize("value", REFUSED, ids=lambda value: type(value).__name__)
def test_what_json_would_rename_or_lose_is_refused(value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        coder(None).encode(value)


@pytest.mark.parametrize(
    "value",
    [None, True, 1, 1.5, "a", "\ud800", [], {}, [1, [2, {"a": [None]}]], {"1": "b", "true": 1}, {"": {"": ""}}, 10**30],
    ids=lambda value: repr(value).partition(" at 0x")[0],
)
def test_what_is_json_is_read_back_as_it_was(value: Any) -> None:
    plain = coder(None)
    assert plain.decode(plain.encode(value)) == value


def test_a_tuple_comes_back_as_a_list() -> None:
    plain = coder(None)
    assert plain.decode(plain.encode({"at": (1, (2, 3))})) == {"at": [1, [2, 3]]}


@pytest.mark.parametrize(
    ("returns", "value"),
    [
        (dict, {1: "a", "1": "b"}),
        (Any, {"deep": [{1: "a", "1": "b"}]}),
        (dict[int | str, str], {1: "a", "1": "b"}),
        (dict[Kind | str, str], {Kind.ONE: "a", "1": "b"}),
    ],
    ids=str,
)
def test_two_keys_of_one_text_are_refused_with_returns_too(returns: Any, value: Any) -> None:
    with pytest.raises(ValueError, match="two keys have one text"):
        coder(returns).encode(value)


@pytest.mark.parametrize(
    ("returns", "value"),
    [(dict[int, str], {1: "a", 2: "b"}), (dict[date, int], {date(2026, 1, 1): 1}), (tuple[int, int], (1, 2))],
    ids=str,
)
def test_with_returns_keys_come_back_as_they_were(returns: Any, value: Any) -> None:
    typed = coder(returns)
    assert typed.decode(typed.encode(value)) == value


class Hidden(BaseModel):
    """As a client for a payment service returns it."""

    id: str
    secret: SecretStr = SecretStr("")
    raw: str = Field(default="", exclude=True)
    _client: object = PrivateAttr(default_factory=object)


class Wider(Hidden):
    more: str = "more"


class Bare:
    """Its values compare as objects do."""

    @classmethod
    def __get_pydantic_core_schema__(cls, *_: Any) -> Any:
        return no_info_plain_validator_function(lambda _: cls(), serialization=to_string_ser_schema())


@pytest.mark.parametrize(
    ("value", "alike"),
    [
        (Hidden(id="1"), True),
        (Hidden(id="1", secret=SecretStr("pa55")), False),
        (Hidden(id="1", raw="<xml/>"), False),
        (Wider(id="1"), False),
    ],
    ids=["all of it", "a secret", "a field left out", "a field of a subclass"],
)
def test_what_json_changes_is_told_from_what_comes_back(value: Any, alike: bool) -> None:
    typed = coder(Hidden)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            encoded = typed.encode(value)
        except ValueError:  # pydantic itself refuses it, of some releases
            assert not alike
            return
    assert typed.alike(value, typed.decode(encoded)) is alike


class Page(BaseModel):
    items: list[Hidden]
    by_id: dict[str, Hidden]


@dataclass(eq=False)
class Unequal:
    id: str
    of: Hidden


@pytest.mark.parametrize("secret", ["", "pa55"])
def test_what_is_within_is_compared_by_what_it_shows(secret: str) -> None:
    one = Hidden(id="1", secret=SecretStr(secret))
    cases: list[tuple[Any, Any]] = [
        (list[Hidden], [one]),
        (dict[str, Hidden], {"a": one}),
        (tuple[Hidden, int], (one, 1)),
        (Page, Page(items=[one], by_id={"1": one})),
        (Unequal, Unequal("1", one)),
        (list[Unequal], [Unequal("1", one)]),
    ]
    for returns, value in cases:
        typed = coder(returns)
        assert typed.alike(value, typed.decode(typed.encode(value))) is not bool(secret), returns


def test_values_that_cannot_be_compared_are_believed() -> None:
    typed = coder(Bare)
    assert typed.alike(Bare(), typed.decode(typed.encode(Bare())))
