"""The folder keeps the contract: the conformance suite, and what is particular to a folder."""

from datetime import timedelta
from itertools import count
from pathlib import Path

import pytest
from transport import FolderTransport

from exactly_once import Message
from exactly_once.outcome import Ack
from exactly_once.testing.conformance import Conformance, Harness
from exactly_once.transports.contract import Subscription, Surroundings

SECOND = timedelta(seconds=1)


class FolderHarness(Harness):
    lag = timedelta(milliseconds=300)
    short_invisible = SECOND

    def __init__(self, root: Path) -> None:
        self.root, self.numbers = root, count()

    def transport(self, *, invisible: timedelta | None = None) -> FolderTransport:
        return FolderTransport(self.root, invisible or timedelta(seconds=30))

    def topic(self, *, ordered: bool = False, delayed: bool = False) -> str:
        return f"topic/{next(self.numbers)}"

    def group(self, *, ordered: bool = False) -> str:
        return f"group@{next(self.numbers)}"


class TestFolder(Conformance):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> FolderHarness:
        return FolderHarness(tmp_path)


def test_a_url_names_the_folder_and_check_says_what_to_type_where_it_is_not_there(tmp_path: Path) -> None:
    transport = FolderTransport.from_url(f"folder://{tmp_path}/shop", Surroundings())
    [problem] = transport.check("inventory", [Subscription("orders")])
    assert problem.endswith(f"Type: mkdir -p {tmp_path}/shop")


def test_what_nobody_would_receive_is_refused(tmp_path: Path) -> None:
    [answer] = FolderTransport(tmp_path).send([Message("orders", b"{}")])
    assert isinstance(answer, Exception)


def test_a_delivery_whose_time_is_over_settles_nothing(tmp_path: Path) -> None:
    transport = FolderTransport(tmp_path, invisible=timedelta(milliseconds=50))
    [consumer] = transport.subscribe("inventory", [Subscription("orders")])
    transport.send([Message("orders", b"{}")])
    [late], [current] = consumer.receive(1, SECOND), consumer.receive(1, SECOND)
    consumer.settle([(late, Ack())])
    [third] = consumer.receive(1, SECOND)
    assert [each.message.attempt for each in (late, current, third)] == [1, 2, 3]
