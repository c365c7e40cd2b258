"""The transports by URL scheme. Imports a transport's module only when its scheme is asked for; opens no connection.

Called by the facade. A transport is a class with `from_url(url, surroundings)` that keeps the contract of
`exactly_once.transports.contract` and passes the conformance suite.
"""

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Final, Protocol, cast

from exactly_once.errors import ConfigurationError
from exactly_once.transports.contract import Surroundings, Transport

__all__ = ["SCHEMES", "transport_from"]

SCHEMES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "memory": "exactly_once.transports.memory:MemoryTransport",
        "rocketmq": "exactly_once.transports.rocketmq5.transport:RocketMQ5Transport",
        "rocketmq4": "exactly_once.transports.rocketmq4.transport:RocketMQ4Transport",
        "sql": "exactly_once.transports.sql.transport:SqlTransport",
    }
)
"""Which class serves which scheme, as "module:Class": naming a broker does not import its client."""


class _TransportClass(Protocol):
    def from_url(self, url: str, surroundings: Surroundings) -> Transport: ...


def transport_from(url: str, surroundings: Surroundings) -> Transport:
    """Return the transport that a URL names. Opens nothing.

    Args:
        url: Such as `rocketmq://127.0.0.1:8081`, `rocketmq4://ns1:9876,ns2:9876?namespace=x`, `sql://`, `memory://test`.
        surroundings: What the transport may use of its application.

    Returns:
        A transport that keeps the contract of `exactly_once.transports.contract`.

    Raises:
        ConfigurationError: The scheme, an option or a host is not understood.
        MissingExtra: The broker's client library is not installed.

    Example:
        >>> transport_from("memory://doc", Surroundings()).features.ordered
        True
    """
    scheme, colon, _ = url.partition("://")
    where = SCHEMES.get(scheme.lower())
    if not colon or where is None:
        # A URL without a scheme may begin with anything, also with a secret: only a plausible scheme is repeated.
        given = f"the scheme {scheme!r}" if colon and scheme.isalnum() else "a URL without a known scheme"
        known = ", ".join(f"{name}://" for name in sorted(SCHEMES))
        raise ConfigurationError(f"No transport serves {given}. Known are: {known}.")
    module, _, name = where.partition(":")
    chosen = cast("_TransportClass", getattr(import_module(module), name))
    return chosen.from_url(url, surroundings)
