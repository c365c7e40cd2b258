"""The conformance suite over `rocketmq://`, against a real RocketMQ 5."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import count

import pytest

from exactly_once.errors import TransportError
from exactly_once.testing.conformance import (
    Conformance,
    ServedHarness,
    ServerConformance,
    TopicConformance,
    numbered,
    send,
)
from exactly_once.transports.contract import Receipt, Surroundings, Transport
from exactly_once.transports.registry import transport_from
from exactly_once.transports.rocketmq5 import wall
from tests.services.need import need
from tests.services.rocketmq import RocketMQ

_names = count()


class RocketMQ5Harness(ServedHarness):
    patience = timedelta(seconds=15)
    # the broker looks once a second for what is due, and a proxy's long poll is told later still: 2 to 4 s were seen
    lag = timedelta(seconds=5)
    short_invisible = timedelta(seconds=3)
    remedy = "Type: mqadmin update"

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

    def test_a_client_that_another_thread_gives_up_under_way_is_an_answer_and_no_exception(
        self, harness: RocketMQ5Harness
    ) -> None:
        from exactly_once.transports.rocketmq5.producer import RocketMQ5Producer

        topic = harness.topic()
        producer = harness.transport().producer()
        assert isinstance(producer, RocketMQ5Producer)
        try:
            send(harness, producer, numbered(topic, 1))
            cut = 0
            with ThreadPoolExecutor(1) as pool:
                for _ in range(10):
                    sending = pool.submit(producer.send, numbered(topic, 400))
                    time.sleep(0.02)
                    producer._forget(producer._client)
                    answers = sending.result(30)
                    assert len(answers) == 400
                    assert all(isinstance(answer, (Receipt, TransportError)) for answer in answers)
                    cut += any(isinstance(answer, TransportError) for answer in answers)
            assert cut, "no send was cut"
            send(harness, producer, numbered(topic, 1))
        finally:
            producer.close()
