"""The conformance suite over `rocketmq4://`, against a real RocketMQ 5 broker and the real librocketmq."""

from collections.abc import Sequence
from datetime import timedelta
from itertools import count

import pytest

from exactly_once.testing.child import wait_until
from exactly_once.testing.conformance import Conformance, ServedHarness, ServerConformance, TopicConformance
from exactly_once.transports.contract import Surroundings, Transport
from exactly_once.transports.registry import transport_from
from tests.services.rocketmq import RocketMQ
from tests.services.rocketmq4_client import need_client, shares

_names = count()


class RocketMQ4Harness(ServedHarness):
    patience = timedelta(seconds=15)
    lag = timedelta(seconds=2)
    remedy = "Type: mqadmin update"
    ids_from_threads_differ = False  # librocketmq gave 51 of 40,000 messages sent by 8 threads the id of another

    def __init__(self, server: RocketMQ) -> None:
        self.server = server

    def transport(self, *, invisible: timedelta | None = None) -> Transport:
        return transport_from(f"rocketmq4://{self.server.name_server}", Surroundings())

    def topic(self, *, ordered: bool = False, delayed: bool = False) -> str:
        name = f"conformance4-{next(_names)}"
        self.server.create_topic(name, "FIFO" if ordered else "DELAY" if delayed else "NORMAL")
        return name

    def group(self, *, ordered: bool = False) -> str:
        name = f"conformance4-group-{next(_names)}"
        self.server.create_group(name, orderly=ordered, retries=2147483647)
        return name

    def joined(self, group: str, topics: Sequence[str], members: int) -> None:
        """The client reports what it has been given: all queues, none of them twice."""

        def shared_out() -> bool:
            held = [queues for queues in shares(self.server, group) if queues]
            every = [queue for queues in held for queue in queues if queue[0] in topics]
            return len(held) == members and len(every) == len(set(every)) == 4 * len(topics)

        wait_until(shared_out, what=f"{members} members share {topics}", patience_s=40)

    def stop_server(self) -> None:
        self.server.kill_proxy()  # the broker is in the same process

    def start_server(self) -> None:
        self.server.start()

    def unreachable(self) -> Transport:
        return transport_from("rocketmq4://127.0.0.1:1", Surroundings())


class TestRocketMQ4(ServerConformance, TopicConformance, Conformance):
    @pytest.fixture
    def harness(self, rocketmq: RocketMQ) -> RocketMQ4Harness:
        need_client()
        return RocketMQ4Harness(rocketmq)
