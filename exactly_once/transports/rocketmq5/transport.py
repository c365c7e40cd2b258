"""RocketMQ 5 over gRPC: the transport of `rocketmq://HOST:8081`, through the official `rocketmq-python-client` 5.

    rocketmq://HOST:8081[;HOST:8081...]?namespace=..&access_key=..&secret_key=..|secret_key_file=..
                                        &invisible_s=30&max_attempts=16&name_servers=NS1:9876,NS2:9876

| module | what it is for |
|---|---|
| `wall` | importing the client without what its import does to a program |
| `endpoints` | the addresses of the proxies, and whether one answers |
| `group_client` | one client in one group, and the few calls we make through it |
| `membership` | the present client, and a new one after its proxy restarted |
| `consumer`, `answers` | receiving, settling, order, outages |
| `reading` | a received message as ours; or as bytes that cannot be read |
| `producer`, `requests` | sending once, many at a time |
| `advice`, `checks` | what is wrong before a start, and the command that repairs it |

Making a transport opens nothing and does not import the client.

Sources: the protocol `apache/rocketmq-apis` (messaging service v2); the limits are the proxy's defaults
(`maxMessageSize`, `maxDelayTimeMills`, `maxInvisibleTimeMills`, `minInvisibleTimeMillsForRecv`).
"""

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from ipaddress import IPv4Address
from typing import Final

from exactly_once.errors import ConfigurationError
from exactly_once.transports.contract import BrokerProducer, Consumer, Features, Subscription, Surroundings
from exactly_once.transports.members import subscribed_otherwise
from exactly_once.transports.remoting import Admin
from exactly_once.transports.rocketmq5 import wall
from exactly_once.transports.rocketmq5.endpoints import Endpoints
from exactly_once.transports.urls import ParsedURL, parse

__all__ = ["RocketMQ5Transport"]

DEFAULT_PORT: Final = 8081
NAME_SERVER_PORT: Final = 9876
# Long enough for a worker, which extends after each third, to survive a slow database; a killed worker's messages wait as long.
# Proxies refuse less than 10 s unless minInvisibleTimeMillsForRecv allows it.
DEFAULT_INVISIBLE: Final = timedelta(seconds=30)
LONGEST_INVISIBLE: Final = timedelta(hours=12)
# A group's default retryMaxTimes of 16 allows 17 deliveries; the last one is kept for parking.
DEFAULT_MAX_ATTEMPTS: Final = 16
MAX_BODY_BYTES: Final = 4 * 1024 * 1024
LONGEST_SEND_DELAY: Final = timedelta(hours=24)
# Brokers delete messages after fileReservedTime, by default 72 hours: no copy arrives later.
REDELIVERY_SPAN: Final = timedelta(hours=72)


