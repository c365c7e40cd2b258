"""A message as it is made by hand, and from what confluent-kafka hands out, by its documented methods."""

from datetime import UTC, datetime
from typing import Any

import pytest

from exactly_once import Message


class Received:
    """What the client hands out, as far as it is read."""

    def __init__(
        self, *, key: bytes | None, headers: list[tuple[str, bytes | None]] | None, timestamp: tuple[int, int]
    ) -> None:
        self._key, self._headers, self._timestamp = key, headers, timestamp

    def __getattr__(self, name: str) -> Any:
        found = {"topic": "orders", "value": b"\x00{}", "partition": 3, "offset": 17, "key": self._key}
        found |= {"headers": self._headers, "timestamp": self._timestamp}
        return lambda: found[name]


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
