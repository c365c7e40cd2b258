"""What every transport must do, whatever broker stands behind it: one suite, driven by `Features`.

A transport's test module subclasses `Conformance` and provides a fixture `harness`. Transports with a server that can
go away take `ServerConformance` too, and those whose topics and groups must be made beforehand `TopicConformance`.
A test is skipped for one kind of reason only: what the transport itself declares it does not do.

    class TestMyBroker(ServerConformance, Conformance):
        @pytest.fixture
        def harness(self, my_broker: MyBroker) -> MyHarness:
            return MyHarness(my_broker)

The waits are deadlines, not sleeps: `harness.patience` is the longest a broker may take for what it promises, and
`harness.lag` how late it may be with a message that is due. Nothing here knows a broker. Called by pytest, for the
transports of this package and for those of others.
"""

from __future__ import annotations

import random
import re
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Final, Self

import pytest

from exactly_once.message import Message
from exactly_once.outcome import Ack, Redeliver, Settlement
from exactly_once.transports.contract import (
    Away,
    BrokerProducer,
    Consumer,
    Delivery,
    Features,
    Receipt,
    Subscription,
    Transport,
)

__all__ = [
    "Conformance",
    "Harness",
    "Heard",
    "Listening",
    "ServedHarness",
    "ServerConformance",
    "TopicConformance",
    "ack",
    "leave",
    "needs",
    "number",
    "numbered",
    "producing",
    "send",
]

SECOND: Final = timedelta(seconds=1)
CLOCK: Final = timedelta(
    milliseconds=100
)  # clocks of two machines, and of one rounded to milliseconds, differ a little


class Harness(ABC):
    """Makes what a test needs on one broker: subclass it, and return it from the fixture `harness`.

    Example:
        class MyHarness(Harness):
            def transport(self, *, invisible: timedelta | None = None) -> Transport:
                return MyTransport("127.0.0.1", invisible=invisible or timedelta(seconds=30))

            def topic(self, *, ordered: bool = False, delayed: bool = False) -> str:
                return f"topic-{uuid4().hex}"

            def group(self, *, ordered: bool = False) -> str:
                return f"group-{uuid4().hex}"
    """

    patience = timedelta(seconds=10)
    """The longest anything the broker promises may take."""
    lag = timedelta(milliseconds=500)
    """How late a message may come that is due; and how long to wait before believing that none comes."""
    short_invisible = timedelta(seconds=2)
    """The shortest invisible time the broker takes, for tests that wait until it is over."""
    many = 1000
    """Messages of the long test."""
    ids_from_threads_differ = True
    """Whether messages sent by several threads at once never get the same id."""
    remedy = "Type: "
    """How the advice begins in what `check` says of a topic or a group that does not exist."""

    @abstractmethod
    def transport(self, *, invisible: timedelta | None = None) -> Transport:
        """Return a new transport to the same broker.

        Args:
            invisible: How long a delivery is to stay invisible, where the broker has such a thing. None: the usual time.
        """

    @abstractmethod
    def topic(self, *, ordered: bool = False, delayed: bool = False) -> str:
        """Return the name of a fresh topic, which exists.

        Args:
            ordered: It is to keep the order of each ordering key.
            delayed: It is to take messages that are delivered later.
        """

    @abstractmethod
    def group(self, *, ordered: bool = False) -> str:
        """Return the name of a fresh group, which exists where groups must be made.

        Args:
            ordered: It is to receive an ordered topic.
        """

    def joined(self, group: str, topics: Sequence[str], members: int) -> None:  # noqa: B027
        """Wait until a group's members have shared the topics out; called after each subscribe.

        Args:
            group: Which group.
            topics: What its members receive.
            members: How many there are now.
        """


class ServedHarness(Harness):
    """For a broker that is a server, which can be stopped: what `ServerConformance` needs beside the rest."""

    @abstractmethod
    def stop_server(self) -> None:
        """Kill the server."""

    @abstractmethod
    def start_server(self) -> None:
        """Start it again on the same store, and wait until it answers."""

    @abstractmethod
    def unreachable(self) -> Transport:
        """Return a transport for an address where nothing listens."""


@dataclass(frozen=True, slots=True)
class Heard:
    """One delivery, and when it was handed out (time.monotonic)."""

    delivery: Delivery
    at: float

    @property
    def message(self) -> Message:
        return self.delivery.message


Decide = Callable[[Delivery], Settlement | None]


def ack(_: Delivery) -> Settlement:
    return Ack()


def leave(_: Delivery) -> None:
    """Leave it unsettled."""


