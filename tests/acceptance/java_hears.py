"""What each of our two producers for RocketMQ sends, and that Java's client hears it so, field by field. Called by tests."""

import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from time import time

from exactly_once.clients.rocketmq_properties import ORDERING_PROPERTY, internal
from exactly_once.message import Message
from exactly_once.transports.contract import Receipt, Transport
from tests.services.java_consumer import JavaListener
from tests.services.rocketmq import RocketMQ

__all__ = ["check_what_java_hears"]

DELAY = timedelta(seconds=5)
PROPERTIES = {"city": "Köln 🚀", "empty": "", "blank": " ", "none": ""}
_WITHIN_S = 3600  # a clock is not what is looked at, but that the time is one


def _sent(topics: Mapping[str, str]) -> Sequence[tuple[Message, timedelta | None]]:
    normal, fifo, delay = (topics[kind] for kind in ("NORMAL", "FIFO", "DELAY"))
    return [
        (Message(normal, '{"no": "ü"}'.encode(), tag="created", key="A-1", properties=PROPERTIES), None),
        (Message(normal, b"\0\xff\0", key="buyer-3 order-7", properties={"one": "1"}), None),
        (Message(normal, b"bare"), None),
        (Message(fifo, b"first", tag="paid", key="Köln", ordering_key="o-1", properties={"only": ""}), None),
        (Message(fifo, b"second", ordering_key="o-1"), None),
        (Message(delay, b"later", tag="late", key="B-2", properties={"city": "Köln"}), DELAY),
    ]


def check_what_java_hears(server: RocketMQ, transport: Transport, group: str, topics: Mapping[str, str]) -> None:
    """Send one of each kind, and compare.

    Args:
        server: Where to.
        transport: Whose producer sends.
        group: Java's, which has not consumed yet.
        topics: One for each kind of message: NORMAL, FIFO and DELAY; they may be one.
    """
    sent = _sent(topics)
    producer = transport.producer()
    try:
        answers = [producer.send([message], delay=delay)[0] for message, delay in sent]
    finally:
        producer.close()
    receipts = [answer for answer in answers if isinstance(answer, Receipt)]
    assert len(receipts) == len(sent), answers
    with JavaListener(server, group, *dict.fromkeys(topics.values())) as listener:
        heard = {one.id: one for one in listener.wait_for(len(sent))}
    assert heard.keys() == {receipt.message_id for receipt in receipts}, "under the ids that the producer was told"
    for (message, delay), receipt in zip(sent, receipts, strict=True):
        one = heard[receipt.message_id]
        assert (one.topic, one.body, one.tags, one.keys) == (message.topic, message.body, message.tag, message.key)
        assert one.properties.get(ORDERING_PROPERTY) == message.ordering_key
        theirs = {name: value for name, value in one.properties.items() if not internal(name)}
        assert theirs == {name: value for name, value in message.properties.items() if value}
        if not all(message.properties.values()):
            assert json.loads(one.properties["eo-names"]) == list(message.properties), "the empty ones are named here"
        assert one.again == 0
        assert abs(one.born - time() * 1000) < _WITHIN_S * 1000
        # a broker's delays are of whole seconds
        assert delay is None or one.heard - one.born >= (delay.total_seconds() - 1) * 1000
    first, second = (heard[receipts[place].message_id] for place in (3, 4))
    assert first.queue == second.queue, "of one ordering key, in one queue"