class RocketMQ5Transport:
    """The transport of a `rocketmq://` URL.

    Args:
        proxies: The addresses of the proxies, and our credentials.
        invisible: How long a delivery stays invisible unless extended; whole seconds.
        max_attempts: How many deliveries may run; the group must allow one more.
        admin: Asks name servers and brokers what a proxy does not report; None if the URL names no name servers.
    """

    def __init__(
        self, proxies: Endpoints, *, invisible: timedelta, max_attempts: int, admin: Admin | None = None
    ) -> None:
        self._proxies, self._invisible, self._admin = proxies, invisible, admin
        self._features = Features(
            redelivers=True,
            counts_attempts=True,
            max_attempts=max_attempts,
            max_redelivery_delay=LONGEST_INVISIBLE,
            redelivery_span=REDELIVERY_SPAN,
            ordered=True,
            tags=True,
            properties=True,
            delayed=True,
            max_send_delay=LONGEST_SEND_DELAY,
            max_body_bytes=MAX_BODY_BYTES,
        )

    @classmethod
    def from_url(cls, url: str, surroundings: Surroundings) -> "RocketMQ5Transport":
        """Return the transport that a URL names. Opens nothing.

        Args:
            url: As in this module's first lines; several endpoints are separated by semicolons or commas.
            surroundings: Not used.

        Raises:
            ConfigurationError: An option or a host is not understood, or the other RocketMQ client is installed.
            MissingExtra: The client is not installed.

        Example:
            >>> RocketMQ5Transport.from_url("rocketmq://127.0.0.1:8081", Surroundings()).features.max_attempts
            16
        """
        place_text, question, query = url.partition("?")
        given = parse(
            place_text.replace(";", ",") + question + query,
            options=["namespace", "access_key", "invisible_s", "max_attempts", "name_servers"],
            secrets=["secret_key"],
            default_port=DEFAULT_PORT,
        )
        if not given.hosts:
            raise ConfigurationError(f"A rocketmq URL names the proxy: rocketmq://HOST:{DEFAULT_PORT}.")
        for host, _ in given.hosts:
            # The client cuts at the first colon, and takes several endpoints only as IPv4 addresses.
            if ":" in host:
                raise ConfigurationError(
                    f"The RocketMQ client cannot be given the IPv6 address {host}; use a host name or an IPv4 address."
                )
            if len(given.hosts) > 1 and not _is_ipv4(host):
                raise ConfigurationError(
                    f"Of several RocketMQ endpoints each must be an IPv4 address, and {host!r} is none. Write the addresses, "
                    "or one host name that resolves to all of them."
                )
        if ("access_key" in given.options) != ("secret_key" in given.options):
            raise ConfigurationError(
                f"{given} needs both access_key= and secret_key= (or secret_key_file=), or neither."
            )
        invisible = given.seconds("invisible_s", DEFAULT_INVISIBLE)
        if invisible % timedelta(seconds=1) or invisible > LONGEST_INVISIBLE:
            raise ConfigurationError("The option invisible_s must be whole seconds, at most 43200 (12 hours).")
        wall.require()
        wall.build()
        proxies = Endpoints(
            given.endpoints,
            given.options.get("namespace", ""),
            given.options.get("access_key", ""),
            given.options.get("secret_key", ""),
        )
        return cls(
            proxies,
            invisible=invisible,
            max_attempts=given.whole("max_attempts", DEFAULT_MAX_ATTEMPTS),
            admin=_admin(given),
        )

    @property
    def features(self) -> Features:
        """What RocketMQ 5 can do, known before connecting."""
        return self._features

    def check(self, group: str, subscriptions: Sequence[Subscription]) -> Sequence[str]:
        """Ask the server whether it, the topics and the group are as needed; see `contract.Transport`."""
        from exactly_once.transports.rocketmq5.checks import problems

        return problems(self._proxies, group, subscriptions, max_attempts=self._features.max_attempts or 0)

    def concerns(self, group: str, subscriptions: Sequence[Subscription]) -> Sequence[str]:
        """Ask whether other members of the group have another subscription, if the URL names name servers."""
        if self._admin is None:
            return ()
        wanted = [replace(each, topic=self._proxies.named(each.topic)) for each in subscriptions]
        return subscribed_otherwise(self._admin, self._proxies.named(group), wanted)

    def subscribe(self, group: str, subscriptions: Sequence[Subscription]) -> Sequence[Consumer]:
        """Join the group, with one consumer for each topic: one for several topics would wait for the idle ones in turn."""
        from exactly_once.transports.rocketmq5.consumer import RocketMQ5Consumer

        return [
            RocketMQ5Consumer(
                *(self._proxies, group, subscriptions, mine), features=self._features, invisible=self._invisible
            )
            for mine in subscriptions
        ]

    def producer(self) -> BrokerProducer:
        """Return a producer, which connects at its first `send`."""
        from exactly_once.transports.rocketmq5.producer import RocketMQ5Producer

        return RocketMQ5Producer(self._proxies, self._features)


def _admin(given: ParsedURL) -> Admin | None:
    if "name_servers" not in given.options:
        return None
    places = parse(
        f"rocketmq4://{given.options['name_servers']}", options=[], secrets=[], default_port=NAME_SERVER_PORT
    )
    access, secret = given.options.get("access_key"), given.options.get("secret_key")
    return Admin(places.endpoints, (access, secret) if access is not None and secret is not None else None)


def _is_ipv4(host: str) -> bool:
    try:
        IPv4Address(host)
    except ValueError:
        return False
    return True
