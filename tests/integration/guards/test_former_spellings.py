"""A message whose key the release before spelled otherwise is done once, whichever release did it."""

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy.orm import Session

from exactly_once import Lease, Message, Outcome, keys
from exactly_once.doctor.looking import Mark, examine
from tests.integration.batches import told as told_together
from tests.integration.shop import Shop, on, put

pytestmark = pytest.mark.nightly(meet=2)

SENT = b"order-7 buyer-3"
SPELLED = "buyer-3 order-7"
KEYS: list[Any] = [keys.message_key(), ("tag", keys.message_key()), keys.call(lambda message: f"no {message.key}")]


def now(raw: bytes = SENT, *, message_id: str = "id-1", **more: Any) -> Message:
    """The message as this release reads it."""
    found = {"topic": "orders", "body": b'{"tag": "t"}', "tags": b"", "keys": raw, "id": message_id}
    found |= {"reconsume_times": 0, "born_timestamp": 1, "get_property": {}.get}
    return Message.from_rocketmq4(SimpleNamespace(**found | more))


def before(raw: bytes = SENT, *, message_id: str = "id-1", **more: Any) -> Message:
    """The message as the release before read it."""
    return Message("orders", b'{"tag": "t"}', key=raw.decode("utf-8", "replace"), message_id=message_id, **more)


def effect(session: Session) -> None:
    put(session, "effect")


@pytest.mark.parametrize("key", KEYS, ids=["alone", "a part", "a function"])
@pytest.mark.parametrize("guard", [None, Lease(timedelta(minutes=1))], ids=["transaction", "lease"])
@pytest.mark.parametrize("raw", [SENT, b"\x8a\x91"], ids=["several keys", "no UTF-8"])
def test_what_was_done_under_its_former_key_is_a_duplicate(shop: Shop, key: Any, guard: Any, raw: bytes) -> None:
    shop.handles(effect, key=key, guard=guard)
    assert shop.process(before(raw)) is Outcome.PROCESSED
    assert shop.process(now(raw)) is Outcome.DUPLICATE
    assert shop.effects() == ["effect"]
    assert len(shop.claims()) == 1


def test_under_a_lease_in_redis_too_where_the_handler_writes_to_its_database(shop: Shop, redis_url: str) -> None:
    shop.handles(effect, key=keys.message_key(), guard=Lease(timedelta(minutes=1), store=redis_url))
    assert shop.process(before()) is Outcome.PROCESSED
    assert shop.process(now()) is Outcome.DUPLICATE
    assert shop.effects() == ["effect"]


def test_another_message_of_that_former_key_runs(shop: Shop) -> None:
    shop.handles(effect, key=keys.message_key(), fingerprint=None)
    assert shop.process(before(b"\x8a\x91", message_id="id-1")) is Outcome.PROCESSED
    assert shop.process(now(b"\x8b\x92", message_id="id-2")) is Outcome.PROCESSED, "two keys had one spelling"
    assert shop.process(now(b"\x8b\x92", message_id="id-2")) is Outcome.DUPLICATE
    assert shop.claims() == ["\ufdd08b92", "\ufffd\ufffd"]
    assert shop.effects() == ["effect", "effect"]


def test_in_a_group_too(shop: Shop) -> None:
    shop.handles(effect, key=keys.message_key(), batch=10)
    assert shop.process(before()) is Outcome.PROCESSED
    messages = [now(), now(b"b a", message_id="id-2"), now(b"c", message_id="id-3")]
    assert [one.outcome for one in told_together(shop, messages).results] == [  # type: ignore[union-attr]
        *(Outcome.DUPLICATE, Outcome.PROCESSED, Outcome.PROCESSED),
    ]
    assert shop.claims() == ["a b", "c", "order-7 buyer-3"]


def test_what_failed_under_its_former_key_succeeds_and_its_row_is_closed(shop: Shop) -> None:
    wrong = True

    def do(session: Session) -> None:
        if wrong:
            raise ValueError("not yet")
        put(session, "effect")

    shop.handles(do, key=keys.message_key(), ordered=True)
    assert shop.process(before(ordering_key="o")) is Outcome.FAILED
    wrong = False
    again = now(get_property={"__SHARDINGKEY": b"o"}.get, reconsume_times=1)
    assert shop.process(again) is Outcome.PROCESSED, "it does not wait behind itself"
    assert shop.failure().state == "resolved"
    assert shop.effects() == ["effect"]


@on(colour="sync")
def test_the_doctor_counts_the_claims_under_former_spellings(shop: Shop) -> None:
    shop.handles(effect, key=("tag", keys.message_key()))
    shop.handles(effect, name="other", key=keys.message_key())
    shop.process(before())
    shop.process(before(b"\x8a\x91", message_id="id-2"))
    shop.process(now(b"z y x", message_id="id-3"))
    told = [one.text for one in examine(shop.eo, None) if one.mark is Mark.WARN]
    found = [text for text in told if "spelled" in text]
    assert len(found) == 2
    assert all("2 claims" in text for text in found)
    assert "'handler'" in found[0]


def test_a_key_that_is_spelled_as_before_is_not_looked_up_twice() -> None:
    assert now(b"order-7").former is None
    assert now(b"buyer-3 order-7").former is None
    assert now(SENT).former == {"key": "order-7 buyer-3"}
