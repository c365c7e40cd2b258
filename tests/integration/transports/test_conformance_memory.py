"""The conformance suite over `memory://`, and what is particular to it."""

from datetime import timedelta
from itertools import count

import pytest

from exactly_once.errors import ConfigurationError
from exactly_once.message import Message
from exactly_once.outcome import Ack
from exactly_once.testing.conformance import Conformance, Harness
from exactly_once.transports.contract import Subscription, Surroundings, Transport
from exactly_once.transports.memory import forget
from exactly_once.transports.registry import transport_from

_names = count()
SECOND = timedelta(seconds=1)


class MemoryHarness(Harness):
    lag = timedelta(milliseconds=300)
    short_invisible = timedelta(milliseconds=600)

    def __init__(self) -> None:
        self.name = f"conformance-{next(_names)}"

    def transport(self, *, invisible: timedelta | None = None) -> Transport:
        option = f"?invisible_s={invisible.total_seconds()}" if invisible else ""
        return transport_from(f"memory://{self.name}{option}", Surroundings())

    def topic(self, *, ordered: bool = False, delayed: bool = False) -> str:
        return f"topic-{next(_names)}"

    def group(self, *, ordered: bool = False) -> str:
        return f"group-{next(_names)}"


class TestMemory(Conformance):
    @pytest.fixture
    def harness(self) -> Harness:
        return MemoryHarness()


def test_transports_of_one_name_share_a_broker_and_of_two_names_do_not() -> None:
    one, same, other = (transport_from(f"memory://{n}", Surroundings()) for n in ("share", "share", "not-share"))
    [consumer] = same.subscribe("g", [Subscription("t")])
    [stranger] = other.subscribe("g", [Subscription("t")])
    one.producer().send([Message("t", b"x")])
    assert len(consumer.receive(1, SECOND)) == 1
    assert list(stranger.receive(1, timedelta(0))) == []
    forget("share")
    forget("not-share")


def test_what_was_sent_before_any_group_joined_goes_to_the_first_that_joins() -> None:
    transport = transport_from("memory://early", Surroundings())
    transport.producer().send([Message("t", b"early")])
    [first] = transport.subscribe("first", [Subscription("t")])
    [second] = transport.subscribe("second", [Subscription("t")])
    assert [d.message.body for d in first.receive(5, SECOND)] == [b"early"]
    assert list(second.receive(5, timedelta(0))) == []
    forget("early")


def test_an_expired_delivery_settles_nothing() -> None:
    transport = transport_from("memory://fence?invisible_s=0.05", Surroundings())
    [consumer] = transport.subscribe("g", [Subscription("t")])
    transport.producer().send([Message("t", b"x")])
    [late] = consumer.receive(1, SECOND)
    [current] = consumer.receive(1, SECOND)
    consumer.settle([(late, Ack())])
    [third] = consumer.receive(1, SECOND)
    assert [d.message.attempt for d in (late, current, third)] == [1, 2, 3]
    consumer.settle([(third, Ack())])
    assert list(consumer.receive(1, timedelta(milliseconds=100))) == []
    forget("fence")


@pytest.mark.parametrize("url", ["memory://a,b", "memory://a?colour=red", "memory://a?invisible_s=-1"])
def test_a_wrong_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError):
        transport_from(url, Surroundings())
