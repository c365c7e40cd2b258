"""What Apache's client for Java sends, through `rocketmq4://`: the same message as through any other door."""

from typing import Any

import pytest

from exactly_once.message import Message
from exactly_once.testing.child import wait_until
from exactly_once.transport import Subscription
from tests.acceptance.test_rocketmq4_walls import Place, leave, take, the_client
from tests.services import java_producer
from tests.services.need import require
from tests.services.rocketmq import RocketMQ
from tests.services.rocketmq4_client import need_client


@pytest.fixture(autouse=True)
def _java() -> None:
    require(java_producer)
    need_client()


@pytest.fixture
def place(rocketmq: RocketMQ) -> Place:
    return Place(rocketmq)


def test_several_keys_of_a_java_producer_are_one_key_through_both_doors(place: Place) -> None:
    heard: list[Message] = []

    def callback(received: Any) -> object:
        heard.append(Message.from_rocketmq4(received))
        return the_client().ConsumeStatus.CONSUME_SUCCESS

    other = Place(place.server)
    bare = other.bare(callback)
    java_producer.send(place.server, other.topic, keys="order-7 buyer-3 order-7")
    consumers = place.transport().subscribe(place.group, [Subscription(place.topic)])
    try:
        java_producer.send(place.server, place.topic, keys="order-7 buyer-3 order-7", tag="created")
        (delivery,) = take(consumers[0], 1)
        assert (delivery.message.key, delivery.message.tag) == ("buyer-3 order-7", "created")
        assert delivery.message.former == {"key": "order-7 buyer-3 order-7"}
        wait_until(lambda: heard, what="heard", patience_s=30)
        assert heard[0].key == "buyer-3 order-7"
    finally:
        leave(consumers)
        bare.shutdown()
