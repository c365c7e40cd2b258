"""Reads a database's URL, and refuses one of which a password was cut in two: its rest would be taken for a host or an option,
and printed. Refuses one with an option that its driver does not know, too.

Opens nothing. Called by whatever takes a URL from a person: `store`, `alembic`, the command line.
"""

from typing import Final
from urllib.parse import unquote

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from exactly_once.database.url_options import advice_on, refused_options
from exactly_once.errors import ConfigurationError
from exactly_once.wording.redaction import behind_secret, remember

__all__ = ["check_options", "database_url", "remember_parts"]

# nothing of the URL is repeated: what cannot be read may hold a password anywhere
_UNREADABLE: Final = (
    "The database URL cannot be read{why}. It looks like postgresql+psycopg://user:password@host:5432/database. In a user, a"
    " password or a name write @ as %40, : as %3A, / as %2F, ? as %3F, # as %23, & as %26 and % as %25."
)


def database_url(url: str | URL) -> URL:
    """Return a URL taken apart.

    Args:
        url: As a person wrote it.

    Raises:
        ConfigurationError: It is none, or not the one that was meant; the text repeats nothing of it.

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
    except (ArgumentError, ValueError):  # a port that is no number: its text would repeat it
        raise ConfigurationError(_UNREADABLE.format(why="")) from None
    remember(url, read.password)
    if read.get_backend_name() != "sqlite":
        place = url.partition("?")[0]
        if place.count("@") > (read.username is not None or read.password is not None):
            raise ConfigurationError(_UNREADABLE.format(why=": it has an @ too many"))
        if any(pair and "=" not in pair for pair in url.partition("?")[2].split("&")):
            raise ConfigurationError(_UNREADABLE.format(why=": behind its ? stands something that is not NAME=VALUE"))
    if _lacks_value(url.partition("?")[2]):  # SQLAlchemy leaves such a name out, and the password would be short of it
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
        ConfigurationError: It has some. Those behind a secret may be the rest of it, and are not repeated.
    """
    refused = refused_options(url)
    if not refused:
        return
    if not set(refused).isdisjoint(behind_secret(url.query)):
        raise ConfigurationError(
            _UNREADABLE.format(why=": behind a password in it stands an option that its driver does not know")
        )
    if url.get_backend_name() != "sqlite":  # there SQLAlchemy leaves them out, with a warning
        raise ConfigurationError(advice_on(url, refused))


def remember_parts(url: URL) -> None:
    """Keep what of a URL that was read elsewhere may be the rest of a password, to be struck out of what its driver says."""
    refused, behind = refused_options(url), behind_secret(url.query)
    names = [name for name in behind if refused is None or name in refused]
    told = [url.query[name] for name in names]
    values = [each for value in told for each in ([value] if isinstance(value, str) else value)]
    remember(url, url.password, (*names, *values))
