"""One database, as the application uses it: engines for threads and for asyncio, sessions, and whether it answers.

Made from a URL (then we make the engines and choose their size), an Engine, an AsyncEngine or a sessionmaker. Connects to
nothing until first used. The facade makes stores; attempts, the pump and the worker's outage probe use them.
"""

from collections.abc import Callable
from functools import cached_property
from time import time
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Engine, StaticPool
from sqlalchemy.orm import Session, sessionmaker

from exactly_once.claim import ClaimRow
from exactly_once.database.connections import forked_engines, loops
from exactly_once.database.connections.had_before import watch_pool
from exactly_once.database.connections.replaced_file import watch_file
from exactly_once.database.dialects.claim_refusal import tried
from exactly_once.database.dialects.contract import Dialect, ErrorKind
from exactly_once.database.dialects.registry import dialect_for
from exactly_once.database.dialects.schema_lookup import schema_in
from exactly_once.database.engines import async_engine, engine_of, sides, sync_engine, url_of
from exactly_once.database.errors.drivers_own import original
from exactly_once.database.errors.not_made import not_made
from exactly_once.database.errors.unreached import unreached
from exactly_once.database.errors.whose import came_through
from exactly_once.database.in_memory import in_memory
from exactly_once.database.probe import ROOM_ROWS, try_to_write
from exactly_once.database.schema import Tables, tables
from exactly_once.database.url import remember_parts
from exactly_once.database.watched.interception import install, install_session
from exactly_once.database.watched.session import HOME
from exactly_once.errors import ConfigurationError, SchemaError, StoreUnavailable
from exactly_once.exceptions.stops import asked_from_outside
from exactly_once.wording.redaction import redacted
from exactly_once.wording.steady_log import steady

if TYPE_CHECKING:
    import asyncio

    from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = ["Store"]

_log = steady("exactly_once.store")


class _Nothing(tuple[()]):
    """No listeners, for any event."""

    __slots__ = ()

    def __call__(self, *_: object, **__: object) -> None: ...