class Listening:
    """One member of a group as the worker would run it: a thread per consumer, each delivery decided and settled.

    Args:
        harness: Whose broker.
        group: Which group it joins.
        subscriptions: What it receives.
        decide: Returns the settlement of a delivery, or None to leave it unsettled.
        transport: Through which transport. None: a new one of the harness.
        limit: How many deliveries one `receive` may hand out.
        hands: How many threads decide and settle. 0: the receiving thread does.
        members: How many members of the group there are with this one.

    Raises:
        AssertionError: Something waited for did not come, or came where nothing may.

    Example:
        with Listening(harness, group, [Subscription(topic)]) as listening:
            listening.wait_count(3)
    """

    def __init__(
        self,
        harness: Harness,
        group: str,
        subscriptions: Sequence[Subscription],
        decide: Decide = ack,
        *,
        transport: Transport | None = None,
        limit: int = 16,
        hands: int = 0,
        members: int = 1,
    ) -> None:
        self._harness, self._decide, self._limit = harness, decide, limit
        transport = transport or harness.transport()
        self.consumers: Sequence[Consumer] = transport.subscribe(group, subscriptions)
        self.heard: list[Heard] = []
        self._errors: list[BaseException] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._pool = ThreadPoolExecutor(hands) if hands else None  # settles from other threads than the receiving one
        self._threads = [threading.Thread(target=self._receive, args=(c,), daemon=True) for c in self.consumers]
        for thread in self._threads:
            thread.start()
        harness.joined(group, [s.topic for s in subscriptions], members)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.leave()
        if kind is None and self._errors:
            raise self._errors[0]

    def leave(self) -> None:
        """Stop and close, in the worker's order; twice is once."""
        self._stopping = True
        for consumer in self.consumers:
            consumer.stop()
        for thread in self._threads:
            thread.join(self._harness.patience.total_seconds())
            assert not thread.is_alive(), "receive did not end after stop"
        if self._pool:
            self._pool.shutdown()
        for consumer in self.consumers:
            consumer.close()

    def bodies(self) -> list[bytes | None]:
        with self._changed:
            return [h.message.body for h in self.heard]

    def extend(self) -> None:
        """Extend all that is unsettled, as the worker does each third of the invisible time."""
        with self._changed:
            deliveries = [h.delivery for h in self.heard]
        for consumer in self.consumers:
            consumer.extend(deliveries)

    def wait(self, until: Callable[[], bool], what: str, *, longest: timedelta | None = None) -> None:
        """Wait until something is heard, or fail and say what was."""
        with self._changed:
            done = self._changed.wait_for(
                lambda: bool(self._errors) or until(), (longest or self._harness.patience).total_seconds()
            )
            if self._errors:
                raise self._errors[0]
            assert done, f"{what}: not within {longest or self._harness.patience}; heard {len(self.heard)} deliveries"

    def wait_count(self, count: int, *, longest: timedelta | None = None) -> None:
        self.wait(lambda: len(self.heard) >= count, f"{count} deliveries", longest=longest)

    def stays_quiet(self, span: timedelta) -> None:
        """Fail if anything more is handed out within `span`."""
        with self._changed:
            before = len(self.heard)
            more = self._changed.wait_for(lambda: len(self.heard) > before, span.total_seconds())
            assert not more, f"handed out again: {self.heard[before:]}"

    def _receive(self, consumer: Consumer) -> None:
        try:
            while not self._stopping:
                for delivery in consumer.receive(self._limit, SECOND):
                    with self._changed:
                        self.heard.append(Heard(delivery, time.monotonic()))
                        self._changed.notify_all()
                    if self._pool:
                        self._pool.submit(self._settle, consumer, delivery)
                    else:
                        self._settle(consumer, delivery)
        except BaseException as error:
            self._fail(error)

    def _settle(self, consumer: Consumer, delivery: Delivery) -> None:
        try:
            settlement = self._decide(delivery)
            if settlement is not None:
                consumer.settle([(delivery, settlement)])
            with self._changed:  # a test may wait for what `decide` wrote down
                self._changed.notify_all()
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._errors.append(error)
            self._changed.notify_all()


@contextmanager
def producing(transport: Transport) -> Iterator[BrokerProducer]:
    """A producer that is closed in the end.

    Example:
        with producing(harness.transport()) as producer:
            send(harness, producer, numbered(topic, 3))
    """
    producer = transport.producer()
    try:
        yield producer
    finally:
        producer.close()


def send(
    harness: Harness, producer: BrokerProducer, messages: Sequence[Message], *, delay: timedelta | None = None
) -> list[Receipt]:
    """Send all, trying again what failed: a young topic may not be known everywhere at once.

    Args:
        harness: How long to try: its `patience`.
        producer: Through which producer.
        messages: What to send.
        delay: Deliver them not before this has passed.

    Returns:
        A receipt for each, in order.

    Raises:
        Exception: What the producer answered: a `ValueError` at once, anything else after the harness' `patience`.
    """
    receipts: list[Receipt | None] = [None] * len(messages)
    deadline = time.monotonic() + harness.patience.total_seconds()
    while True:
        todo = [n for n, receipt in enumerate(receipts) if receipt is None]
        if not todo:
            return [receipt for receipt in receipts if receipt is not None]
        failed: Exception | None = None
        for n, answer in zip(todo, producer.send([messages[n] for n in todo], delay=delay), strict=True):
            if isinstance(answer, Receipt):
                receipts[n] = answer
            elif isinstance(answer, ValueError):
                raise answer
            else:
                failed = failed or answer
        if failed is not None and time.monotonic() > deadline:
            raise failed


