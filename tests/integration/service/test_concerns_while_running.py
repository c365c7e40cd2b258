"""What costs a group messages is looked for before a worker joins, soon after, and then every hour."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from exactly_once import ExactlyOnce
from exactly_once.alembic import upgrade
from exactly_once.message import Message
from exactly_once.service import worker_service as serving
from exactly_once.testing.child import wait_until
from exactly_once.transports.memory import MemoryTransport

TOLD = "exactly_once.worker"


@pytest.fixture
def looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Make a worker over a broker that tells this at each look, the last for ever."""

    def make(answers: Sequence[Sequence[str]]) -> tuple[Any, list[int]]:
        asked: list[int] = []

        def concerns(self: object, group: str, subscriptions: object) -> Sequence[str]:
            asked.append(1)
            return answers[min(len(asked), len(answers)) - 1]

        monkeypatch.setattr(MemoryTransport, "concerns", concerns)
        upgrade(f"sqlite:///{tmp_path / 'shop.db'}")
        eo = ExactlyOnce(f"sqlite:///{tmp_path / 'shop.db'}", group="concerns")

        @eo.handler("orders", key="no")
        def reserve(message: Message) -> None: ...

        return eo.worker(f"memory://{tmp_path.name}"), asked

    return make


def test_what_shows_only_once_all_have_joined_is_told_soon(
    looks: Callable[..., Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "_CONCERNED_SOON_S", 0.1)
    worker, _ = looks([[], ["another one wants other tags"]])
    with worker:
        wait_until(lambda: warned(caplog) != [], what="told", patience_s=60)
    assert warned(caplog) == ["another one wants other tags"]


def test_what_the_start_said_is_not_said_again_within_the_hour(
    looks: Callable[..., Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "_CONCERNED_SOON_S", 0.1)
    worker, asked = looks([["old"], ["old", "new"]])
    with worker:
        wait_until(lambda: "new" in warned(caplog), what="told", patience_s=60)
    assert warned(caplog) == ["old", "new"]
    assert len(asked) == 2


def test_each_hour_all_of_it_is_said_again(
    looks: Callable[..., Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "_CONCERNED_S", 0.1)
    worker, asked = looks([["old"]])
    with worker:
        wait_until(lambda: len(warned(caplog)) >= 3, what="told twice more", patience_s=60)
    assert len(asked) > 3  # the second look said nothing


def test_the_soon_look_leaves_each_member_time_to_tell_the_broker() -> None:
    assert 30 < serving._CONCERNED_SOON_S < 60  # a heartbeat of RocketMQ's is 30 s


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if (r.name, r.levelno) == (TOLD, logging.WARNING)]
