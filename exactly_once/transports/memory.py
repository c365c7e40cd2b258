"""A broker inside the process, for tests: `memory://NAME`. Keeps nothing on disk; serves no other process.

All transports of one name in a process share one broker, so that a test's producer and its worker meet. It keeps the
whole contract, so what passes here behaves the same on a real broker: several groups each get every message, a
delivery comes back unless settled in time, attempts are counted, the messages of an ordering key come one at a time.
Messages that are sent before any group has joined a topic go to the first group that joins.

`forget(name)` drops a broker with all its messages. Nothing here sleeps: every wait is on the broker's one Condition.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from threading import Condition
from time import monotonic
from typing import Final
from uuid import uuid4

from exactly_once import fork
from exactly_once.errors import ConfigurationError, ForkedProcess, TransportError
from exactly_once.message import Message
from exactly_once.outcome import Ack, Settlement
from exactly_once.transports.contract import (
    BrokerProducer,
    Consumer,
    Delivery,
    Features,
    Receipt,
    Subscription,
    Surroundings,
)
from exactly_once.transports.urls import parse

__all__ = ["MemoryTransport", "forget"]

_FEATURES: Final = Features(
    redelivers=True,
    counts_attempts=True,
    ordered=True,
    tags=True,
    properties=True,
    delayed=True,
    empty_body=True,
)
_ALONE: Final = (
    "memory:// is a queue inside this one process, of several: nothing that another process sends comes here, and each has"
    " a queue of its own. It is for tests. Use sql:// to try several processes without a broker."
)
_INVISIBLE: Final = timedelta(seconds=60)


@dataclass(slots=True, eq=False)
class _Entry:
    """One message for one group, from sending to acknowledgement."""

    message: Message
    due: float
    """Not handed out before this time (monotonic seconds): the end of a delay, or of the invisible time."""
    attempts: int = 0
    holder: object | None = None
    """The present delivery. Settling another delivery changes nothing."""


# In the order of sending. A linked structure: taking entries from the front of a dict would slow down each later iteration.
_Queue = OrderedDict[_Entry, None]


class _Broker:
    """Topics, and what each group has yet to process; `changed` guards all of it."""

    def __init__(self, name: str) -> None:
        self.changed = Condition()
        self._name, self._process = name, fork.here
        self._queues: dict[str, dict[str, _Queue]] = {}
        self._unclaimed: dict[str, _Queue] = {}
        fork.tell(self)

    def forked(self) -> None:
        """Runs in a forked child: this is a copy, and a thread of the parent may have held the lock."""
        self.changed = Condition()

    def of_parent(self) -> ForkedProcess | None:
        """Return an error if the broker belongs to another process: a message that is put into a copy reaches nobody there."""
        if self._process is fork.here:
            return None
        return ForkedProcess(
            f"The broker memory://{self._name} is in the memory of the process that this one was forked off, and cannot be"
            " reached from here; nothing was sent or received. Name another one here, or use sql://."
        )

    def join(self, topic: str, group: str) -> None:
        with self.changed:
            queues = self._queues.setdefault(topic, {})
            if group not in queues:
                # The first group takes what was sent before there was any group.
                queues[group] = self._unclaimed.pop(topic, _Queue())

    def put(self, message: Message, due: float) -> None:
        queues = self._queues.get(message.topic)
        for queue in queues.values() if queues else [self._unclaimed.setdefault(message.topic, _Queue())]:
            queue[_Entry(message, due)] = None

    def queue(self, topic: str, group: str) -> _Queue:
        return self._queues[topic][group]


_brokers: dict[str, _Broker] = {}


def _broker(name: str) -> _Broker:
    return _brokers.get(name) or _brokers.setdefault(name, _Broker(name))  # atomic for all threads, without a lock


def forget(name: str) -> None:
    """Drop the broker of that name with all its messages. Transports that exist keep the old broker.

    Example:
        >>> forget("doc")
    """
    _brokers.pop(name, None)


class MemoryTransport:
    """The broker of one name in this process.

    Args:
        name: The broker; two transports of one name share it.
        invisible: A delivery that is neither settled nor extended comes back after this time.

    Example:
        >>> transport = MemoryTransport("doc")
        >>> [consumer] = transport.subscribe("inventory", [Subscription("orders")])
        >>> [receipt] = transport.producer().send([Message("orders", b"{}")])
        >>> [delivery] = consumer.receive(1, timedelta(seconds=1))
        >>> delivery.message.body, delivery.message.attempt
        (b'{}', 1)
        >>> consumer.settle([(delivery, Ack())])
    """

    def __init__(self, name: str, *, invisible: timedelta = _INVISIBLE, one_of_several: bool = False) -> None:
        self._broker = _broker(name)
        self._invisible, self._one_of_several = invisible, one_of_several

    @classmethod
    def from_url(cls, url: str, surroundings: Surroundings) -> MemoryTransport:
        """Make a transport from `memory://NAME?invisible_s=60`.

        From the surroundings it needs whether there are other processes.
        """
        parsed = parse(url, options=["invisible_s"])
        if len(parsed.hosts) > 1:
            raise ConfigurationError(f"{parsed} names several brokers; a memory URL has one name, as in memory://test.")
        name = parsed.endpoints[0] if parsed.hosts else ""
        return cls(
            name, invisible=parsed.seconds("invisible_s", _INVISIBLE), one_of_several=surroundings.one_of_several
        )

    @property
    def features(self) -> Features:
        return _FEATURES

    def check(self, group: str, subscriptions: Sequence[Subscription]) -> Sequence[str]:
        """Return nothing, except for a parent's broker: topics and groups are created when they are named."""
        error = self._broker.of_parent()
        return () if error is None else (str(error),)

    def concerns(self, group: str, subscriptions: Sequence[Subscription]) -> Sequence[str]:
        """In one of several processes, say that other processes cannot reach it. Else a message waits until a member takes it."""
        return (_ALONE,) if self._one_of_several else ()

    def subscribe(self, group: str, subscriptions: Sequence[Subscription]) -> Sequence[Consumer]:
        """Join the group. One consumer for all topics."""
        if (error := self._broker.of_parent()) is not None:
            raise error
        for subscription in subscriptions:
            self._broker.join(subscription.topic, group)
        return [_MemoryConsumer(self._broker, group, tuple(subscriptions), self._invisible)]

    def producer(self) -> BrokerProducer:
        return _MemoryProducer(self._broker)


