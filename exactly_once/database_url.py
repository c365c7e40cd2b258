"""Reads a database's URL, and refuses one of which a password was cut in two: its rest would be taken for a host, and printed.

Opens nothing. Called by whatever takes a URL from a person: `store`, `alembic`, the command line.
"""

from typing import Final

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from exactly_once.errors import ConfigurationError
from exactly_once.redaction import remember

__all__ = ["database_url"]

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
        return url
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
    return read
