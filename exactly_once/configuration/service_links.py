"""Which environment variables are Kubernetes' own: it sets them in each pod for each Service of its namespace. Pure.

A Service named `exactly-once` makes EXACTLY_ONCE_SERVICE_HOST, EXACTLY_ONCE_PORT=tcp://10.0.0.11:80 and more; one named
`exactly-once-redis` makes EXACTLY_ONCE_REDIS_PORT and the like. Nobody wrote them as settings. Called by `config`.
"""

import re
from collections.abc import Mapping
from typing import Final

__all__ = ["service_links"]

_PROTOCOL: Final = "(?:TCP|UDP|SCTP)"
_ADDRESS: Final = re.compile(r"(?:tcp|udp|sctp)://\S+")
_NUMBER: Final = re.compile(r"[0-9]+")
_ANY: Final = re.compile(r"\S+")
_LINKS: Final = tuple(
    (re.compile(rf"(?:\w+_)?{name}"), value)
    for name, value in (
        ("SERVICE_HOST", _ANY),
        (r"SERVICE_PORT(?:_\w+)?", _NUMBER),
        ("PORT", _ADDRESS),
        (f"PORT_[0-9]+_{_PROTOCOL}", _ADDRESS),
        (f"PORT_[0-9]+_{_PROTOCOL}_(?:PROTO|PORT|ADDR)", _ANY),
    )
)


def service_links(variables: Mapping[str, str], prefix: str) -> tuple[str, ...]:
    """Return the names that begin with `prefix` and have the form of Kubernetes' variables, in name and value.

    Example:
        >>> service_links({"SHOP_PORT": "tcp://10.0.0.11:80", "SHOP_PORT_80_TCP_PROTO": "tcp"}, "SHOP_")
        ('SHOP_PORT', 'SHOP_PORT_80_TCP_PROTO')
        >>> service_links({"SHOP_PORT": "8080"}, "SHOP_")
        ()
    """
    return tuple(
        variable
        for variable, value in variables.items()
        if variable.startswith(prefix)
        and any(
            name.fullmatch(variable.removeprefix(prefix)) and form.fullmatch(value.strip()) for name, form in _LINKS
        )
    )