class _OneHook:
    """Replaces the events of a session.

    Args:
        after_begin: The application's listeners of that event. What they set (a role, a tenant) may give the right to
            write our rows. If they raise, we try without them.
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
    """A session for our own rows, in which no hook of the application runs except `after_begin`.

    A hook listens to sessionmakers, or to the class `Session` and so to every subclass. It is written for
    the sessions of handlers:
    one that refuses a commit without a user in `session.info` would keep each failure from being recorded.
    """

    dispatch = _OneHook()  # type: ignore[assignment]


class Store:
    """One database: its engines and sessions, sync and async.

    Args:
        name: Its name among several.
        database: URL, engine or sessionmaker for threads; or an async one, from which the sync engine is derived.
        async_database: The same for asyncio, if it is not to be derived.
        schema: The database schema of our tables.
        pool_size: Connections in each engine that we make.
        pooler: There is a pooler before PostgreSQL, even if we detect none.
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
        self._given, self._given_async = sides(database, async_database)
        self.made: list[Engine] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._told_of_loops = False
        self._wants_room = False
        self._refused: ClaimRow | None = None
        self.lacking: str | None = None
        """The database's own character set, if `alembic.ready` saw that it lacks characters."""

    # -- threads -----------------------------------------------------------------------------------------------------

    @cached_property
    def engine(self) -> Engine:
        """The engine for threads: the worker's own work, and sync handlers."""
        return self._watched(
            engine_of(self._given) or self._ours(sync_engine(url_of(self._given or self._given_async), self.pool_size))
        )

    @cached_property
    def engine_apart(self) -> Engine:
        """The same database with a separate pool: it goes on when handlers hold all connections of the other."""
        engine = self.engine
        apart = Engine(engine.pool.recreate(), engine.dialect, engine.url)
        forked_engines.register(apart)
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
        """The class of the sessions that handlers get."""
        from sqlalchemy.ext.asyncio import AsyncSession

        given = self._given_async if is_async else self._given
        made: type[Any] = getattr(given, "class_", AsyncSession if is_async else Session)
        return made

    def open(self) -> tuple[Session, Session]:
        """Make a session for a thread. Returns it twice: for us, and for the handler."""
        session = self._maker()
        session.info[HOME] = self.engine
        return session, session

    def open_ours(self) -> tuple[Session, Session]:
        """The same for our own rows."""
        session = _OurSession(self.engine)
        session.dispatch = _OneHook(self._maker().dispatch.after_begin)
        return session, session

    # -- asyncio -----------------------------------------------------------------------------------------------------

    @cached_property
    def async_engine(self) -> "AsyncEngine":
        """The engine for asyncio. It belongs to the loop that first uses it."""
        from sqlalchemy.ext.asyncio import AsyncEngine

        given = self._given_async
        engine = getattr(given, "kw", {}).get("bind", given)
        if not isinstance(engine, AsyncEngine):
            engine = async_engine(url_of(given or self._given), self.pool_size)
            self._ours(engine.sync_engine)
        self._watched(engine.sync_engine)
        loops.keep_apart(engine.sync_engine)
        found: AsyncEngine = engine
        return found

    @cached_property
    def _async_maker(self) -> Callable[[], Any]:
        from sqlalchemy.ext.asyncio import async_sessionmaker

        engine = self.async_engine
        given = self._given_async
        # A sessionmaker inside: listeners need sync classes. A subclass of our own keeps them off the user's class.
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
        """Make a session for asyncio. Returns the inner sync session, for us, and the AsyncSession, for the handler."""
        from asyncio import get_running_loop

        if self._loop is not (loop := get_running_loop()):
            self._moved(loop)
        session = self._async_maker()
        session.sync_session.info[HOME] = self.async_engine.sync_engine
        return session.sync_session, session

    def open_ours_async(self) -> tuple[Session, Session]:
        """The same for our own rows, in a greenlet of the loop."""
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
        if not before.is_running():  # closed or at rest: tasks that wait there for a connection cannot be woken
            loops.leave(self.async_engine.sync_engine)
        elif not self._told_of_loops:
            self._told_of_loops = True
            if why := loops.why_not_several(self.async_engine.sync_engine):
                _log.warning("%s", why)

    def remedy(self, error: BaseException | None) -> str:
        """Return what to do about an error of asyncio's pool whose text does not say it. Empty for all other errors."""
        if error is None or not loops.is_of_several(error):
            return ""
        return loops.why_not_several(self.async_engine.sync_engine) or ""

    # -- both --------------------------------------------------------------------------------------------------------

    @cached_property
    def dialect(self) -> Dialect:
        """The statements and error codes of this database's server."""
        kept_as = f"{self.schema} {self.pooler}"
        return dialect_for(
            self.engine,
            lambda: self.resolved_schema,
            looked_up=self.schema is None,
            durable=self._durable,
            kept_as=kept_as,
        )

    @cached_property
    def resolved_schema(self) -> str | None:
        """The database schema of our tables. Looked up at first use, which connects.

        Raises:
            SchemaError: There are no tables.
            ConfigurationError: There are several, and `schema=` does not say which.
        """
        return self.schema or schema_in(self.engine)

    @cached_property
    def tables(self) -> Tables:
        """Our tables in that schema. Looked up like `resolved_schema`."""
        return tables(self.resolved_schema)

    def seen(self, error: BaseException) -> None:
        """Remember what the next look must check after this error: for example, whether the disk has room again."""
        cause = error.__cause__ if isinstance(error, StoreUnavailable) else error
        if isinstance(error, StoreUnavailable) and error.claim is not None and error.store in (None, self.name):
            self._refused = error.claim
        if cause is not None and self.dialect.no_room(cause):
            self._wants_room = True

    def answers(self) -> bool:
        """Say whether the database can be reached and written to now. For threads."""
        return self.look(insists=True)

    def look(self, *, is_async: bool = False, insists: bool = False) -> bool:
        """Say whether a row can be written. Writes through a new connection, and rolls back.

        New, because a session keeps the server's defaults of the time when it began: a pool that was filled
        while the database was read-only would stay read-only. For the same reason older connections are not used again after a
        successful look. The exception is a database whose disk was full: its connections are still good.

        If the server gives no new connection, one of the pool must do: the pool may hold all connections that
        the server allows us.

        Args:
            is_async: Called in a greenlet of the loop; else in a thread.
            insists: Ask the pool after any failure of a new connection. If the server vanished, that waits as
                long as the connection's own limits say, so the look for a message does not insist.
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
        except Exception:  # any error: it does not answer
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
                try_to_write(connection, self.tables.idempotent, rows=ROOM_ROWS if wants_room else 1)
        except Exception as error:
            if not in_memory(connection.engine):
                connection.invalidate()  # before the rollback: else a pooler keeps the server's connection as a stranger left it
            # This row is not of the application's group, and a partitioned table may refuse this row alone. So
            # the next claim gets the error; only after a refused claim do we wait.
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
        """Let each connection that is older than now be closed at its next checkout, in the thread or loop it belongs to."""
        for engine in self._engines():
            if in_memory(engine):
                continue
            # What SQLAlchemy itself does after a lost connection; it has no public method for that.
            engine.pool._invalidate_time = time()  # noqa: SLF001

    def _engines(self) -> list[Engine]:
        """The engines that were used."""
        made = (self.__dict__.get(name) for name in ("engine", "engine_apart", "async_engine"))
        return [getattr(engine, "sync_engine", engine) for engine in made if engine is not None]

    def check_threads(self) -> None:
        """Refuse an engine that the threads of a worker cannot share.

        Raises:
            ConfigurationError: All threads would use one connection at once, which can crash the driver and the process.
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
        """Return the error to report if an error means that our tables were dropped; None for any other error."""
        if not self._lacks_table(error):
            return None
        missing = SchemaError(not_made(self.engine, schema=self.resolved_schema))
        missing.store = self.name
        return missing

    def unreached(self, error: BaseException) -> bool:
        """Say whether an error was raised while anybody was getting a connection to this database."""
        return unreached(error, self._engines())

    def of_another_database(self, error: BaseException) -> bool:
        """Say whether a database error came from another database, used by the handler. It says nothing about this database."""
        return not came_through(error, self._engines())

    def close(self) -> None:
        """Close the engines that we made. Engines that we were given belong to the application."""
        for engine in self.made:
            engine.dispose(close=engine.dialect.is_async is False)

    def _ours(self, engine: Engine) -> Engine:
        self.made.append(engine)
        return engine

    def _watched(self, engine: Engine) -> Engine:
        remember_parts(engine.url)
        install(engine)
        watch_pool(engine)
        watch_file(engine, ours=engine in self.made)
        if (engine.dialect.name, engine.dialect.driver.removesuffix("_async")) == ("postgresql", "psycopg"):
            from exactly_once.database.dialects.postgresql_pooler import look_at_each

            look_at_each(engine, ours=engine in self.made, said=self.pooler)
        forked_engines.register(engine)
        return engine
