"""Reads the URL of a database. Refuses a URL whose password was cut in two, and options that the driver does not know.

The rest of a cut password would be used as a host or an option, and printed.

Opens nothing. Called by `store`, `redis.connection`, `alembic` and the command line with a URL that a person typed.
"""

from typing import Final
from urllib.parse import unquote

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from exactly_once.database.url_options import advice_on, refused_options
from exactly_once.errors import ConfigurationError
from exactly_once.wording.redaction import behind_secret, remember

__all__ = ["check_options", "database_url", "remember_parts"]

# The text repeats nothing of the URL: an unreadable URL may hold a password anywhere.
_UNREADABLE: Final = (
    "The database URL cannot be read{why}. It looks like postgresql+psycopg://user:password@host:5432/database. In a user, a"
    " password or a name write @ as %40, : as %3A, / as %2F, ? as %3F, # as %23, & as %26 and % as %25."
)


def database_url(url: str | URL) -> URL:
    """Parse a URL.

    Args:
        url: The URL as a person wrote it.

    Raises:
        ConfigurationError: It is no URL, or not the intended one. The text repeats nothing of it.

    Example:
        >>> database_url("postgresql+psycopg://me:secret@db/shop").host
        'db'
    """
    if isinstance(url, URL):
        check_options(url)
        return url
    if url.lstrip()[:1] in ('"', "'"):
        raise ConfigurationError(
            "The database URL begins with a quotation mark, which is part of it here. Leave both out."
        )
    try:
        read = make_url(url)
    except (ArgumentError, ValueError):  # a port that is no number, for example: its text would repeat it
        raise ConfigurationError(_UNREADABLE.format(why="")) from None
    remember(url, read.password)
    if read.get_backend_name() != "sqlite":
        place = url.partition("?")[0]
        if place.count("@") > (read.username is not None or read.password is not None):
            raise ConfigurationError(_UNREADABLE.format(why=": it has an @ too many"))
        if any(pair and "=" not in pair for pair in url.partition("?")[2].split("&")):
            raise ConfigurationError(_UNREADABLE.format(why=": behind its ? stands something that is not NAME=VALUE"))
    if _lacks_value(url.partition("?")[2]):  # SQLAlchemy drops such a name, and the password would be incomplete
        raise ConfigurationError(_UNREADABLE.format(why=": behind a password in it stands a name without a value"))
    check_options(read)
    return read


def _lacks_value(query: str) -> bool:
    pairs = [pair.partition("=") for pair in query.split("&") if pair]
    behind = len(behind_secret(unquote(name) for name, _, _ in pairs))
    return not all(value for _, _, value in pairs[len(pairs) - behind :])


def check_options(url: URL) -> None:
    """Refuse a URL with options that its driver does not know.

    Raises:
        ConfigurationError: It has some. Those after a secret may be the rest of that secret, and are not repeated.
    """
    refused = refused_options(url)
    if not refused:
        return
    if not set(refused).isdisjoint(behind_secret(url.query)):
        raise ConfigurationError(
            _UNREADABLE.format(why=": behind a password in it stands an option that its driver does not know")
        )
    if url.get_backend_name() != "sqlite":  # for sqlite SQLAlchemy drops them, with a warning
        raise ConfigurationError(advice_on(url, refused))


def remember_parts(url: URL) -> None:
    """Remember the parts of a parsed URL that may be the rest of a password. They are redacted in the driver's error texts."""
    refused, behind = refused_options(url), behind_secret(url.query)
    names = [name for name in behind if refused is None or name in refused]
    told = [url.query[name] for name in names]
    values = [each for value in told for each in ([value] if isinstance(value, str) else value)]
    remember(url, url.password, (*names, *values))