class _MemoryConsumer:
    def __init__(self, broker: _Broker, group: str, subscriptions: tuple[Subscription, ...], span: timedelta) -> None:
        self._broker = broker
        self._queues = [(subscription, broker.queue(subscription.topic, group)) for subscription in subscriptions]
        self._invisible = span
        self._stopped = False

    @property
    def features(self) -> Features:
        return _FEATURES

    @property
    def invisible(self) -> timedelta | None:
        return self._invisible

    def receive(self, limit: int, wait: timedelta) -> Sequence[Delivery]:
        deadline = monotonic() + wait.total_seconds()
        if (error := self._broker.of_parent()) is not None:
            raise error
        with self._broker.changed:
            while limit > 0 and not self._stopped:
                found, next_due = self._take(limit)
                left = deadline - monotonic()
                if found or left <= 0:
                    return found
                self._broker.changed.wait(min(left, max(0.0, next_due - monotonic())))
        return []

    def _take(self, limit: int) -> tuple[list[Delivery], float]:
        """Return what is due, up to `limit`, and when the next message will be due."""
        now, next_due = monotonic(), float("inf")
        found: list[Delivery] = []
        for subscription, queue in self._queues:
            waiting: set[str] = set()  # keys with an earlier message that is not finished
            for entry in queue:
                message = entry.message
                if subscription.tags and message.tag not in subscription.tags:
                    continue
                if subscription.ordered and message.ordering_key is not None:
                    if message.ordering_key in waiting:
                        continue
                    waiting.add(message.ordering_key)
                if entry.due > now:
                    next_due = min(next_due, entry.due)
                    continue
                found.append(self._hand_out(queue, entry, now))
                if len(found) == limit:
                    return found, now
        return found, next_due

    def _hand_out(self, queue: _Queue, entry: _Entry, now: float) -> Delivery:
        entry.attempts += 1
        entry.due = now + self._invisible.total_seconds()
        entry.holder = holder = object()
        message = entry.message
        if message.attempt != entry.attempts:
            message = replace(message, attempt=entry.attempts)
        return Delivery(message, (queue, entry, holder))

    def settle(self, settlements: Sequence[tuple[Delivery, Settlement]]) -> None:
        with self._broker.changed:
            for delivery, settlement in settlements:
                queue, entry, holder = delivery.receipt_handle
                if entry.holder is not holder:
                    continue  # it is settled, or its time was over and there is another delivery of it
                entry.holder = None
                if isinstance(settlement, Ack):
                    del queue[entry]
                else:
                    entry.due = monotonic() + settlement.delay.total_seconds()
            self._broker.changed.notify_all()

    def extend(self, deliveries: Sequence[Delivery]) -> None:
        with self._broker.changed:
            due = monotonic() + self._invisible.total_seconds()
            for delivery in deliveries:
                _, entry, holder = delivery.receipt_handle
                if entry.holder is holder:
                    entry.due = due

    def stop(self) -> None:
        with self._broker.changed:
            self._stopped = True
            self._broker.changed.notify_all()

    def close(self) -> None:
        self.stop()


class _MemoryProducer:
    def __init__(self, broker: _Broker) -> None:
        self._broker = broker
        self._closed = False

    def send(self, messages: Sequence[Message], *, delay: timedelta | None = None) -> Sequence[Receipt | Exception]:
        if self._closed:
            return [TransportError("this producer is closed; make another one") for _ in messages]
        if (error := self._broker.of_parent()) is not None:
            return [error for _ in messages]
        due = monotonic() + (delay.total_seconds() if delay else 0.0)
        receipts = []
        with self._broker.changed:
            for message in messages:
                stored = replace(
                    message,
                    properties=dict(message.properties),
                    message_id=uuid4().hex,
                    born_at=message.born_at or datetime.now(UTC),
                )
                self._broker.put(stored, due)
                receipts.append(Receipt(message.topic, str(stored.message_id)))
            self._broker.changed.notify_all()
        return receipts

    def close(self) -> None:
        self._closed = True
