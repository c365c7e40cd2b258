"""Which driver the URL of a database asks for, and what to write if that driver is not installed.

Opens nothing. Called by `store`, `alembic` and the command line before they make an engine from a URL.
"""

from typing import Final

from sqlalchemy import URL
from sqlalchemy.exc import NoSuchModuleError

from exactly_once.errors import ConfigurationError, MissingExtra

__all__ = ["EXTRAS", "check_driver", "missing_driver", "with_driver"]

# The driver of a URL that names none. SQLAlchemy's own default for MySQL is a driver that cannot claim.
_BARE: Final = {"postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql", "mariadb": "mariadb+pymysql"}
_WRITE: Final = {
    "postgresql": "postgresql+psycopg://user:password@host/name, which serves sync and async handlers",
    "mysql": "mysql+pymysql://user:password@host/name, which serves sync and async handlers",
    "mariadb": "mariadb+pymysql://user:password@host/name, which serves sync and async handlers",
    "sqlite": "sqlite:///orders.db, which serves sync and async handlers",
}
EXTRAS: Final = {"pymysql": "mysql", "asyncmy": "mysql", "aiosqlite": "sqlite"}
"""The optional dependency that installs a driver."""


def with_driver(url: URL) -> URL:
    """Return the URL with our default driver if it names none."""
    return url.set(drivername=_BARE.get(url.drivername, url.drivername))


def check_driver(url: URL) -> None:
    """Import the driver of a URL.

    Raises:
        ConfigurationError: SQLAlchemy or exactly_once knows no such database, or its driver is not installed.
    """
    url = with_driver(url)
    try:
        dialect = url.get_dialect()
        if url.get_backend_name() not in _WRITE:
            raise missing_driver(url)
        dialect.import_dbapi()
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        raise missing_driver(url, error) from error


def missing_driver(url: URL, error: Exception | None = None) -> ConfigurationError:
    """Return the error for a URL whose database or driver is not available.

    Args:
        url: The URL. The text repeats its scheme alone.
        error: What SQLAlchemy raised, if it did.
    """
    backend, _, driver = url.drivername.partition("+")
    unknown = isinstance(error, NoSuchModuleError)
    if backend not in _WRITE:
        why = (
            f"SQLAlchemy knows no database {backend!r}"
            if unknown
            else f"exactly_once speaks postgresql, mysql, mariadb and sqlite, and not {backend}"
        )
        likely = ["postgresql"] if backend.startswith("postgres") else list(_WRITE)
        return ConfigurationError(f"{why}. Write {' or '.join(_WRITE[name].partition(',')[0] for name in likely)}")
    if unknown:
        return ConfigurationError(f"SQLAlchemy knows no driver {url.drivername!r}. Write {_WRITE[backend]}.")
    if (extra := EXTRAS.get(driver)) is not None:
        return MissingExtra(f"The database {url.drivername}", extra)
    return ConfigurationError(
        f"The URL asks for the driver {driver or getattr(error, 'name', None)}, which is not installed. Write {_WRITE[backend]}."
    )
