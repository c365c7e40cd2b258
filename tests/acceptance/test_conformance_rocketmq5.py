"""The conformance suite over `rocketmq://`, against a real RocketMQ 5."""

from datetime import timedelta
from itertools import count

import pytest

from exactly_once.transport import Surroundings, Transport
from exactly_once.transports import transport_from
from exactly_once.transports.rocketmq5 import wall
from tests.acceptance.conformance import Conformance, ServedHarness, ServerConformance, TopicConformance
from tests.services.need import need
from tests.services.rocketmq import RocketMQ

_names = count()


class RocketMQ5Harness(ServedHarness):
    patience = timedelta(seconds=15)
    # the broker looks once a second for what is due, and a proxy's long poll is told later still: 2 to 4 s were seen
    lag = timedelta(seconds=5)
    short_invisible = timedelta(seconds=3)

    def __init__(self, server: RocketMQ) -> None:
        self.server = server
        self.url = f"rocketmq://{server.grpc}"

    def transport(self, *, invisible: timedelta | None = None) -> Transport:
        return transport_from(f"{self.url}?invisible_s={(invisible or timedelta(seconds=30)).seconds}", Surroundings())

    def topic(self, *, ordered: bool = False, delayed: bool = False) -> str:
        name = f"conformance5-{next(_names)}"
        self.server.create_topic(name, "FIFO" if ordered else "DELAY" if delayed else "NORMAL")
        return name

    def group(self, *, ordered: bool = False) -> str:
        name = f"conformance5-group-{next(_names)}"
        self.server.create_group(name, orderly=ordered)
        return name

    def stop_server(self) -> None:
        self.server.kill_proxy()

    def start_server(self) -> None:
        self.server.start()

    def unreachable(self) -> Transport:
        return transport_from("rocketmq://127.0.0.1:1", Surroundings())


class TestRocketMQ5(ServerConformance, TopicConformance, Conformance):
    @pytest.fixture
    def harness(self, rocketmq: RocketMQ) -> RocketMQ5Harness:
        need(wall.missing())
        return RocketMQ5Harness(rocketmq)
