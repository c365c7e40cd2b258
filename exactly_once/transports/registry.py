"""The transports by URL scheme. Imports a transport's module only when its scheme is asked for; opens no connection.

Called by the facade. A transport is a class with `from_url(url, surroundings)` that keeps the contract of
`exactly_once.transports.contract` and passes the suite of `exactly_once.testing.conformance`. Another distribution names its own
among its packaging's entry points, in the group `exactly_once.transports`. Those are looked for only where no transport of ours
has the scheme, so none takes the place of ours.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Final, Protocol, cast

from exactly_once.errors import ConfigurationError
from exactly_once.transports.contract import Surroundings, Transport

__all__ = ["ENTRY_POINTS", "SCHEMES", "transport_from"]

ENTRY_POINTS: Final = "exactly_once.transports"
"""The group in which other distributions name their transports: `scheme = "module:Class"`."""

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
        ConfigurationError: The scheme, an option or a host is not understood; or two other distributions serve the scheme, or
            the class that one names cannot be imported.
        MissingExtra: The broker's client library is not installed.

    Example:
        >>> transport_from("memory://doc", Surroundings()).features.ordered
        True
    """
    scheme, colon, _ = url.partition("://")
    where = SCHEMES.get(scheme.lower())
    if colon and where is not None:
        module, _, name = where.partition(":")
        return cast("_TransportClass", getattr(import_module(module), name)).from_url(url, surroundings)
    others = _others()
    if colon and (found := others.get(scheme.lower())):
        return _loaded(scheme.lower(), found).from_url(url, surroundings)
    # a URL without a scheme may begin with anything, also with a secret: only a plausible scheme is repeated
    given = f"the scheme {scheme!r}" if colon and scheme.isalnum() else "a URL without a known scheme"
    known = ", ".join(f"{name}://" for name in sorted({*SCHEMES, *others}))
    raise ConfigurationError(f"No transport serves {given}. Known are: {known}.")


def _others() -> Mapping[str, Sequence[EntryPoint]]:
    """Return what other distributions name, by scheme."""
    found: dict[str, list[EntryPoint]] = {}
    for each in entry_points(group=ENTRY_POINTS):
        found.setdefault(each.name.lower(), []).append(each)
    return found


def _loaded(scheme: str, found: Sequence[EntryPoint]) -> _TransportClass:
    if len(found) > 1:
        raise ConfigurationError(
            f"Several distributions serve {scheme}://: {', '.join(sorted(map(_named, found)))}. Uninstall all but one of them."
        )
    [one] = found
    try:
        chosen = one.load()
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"The transport {scheme}:// of {_named(one)} cannot be imported: {error}.") from error
    if not callable(getattr(chosen, "from_url", None)):
        raise ConfigurationError(
            f"The transport {scheme}:// of {_named(one)} has no from_url(url, surroundings), by which one is made."
        )
    return cast("_TransportClass", chosen)


def _named(each: EntryPoint) -> str:
    return each.value if each.dist is None else f"{each.dist.name} ({each.value})"
