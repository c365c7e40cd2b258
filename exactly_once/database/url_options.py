"""Which options in the URL of a database its driver refuses. Opens nothing. Imports the driver to ask it.

A driver raises for such an option when it connects, each driver with its own text: PyMySQL as a call with a wrong argument. An
option that follows a password may be the rest of that password. Called by `database.url`.
"""

from importlib import import_module
from inspect import signature
from typing import Any, Final

from sqlalchemy import URL

__all__ = ["advice_on", "refused_options"]

_TLS: Final = (
    "For TLS write ssl_ca=/etc/ssl/certs/ca-certificates.crt: a file with whoever signed the server's certificate."
)
_OF_SQLITE: Final = frozenset(
    (
        "timeout",
        "isolation_level",
        "detect_types",
        "check_same_thread",
        "cached_statements",
        "nolock",
        "immutable",
        "mode",
        "vfs",
    )
)


def refused_options(url: URL) -> tuple[str, ...] | None:
    """Return the names in a URL's query that its driver does not take. None where the driver cannot be asked.

    Example:
        >>> from sqlalchemy import make_url
        >>> refused_options(make_url("mysql+pymysql://me@db/shop?charset=utf8mb4&sslmode=require"))
        ('sslmode',)
    """
    if not url.query:
        return ()
    backend = url.get_backend_name()
    if backend == "sqlite":
        return None if "uri" in url.query else tuple(name for name in url.query if name not in _OF_SQLITE)
    if "plugin" in url.query:  # a plugin takes options of its own
        return None
    try:
        dialect = url.get_dialect()
        known = _known_to(dialect.driver.removesuffix("_async"))
        # The arguments that SQLAlchemy makes of the URL: some names, such as ssl_ca, are SQLAlchemy's own.
        _, given = dialect().create_connect_args(url)
    except Exception:  # no such driver, or an invalid value: connecting reports that
        return None
    return None if known is None else tuple(name for name in url.query if name in given and name not in known)


def advice_on(url: URL, refused: tuple[str, ...]) -> str:
    """Say which options are refused, and what to write instead. The text repeats their names."""
    named = ", ".join(repr(name) for name in refused)
    tls = f" {_TLS}" if any("ssl" in name or "tls" in name for name in refused) and _is_mysql(url) else ""
    several = "options" if len(refused) > 1 else "option"
    return f"The database URL cannot be used: its driver {url.drivername} does not know the {several} {named}.{tls}"


def _is_mysql(url: URL) -> bool:
    return url.get_backend_name() in ("mysql", "mariadb")


def _known_to(driver: str) -> frozenset[str] | None:
    match driver:
        case "psycopg":
            psycopg: Any = import_module("psycopg")
            libpq = (option.keyword.decode() for option in psycopg.pq.Conninfo.get_defaults())
            return frozenset(libpq) | frozenset(signature(psycopg.Connection.connect).parameters)
        case "pymysql" | "asyncmy":
            return frozenset(signature(import_module(driver).connect).parameters)
        case _:
            return None
