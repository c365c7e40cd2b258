"""The contract with a broker, as words: a delivery, a subscription, what a broker can do, and four small protocols.

Nothing here opens, waits or decides. Implementations live in `transports/`, one file a broker; the worker knows only
this module. All calls are synchronous and block their own thread.
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
    """A message in our hands, until it is settled once.

    `receipt` is the transport's own (a receipt handle, a row id); nobody else looks inside. `handler` is None for a
    broker's delivery, which every matching handler sees, and a name when the failure store of `database` brings a message
    back for that handler alone. `unread` says why the body could not be read: it stands there as it came, and no handler runs.
    """

    message: Message
    receipt: Any
    handler: str | None = None
    unread: BadBody | None = None
    database: str | None = None


@dataclass(frozen=True, slots=True)
class Subscription:
    """What one group wants of one topic: the union over its handlers, since a group must subscribe alike everywhere.

    `tags` is sorted; empty means every tag, and messages without one. `largest_batch` is how many messages its
    largest group takes: a client that waits in a thread for each message in hand needs as many threads.
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
    """What a broker, through this client, can be trusted with. The worker, the policy and the conformance suite read it."""

    redelivers: bool
    """False: `Redeliver` is unsafe or missing; failures go through the failure store's pump."""
    counts_attempts: bool
    """`Message.attempt` is the broker's own count of deliveries."""
    max_attempts: int | None = None
    """After this many deliveries the broker takes the message away: park before. None: it never does."""
    max_redelivery_delay: timedelta | None = None
    """The longest delay `Redeliver` can ask for. None: any."""
    redelivery_span: timedelta | None = None
    """The longest time until a copy may still arrive; retention must be longer. None: not bounded."""
    ordered: bool = False
    """Can keep the messages of one ordering key in order, one at a time."""
    tags: bool = False
    """Filters by tag on the broker's side."""
    properties: bool = False
    """Carries string properties."""
    delayed: bool = False
    """Can deliver not before a given time."""
    max_send_delay: timedelta | None = None
    max_body_bytes: int | None = None
    empty_body: bool = False
    """Can carry a body of zero bytes."""


@runtime_checkable
class Tidied(Protocol):
    """A consumer of a transport that keeps messages until somebody deletes them; others need nothing of it."""

    @property
    def topic(self) -> str:
        """Whose messages."""

    @property
    def tidy_every(self) -> timedelta | None:
        """The time between two calls of `tidy`; None where nothing can lie there."""

    def tidy(self) -> None:
        """Delete what no handler of the group will take; called by a thread of its own."""


class Consumer(Protocol):
    """One receiving end. `receive` is called by one thread; `settle`, `extend` and `stop` by others at the same time."""

    @property
    def features(self) -> Features:
        """What the source of these deliveries can do."""

    @property
    def invisible(self) -> timedelta | None:
        """A delivery comes back after this unless extended; None where the broker waits as long as we are connected."""

    def receive(self, limit: int, wait: timedelta) -> Sequence[Delivery]:
        """Hand out up to `limit` deliveries, waiting at most `wait` for the first.

        `limit` 0 only keeps the session alive. Where ordered, never one behind another of its key that is unsettled or
        due later. A broker that is away is not an error: wait, reconnect, return nothing.
        """

    def settle(self, verdicts: Sequence[tuple[Delivery, Settlement]]) -> None:
        """Carry out each verdict, in the order given.

        One that cannot be carried out is logged, for its message comes back by itself. Where ordered, `Redeliver` holds
        the key back from this call on.
        """

    def extend(self, deliveries: Sequence[Delivery]) -> None:
        """Keep these invisible for another `invisible`; called each third of it, never where that is None."""

    def stop(self) -> None:
        """Hand out nothing more: end a waiting `receive`, give back what was fetched and not handed out. Twice is once."""

    def close(self) -> None:
        """Leave the broker, after the last `settle`; what is unsettled comes back by itself. Twice is once."""


class BrokerProducer(Protocol):
    """Sends; safe to use from several threads."""

    def send(self, messages: Sequence[Message], *, delay: timedelta | None = None) -> Sequence[Receipt | Exception]:
        """Return, per message and in order, a receipt once the broker has stored it, else why not.

        One try, no more: the caller decides on another. Of one ordering key none is sent after a failed one. A
        `ValueError` says that this message is refused as it is and another try cannot help, a `ConfigurationError` that no
        message can be sent before a person mends something; anything else may be tried again.
        """

    def close(self) -> None:
        """Flush and leave. Twice is once."""


class Transport(Protocol):
    """What a URL names. Making one opens nothing."""

    @property
    def features(self) -> Features:
        """What this broker can do, known before connecting."""

    def check(self, group: str, subscriptions: Sequence[Subscription]) -> Sequence[str]:
        """Say what is wrong (server away, unknown topic, group missing or badly set), each with what to type.

        Empty means ready. A server that does not answer is an `Away`, and worth waiting for. A client that starts
        without a server is not believed: this asks the server.
        """

    def concerns(self, group: str, subscriptions: Sequence[Subscription]) -> Sequence[str]:
        """Return what stops nobody from receiving and can lose messages later: members of the group that subscribe differently.

        Asked at a start, half a minute later, every hour while a worker runs, and by `doctor`. Empty where no server tells.
        Raises nothing.
        """

    def subscribe(self, group: str, subscriptions: Sequence[Subscription]) -> Sequence[Consumer]:
        """Join the group; as many consumers as want a receiving thread of their own (one, or one per topic)."""

    def producer(self) -> BrokerProducer:
        """A producer."""


class Away(str):
    """A problem that waiting may mend: a server does not answer. Anything else `check` says must be mended by hand."""

    __slots__ = ()


def _no_engine() -> Engine:
    raise LookupError("this transport needs a database, and none was given")


def _no_schema() -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a transport may use of the application it serves; most use nothing."""

    engine: Callable[[], Engine] = field(default=_no_engine)
    """The application's first database, for the embedded transport."""
    schema: Callable[[], str | None] = field(default=_no_schema)
    """Names the database schema our tables live in; asked on first use, and may connect for it."""
    one_of_several: bool = False
    """This process is one of several of a supervisor's."""
