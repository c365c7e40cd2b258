"""What Apache's client for Java sends, through `rocketmq://`: the same message as through any other door."""

import pytest

from exactly_once.message import Message
from exactly_once.transport import Subscription
from exactly_once.transports.rocketmq5 import wall
from exactly_once.verdict import Ack
from tests.acceptance.test_rocketmq5_walls import Broker, bare_receive, receive
from tests.services import java_producer
from tests.services.need import need, require
from tests.services.rocketmq import RocketMQ


@pytest.fixture(autouse=True)
def _java() -> None:
    require(java_producer)
    need(wall.missing())
    wall.build()


@pytest.fixture
def broker(rocketmq: RocketMQ) -> Broker:
    return Broker(rocketmq)


def test_several_keys_of_a_java_producer_are_one_key_through_both_doors(broker: Broker) -> None:
    topic, group = broker.names()
    _, other = broker.names()
    java_producer.send(broker.server, topic, keys="order-7 buyer-3 order-7", tag="created")
    with broker.bare(other, topic) as bare:
        [received] = bare_receive(bare)
        assert Message.from_rocketmq(received).key == "buyer-3 order-7"
    with broker.consumer(group, Subscription(topic)) as ours:
        [delivery] = receive(ours)
        assert (delivery.message.key, delivery.message.tag) == ("buyer-3 order-7", "created")
        assert delivery.message.former == {"key": "order-7 buyer-3 order-7"}
        ours.settle([(delivery, Ack())])