def numbered(topic: str, count: int, *, tag: str | None = None, ordering_key: str | None = None) -> list[Message]:
    """Return messages whose bodies are the numbers from 0.

    Example:
        >>> [message.body for message in numbered("orders", 2)]
        [b'0', b'1']
    """
    return [Message(topic, str(n).encode(), tag=tag, key=f"k{n}", ordering_key=ordering_key) for n in range(count)]


def number(delivery: Delivery) -> int:
    """Return the number in the body of a delivery of `numbered`."""
    return int(delivery.message.body or b"")


def needs(features: Features, name: str) -> None:
    """Skip, where the transport declares that it does not do this.

    Args:
        features: The transport's.
        name: A field of `Features`.
    """
    if not getattr(features, name):
        pytest.skip(f"this transport declares Features.{name} = {getattr(features, name)}")


def invisible_of(transport: Transport, group: str, subscriptions: Sequence[Subscription]) -> None:
    """Skip, where a delivery is ours for as long as we are connected."""
    consumers = transport.subscribe(group, subscriptions)
    invisible = consumers[0].invisible
    for consumer in consumers:
        consumer.stop()
        consumer.close()
    if invisible is None:
        pytest.skip("this transport declares Consumer.invisible = None: a delivery is ours while we are connected")


class Conformance:
    """What every transport does. Subclass it under a name that begins with Test, and give a fixture `harness`.

    Example:
        class TestMyBroker(Conformance):
            @pytest.fixture
            def harness(self) -> Harness:
                return MyHarness()
    """

    @pytest.fixture
    def harness(self) -> Harness:
        """Give what makes transports, topics and groups."""
        raise NotImplementedError(
            f"{type(self).__name__} lacks what makes its transport: give it a fixture `harness` that returns a Harness."
        )

    @pytest.fixture
    def features(self, harness: Harness) -> Features:
        """Give what the transport declares: it decides which tests are skipped."""
        return harness.transport().features

    # -- what is carried ----------------------------------------------------------------------------------------------

    def test_every_field_of_a_message_comes_back_as_it_was_sent(self, harness: Harness, features: Features) -> None:
        topic, group = harness.topic(), harness.group()
        sent = Message(
            topic,
            bytes(range(256)) + b"\x00\xff\x00",
            tag="created" if features.tags else None,
            key="Bestellung-Ä-№7-🎁",
            properties={"trace": "a-1", "city": "Zürich 東京", "empty-ish": " x "} if features.properties else {},
        )
        with Listening(harness, group, [Subscription(topic)]) as listening, producing(harness.transport()) as producer:
            before = datetime.now(UTC)
            [receipt] = send(harness, producer, [sent])
            listening.wait_count(1)
        got = listening.heard[0].message
        assert (got.topic, got.body, got.tag, got.key) == (sent.topic, sent.body, sent.tag, sent.key)
        assert dict(got.properties) == dict(sent.properties)
        assert got.ordering_key is None
        assert receipt == Receipt(topic, got.message_id or "no message id")
        assert got.born_at is not None
        assert got.born_at.tzinfo is not None
        assert abs(got.born_at - before) < harness.patience + SECOND
        assert got.attempt == 1
        assert listening.heard[0].delivery.handler is None

    @pytest.mark.parametrize(
        "body",
        [b"\x00", b"a\x00b", b"\xff" * 3, "überall".encode(), b" "],
        ids=lambda value: repr(value).partition(" at 0x")[0],
    )
    def test_a_body_of_any_bytes_comes_back(self, harness: Harness, body: bytes) -> None:
        self._round_trip(harness, body)

    def test_a_body_of_one_mebibyte_comes_back(self, harness: Harness, features: Features) -> None:
        size = min(1024 * 1024, features.max_body_bytes or 1024 * 1024)
        self._round_trip(harness, random.Random(7).randbytes(size))  # noqa: S311  (the same bytes each time)

    def test_a_body_of_no_bytes_comes_back(self, harness: Harness, features: Features) -> None:
        needs(features, "empty_body")
        self._round_trip(harness, b"")

    def _round_trip(self, harness: Harness, body: bytes) -> None:
        topic, group = harness.topic(), harness.group()
        with Listening(harness, group, [Subscription(topic)]) as listening, producing(harness.transport()) as producer:
            send(harness, producer, [Message(topic, body, key="k")])
            listening.wait_count(1)
        assert listening.bodies() == [body]

    def test_a_message_without_key_tag_and_properties_comes_back_without_them(self, harness: Harness) -> None:
        topic, group = harness.topic(), harness.group()
        with Listening(harness, group, [Subscription(topic)]) as listening, producing(harness.transport()) as producer:
            send(harness, producer, [Message(topic, b"bare")])
            listening.wait_count(1)
        got = listening.heard[0].message
        assert (got.tag, got.key, got.ordering_key, dict(got.properties)) == (None, None, None, {})

    # -- settling -----------------------------------------------------------------------------------------------------

    def test_an_acknowledged_message_does_not_come_again(self, harness: Harness) -> None:
        topic, group = harness.topic(), harness.group()
        short = harness.transport(invisible=harness.short_invisible)
        with (
            Listening(harness, group, [Subscription(topic)], transport=short) as listening,
            producing(harness.transport()) as producer,
        ):
            send(harness, producer, numbered(topic, 3))
            listening.wait_count(3)
            invisible = listening.consumers[0].invisible or timedelta(0)
            listening.stays_quiet(invisible + harness.lag)
        with Listening(harness, group, [Subscription(topic)]) as again:
            again.stays_quiet(harness.lag)

    def test_a_redelivered_message_comes_again_not_before_its_delay(self, harness: Harness, features: Features) -> None:
        needs(features, "redelivers")
        topic, group, delay = harness.topic(), harness.group(), timedelta(seconds=2)
        settled: list[float] = []

        def once(delivery: Delivery) -> Settlement:
            if settled:
                return Ack()
            settled.append(time.monotonic())
            return Redeliver(delay)

        with (
            Listening(harness, group, [Subscription(topic)], once) as listening,
            producing(harness.transport()) as producer,
        ):
            [receipt] = send(harness, producer, [Message(topic, b"x", key="k")])
            listening.wait_count(2, longest=harness.patience + delay)
            first, second = listening.heard[:2]
        assert second.at - settled[0] >= (delay - CLOCK).total_seconds()
        assert (second.message.body, second.message.key) == (b"x", "k")
        assert first.message.message_id == second.message.message_id == receipt.message_id
        if features.counts_attempts:
            assert (first.message.attempt, second.message.attempt) == (1, 2)

    def test_a_redelivery_without_delay_comes_soon(self, harness: Harness, features: Features) -> None:
        needs(features, "redelivers")
        topic, group = harness.topic(), harness.group()
        seen: Counter[int] = Counter()

        def thrice(delivery: Delivery) -> Settlement:
            seen[number(delivery)] += 1
            return Ack() if seen[number(delivery)] == 3 else Redeliver()

        with (
            Listening(harness, group, [Subscription(topic)], thrice) as listening,
            producing(harness.transport()) as producer,
        ):
            send(harness, producer, numbered(topic, 4))
            listening.wait_count(12, longest=3 * harness.patience)
            listening.stays_quiet(harness.lag)
        if features.counts_attempts:
            assert Counter(h.message.attempt for h in listening.heard) == {1: 4, 2: 4, 3: 4}

    def test_an_unsettled_message_comes_again_after_its_invisible_time(self, harness: Harness) -> None:
        topic, group = harness.topic(), harness.group()
        short = harness.transport(invisible=harness.short_invisible)
        invisible_of(short, group, [Subscription(topic)])
        with (
            Listening(harness, group, [Subscription(topic)], leave, transport=short) as listening,
            producing(harness.transport()) as producer,
        ):
            send(harness, producer, [Message(topic, b"x")])
            listening.wait_count(2, longest=harness.patience + harness.short_invisible)
            first, second = listening.heard[:2]
        assert second.at - first.at >= (harness.short_invisible - 2 * CLOCK).total_seconds()

    def test_extending_keeps_a_message_invisible(self, harness: Harness) -> None:
        topic, group = harness.topic(), harness.group()
        short = harness.transport(invisible=harness.short_invisible)
        invisible_of(short, group, [Subscription(topic)])
        with (
            Listening(harness, group, [Subscription(topic)], leave, transport=short) as listening,
            producing(harness.transport()) as producer,
        ):
            send(harness, producer, [Message(topic, b"x")])
            listening.wait_count(1)
            third = harness.short_invisible / 3
            until = time.monotonic() + (2 * harness.short_invisible + harness.lag).total_seconds()
            while time.monotonic() < until:
                listening.extend()
                listening.stays_quiet(third)
            [delivery] = [h.delivery for h in listening.heard]
            listening.consumers[0].settle([(delivery, Ack())])
            listening.stays_quiet(harness.short_invisible + harness.lag)

    def test_what_is_unsettled_when_its_consumer_closes_comes_again(self, harness: Harness) -> None:
        topic, group = harness.topic(), harness.group()
        short = harness.transport(invisible=harness.short_invisible)
        with (
            Listening(harness, group, [Subscription(topic)], leave, transport=short) as listening,
            producing(harness.transport()) as producer,
        ):
            send(harness, producer, [Message(topic, b"kept")])
            listening.wait_count(1)
        with Listening(harness, group, [Subscription(topic)]) as again:
            again.wait_count(1, longest=2 * harness.patience + harness.short_invisible)
            assert again.bodies()[0] == b"kept"

    def test_what_was_fetched_and_not_handed_out_is_given_back_by_stop(self, harness: Harness) -> None:
        topic, group = harness.topic(), harness.group()
        short = harness.transport(invisible=harness.short_invisible)
        taken: list[int] = []
        consumers = short.subscribe(group, [Subscription(topic)])
        harness.joined(group, [topic], 1)
        with producing(harness.transport()) as producer:
            send(harness, producer, numbered(topic, 20))
        deadline = time.monotonic() + harness.patience.total_seconds()
        while not taken and time.monotonic() < deadline:
            got = consumers[0].receive(1, SECOND)
            assert len(got) <= 1
            taken += [number(d) for d in got]
            consumers[0].settle([(d, Ack()) for d in got])
        assert taken, "nothing was handed out"
        for consumer in consumers:
            consumer.stop()
            consumer.close()
        rest = set(range(20)) - set(taken)
        with Listening(harness, group, [Subscription(topic)]) as again:
            again.wait(
                lambda: {number(h.delivery) for h in again.heard} >= rest,
                "the messages never handed out",
                longest=2 * harness.patience + harness.short_invisible,
            )

    # -- receiving ----------------------------------------------------------------------------------------------------

    def test_receive_with_limit_zero_hands_out_nothing_and_loses_nothing(self, harness: Harness) -> None:
        topic, group = harness.topic(), harness.group()
        consumers = harness.transport().subscribe(group, [Subscription(topic)])
        try:
            harness.joined(group, [topic], 1)
            with producing(harness.transport()) as producer:
                send(harness, producer, numbered(topic, 2))
            for consumer in consumers:
                assert list(consumer.receive(0, timedelta(milliseconds=200))) == []
            got: list[Delivery] = []
            deadline = time.monotonic() + harness.patience.total_seconds()
            while len(got) < 2 and time.monotonic() < deadline:
                for consumer in consumers:
                    fresh = consumer.receive(2, SECOND)
                    consumer.settle([(d, Ack()) for d in fresh])
                    got += fresh
            assert sorted(number(d) for d in got) == [0, 1]
        finally:
            for consumer in consumers:
                consumer.stop()
                consumer.close()

    def test_stop_ends_a_waiting_receive_and_both_stop_and_close_may_be_called_twice(self, harness: Harness) -> None:
        topic, group = harness.topic(), harness.group()
        consumers = harness.transport().subscribe(group, [Subscription(topic)])
        harness.joined(group, [topic], 1)
        answers: list[Sequence[Delivery]] = []
        thread = threading.Thread(target=lambda: answers.append(consumers[0].receive(1, timedelta(seconds=60))))
        thread.start()
        thread.join(0.3)  # so that it is waiting; were it not, the test would pass all the same
        begun = time.monotonic()
        for consumer in consumers:
            consumer.stop()
            consumer.stop()
        thread.join(harness.patience.total_seconds())
        assert not thread.is_alive()
        assert time.monotonic() - begun < 5
        assert [list(answer) for answer in answers] == [[]]
        assert list(consumers[0].receive(1, SECOND)) == []
        for consumer in consumers:
            consumer.close()
            consumer.close()

    def test_only_messages_of_the_wanted_tags_are_handed_out(self, harness: Harness, features: Features) -> None:
        needs(features, "tags")
        topic, some, every = harness.topic(), harness.group(), harness.group()
        with (
            Listening(harness, some, [Subscription(topic, ("cancelled", "created"))]) as wanted,
            Listening(harness, every, [Subscription(topic)]) as everything,
            producing(harness.transport()) as producer,
        ):
            tags = ["created", "cancelled", "creat", "Created", "paid", None]
            send(harness, producer, [Message(topic, str(tag).encode(), tag=tag) for tag in tags])
            everything.wait_count(len(tags))
            wanted.wait_count(2)
            wanted.stays_quiet(harness.lag)
        assert sorted(str(h.message.tag) for h in wanted.heard) == ["cancelled", "created"]
        assert {h.message.tag for h in everything.heard} == set(tags)

    def test_one_group_receives_from_several_topics(self, harness: Harness) -> None:
        topics, group = [harness.topic(), harness.topic()], harness.group()
        with (
            Listening(harness, group, [Subscription(topic) for topic in topics]) as listening,
            producing(harness.transport()) as producer,
        ):
            send(harness, producer, [Message(topic, topic.encode()) for topic in topics])
            listening.wait_count(2)
        assert sorted(h.message.topic for h in listening.heard) == sorted(topics)
        assert all(h.message.body == h.message.topic.encode() for h in listening.heard)

    def test_two_groups_each_see_every_message(self, harness: Harness) -> None:
        topic, one, two = harness.topic(), harness.group(), harness.group()
        with (
            Listening(harness, one, [Subscription(topic)]) as first,
            Listening(harness, two, [Subscription(topic)]) as second,
            producing(harness.transport()) as producer,
        ):
            send(harness, producer, numbered(topic, 30))
            for listening in (first, second):
                listening.wait_count(30)
                assert sorted(number(h.delivery) for h in listening.heard) == list(range(30))

    def test_two_consumers_of_one_group_share_without_doubling(self, harness: Harness) -> None:
        topic, group = harness.topic(), harness.group()
        with (
            Listening(harness, group, [Subscription(topic)], limit=4) as first,
            Listening(harness, group, [Subscription(topic)], limit=4, members=2) as second,
            producing(harness.transport()) as producer,
        ):
            send(harness, producer, numbered(topic, 100))
            _until(harness, lambda: len(first.heard) + len(second.heard) >= 100, "100 messages")
            first.stays_quiet(harness.lag)
            second.stays_quiet(harness.lag)
        assert sorted(number(h.delivery) for h in first.heard + second.heard) == list(range(100))

    # -- order --------------------------------------------------------------------------------------------------------

    def test_an_ordering_key_comes_back_and_its_messages_are_handed_out_one_at_a_time(
        self, harness: Harness, features: Features
    ) -> None:
        """Slow settles, two consumers: between "done" and "the broker knows" no follower may come."""
        needs(features, "ordered")
        topic, group = harness.topic(ordered=True), harness.group(ordered=True)
        keys, each = [f"key-{n}" for n in range(8)], 8
        watch = threading.Lock()
        running: set[str] = set()
        seen: defaultdict[str, list[int]] = defaultdict(list)
        broken: list[str] = []

        def slowly(delivery: Delivery) -> Settlement:
            key = str(delivery.message.ordering_key)
            with watch:
                if key in running:
                    broken.append(f"{key}: {number(delivery)} while another ran")
                running.add(key)
                seen[key].append(number(delivery))
            time.sleep(0.01)  # the work itself; what is measured is that no follower is handed out meanwhile
            with watch:
                running.discard(key)
            return Ack()

        ordered = [Subscription(topic, ordered=True)]
        with (
            Listening(harness, group, ordered, slowly, hands=16) as first,
            Listening(harness, group, ordered, slowly, hands=16, members=2) as second,
            producing(harness.transport()) as producer,
        ):
            messages = [
                Message(topic, str(n).encode(), ordering_key=key, key=f"{key}.{n}") for n in range(each) for key in keys
            ]
            send(harness, producer, messages)
            _until(
                harness,
                lambda: sum(len(numbers) for numbers in seen.values()) >= each * len(keys),
                "all messages",
                longest=3 * harness.patience,
            )
            assert first.heard or second.heard
        assert broken == []
        assert dict(seen) == {key: list(range(each)) for key in keys}

    def test_a_failing_message_holds_back_its_own_key_and_others_flow(
        self, harness: Harness, features: Features
    ) -> None:
        needs(features, "ordered")
        needs(features, "redelivers")
        topic, group = harness.topic(ordered=True), harness.group(ordered=True)
        others = [f"other-{n}" for n in range(16)]
        watch = threading.Lock()
        told: list[tuple[str, int]] = []
        failures = 3

        def first_fails(delivery: Delivery) -> Settlement:
            key, n = str(delivery.message.ordering_key), number(delivery)
            with watch:
                told.append((key, n))
                failed = told.count(("failing", 0))
            return Redeliver(SECOND) if (key, n) == ("failing", 0) and failed <= failures else Ack()

        with (
            Listening(harness, group, [Subscription(topic, ordered=True)], first_fails, hands=8) as listening,
            producing(harness.transport()) as producer,
        ):
            send(harness, producer, numbered(topic, 3, ordering_key="failing"))
            listening.wait_count(1)
            for key in others:
                send(harness, producer, numbered(topic, 2, ordering_key=key))
            listening.wait(
                lambda: (
                    len({h.delivery.message.message_id for h in listening.heard}) >= 3 + 2 * len(others)
                    and ("failing", 2) in told
                ),
                "every message",
                longest=5 * harness.patience,
            )
        assert [n for key, n in told if key == "failing"] == [0] * (failures + 1) + [1, 2]
        for key in others:
            assert [n for k, n in told if k == key] == [0, 1]
        last_failure = max(n for n, entry in enumerate(told) if entry == ("failing", 0))
        assert any(key != "failing" for key, _ in told[:last_failure]), "no other key flowed while one was held back"

    def test_redeliver_holds_its_key_back_from_that_call_on(self, harness: Harness, features: Features) -> None:
        """A receive that is under way while the failure is settled must not hand out the follower."""
        needs(features, "ordered")
        needs(features, "redelivers")
        topic, group, delay = harness.topic(ordered=True), harness.group(ordered=True), timedelta(seconds=2)
        failed: list[float] = []

        def fail_once(delivery: Delivery) -> Settlement:
            if failed or number(delivery):
                return Ack()
            time.sleep(0.05)  # a receive is certainly under way
            failed.append(time.monotonic())
            return Redeliver(delay)

        with (
            Listening(harness, group, [Subscription(topic, ordered=True)], fail_once, hands=4) as listening,
            producing(harness.transport()) as producer,
        ):
            send(harness, producer, numbered(topic, 3, ordering_key="a"))
            listening.wait_count(4, longest=2 * harness.patience + delay)
        assert [number(h.delivery) for h in listening.heard] == [0, 0, 1, 2]
        assert listening.heard[1].at - failed[0] >= (delay - CLOCK).total_seconds()

    def test_an_ordering_key_comes_back_as_it_was_sent(self, harness: Harness, features: Features) -> None:
        needs(features, "ordered")
        topic, group = harness.topic(ordered=True), harness.group(ordered=True)
        with (
            Listening(harness, group, [Subscription(topic, ordered=True)]) as listening,
            producing(harness.transport()) as producer,
        ):
            send(harness, producer, [Message(topic, b"x", ordering_key="Kunde-Ä-7")])
            listening.wait_count(1)
        assert listening.heard[0].message.ordering_key == "Kunde-Ä-7"

    # -- sending ------------------------------------------------------------------------------------------------------

    def test_a_delayed_message_does_not_come_before_its_time(self, harness: Harness, features: Features) -> None:
        needs(features, "delayed")
        topic, group, delay = harness.topic(delayed=True), harness.group(), timedelta(seconds=3)
        with Listening(harness, group, [Subscription(topic)]) as listening, producing(harness.transport()) as producer:
            begun = time.monotonic()
            send(harness, producer, [Message(topic, b"later")], delay=delay)
            listening.wait_count(1, longest=harness.patience + delay)
        assert listening.heard[0].at - begun >= (delay - CLOCK).total_seconds()

    def test_a_producer_returns_a_receipt_for_each_message_in_order(self, harness: Harness) -> None:
        topic, group = harness.topic(), harness.group()
        messages = numbered(topic, 12)
        with Listening(harness, group, [Subscription(topic)]) as listening, producing(harness.transport()) as producer:
            assert list(producer.send([])) == []
            receipts = send(harness, producer, messages)
            listening.wait_count(12)
        by_id = {h.message.message_id: h.message.body for h in listening.heard}
        assert [by_id[receipt.message_id] for receipt in receipts] == [m.body for m in messages]
        assert {receipt.topic for receipt in receipts} == {topic}

    def test_one_producer_serves_many_threads(self, harness: Harness) -> None:
        topic, group = harness.topic(), harness.group()
        with Listening(harness, group, [Subscription(topic)]) as listening, producing(harness.transport()) as producer:
            with ThreadPoolExecutor(8) as pool:
                parts = [numbered(topic, 200)[n::8] for n in range(8)]
                jobs = [pool.submit(send, harness, producer, part) for part in parts]
                ids = [receipt.message_id for job in jobs for receipt in job.result()]
            listening.wait(lambda: len({number(h.delivery) for h in listening.heard}) >= 200, "200 messages")
        assert {number(h.delivery) for h in listening.heard} == set(range(200))
        assert set(ids) == {h.message.message_id for h in listening.heard}
        assert len(set(ids)) == 200 or not harness.ids_from_threads_differ

    def test_a_body_over_the_limit_is_refused_and_the_others_are_sent(
        self, harness: Harness, features: Features
    ) -> None:
        needs(features, "max_body_bytes")
        topic = harness.topic()
        too_long = Message(topic, b"x" * ((features.max_body_bytes or 0) + 1))
        with producing(harness.transport()) as producer:
            send(harness, producer, [Message(topic, b"first: the topic is known now")])
            answers = producer.send([Message(topic, b"a"), too_long, Message(topic, b"b")])
        assert isinstance(answers[0], Receipt)
        assert isinstance(answers[1], ValueError)
        assert isinstance(answers[2], Receipt)

    def test_closing_a_producer_twice_is_closing_it_once(self, harness: Harness) -> None:
        producer = harness.transport().producer()
        producer.close()
        producer.close()

    # -- starting -----------------------------------------------------------------------------------------------------

    def test_check_finds_nothing_wrong_with_a_topic_and_group_that_are_ready(self, harness: Harness) -> None:
        topic, group = harness.topic(), harness.group()
        assert list(harness.transport().check(group, [Subscription(topic)])) == []

    # -- all together -------------------------------------------------------------------------------------------------

    def test_many_messages_over_two_consumers_with_random_redeliveries_are_each_acknowledged_once(
        self, harness: Harness, features: Features
    ) -> None:
        topic, group, count = harness.topic(), harness.group(), harness.many
        dice = random.Random(11)  # noqa: S311  (the same each time)
        watch = threading.Lock()
        acked: Counter[int] = Counter()

        def sometimes(delivery: Delivery) -> Settlement:
            with watch:
                if features.redelivers and dice.random() < 0.1:
                    return Redeliver(timedelta(seconds=dice.choice([0, 0, 1])))
                acked[number(delivery)] += 1
            return Ack()

        with (
            Listening(harness, group, [Subscription(topic)], sometimes, hands=4, limit=32) as first,
            Listening(harness, group, [Subscription(topic)], sometimes, hands=4, limit=32, members=2) as second,
            producing(harness.transport()) as producer,
        ):
            messages = numbered(topic, count)
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(lambda part: send(harness, producer, part), [messages[n::4] for n in range(4)]))
            _until(harness, lambda: len(acked) >= count, f"{count} messages", longest=6 * harness.patience)
            first.stays_quiet(harness.lag)
            second.stays_quiet(harness.lag)
        assert acked == dict.fromkeys(range(count), 1)


