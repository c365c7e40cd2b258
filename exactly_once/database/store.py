"""One database, as the application uses it: engines for threads and for asyncio, sessions, and whether it answers.

Made from a URL (then the engines are ours and sized for us), an Engine, an AsyncEngine or a sessionmaker. Connects to
nothing until first used. The facade makes stores; deliveries, the pump and the worker's outage probe use them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from os import urandom
from time import time
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from sqlalchemy import URL, Connection, Engine, NullPool, StaticPool, Table, create_engine, insert
from sqlalchemy.exc import NoSuchModuleError
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import reset_none

from exactly_once.claim import ClaimRow
from exactly_once.database.characters import utf8_args
from exactly_once.database.connections import forked as forked_engines
from exactly_once.database.connections import loops
from exactly_once.database.connections.pooler import prepare_threshold
from exactly_once.database.connections.replaced_file import watch_file
from exactly_once.database.dialects.contract import Dialect, ErrorKind
from exactly_once.database.dialects.firsthand import watch_pool
from exactly_once.database.dialects.place import schema_in
from exactly_once.database.dialects.refusing import tried
from exactly_once.database.dialects.registry import dialect_for
from exactly_once.database.driver_choice import missing_driver
from exactly_once.database.errors.drivers_own import original
from exactly_once.database.errors.not_made import not_made, of_the_settings
from exactly_once.database.errors.unreached import unreached
from exactly_once.database.errors.whose import came_through
from exactly_once.database.in_memory import in_memory
from exactly_once.database.owner import new_owner
from exactly_once.database.schema import CONSUMING, Tables, tables
from exactly_once.database.url import check_options, database_url, remember_parts
from exactly_once.database.watched.listening import install, install_session
from exactly_once.database.watched.watch import HOME, elsewhere
from exactly_once.errors import ConfigurationError, MissingExtra, SchemaError, StoreUnavailable
from exactly_once.exceptions.stops import asked_from_outside
from exactly_once.wording.redaction import redacted
from exactly_once.wording.steady_log import steady

if TYPE_CHECKING:
    import asyncio

    from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = ["WHERE_GIVEN", "Store", "claims_twice", "lacking_characters", "try_to_write"]

_log = steady("exactly_once.store")

# the drivers that exist for both worlds, so that one URL serves handlers of both kinds
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
_CONNECT_S: Final = 5  # a server that does not accept within this is away
# 6 MiB in InnoDB's pages: more than the 4 by which it lets a table grow, so that writing it takes room from the disk. In
# rows that fit into a page: it ends the server where a larger value found no room and is to be rolled back
_ROOM_ROWS: Final = 800
_ROOM_BYTES: Final = 7000
_SQLITE_BUSY_S: Final = 30  # handlers run one at a time there, and wait for their turn


class _Nothing(tuple[()]):
    """No listeners, whoever asks how."""

    __slots__ = ()

    def __call__(self, *_: object, **__: object) -> None: ...


class _OneHook:
    """In place of a session's events.

    Args:
        after_begin: The application's listeners of that event. What they set (a role, a tenant) may be what gives the right to
            write our rows; where they raise, it is tried without.
    """

    def __init__(self, after_begin: Callable[..., None] | None = None) -> None:
        self._after_begin = after_begin

    def after_begin(self, *given: object) -> None:
        if self._after_begin is not None:
            try:
                self._after_begin(*given)
            except BaseException as error:
                if asked_from_outside(error):
                    raise

    def __getattr__(self, name: str) -> _Nothing:
        return _Nothing()


class _OurSession(Session):
    """A session for rows of ours alone, in which no hook of the application's runs but `after_begin`.

    A hook listens to sessionmakers, or to the class `Session` and with it to every subclass. It is written for what handlers do:
    one that refuses a commit without a user in `session.info` would keep each failure from being recorded.
    """

    dispatch = _OneHook()  # type: ignore[assignment]


WHERE_GIVEN: Final = (
    "where it was given: EXACTLY_ONCE_DATABASE (or ..._ASYNC_DATABASE, ..._FILE), the settings file, or the code."
)


class Store:
    """One database and the ways into it.

    Args:
        name: Its name among several.
        database: URL, engine or sessionmaker for threads; or an async one, from which the other is derived.
        async_database: The same for asyncio, where it is not to be derived.
        schema: The database schema our tables live in.
        pool_size: Connections for each kind of engine that we make.
        pooler: A pooler stands before PostgreSQL, also where none is seen.
        durable: Commits of handlers wait for the disk, whatever the session says.
    """

    def __init__(
        self,
        name: str,
        database: Any,
        async_database: Any = None,
        *,
        schema: str | None = None,
        pool_size: int = 16,
        pooler: bool = False,
        durable: bool = True,
    ) -> None:
        self.name = name
        self.schema = schema
        self.pool_size = pool_size
        self.pooler, self._durable = pooler, durable
        self._given, self._given_async = _sides(database, async_database)
        self.made: list[Engine] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._told_of_loops = False
        self._wants_room = False
        self._refused: ClaimRow | None = None
        self.lacking: str | None = None
        """The database's own character set, where `problem` saw that it lacks characters."""

    # -- threads -----------------------------------------------------------------------------------------------------

    @cached_property
    def engine(self) -> Engine:
        """The engine for threads: the worker's own work, and sync handlers."""
        return self._watched(_engine_of(self._given) or self._make(self._url(self._given or self._given_async), _SYNC))

    @cached_property
    def engine_apart(self) -> Engine:
        """The same database through a pool of its own: handlers that hold all connections keep nothing of it from going on."""
        engine = self.engine
        apart = Engine(engine.pool.recreate(), engine.dialect, engine.url)
        forked_engines.seen(apart)
        self.made.append(apart)
        return apart

    @cached_property
    def _maker(self) -> Callable[[], Session]:
        engine = self.engine
        if isinstance(self._given, sessionmaker):
            install_session(self._given)
            return self._given
        made = sessionmaker(engine, expire_on_commit=False)
        install_session(made)
        return made

    def makes(self, is_async: bool) -> type[Any]:
        """The class of the sessions that handlers are handed."""
        from sqlalchemy.ext.asyncio import AsyncSession

        given = self._given_async if is_async else self._given
        made: type[Any] = getattr(given, "class_", AsyncSession if is_async else Session)
        return made

    def open(self) -> tuple[Session, Session]:
        """Make a session for a thread: for us, and for the handler."""
        session = self._maker()
        session.info[HOME] = self.engine
        return session, session

    def open_ours(self) -> tuple[Session, Session]:
        """The same for what is ours alone."""
        session = _OurSession(self.engine)
        session.dispatch = _OneHook(self._maker().dispatch.after_begin)
        return session, session

    # -- asyncio -----------------------------------------------------------------------------------------------------

    @cached_property
    def async_engine(self) -> "AsyncEngine":
        """The engine for asyncio; belongs to the loop that first uses it."""
        from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

        given = self._given_async
        engine = getattr(given, "kw", {}).get("bind", given)
        if not isinstance(engine, AsyncEngine):
            url = self._url(given or self._given)
            engine = self._import(
                create_async_engine, url.set(drivername=self._driver(url, _ASYNC)), self._options(url)
            )
            of_the_settings(engine.sync_engine)
            self.made.append(engine.sync_engine)
        self._watched(engine.sync_engine)
        loops.keep_apart(engine.sync_engine)
        found: AsyncEngine = engine
        return found

    @cached_property
    def _async_maker(self) -> Callable[[], Any]:
        from sqlalchemy.ext.asyncio import async_sessionmaker

        engine = self.async_engine
        given = self._given_async
        # a sessionmaker inside: listeners are for sync classes, and a subclass of our own keeps them off the user's
        base: type[Session] = Session
        if isinstance(given, async_sessionmaker):
            base = given.class_.sync_session_class
            kw = dict(given.kw)
            kw.setdefault("sync_session_class", base)
            watched = type("WatchedSession", (kw["sync_session_class"],), {})
            install_session(watched)
            kw["sync_session_class"] = watched
            return async_sessionmaker(class_=given.class_, **kw)
        watched = type("WatchedSession", (base,), {})
        install_session(watched)
        return async_sessionmaker(engine, expire_on_commit=False, sync_session_class=watched)

    def open_async(self) -> tuple[Session, Any]:
        """Make a session for asyncio: the sync one inside, for us, and the AsyncSession, for the handler."""
        from asyncio import get_running_loop

        if self._loop is not (loop := get_running_loop()):
            self._moved(loop)
        session = self._async_maker()
        session.sync_session.info[HOME] = self.async_engine.sync_engine
        return session.sync_session, session

    def open_ours_async(self) -> tuple[Session, Session]:
        """The same for what is ours alone, in a greenlet of the loop."""
        from asyncio import get_running_loop

        if self._loop is not (loop := get_running_loop()):
            self._moved(loop)
        session = _OurSession(self.async_engine.sync_engine)
        session.dispatch = _OneHook(self._async_maker().sync_session.dispatch.after_begin)
        return session, session

    def _moved(self, loop: "asyncio.AbstractEventLoop") -> None:
        before, self._loop = self._loop, loop
        if before is None:
            return
        if not before.is_running():  # closed, or at rest: whoever waits in it for a connection cannot be told of one
            loops.leave(self.async_engine.sync_engine)
        elif not self._told_of_loops:
            self._told_of_loops = True
            if why := loops.why_not_several(self.async_engine.sync_engine):
                _log.warning("%s", why)

    def remedy(self, error: BaseException | None) -> str:
        """What to do about an error of asyncio's pool, where that says so little; empty for all others."""
        if error is None or not loops.is_of_several(error):
            return ""
        return loops.why_not_several(self.async_engine.sync_engine) or ""

    # -- both --------------------------------------------------------------------------------------------------------

    @cached_property
    def dialect(self) -> Dialect:
        """How this database is spoken to."""
        kept_as = f"{self.schema} {self.pooler}"
        return dialect_for(self.engine, lambda: self.place, durable=self._durable, kept_as=kept_as)

    @cached_property
    def place(self) -> str | None:
        """The database schema that our tables are in; looked up at first use, which connects.

        Raises:
            SchemaError: There are no tables.
            ConfigurationError: There are several, and `schema=` does not say which.
        """
        return self.schema or schema_in(self.engine)

    @cached_property
    def tables(self) -> Tables:
        """Our tables there; looked up like `place`."""
        return tables(self.place)

    def seen(self, error: BaseException) -> None:
        """Remember of an error what the next look must find out: whether there is room again."""
        cause = error.__cause__ if isinstance(error, StoreUnavailable) else error
        if isinstance(error, StoreUnavailable) and error.claim is not None and error.store in (None, self.name):
            self._refused = error.claim
        if cause is not None and self.dialect.no_room(cause):
            self._wants_room = True

    def answers(self) -> bool:
        """Say whether the database can be reached and written to now; for threads."""
        return self.look(insists=True)

    def look(self, *, is_async: bool = False, insists: bool = False) -> bool:
        """Say whether a row can be written, which is rolled back: through a new connection.

        New, because a session keeps what the server's defaults were as it began: a pool filled while the database was
        read only would say so for ever. For the same reason, once it can, older connections are not used again; but those of a
        database that had no room are as good as new ones.

        Where the server gives no new one, one of the pool's has to do: it may hold the last that are given to us.

        Args:
            is_async: Called in a greenlet of the loop; else in a thread.
            insists: The pool is asked, whatever kept a new connection from being made. A server that vanished is waited for as
                long as the connection's own limits say, so messages do not ask so.
        """
        engine = self.async_engine.sync_engine if is_async else self.engine
        if in_memory(engine):
            return self._writes_through(engine)  # another connection is another database
        had_no_room = self._wants_room
        apart = Engine(engine.pool.recreate(), engine.dialect, engine.url)
        try:
            with apart.connect() as connection:
                well = self._writes(connection)
        except Exception as error:
            return (insists or self.dialect.gives_no_more(error)) and self._writes_through(engine)
        finally:
            apart.dispose()
        if well and not had_no_room:
            self._forget_connections()
        return well

    def _writes_through(self, engine: Engine) -> bool:
        try:
            with engine.connect() as connection:
                return self._writes(connection)
        except Exception:  # whatever it says: it does not answer
            return False

    def _writes(self, connection: Connection) -> bool:
        wants_room, refused = self._wants_room, self._refused
        try:
            if refused is not None:
                dbapi, info = connection.connection.dbapi_connection, dict[Any, Any]()
                self.dialect.prepare(dbapi, info, wait_ms=1000)
                tried(self.dialect, dbapi, info, refused, wait_ms=1000)
                self._refused = None
            else:
                try_to_write(connection, self.tables.idempotent, rows=_ROOM_ROWS if wants_room else 1)
        except Exception as error:
            if not in_memory(connection.engine):
                connection.invalidate()  # before it is rolled back: else a pooler keeps the server's as a stranger has left it
            # this row is not of the application's group, and a table that is partitioned may refuse it alone: whoever claims
            # next is told, and what a claim was refused is waited for
            if (
                refused is not None
                or self.dialect.error_kind(error) is not ErrorKind.REFUSED
                or self._lacks_table(error)
            ):
                return False
        if wants_room and refused is None:
            self._wants_room = False
        return True

    def _lacks_table(self, error: BaseException) -> bool:
        return self.dialect.no_table(original(error))

    def _forget_connections(self) -> None:
        """Have each connection that is older than now closed when it is next asked for, where it belongs: thread or loop."""
        for engine in self._engines():
            if in_memory(engine):
                continue
            # what SQLAlchemy itself does after a lost connection; it has no public verb for it
            engine.pool._invalidate_time = time()  # noqa: SLF001

    def _engines(self) -> list[Engine]:
        """Those that were used."""
        made = (self.__dict__.get(name) for name in ("engine", "engine_apart", "async_engine"))
        return [getattr(engine, "sync_engine", engine) for engine in made if engine is not None]

    def check_threads(self) -> None:
        """Refuse what the threads of a worker cannot share.

        Raises:
            ConfigurationError: All of them would use one connection at once; a driver ends the process for less.
        """
        for engine in (self.engine, *self._engines()):
            if in_memory(engine) or isinstance(engine.pool, StaticPool):
                raise ConfigurationError(
                    f"The engine of {redacted(engine.url)} has one connection (a database in memory, or StaticPool), and the"
                    " threads of a worker would use it at once. Give it a file: sqlite:///orders.db. For eo.process in one"
                    " thread it may stay."
                )

    def away(self, error: BaseException) -> bool:
        """Say whether an error means that the database does not answer."""
        return self.unreached(error) or self.dialect.error_kind(error) is ErrorKind.UNAVAILABLE

    def gone(self, error: BaseException) -> SchemaError | None:
        """Return what is told of an error that means that our tables were taken away; None of any other."""
        if not self._lacks_table(error):
            return None
        told = SchemaError(not_made(self.engine, schema=self.place))
        told.store = self.name
        return told

    def unreached(self, error: BaseException) -> bool:
        """Say whether an error was raised where a connection to this database was to be had, whoever wanted it."""
        return unreached(error, self._engines())

    def is_foreign(self, error: BaseException) -> bool:
        """Say whether an error of a database came from another one, of the handler's own; that says nothing of this one."""
        return not came_through(error, self._engines())

    def close(self) -> None:
        """Close the engines we made; those we were given are their owner's."""
        for engine in self.made:
            engine.dispose(close=engine.dialect.is_async is False)

    def _watched(self, engine: Engine) -> Engine:
        remember_parts(engine.url)
        install(engine)
        watch_pool(engine)
        watch_file(engine, ours=engine in self.made)
        if (engine.dialect.name, engine.dialect.driver.removesuffix("_async")) == ("postgresql", "psycopg"):
            from exactly_once.database.dialects.postgresql_pooler import look_at_each

            look_at_each(engine, ours=engine in self.made, said=self.pooler)
        forked_engines.seen(engine)
        return engine

    def _url(self, given: Any) -> URL:
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

    def check_options(self, url: URL) -> None:
        with _where_given():
            check_options(url)

    def _driver(self, url: URL, table: dict[str, str]) -> str:
        return table.get(url.drivername, url.drivername)

    def _make(self, url: URL, table: dict[str, str]) -> Engine:
        engine: Engine = self._import(create_engine, url.set(drivername=self._driver(url, table)), self._options(url))
        of_the_settings(engine)
        self.made.append(engine)
        return engine

    def _import(self, make: Callable[..., Any], url: URL, options: dict[str, Any]) -> Any:
        self.check_options(url)  # also of the driver for the other side, threads or asyncio
        try:
            return make(url, **options)
        except (ModuleNotFoundError, NoSuchModuleError) as error:
            told = missing_driver(url, error)
            if isinstance(told, MissingExtra):
                raise told from error
            raise ConfigurationError(f"{str(told).removesuffix('.')}. Mend it {WHERE_GIVEN}") from error

    def _options(self, url: URL) -> dict[str, Any]:
        backend = url.get_backend_name()
        if backend == "sqlite":
            if not url.database or url.database == ":memory:":
                raise ConfigurationError(
                    "A SQLite database in memory is another one in each thread. Give it a file: sqlite:///orders.db"
                )
            # a handler that waits for its turn to write has its connection already
            return {"connect_args": {"timeout": _SQLITE_BUSY_S}, "pool_size": self.pool_size, "max_overflow": 4}
        options: dict[str, Any] = {"pool_size": self.pool_size, "max_overflow": 4, "pool_timeout": 30}
        if backend == "postgresql":
            # a dead peer is noticed in about a minute, not after the kernel's two hours with the key still locked
            options["connect_args"] = (
                utf8_args(url)
                | {
                    "connect_timeout": _CONNECT_S,
                    "keepalives_idle": 30,
                    "keepalives_interval": 10,
                    "keepalives_count": 3,
                    "tcp_user_timeout": 60_000,
                }
                | {
                    k: v
                    for k, v in url.query.items()
                    if k in ("connect_timeout", "keepalives_idle", "tcp_user_timeout")
                }
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


def _sides(database: Any, async_database: Any) -> tuple[Any, Any]:
    """Sort what was given into the threads' side and asyncio's, refusing what cannot keep the promise."""
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
    """Return what makes the sessions of a scoped_session, async or not; anything else as it is."""
    scoped = isinstance(given, scoped_session) or type(given).__name__ == "async_scoped_session"
    return given.session_factory if scoped else given


def _resets_nothing(bind: Any) -> bool:
    """Say whether this is an engine whose pool neither rolls back what comes back to it, nor closes it, nor asks a listener."""
    pool = getattr(getattr(bind, "sync_engine", bind), "pool", None)
    if pool is None or isinstance(pool, NullPool) or pool.dispatch.reset:
        return False
    return pool._reset_on_return is reset_none  # noqa: SLF001  (there is no public word for it)


def try_to_write(connection: Connection, claims: Table, *, rows: int = 1) -> None:
    """Insert claims of nobody, and roll them back."""
    now = datetime.now(UTC)
    content = urandom(_ROOM_BYTES) if rows > 1 else None  # of no pattern: a server that compresses would write nothing
    values = [
        {
            "consumer_group": "exactly_once",
            "handler": "look",
            "business_key": uuid4().hex,
            "status": CONSUMING,
            "fingerprint": b"",
            "message_content": content,
            "created_at": now,
        }
        for _ in range(rows)
    ]
    connection.execute(insert(claims), values)
    connection.rollback()


def _engine_of(given: Any) -> Engine | None:
    engine = getattr(given, "kw", {}).get("bind", given)
    return engine if isinstance(engine, Engine) else None


def claims_twice(dialect: Dialect, open_session: Callable[[], tuple[Any, Any]], group: str) -> tuple[bool, bool]:
    """Claim one key twice in a transaction that is rolled back; (True, False) where the driver's answer is understood.

    A driver whose duplicate is not recognised would run every duplicate, and nobody would notice.
    """
    session, _ = open_session()
    row = ClaimRow(group, "exactly-once doctor", uuid4().hex, b"", owner=new_owner())
    try:
        connection = session.connection()
        if (wrong := elsewhere(session, connection)) is not None:
            raise ConfigurationError(wrong)
        dbapi, info = connection.connection.dbapi_connection, connection.info
        dialect.prepare(dbapi, info, wait_ms=1000)
        first = dialect.claim(dbapi, info, row, wait_ms=1000, savepoint=True)
        return first, dialect.claim(dbapi, info, row, wait_ms=1000, savepoint=True)
    finally:
        session.rollback()
        session.close()


def lacking_characters(name: str, characters: str) -> str:
    """Say what it means that a database's own character set is none that has every character."""
    if characters == "SQL_ASCII":
        return (
            f"The database {name!r} is in SQL_ASCII: it takes bytes for text and checks nothing. We write UTF-8; other programs"
            " may not. Better: a database in UTF8."
        )
    return (
        f"The database {name!r} is in {characters}, which lacks characters. A message whose key has one is kept as dead and"
        " never run; in other texts of ours it is escaped. Better: a database in UTF8."
    )
