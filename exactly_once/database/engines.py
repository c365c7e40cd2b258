"""Makes the engines of a database out of what an application gave, and refuses what cannot keep the promise.

Connects to nothing. Called by `store` alone, and by the start-up check for the options of a URL.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import URL, Connection, Engine, NullPool, create_engine
from sqlalchemy.exc import NoSuchModuleError
from sqlalchemy.orm import scoped_session, sessionmaker
from sqlalchemy.pool import reset_none

from exactly_once.database.characters import utf8_args
from exactly_once.database.connections.pooler import prepare_threshold
from exactly_once.database.driver_choice import missing_driver
from exactly_once.database.errors.not_made import of_the_settings
from exactly_once.database.url import check_options, database_url
from exactly_once.errors import ConfigurationError, MissingExtra

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = ["WHERE_GIVEN", "async_engine", "engine_of", "refuse_options", "sides", "sync_engine", "url_of"]

# Drivers that have a sync and an async side, so that one URL serves handlers of both kinds.
_ASYNC: Final = {
    "postgresql": "postgresql+psycopg",
    "postgresql+psycopg": "postgresql+psycopg",
    "mysql+pymysql": "mysql+asyncmy",
    "mysql+asyncmy": "mysql+asyncmy",
    "mariadb+pymysql": "mariadb+asyncmy",
    "mariadb+asyncmy": "mariadb+asyncmy",
    "sqlite": "sqlite+aiosqlite",
    "sqlite+pysqlite": "sqlite+aiosqlite",
    "sqlite+aiosqlite": "sqlite+aiosqlite",
}
_SYNC: Final = {
    "postgresql": "postgresql+psycopg",
    "mysql": "mysql+pymysql",
    "mariadb": "mariadb+pymysql",
    "mysql+asyncmy": "mysql+pymysql",
    "mariadb+asyncmy": "mariadb+pymysql",
    "sqlite+aiosqlite": "sqlite",
}

_FLASK: Final = "With Flask-SQLAlchemy: with app.app_context(): eo.bind(db.engine)"
_CONNECT_S: Final = 5  # seconds; a server that does not accept a connection within this time counts as unavailable
_SQLITE_BUSY_S: Final = 30  # handlers run one at a time there, and wait for their turn

WHERE_GIVEN: Final = (
    "where it was given: EXACTLY_ONCE_DATABASE (or ..._ASYNC_DATABASE, ..._FILE), the settings file, or the code."
)


def sides(database: Any, async_database: Any) -> tuple[Any, Any]:
    """Sort what was given into the sync and the async side. Refuses what cannot keep the promise."""
    database, async_database = _made_by(database), _made_by(async_database)
    if async_database is None and (
        hasattr(database, "sync_engine") or hasattr(getattr(database, "class_", None), "run_sync")
    ):
        database, async_database = None, database
    for given in (database, async_database):
        kw = getattr(given, "kw", {})
        if kw.get("twophase"):
            raise ConfigurationError(
                "A sessionmaker with twophase=True cannot be used: claims commit in one phase. Take it out."
            )
        if kw.get("autobegin") is False:
            raise ConfigurationError(
                "A sessionmaker with autobegin=False waits for a begin() that nobody calls here. Take autobegin out."
            )
        if kw.get("binds"):
            raise ConfigurationError(
                "A sessionmaker with binds= writes to several databases, which cannot be one commit. Give one engine;"
                " for several databases give exactly_once a dict of them and route=."
            )
        if _resets_nothing(kw.get("bind", given)):
            raise ConfigurationError(
                "An engine with pool_reset_on_return=None hands a transaction that other code left open to the next user: a"
                " message would commit a stranger's half. Take pool_reset_on_return out; a rollback where nothing is open costs"
                " psycopg and SQLite nothing. Where a listener of `reset` rolls back for you, make it before exactly_once"
                " gets the engine."
            )
        if given is not None and isinstance(given, sessionmaker) and kw.get("bind") is None:
            raise ConfigurationError(f"The sessionmaker has no bind=. Type: sessionmaker(engine). {_FLASK}")
    return database, async_database


def _made_by(given: Any) -> Any:
    """Return the sessionmaker of a scoped_session, sync or async; return anything else as it is."""
    scoped = isinstance(given, scoped_session) or type(given).__name__ == "async_scoped_session"
    return given.session_factory if scoped else given


def _resets_nothing(bind: Any) -> bool:
    """Say whether this is an engine whose pool neither rolls back nor closes a returned connection, nor asks a listener."""
    pool = getattr(getattr(bind, "sync_engine", bind), "pool", None)
    if pool is None or isinstance(pool, NullPool) or pool.dispatch.reset:
        return False
    return pool._reset_on_return is reset_none  # noqa: SLF001  (there is no public word for it)


def engine_of(given: Any) -> Engine | None:
    engine = getattr(given, "kw", {}).get("bind", given)
    return engine if isinstance(engine, Engine) else None


def url_of(given: Any) -> URL:
    """Return the URL of the database that an application gave.

    Raises:
        ConfigurationError: It names none, or a transaction that is its caller's.
    """
    if isinstance(given, (str, URL)):
        with _where_given():
            return database_url(given)
    bind = getattr(given, "kw", {}).get("bind", given)
    if isinstance(bind, Connection) or hasattr(bind, "sync_connection"):
        raise ConfigurationError(
            f"exactly_once was given a {type(bind).__name__}, whose transaction is its caller's: a message takes effect when"
            " its own is committed. Give it an engine, or a sessionmaker of one; in a transaction of your own use eo.claim."
        )
    url = getattr(getattr(bind, "sync_engine", bind), "url", None)
    if not isinstance(url, URL):
        raise ConfigurationError(
            f"exactly_once was given a {type(bind).__name__}, which names no database. Give it a URL, an engine, or a"
            f" sessionmaker of one. {_FLASK}"
        )
    return url


def sync_engine(url: URL, pool_size: int) -> Engine:
    """Make an engine for threads.

    Args:
        url: Of either driver, sync or async.
        pool_size: Its connections.
    """
    engine: Engine = _made(create_engine, url.set(drivername=_SYNC.get(url.drivername, url.drivername)), pool_size)
    of_the_settings(engine)
    return engine


def async_engine(url: URL, pool_size: int) -> "AsyncEngine":
    """Make an engine for asyncio.

    Args:
        url: Of either driver, sync or async.
        pool_size: Its connections.
    """
    from sqlalchemy.ext.asyncio import create_async_engine

    engine: AsyncEngine = _made(
        create_async_engine, url.set(drivername=_ASYNC.get(url.drivername, url.drivername)), pool_size
    )
    of_the_settings(engine.sync_engine)
    return engine


def refuse_options(url: URL) -> None:
    """Refuse options of a URL that would break the promise; the error says where the URL was given."""
    with _where_given():
        check_options(url)


def _made(make: Callable[..., Any], url: URL, pool_size: int) -> Any:
    refuse_options(url)  # of the other driver, too, sync or async
    try:
        return make(url, **_options(url, pool_size))
    except (ModuleNotFoundError, NoSuchModuleError) as error:
        missing = missing_driver(url, error)
        if isinstance(missing, MissingExtra):
            raise missing from error
        raise ConfigurationError(f"{str(missing).removesuffix('.')}. Mend it {WHERE_GIVEN}") from error


def _options(url: URL, pool_size: int) -> dict[str, Any]:
    backend = url.get_backend_name()
    if backend == "sqlite":
        if not url.database or url.database == ":memory:":
            raise ConfigurationError(
                "A SQLite database in memory is another one in each thread. Give it a file: sqlite:///orders.db"
            )
        # A handler that waits for its turn to write already holds its connection.
        return {"connect_args": {"timeout": _SQLITE_BUSY_S}, "pool_size": pool_size, "max_overflow": 4}
    options: dict[str, Any] = {"pool_size": pool_size, "max_overflow": 4, "pool_timeout": 30}
    if backend == "postgresql":
        # Notices a dead peer in about a minute, not after the kernel's two hours with the key still locked.
        options["connect_args"] = (
            utf8_args(url)
            | {
                "connect_timeout": _CONNECT_S,
                "keepalives_idle": 30,
                "keepalives_interval": 10,
                "keepalives_count": 3,
                "tcp_user_timeout": 60_000,
            }
            | {k: v for k, v in url.query.items() if k in ("connect_timeout", "keepalives_idle", "tcp_user_timeout")}
        )
        options["connect_args"] |= prepare_threshold(url)
    else:
        options["connect_args"] = {"connect_timeout": _CONNECT_S}
    return options


@contextmanager
def _where_given() -> Iterator[None]:
    try:
        yield
    except ConfigurationError as error:
        raise ConfigurationError(f"{error} Mend it {WHERE_GIVEN}") from None