class ServerConformance:
    """What a transport does beside that when its broker is a server, which can be away. Its harness is a `ServedHarness`.

    Example:
        class TestMyBroker(ServerConformance, Conformance):
            @pytest.fixture
            def harness(self, my_broker: MyBroker) -> ServedHarness:
                return MyHarness(my_broker)
    """

    def test_check_says_that_the_server_does_not_answer(self, harness: ServedHarness) -> None:
        [problem] = harness.unreachable().check("some-group", [Subscription("some-topic")])
        assert isinstance(problem, Away), "a start-up waits for a server that is away, and refuses all else"
        assert " " in problem, "a sentence for a person"

    def test_producing_without_a_server_fails_for_each_message_and_raises_nothing(self, harness: ServedHarness) -> None:
        with producing(harness.unreachable()) as producer:
            answers = producer.send([Message("some-topic", b"a"), Message("some-topic", b"b")])
        assert [isinstance(a, Exception) and not isinstance(a, ValueError) for a in answers] == [True, True]

    def test_a_restarted_server_is_found_again_by_consumer_and_producer(self, harness: ServedHarness) -> None:
        topic, group = harness.topic(), harness.group()
        with Listening(harness, group, [Subscription(topic)]) as listening, producing(harness.transport()) as producer:
            send(harness, producer, numbered(topic, 5))
            listening.wait_count(5)
            harness.stop_server()
            try:
                listening.stays_quiet(2 * SECOND)  # receive returns nothing and raises nothing meanwhile
            finally:
                harness.start_server()
            send(harness, producer, [Message(topic, b"100")])
            listening.wait(
                lambda: b"100" in [h.message.body for h in listening.heard],
                "a message sent afterwards",
                longest=6 * harness.patience,
            )


