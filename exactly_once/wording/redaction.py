"""URLs without their secrets, for logs, errors and `exactly-once handlers`; and drivers' words without them.

A password with an `@` that was not escaped is cut in two by whoever reads the URL: the driver takes the rest for a host, and says
that there is none of that name. Such secrets are remembered, each part of them, and struck out of what drivers say.

An `&` in a secret of the query cuts it in two, and the rest is read as an option. What stands behind a secret there cannot be
told from it, so it is not printed, and the driver's words on an option that it does not know are struck.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, Protocol, Self
from urllib.parse import quote_plus, unquote

__all__ = ["behind_secret", "redacted", "remember", "struck"]

HIDDEN: Final = "***"
# sslkey= and the like name files; every other "key" in a query is treated as a secret
_SECRET_NAME: Final = re.compile(
    r"pass|pwd|secret|token|credential|signature|private|(?<!ssl)(?<!ssl_)(?<!ssl-)(?<!tls)(?<!tls_)key|^sk$|^ak$",
    re.IGNORECASE,
)
# where a URL is cut by whoever reads it
_CUTS: Final = re.compile(r"[@:/?#&=\[\],]")
_SHORT: Final = 4
"""A part of fewer characters is struck where it stands alone: else each sentence would lose its letters."""
_remembered: set[str] = set()


class _Url(Protocol):
    """SQLAlchemy's URL, which knows of the password in its place and of none in the query."""

    @property
    def database(self) -> str | None: ...
    @property
    def password(self) -> str | None: ...
    @property
    def query(self) -> Mapping[str, str | tuple[str, ...]]: ...

    def set(self, *, query: Mapping[str, Any]) -> Self: ...
    def render_as_string(self, hide_password: bool) -> str: ...


def redacted(url: str | _Url, *, whole: bool = False) -> str:
    """Return a URL as it may be printed: no password, no secret value in its query, and nothing behind one.

    Made for database URLs and for transports of several hosts. Where a password has characters that should have been
    escaped (`@ / ? # &`), too much is hidden rather than too little. A text that is no URL is returned as it is.

    Args:
        url: As it was written, or as it was read.
        whole: All names in its query were seen to be options, so none is a part of a secret.

    Example:
        >>> redacted("rocketmq4://me:pa@ss@ns1:9876,ns2:9876?namespace=eu&secret_key=x")
        'rocketmq4://me:***@ns1:9876,ns2:9876?namespace=eu&secret_key=***'
    """
    text = _text_of(url)
    scheme, separator, rest = text.partition("://")
    if not separator:
        userinfo, at, place = text.rpartition("@")
        user, colon, _ = userinfo.partition(":")
        return f"{user}:{HIDDEN}@{place}" if at and colon else text
    # the last @ of all, even behind a "?": a password may hold an unescaped one. A file has a path and no password.
    if _secret_of(rest):
        user = rest.partition(":")[0]
        scheme, rest = f"{scheme}://{user}:{HIDDEN}", f"@{rest.rpartition('@')[2]}"
    else:
        scheme = f"{scheme}://"
    head, question, query = rest.partition("?")
    return f"{scheme}{head}{question}{_without_secrets(query, whole)}"


def behind_secret(names: Iterable[str]) -> tuple[str, ...]:
    """Return those names of a query that stand behind the first one of a secret, in the order in which they are written.

    Example:
        >>> behind_secret(["sslmode", "password", "rt"])
        ('rt',)
    """
    every = list(names)
    first = next((n for n, name in enumerate(every) if _is_secret(name)), len(every))
    return tuple(every[first + 1 :])


def remember(url: str | _Url, read: str | None, parts: Iterable[str] = ()) -> None:
    """Keep a secret of this URL for `struck`, unless it was read as it is meant.

    Args:
        url: As it was written, or as it was read.
        read: What was taken for its password.
        parts: Names and values of its query that may be parts of a secret.
    """
    _remembered.update(filter(None, parts))
    secret = _secret_of(_text_of(url).partition("://")[2])
    if secret and unquote(secret) != read:
        for text in (secret, unquote(secret)):
            _remembered.update(filter(None, (text, *_CUTS.split(text))))


def struck(text: str) -> str:
    """Return what a driver says, without any part of the secrets that were misread.

    Example:
        >>> remember("postgresql://me:pa@ss@db/shop", "pa")
        >>> struck("failed to resolve host 'ss@db'")
        "failed to resolve host '***@db'"
    """
    for part in sorted(_remembered, key=len, reverse=True):
        for form in {part, repr(part)[1:-1]}:  # as drivers quote
            alone = rf"(?<!\w){re.escape(form)}(?!\w)"
            text = text.replace(form, HIDDEN) if len(form) >= _SHORT else re.sub(alone, HIDDEN, text)
    return text


def _text_of(url: str | _Url) -> str:
    if isinstance(url, str):
        return url
    text = url.set(query={}).render_as_string(hide_password=False)
    # what was read as a database's name may be a part of the password, and is rendered with %40
    if url.database and "@" in url.database and "://" in text and not text.partition("://")[2].startswith("/"):
        text = unquote(text) if url.password is None else _unquoted_path(text)
    # in the order in which it was written: SQLAlchemy sorts the names, and what stood behind a secret would stand before it
    given = ((name, [told] if isinstance(told, str) else told) for name, told in url.query.items())
    query = "&".join(f"{quote_plus(name)}={quote_plus(each)}" for name, every in given for each in every)
    return f"{text}{'?' if query else ''}{query}"


def _unquoted_path(head: str) -> str:
    """Return a URL without a query with its path as it is meant; user and password stay as they are written."""
    userinfo, at, place = head.partition("@")
    return f"{userinfo}{at}{unquote(place)}"


def _secret_of(rest: str) -> str:
    """Return what stands for a password behind `://`, as written; too much of it rather than too little."""
    userinfo, _, _ = rest.rpartition("@")
    return "" if rest.startswith("/") else userinfo.partition(":")[2]


def _is_secret(name: str) -> bool:
    return _SECRET_NAME.search(name) is not None


def _without_secrets(query: str, whole: bool) -> str:
    hidden: list[str] = []
    for pair in query.split("&"):
        name, equals, _ = pair.partition("=")
        secret = bool(equals) and _is_secret(unquote(name))
        hidden.append(f"{name}={HIDDEN}" if secret else pair)
        if secret and not whole:  # what follows may be the rest of it
            break
    return "&".join(hidden)
