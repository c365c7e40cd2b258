"""The producer's facade: three tries, order kept, and an error that carries the message."""

from collections.abc import Callable, Sequence
from datetime import timedelta

import pytest

from exactly_once.errors import ExactlyOnceError, SendFailed, TransportError
from exactly_once.message import Message
from exactly_once.transports.contract import Receipt, Subscription, Surroundings
from exactly_once.transports.memory import forget
from exactly_once.transports.producer import Producer
from exactly_once.transports.registry import transport_from


class Scripted:
    """A broker's producer that answers as the test says."""

    def __init__(self, answer: Callable[[int, Message], Receipt | Exception]) -> None:
        self.tries: list[list[Message]] = []
        self.delays: list[timedelta | None] = []
        self.closed = 0
        self._answer = answer

    def send(self, messages: Sequence[Message], *, delay: timedelta | None = None) -> Sequence[Receipt | Exception]:
        self.tries.append(list(messages))
        self.delays.append(delay)
        return [self._answer(len(self.tries), message) for message in messages]

    def close(self) -> None:
        self.closed += 1


def stored(message: Message) -> Receipt:
    return Receipt(message.topic, str(message.key))


A, B, C = (Message("orders", b"{}", key=key) for key in "abc")


def test_a_message_arrives_with_its_delay() -> None:
    transport = transport_from("memory://producer", Surroundings())
    [consumer] = transport.subscribe("g", [Subscription("orders")])
    with Producer(transport.producer(), "memory://producer") as producer:
        receipt = producer.send(A)
        producer.send(B, delay=timedelta(seconds=60))
    [delivery] = consumer.receive(5, timedelta(seconds=1))
    assert delivery.message.message_id == receipt.message_id
    forget("producer")


def test_what_failed_is_tried_again_alone_and_receipts_keep_their_order() -> None:
    broker = Scripted(lambda n, m: TransportError("away") if m is B and n < 3 else stored(m))
    receipts = Producer(broker, "rocketmq://h").send_all([A, B, C], delay=timedelta(seconds=5))
    assert [receipt.message_id for receipt in receipts] == ["a", "b", "c"]
    assert broker.tries == [[A, B, C], [B], [B]]
    assert broker.delays == [timedelta(seconds=5)] * 3


def test_after_three_tries_the_error_holds_the_message_and_says_why() -> None:
    broker = Scripted(lambda n, m: TransportError(f"away, try {n}"))
    with pytest.raises(SendFailed) as caught:
        Producer(broker, "rocketmq://h:8081").send(A)
    assert len(broker.tries) == 3
    assert caught.value.message is A
    for part in ("'orders'", "'a'", "rocketmq://h:8081", "away, try 3"):
        assert part in str(caught.value)
    assert isinstance(caught.value.__cause__, TransportError)


def test_a_refused_message_is_not_tried_again() -> None:
    broker = Scripted(lambda n, m: ValueError("the tag is too long") if m is B else stored(m))
    with pytest.raises(SendFailed, match="was refused") as caught:
        Producer(broker, "rocketmq://h").send_all([A, B, C])
    assert len(broker.tries) == 1
    assert caught.value.message is B
    assert "Of 3 messages 2 are stored" in str(caught.value)


def test_a_refusal_is_named_before_the_followers_it_held_back() -> None:
    answers: dict[Message, Receipt | Exception] = {
        A: TransportError("away"),
        B: ValueError("no"),
        C: TransportError("-"),
    }
    broker = Scripted(lambda n, m: answers[m])
    with pytest.raises(SendFailed) as caught:
        Producer(broker, "rocketmq://h").send_all([A, B, C])
    assert caught.value.message is B


def test_nothing_is_sent_for_no_messages() -> None:
    broker = Scripted(lambda n, m: stored(m))
    assert Producer(broker, "rocketmq://h").send_all([]) == []
    assert broker.tries == []


def test_closing_twice_closes_the_broker_once_and_sending_afterwards_is_an_error() -> None:
    broker = Scripted(lambda n, m: stored(m))
    producer = Producer(broker, "rocketmq://h")
    producer.close()
    producer.close()
    assert broker.closed == 1
    with pytest.raises(ExactlyOnceError, match="closed"):
        producer.send(A)


def test_what_is_no_message_is_refused_with_how_one_is_made() -> None:
    broker = Scripted(lambda _, message: stored(message))
    with Producer(broker, "somewhere://") as producer:
        wrong: list[Callable[[], object]] = [
            lambda: producer.send("orders", b"{}"),  # type: ignore[call-arg, arg-type]
            lambda: producer.send("orders", body=b"{}"),  # type: ignore[call-arg, arg-type]
            lambda: producer.send(topic="orders", body=b"{}"),  # type: ignore[call-arg]
            lambda: producer.send({"order_no": "A-1"}),  # type: ignore[arg-type]
            lambda: producer.send_all([A, b"{}"]),  # type: ignore[list-item]
            lambda: producer.send_all(A),  # type: ignore[arg-type]
        ]
        for send in wrong:
            with pytest.raises(TypeError, match=r'Write producer\.send\(Message\("orders", body\)\)'):
                send()
        assert broker.tries == []
        assert producer.send(message=A).topic == "orders"
        assert len(producer.send_all(message for message in (A, B))) == 2  # type: ignore[arg-type]