class TopicConformance:
    """What a transport does beside that when topics and groups must be made before they are used.

    Example:
        class TestMyBroker(ServerConformance, TopicConformance, Conformance):
            @pytest.fixture
            def harness(self, my_broker: MyBroker) -> ServedHarness:
                return MyHarness(my_broker)
    """

    def test_check_names_a_topic_that_does_not_exist(self, harness: Harness) -> None:
        group, topic = harness.group(), harness.topic()
        missing = f"{topic}-missing"
        problems = harness.transport().check(group, [Subscription(topic), Subscription(missing)])
        assert any(missing in problem for problem in problems), problems

    def test_check_names_a_group_that_does_not_exist(self, harness: Harness) -> None:
        missing = f"{harness.group()}-missing"
        problems = harness.transport().check(missing, [Subscription(harness.topic())])
        assert any(missing in problem for problem in problems), problems

    def test_check_names_a_group_and_all_topics_that_do_not_exist_at_once(self, harness: Harness) -> None:
        group, *topics = [f"{harness.group()}-missing", f"{harness.topic()}-missing", f"{harness.topic()}-missing"]
        problems = harness.transport().check(group, [Subscription(topic) for topic in topics])
        named = [name for problem in problems for name in (*topics, group) if _names(problem, name)]
        assert sorted(named) == sorted([*topics, group]), problems
        assert len(problems) == len(named), "a problem of its own for each"
        assert all(harness.remedy in problem for problem in problems), problems


def _names(problem: str, name: str) -> bool:
    """Say whether a problem names this topic or group, and not one whose name begins or ends like it."""
    return re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", problem) is not None


def _until(harness: Harness, done: Callable[[], bool], what: str, *, longest: timedelta | None = None) -> None:
    """Wait for something that several threads bring about."""
    deadline = time.monotonic() + (longest or harness.patience).total_seconds()
    while not done():
        assert time.monotonic() < deadline, f"{what}: not within {longest or harness.patience}"
        time.sleep(0.02)
