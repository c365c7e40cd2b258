"""RocketMQ's remoting protocol: the transport of `rocketmq4://NS1:9876,NS2:9876`, through `rocketmq-client-python` 2.0.0.

    rocketmq4://NS1:9876,NS2:9876?namespace=..&access_key=..&secret_key=..|secret_key_file=..
                                  &threads=20&properties=name,name&delay_levels=1s,5s,..
                                  &state_dir=..&max_attempts=5

| module | what it is for |
|---|---|
| `library` | finding and loading librocketmq, whatever its age |
| `connection`, `messages` | the settings of each client; conversion of messages |
| `consumer` | receiving, and leaving without losing unfinished messages |
| `producer` | sending once |
| `ahead`, `stored` | reading messages that would crash the client; parsing the broker's log format |
| `checks` | what is wrong before a start, and the command that repairs it: the servers themselves are asked |

Making a transport opens nothing and does not load librocketmq.

How it differs from other transports:

* **`Redeliver` keeps the message here**, in the client's thread that brought it, and hands it out again when it is due.
  The client's own retry loses messages, so it is never used (see `consumer`). At most `threads` messages wait like
  this; what is unsettled when the process ends comes again from the broker. Failures belong in the failure store.
* **`Message.attempt` counts processes that died with the message in hand** (plus one), not deliveries. Nothing else is
  counted anywhere, and a message that kills its process would come again for ever. See `inflight`.
* **Delays are levels**: 1 s, 5 s, 10 s, 30 s, 1 to 10 min, 20 min, 30 min, 1 h, 2 h, unless `delay_levels=` repeats the
  broker's own `messageDelayLevel`. A delay is rounded up to a level.
* **Properties** of producers other than ours are visible only if named in `properties=`.
* An ordered group handles one message of a queue at a time, so at most as many at once as its topics have queues.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from exactly_once.errors import ConfigurationError
from exactly_once.transports.contract import BrokerProducer, Consumer, Features, Subscription, Surroundings
from exactly_once.transports.members import subscribed_otherwise
from exactly_once.transports.remoting import Admin
from exactly_once.transports.rocketmq4.checks import fix_starting_points, locks_of, problems
from exactly_once.transports.rocketmq4.connection import Connection
from exactly_once.transports.rocketmq4.messages import DELAY_LEVELS, MAX_BODY_BYTES, Names, levels
from exactly_once.transports.urls import ParsedURL, parse

__all__ = ["RocketMQ4Transport", "threads_for"]

DEFAULT_PORT: Final = 9876
DEFAULT_THREADS: Final = 20
MOST_THREADS: Final = 512  # unless the URL says more: a thread that waits costs memory, and time at each wake-up
DEFAULT_MAX_ATTEMPTS: Final = 5  # a message that was in hand at four deaths is not run a fifth time


def threads_for(subscriptions: Sequence[Subscription]) -> int:
    """Return how many callback threads a client gets if its URL does not say: each holds one message while it is in hand.

    Example:
        >>> threads_for([Subscription("orders", largest_batch=100)])
        200
    """
    # One batch runs while the next one forms.
    in_batches = sum(2 * each.largest_batch for each in subscriptions if each.largest_batch > 1)
    return min(MOST_THREADS, max(DEFAULT_THREADS, in_batches))


class RocketMQ4Transport:
    """The transport of a `rocketmq4://` URL.

    Args:
        url: Parsed; its secrets are never printed.
    """

    def __init__(self, url: ParsedURL) -> None:
        self._url = url
        self._threads = url.whole("threads", 0)  # 0: as the batches of the handlers need
        self._names = Names(url.options.get("namespace"))
        self._properties = tuple(filter(None, url.options.get("properties", "").split(",")))
        access, secret = url.options.get("access_key"), url.options.get("secret_key")
        if (access is None) != (secret is None):
            raise ConfigurationError(f"{url} needs both access_key= and secret_key= (or secret_key_file=), or neither.")
        self._keys = (access, secret) if access is not None and secret is not None else None
        self._admin = Admin(url.endpoints, self._keys)
        self._delay_levels = levels(url.options["delay_levels"]) if "delay_levels" in url.options else DELAY_LEVELS
        self._features = Features(
            redelivers=False,
            counts_attempts=True,
            max_attempts=url.whole("max_attempts", DEFAULT_MAX_ATTEMPTS),
            ordered=True,
            tags=True,
            properties=True,
            delayed=True,
            max_send_delay=max(self._delay_levels),
            max_body_bytes=MAX_BODY_BYTES,
        )

    @classmethod
    def from_url(cls, url: str, surroundings: Surroundings) -> "RocketMQ4Transport":
        """Return the transport that a URL names. Opens nothing.

        Args:
            url: As in this module's first lines; the hosts are name servers.
            surroundings: Not used.

        Raises:
            ConfigurationError: An option or a host is not understood.

        Example:
            >>> RocketMQ4Transport.from_url("rocketmq4://ns1:9876,ns2:9876?threads=8", Surroundings()).features.ordered
            True
        """
        options = ["namespace", "access_key", "threads", "properties", "delay_levels", "state_dir", "max_attempts"]
        given = parse(url, options=options, secrets=["secret_key"], default_port=DEFAULT_PORT)
        if not given.hosts:
            raise ConfigurationError(f"A rocketmq4 URL names the name servers: rocketmq4://HOST:{DEFAULT_PORT}.")
        return cls(given)

    @property
    def features(self) -> Features:
        """What RocketMQ can do through this client, known before connecting."""
        return self._features

    def check(self, group: str, subscriptions: Sequence[Subscription]) -> Sequence[str]:
        """Ask the servers whether they, the topics and the group are as needed; see `contract.Transport`.

        Raises:
            ConfigurationError: librocketmq is missing, or cannot be used.
        """
        from exactly_once.transports.rocketmq4.library import load

        load()
        return list(problems(self._admin, self._names, self._url.endpoints, group, subscriptions))

    def concerns(self, group: str, subscriptions: Sequence[Subscription]) -> Sequence[str]:
        """Ask whether other members of the group have another subscription, and whether the journals survive a restart."""
        wanted = [replace(each, topic=self._names.outside(each.topic)) for each in subscriptions]
        return (
            *subscribed_otherwise(self._admin, self._names.outside(group), wanted),
            *self._journals_that_go(group),
        )

    def subscribe(self, group: str, subscriptions: Sequence[Subscription]) -> Sequence[Consumer]:
        """Join the group with one consumer for all topics: the clients of a group must subscribe alike.

        Raises:
            ConfigurationError: librocketmq is missing or cannot be used, or the state directory cannot.
            TransportError: The client refused to start.
        """
        from exactly_once.transports.inflight import InFlight
        from exactly_once.transports.rocketmq4.ahead import Ahead, look_ahead
        from exactly_once.transports.rocketmq4.consumer import RocketMQ4Consumer

        connection = self._connection()
        fix_starting_points(self._admin, self._names, group, subscriptions)
        topics = [subscription.topic for subscription in subscriptions]
        ordered = any(subscription.ordered for subscription in subscriptions)
        threads = self._threads or threads_for(subscriptions)

        def before_leaving(instance: str) -> Callable[[], None]:
            return locks_of(self._admin, self._names, group, topics, instance) if ordered else lambda: None

        in_flight = InFlight(self._state_directory(group), threads)
        ahead: Ahead | None = None
        if found := look_ahead(self._admin, self._names, group, subscriptions, died=in_flight.died_lately):
            theirs = self._names.outside(group)
            ahead = Ahead(*(self._admin, self._names, theirs, found), properties=self._properties, at_once=threads)
        return [
            RocketMQ4Consumer(
                *(connection, group, subscriptions),
                in_flight=in_flight,
                features=self._features,
                threads=threads,
                properties=self._properties,
                before_leaving=before_leaving,
                ahead=ahead,
            )
        ]

    def producer(self) -> BrokerProducer:
        """Return a producer, which connects at its first `send`.

        Raises:
            ConfigurationError: librocketmq is missing or cannot be used.
        """
        from exactly_once.transports.rocketmq4.producer import RocketMQ4Producer

        return RocketMQ4Producer(self._connection(), self._delay_levels)

    def _connection(self) -> Connection:
        from exactly_once.transports.rocketmq4.library import load

        return Connection(
            library=load(),
            name_servers=";".join(self._url.endpoints),
            names=self._names,
            keys=self._keys,
        )

    def _journals_that_go(self, group: str) -> Sequence[str]:
        from exactly_once.transports.inflight import why_it_goes

        try:
            directory = self._state_directory(group)
            why = why_it_goes(directory)
        except (ConfigurationError, OSError):  # `subscribe` refuses it, and says why
            return ()
        if why is None:
            return ()
        text = (
            f"What is in hand is written down in {directory}, and {why}: a message that ends its process each time is then never"
            " known for one. Name a folder that stays, shared by the group's processes (in Kubernetes an emptyDir will do):"
            " ?state_dir=/var/lib/exactly-once"
        )
        return (text,)

    def _state_directory(self, group: str) -> Path:
        from exactly_once.transports.inflight import journal_directory

        named = self._url.options.get("state_dir")
        name = self._names.outside(group)
        return Path(named) / name.replace("/", "_") if named else journal_directory(*sorted(self._url.endpoints), name)
