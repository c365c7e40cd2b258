"""Checks a Redis URL before anything is opened: a mistake is an error at once. The text never repeats the URL. Pure.

It refuses what the client would silently accept: a database that is no number (the client takes 0), an unknown
option, an unescaped password that is read as a host. Called by `RedisConnection` and the settings.
"""

from typing import Final
from urllib.parse import parse_qsl, urlsplit

from exactly_once.errors import ConfigurationError
from exactly_once.wording.text import escaped, listed, probably

__all__ = ["SCHEMES", "checked"]

SCHEMES: Final = ("redis", "rediss", "unix")

_COMMON: Final = ("db", "username", "password")
_TLS: Final = (
    "ssl_ca_certs",
    "ssl_cert_reqs",
    "ssl_certfile",
    "ssl_check_hostname",
    "ssl_keyfile",
)
_OPTIONS: Final = {"redis": _COMMON, "rediss": _COMMON + _TLS, "unix": _COMMON}


def checked(url: object) -> str:
    """Return a Redis URL in the form the client needs, its scheme in lower case.

    Args:
        url: `redis://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE]`, `rediss://...` for TLS, `unix://[...@]/PATH?db=0`.

    Raises:
        ConfigurationError: It is none of these; the text repeats nothing that may be a password.

    Example:
        >>> checked("REDIS://127.0.0.1:6379/0")
        'redis://127.0.0.1:6379/0'
    """
    if not isinstance(url, str):
        raise ConfigurationError(
            f"A Redis is named by a URL, such as redis://127.0.0.1:6379/0, and a {type(url).__name__} was given."
        )
    scheme, colon, rest = url.strip().partition("://")
    scheme = scheme.lower()
    if not colon or scheme not in SCHEMES:
        # A text without a known scheme may begin with anything, also with a password.
        raise ConfigurationError(
            "A Redis URL begins with redis://, rediss:// (TLS) or unix:// (a socket file), such as"
            " redis://127.0.0.1:6379/0. For Sentinel, give the address that follows the primary."
        )
    try:
        parts = urlsplit(f"{scheme}://{rest}")
        host, user, password = parts.hostname, parts.username, parts.password
        _ = parts.port  # raises if it is no port
    except ValueError:
        raise _unreadable(scheme) from None  # its text would repeat a part of the URL
    if parts.fragment or "@" in parts.path or "@" in parts.query:
        raise _unreadable(scheme)
    if user and password is None:
        raise ConfigurationError(
            f"The {scheme} URL has a user and no password before its @. A password stands behind a colon:"
            f" {scheme}://:PASSWORD@..., or {scheme}://USER:PASSWORD@..."
        )
    if scheme == "unix":
        if host or not parts.path.strip("/"):
            raise ConfigurationError("A unix URL names a socket file: unix:///run/redis/redis.sock?db=0")
    else:
        if not host:
            raise ConfigurationError(f"The {scheme} URL names no host: {scheme}://HOST:6379/0")
        database = parts.path.strip("/")
        if database and not (database.isascii() and database.isdigit()):
            raise ConfigurationError(
                f"The {scheme} URL must end with the number of a database, such as /0, and {_ESCAPE}"
            )
    _check_options(scheme, parts.query)
    return f"{scheme}://{rest}"


_ESCAPE: Final = "characters such as / ? # @ & in a password are written %2F %3F %23 %40 %26."


def _unreadable(scheme: str) -> ConfigurationError:
    return ConfigurationError(
        f"The {scheme} URL cannot be read. It looks like {scheme}://:PASSWORD@HOST:6379/0, and {_ESCAPE}"
    )


def _check_options(scheme: str, query: str) -> None:
    known = _OPTIONS[scheme]
    behind = False
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in known and behind:  # it may be the rest of the password: nothing of it is repeated
            raise ConfigurationError(
                f"Behind the password of the {scheme} URL stands an option that it does not know, and that may be the rest of the"
                f" password: there an & is written %26. It knows: {listed(known)}."
            )
        if name not in known:
            raise ConfigurationError(
                f"A {scheme} URL has no option '{escaped(name)}'.{probably(name, known)} It knows: {listed(known)}."
            )
        if not value:
            raise ConfigurationError(f"The option {name} of the {scheme} URL is empty; set it or leave it out.")
        if name == "db" and not (value.isascii() and value.isdigit()):
            raise ConfigurationError(f"The option db of the {scheme} URL must be the number of a database, such as 0.")
        behind = behind or name == "password"
