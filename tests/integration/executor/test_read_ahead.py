"""The next batch is read while the server answers the claim of this one; nothing of that reaches this one's messages."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import insert
from sqlalchemy.orm import Session
from sqlalchemy.util import greenlet_spawn

from exactly_once import Message, Outcome
from exactly_once.executor import batching as batching
from exactly_once.executor.batching import Batching
from exactly_once.executor.future import SmallFuture
from exactly_once.processing.batch import BatchProcessor
from exactly_once.processing.work import BatchResults
from tests.integration.batches import FEATURES, handles
from tests.integration.shop import GROUP, Shop, order, put, shops

P = Outcome.PROCESSED


class Groups:
    """Groups of two, as a worker takes them, and what happened in which order."""

    def __init__(self, shop: Shop, *, exits_at: int | None = None, always: bool = False) -> None:
        self._shop, self._exits_at, self._always = shop, exits_at, always
        self.story: list[str] = []
        handles(shop, self._effect, key=self._key, batch=2)
        (handler,) = shop.eo._router.matching(order(1))
        assert isinstance(handler, BatchProcessor)
        self.batching = Batching(handler)

    def _key(self, message: Message) -> str:
        number = json.loads(message.body or b"")["no"]
        self.story.append(f"read {number}")
        if number == self._exits_at:
            self._exits_at = number if self._always else None
            raise SystemExit
        return str(number)

    def _effect(self, session: Session, number: object) -> None:
        self.story.append(f"call {number}")
        put(session, str(number))

    def add(self, *numbers: int) -> None:
        for number in numbers:
            self.batching.add(order(number), FEATURES, SmallFuture())

    def run(self) -> list[Any]:
        """Take a group and run it, with the next one behind it."""
        return [each.outcome for each in self.told()]

    def told(self) -> Sequence[Any]:
        """The same, all that is said of each."""
        group = self.batching.take()

        def run() -> BatchResults:
            members = self.batching.members(group)
            return self.batching.handler.run_batch(members, meanwhile=self.batching.read_ahead())

        found: Any = self._shop.await_(greenlet_spawn(run)) if self._shop.is_async else run()
        return found.results


def test_the_next_group_is_read_before_this_one_is_called_where_the_driver_lets_go(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "_LOOK_S", 60)  # however fast the server answers, all is read
    groups = Groups(shop)
    groups.add(1, 2, 3, 4)
    assert groups.run() == [P, P]
    assert groups.run() == [P, P]
    reads, calls = ["read 1", "read 2"], ["call 1", "call 2"]
    later, last = ["read 3", "read 4"], ["call 3", "call 4"]
    overlaps = shop.dialect == "postgres"
    assert groups.story == (reads + later + calls + last if overlaps else reads + calls + later + last)
    shop.assert_kept("1", "2", "3", "4", claims=["1", "2", "3", "4"])


def test_a_key_function_that_exits_while_it_is_asked_ahead_costs_nobody_anything(shop: Shop) -> None:
    groups = Groups(shop, exits_at=3)
    groups.add(1, 2, 3, 4)
    assert groups.run() == [P, P]
    assert groups.run() == [P, P]
    later = ("3", "4") if shop.dialect == "postgres" else ("4", "3")  # asked in its own group alone, it runs alone
    shop.assert_kept("1", "2", *later, claims=["1", "2", "3", "4"])


def test_a_key_function_that_always_exits_costs_its_message_alone(shop: Shop) -> None:
    groups = Groups(shop, exits_at=3, always=True)
    groups.add(1, 2, 3, 4)
    assert groups.run() == [P, P]
    exited, other = groups.told()
    assert isinstance(exited, SystemExit)
    assert not isinstance(other, BaseException)
    assert other.outcome is P
    shop.assert_kept("1", "2", "4", claims=["1", "2", "4"])


def test_a_claim_that_finds_a_key_held_reads_ahead_all_the_same(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "_LOOK_S", 60)
    for shop in shops(request, "postgres", "sync"):
        groups = Groups(shop)
        groups.add(1, 2, 3, 4)
        with shop.outside.begin() as other:
            values = {"consumer_group": GROUP, "handler": "handler", "business_key": "2", "status": 1}
            other.execute(
                insert(shop.tables.idempotent).values(
                    **values, fingerprint=b"", retry_times=0, created_at=datetime.now(UTC)
                )
            )
            assert groups.run() == [P, Outcome.IN_PROGRESS]
            other.rollback()
        assert groups.run() == [P, P]
        assert groups.story.count("read 3") == groups.story.count("read 4") == 1
        shop.assert_kept("1", "3", "4", claims=["1", "3", "4"])
