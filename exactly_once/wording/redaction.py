"""URLs without their secrets, for logs, errors and `exactly-once handlers`; and drivers' texts without them.

A password with an unescaped `@` is cut in two by each program that reads the URL: the driver takes the rest for
a host, and reports that there is no such host. Such secrets are remembered, with each part of them, and
redacted in the drivers' texts.

An unescaped `&` in a secret of the query cuts it in two, and the rest is read as an option. What follows a secret there cannot be
told from the secret, so it is not printed, and it is redacted in the driver's text about an unknown option.

Libraries write the URLs of other services into their errors (`raise_for_status()` of an HTTP client does). In each text the
secrets of all URLs are redacted, as far as they stand where a URL has them.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, Protocol, Self
from urllib.parse import quote_plus, unquote

__all__ = ["behind_secret", "redacted", "remember", "struck"]

HIDDEN: Final = "***"
# sslkey= and the like name files; every other "key" in a query counts as a secret.
_SECRET_NAME: Final = re.compile(
    r"pass|pwd|secret|token|credential|signature|private|(?<!ssl)(?<!ssl_)(?<!ssl-)(?<!tls)(?<!tls_)key|^sk$|^ak$",
    re.IGNORECASE,
)
# The characters at which a program may cut a URL.
_CUTS: Final = re.compile(r"[@:/?#&=\[\],]")
_SHORT: Final = 4
"""A part with fewer characters is redacted only as a whole word: else each sentence would lose its letters."""
# A scheme has few characters: without that limit a long text would be searched from each of its letters.
_URL_IN_TEXT: Final = re.compile(
    r"""(?<![\w+.-])([A-Za-z][\w+.-]{0,30}://)([^\s/?#'"<>]*@)?([^\s?'"<>]*\??)([^\s'"<>]*)"""
)
_PAIR: Final = re.compile(r"([^&=#?]+)=([^&#]*)")
_remembered: set[str] = set()


class _Url(Protocol):
    """SQLAlchemy's URL, which knows the password in its usual place, but none in the query."""

    @property
    def database(self) -> str | None: ...
    @property
    def password(self) -> str | None: ...
    @property
    def query(self) -> Mapping[str, str | tuple[str, ...]]: ...

    def set(self, *, query: Mapping[str, Any]) -> Self: ...
    def render_as_string(self, hide_password: bool) -> str: ...


def redacted(url: str | _Url, *, whole: bool = False) -> str:
    """Return a URL in printable form: without password, without a secret value in its query, and without what follows that.

    For URLs of databases and of transports with several hosts. If a password has characters that should have been
    escaped (`@ / ? # &`), too much is hidden rather than too little. A text that is no URL is returned unchanged.

    Args:
        url: As it was written, or parsed.
        whole: All names in its query were checked to be options, so none is a part of a secret.

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
    # The last @ of all, even after a "?": a password may contain an unescaped one. A file has a path and no password.
    if _secret_of(rest):
        user = rest.partition(":")[0]
        scheme, rest = f"{scheme}://{user}:{HIDDEN}", f"@{rest.rpartition('@')[2]}"
    else:
        scheme = f"{scheme}://"
    head, question, query = rest.partition("?")
    return f"{scheme}{head}{question}{_without_secrets(query, whole)}"


def behind_secret(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names of a query that follow the first secret, in the order in which they are written.

    Example:
        >>> behind_secret(["sslmode", "password", "rt"])
        ('rt',)
    """
    every = list(names)
    first = next((n for n, name in enumerate(every) if _is_secret(name)), len(every))
    return tuple(every[first + 1 :])


def remember(url: str | _Url, read: str | None, parts: Iterable[str] = ()) -> None:
    """Remember a secret of this URL for `struck`, unless it was read correctly.

    Args:
        url: As it was written, or parsed.
        read: What was read as its password.
        parts: Names and values of its query that may be parts of a secret.
    """
    _remembered.update(filter(None, parts))
    secret = _secret_of(_text_of(url).partition("://")[2])
    if secret and unquote(secret) != read:
        for text in (secret, unquote(secret)):
            _remembered.update(filter(None, (text, *_CUTS.split(text))))


def struck(text: str) -> str:
    """Return a driver's or a library's text without any part of the misread secrets, and without the secrets of URLs in it.

    Example:
        >>> remember("postgresql://me:pa@ss@db/shop", "pa")
        >>> struck("failed to resolve host 'ss@db'")
        "failed to resolve host '***@db'"
        >>> struck("500 for url 'https://me:word@bank.test/v1?api_key=7&page=2'")
        "500 for url 'https://me:***@bank.test/v1?api_key=***&page=2'"
    """
    if "://" in text:
        text = _URL_IN_TEXT.sub(_without_its_secrets, text)
    for part in sorted(_remembered, key=len, reverse=True):
        for form in {part, repr(part)[1:-1]}:  # as drivers quote it
            alone = rf"(?<!\w){re.escape(form)}(?!\w)"
            text = text.replace(form, HIDDEN) if len(form) >= _SHORT else re.sub(alone, HIDDEN, text)
    return text


def _without_its_secrets(url: re.Match[str]) -> str:
    scheme, userinfo, place, query = url.groups(default="")
    user, colon, _ = userinfo.partition(":")
    if colon:
        userinfo = f"{user}:{HIDDEN}@"
    elif userinfo and scheme.lower().startswith("http"):  # a token: nobody's name stands alone there
        userinfo = f"{HIDDEN}@"
    return f"{scheme}{userinfo}{place}{_PAIR.sub(_pair_without_secret, query)}"


def _pair_without_secret(pair: re.Match[str]) -> str:
    return f"{pair[1]}={HIDDEN}" if _is_secret(unquote(pair[1])) else pair[0]


def _text_of(url: str | _Url) -> str:
    if isinstance(url, str):
        return url
    text = url.set(query={}).render_as_string(hide_password=False)
    # What was read as the name of a database may be a part of the password, and is rendered with %40.
    if url.database and "@" in url.database and "://" in text and not text.partition("://")[2].startswith("/"):
        text = unquote(text) if url.password is None else _unquoted_path(text)
    # In the order in which it was written: SQLAlchemy sorts the names, and would put what followed a secret before it.
    given = ((name, [told] if isinstance(told, str) else told) for name, told in url.query.items())
    query = "&".join(f"{quote_plus(name)}={quote_plus(each)}" for name, every in given for each in every)
    return f"{text}{'?' if query else ''}{query}"


def _unquoted_path(head: str) -> str:
    """Return a URL without a query, with its path decoded; user and password stay as they are written."""
    userinfo, at, place = head.partition("@")
    return f"{userinfo}{at}{unquote(place)}"


def _secret_of(rest: str) -> str:
    """Return what is in the password's place after `://`, as written; too much of it rather than too little."""
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
