"""URLs without their secrets, for logs, errors and `exactly-once handlers`. Pure."""

import re
from typing import Final, Protocol

__all__ = ["redacted"]

HIDDEN: Final = "***"
# sslkey= and the like name files; every other "key" in a query is treated as a secret
_SECRET_NAME: Final = re.compile(
    r"pass|pwd|secret|token|credential|signature|private|(?<!ssl)(?<!ssl_)(?<!ssl-)(?<!tls)(?<!tls_)key|^sk$|^ak$",
    re.IGNORECASE,
)


class _Url(Protocol):
    """SQLAlchemy's URL, which knows of the password in its place and of none in the query."""

    def render_as_string(self, hide_password: bool) -> str: ...


def redacted(url: str | _Url) -> str:
    """Return a URL as it may be printed: no password, no secret value in its query.

    Made for database URLs and for transports of several hosts. Where a password has characters that should have been
    escaped (`@ / ? #`), too much is hidden rather than too little. A text that is no URL is returned as it is.

    Example:
        >>> redacted("rocketmq4://me:pa@ss@ns1:9876,ns2:9876?namespace=eu&secret_key=x")
        'rocketmq4://me:***@ns1:9876,ns2:9876?namespace=eu&secret_key=***'
    """
    text = url if isinstance(url, str) else url.render_as_string(hide_password=False)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return text
    userinfo, at, after = rest.rpartition("@")
    user, colon, _ = userinfo.partition(":")
    # the last @ of all, even behind a "?": a password may hold an unescaped one. A file has a path and no password.
    if at and colon and not rest.startswith("/"):
        scheme, rest = f"{scheme}://{user}:{HIDDEN}", f"@{after}"
    else:
        scheme = f"{scheme}://"
    head, question, query = rest.partition("?")
    return f"{scheme}{head}{question}{_without_secrets(query)}"


def _without_secrets(query: str) -> str:
    hidden = []
    for pair in query.split("&"):
        name, equals, _ = pair.partition("=")
        hidden.append(f"{name}={HIDDEN}" if equals and _SECRET_NAME.search(name) else pair)
    return "&".join(hidden)
