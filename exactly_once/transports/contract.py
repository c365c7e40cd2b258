"""The contract with a broker: a delivery, a subscription, what a broker can do, and four small protocols.

Never opens, waits or decides. The implementations are the other modules of `transports`; the worker knows this module alone. All
calls are synchronous and block their own thread.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol, runtime_checkable

from sqlalchemy import Engine

from exactly_once.errors import BadBody
from exactly_once.message import Message
from exactly_once.outcome import Settlement

__all__ = [
    "Away",
    "BrokerProducer",
    "Consumer",
    "Delivery",
    "Features",
    "Receipt",
    "Subscription",
    "Surroundings",
    "Tidied",
    "Transport",
]


@dataclass(frozen=True, slots=True, eq=False)
class Delivery:
    """A message that is in hand until it is settled, once.

    `receipt_handle` belongs to the transport (a broker's receipt handle, a row id); nothing else reads it. `handler` is None
    for a broker's delivery, which goes to every matching handler. It is a name if the failure store of `database` redelivers
    a message for that handler alone. `unread` says why the body could not be read: the body is then kept as it came, and no
    handler runs.
    """

    message: Message
    receipt_handle: Any
    handler: str | None = None
    unread: BadBody | None = None
    database: str | None = None


@dataclass(frozen=True, slots=True)
class Subscription:
    """What one group subscribes to in one topic: the union over its handlers, because all members must subscribe alike.

    `tags` is sorted; empty means every tag, and messages without a tag. `largest_batch` is the size of the largest batch of
    a handler: a client that keeps a thread waiting for each message in hand needs as many threads.
    """

    topic: str
    tags: tuple[str, ...] = ()
    ordered: bool = False
    largest_batch: int = 1


@dataclass(frozen=True, slots=True)
class Receipt:
    """The broker has stored the message, under this id."""

    topic: str
    message_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """What a broker can do through this client. Read by the worker, the retry policy and the conformance suite."""

    redelivers: bool
    """False: `Redeliver` is unsafe or missing; the failure store's pump redelivers failed messages instead."""
    counts_attempts: bool
    """`Message.attempt` is the broker's own count of deliveries."""
    max_attempts: int | None = None
    """After so many deliveries the broker drops the message, so it must be parked before. None: the broker never does."""
    max_redelivery_delay: timedelta | None = None
    """The longest delay that `Redeliver` can ask for. None: any."""
    redelivery_span: timedelta | None = None
    """The longest time until a copy may still arrive; retention must be longer. None: no limit."""
    ordered: bool = False
    """Can deliver the messages of one ordering key in order, one at a time."""
    tags: bool = False
    """Filters by tag on the broker's side."""
    properties: bool = False
    """Carries string properties."""
    delayed: bool = False
    """Can hold a message back until a given time."""
    max_send_delay: timedelta | None = None
    max_body_bytes: int | None = None
    empty_body: bool = False
    """Can carry a body of zero bytes."""


@runtime_checkable
class Tidied(Protocol):
    """A consumer of a transport that keeps messages until they are deleted. Other consumers do not implement this."""

    @property
    def topic(self) -> str:
        """The topic of the messages."""

    @property
    def tidy_every(self) -> timedelta | None:
        """The time between two calls of `tidy`. None: no message can be left there."""

    def tidy(self) -> None:
        """Delete messages that no handler of the group will take. Called in a thread of its own."""


class Consumer(Protocol):
    """The receiving side. One thread calls `receive`; others call `settle`, `extend` and `stop` at the same time."""

    @property
    def features(self) -> Features:
        """What the source of these deliveries can do."""

    @property
    def invisible(self) -> timedelta | None:
        """A delivery comes back after this time unless extended. None: the broker waits as long as we are connected."""

    def receive(self, limit: int, wait: timedelta) -> Sequence[Delivery]:
        """Hand out up to `limit` deliveries, waiting at most `wait` for the first.

        `limit` 0 only keeps the session alive. If ordered, never a delivery while an earlier one of its key is unsettled or
        due later. An unavailable broker is not an error: wait, reconnect, return nothing.
        """

    def settle(self, settlements: Sequence[tuple[Delivery, Settlement]]) -> None:
        """Carry out each settlement, in the order given.

        A settlement that fails is logged: its message comes back by itself. If ordered, `Redeliver` holds the key back from this
        call on.
        """

    def extend(self, deliveries: Sequence[Delivery]) -> None:
        """Keep these invisible for another `invisible`. Called after each third of that time; never if it is None."""

    def stop(self) -> None:
        """Hand out nothing more: end a waiting `receive`, and give back what was fetched but not handed out. Idempotent."""

    def close(self) -> None:
        """Leave the broker, after the last `settle`. Unsettled messages come back by themselves. Idempotent."""


class BrokerProducer(Protocol):
    """Sends messages. Thread-safe."""

    def send(self, messages: Sequence[Message], *, delay: timedelta | None = None) -> Sequence[Receipt | Exception]:
        """Return, for each message in order, a receipt once the broker has stored it, else the reason.

        One try only: the caller decides on another. After a failed message, no other of its ordering key is sent. A
        `ValueError` means that this message is refused, and another try cannot help. A `ConfigurationError` means that no
        message can be sent until a person repairs something. After any other error another try may help.
        """

    def close(self) -> None:
        """Flush and leave. Idempotent."""


class Transport(Protocol):
    """The broker that a URL names. Making a transport opens nothing."""

    @property
    def features(self) -> Features:
        """What this broker can do, known before connecting."""

    def check(self, group: str, subscriptions: Sequence[Subscription]) -> Sequence[str]:
        """Return each problem (server away, unknown topic, group missing or with wrong settings) with the command to type.

        Empty means ready. A server that does not answer is an `Away`, and worth waiting for. This asks the server itself:
        a client may start without a server.
        """

    def concerns(self, group: str, subscriptions: Sequence[Subscription]) -> Sequence[str]:
        """Return what does not stop anybody from receiving but can lose messages: members of the group with other subscriptions.

        Asked at a start, half a minute later, every hour while a worker runs, and by `doctor`. Empty if no server tells.
        Raises nothing.
        """

    def subscribe(self, group: str, subscriptions: Sequence[Subscription]) -> Sequence[Consumer]:
        """Join the group. Returns as many consumers as need a receiving thread of their own (one, or one for each topic)."""

    def producer(self) -> BrokerProducer:
        """A producer."""


class Away(str):
    """A problem that may pass by waiting: a server does not answer. A person must repair any other problem of `check`."""

    __slots__ = ()


def _no_engine() -> Engine:
    raise LookupError("this transport needs a database, and none was given")


def _no_schema() -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a transport may use of its application. Most transports use nothing of it."""

    engine: Callable[[], Engine] = field(default=_no_engine)
    """The application's first database, for the embedded transport."""
    schema: Callable[[], str | None] = field(default=_no_schema)
    """Returns the database schema of our tables. Asked on first use, and may connect."""
    one_of_several: bool = False
    """This process is one of several under a supervisor."""
