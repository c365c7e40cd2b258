"""Gives a forked process new, empty SQLAlchemy pools, for every engine, ours or not. Sends nothing.

The child never uses a connection that was open at the fork. Its socket is replaced in the child by one whose other end is
closed. So no driver, cursor or garbage collector can send anything to the parent's server. The object is never freed. Code that
still uses it, such as a session in a child that was forked inside a handler, gets an error that says so. A rollback or a close
of it does nothing.

SQLite differs: its locks belong to the process, and the library itself remembers them. Idle connections are
closed in the parent before the fork, and opened again when needed. If a transaction is open at the fork, the child would
believe that it holds that transaction's locks. So the child is refused the database.
"""

import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final
from weakref import WeakKeyDictionary, ref

from sqlalchemy import Engine
from sqlalchemy.engine.base import OptionEngine
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from exactly_once import fork
from exactly_once.database.in_memory import in_memory
from exactly_once.database.listeners import listen
from exactly_once.errors import ForkedProcess

__all__ = ["base_engine", "register", "register_connection", "register_named"]

_STOP_S: Final = 1.0  # seconds; an idle connection's thread only has to close it

_KNOWN: "WeakKeyDictionary[Engine, _KnownEngine]" = WeakKeyDictionary()
_HELD: Final[set[str]] = set()
"""SQLite files in which a transaction was open when this process was forked."""


def base_engine(engine: Engine) -> Engine:
    """Return the engine that create_engine made.

    An engine with execution options shares its pool, and may live for one request.
    """
    while isinstance(engine, OptionEngine):
        engine = engine._proxied  # noqa: SLF001
    return engine


def register(engine: Engine) -> None:
    """Give children a new pool of this engine. Does nothing the second time. `register_connection` adds the older ones."""
    engine = base_engine(engine)
    if engine not in _KNOWN and not in_memory(engine):
        _KNOWN[engine] = _KnownEngine(engine)


def register_named(database: Any) -> None:
    """Register the engines that an application names, before their first use: the program may fork before that.

    Args:
        database: A sync or async engine, a sessionmaker of one, a mapping of these, or anything else.
    """
    for each in database.values() if isinstance(database, Mapping) else (database,):
        bind = getattr(each, "kw", {}).get("bind", each)
        engine = getattr(bind, "sync_engine", bind)
        if isinstance(engine, Engine):
            register(engine)


def register_connection(engine: Engine, connection: PoolProxiedConnection) -> None:
    """Register a connection that may have been opened before its engine was registered."""
    engine = base_engine(engine)
    register(engine)
    record = getattr(connection, "_connection_record", None)
    known = _KNOWN.get(engine)
    if known is not None and record is not None:
        known.connected(None, record)


class _KnownEngine:
    """One engine, and the connections that it has opened."""

    def __init__(self, engine: Engine) -> None:
        self._engine = ref(engine)
        self._records: set[ref[ConnectionPoolEntry]] = set()
        self._file = os.path.realpath(engine.url.database or "") if engine.dialect.name == "sqlite" else None
        listen(engine, "connect", self.connected)
        if self._file is not None:
            listen(engine, "do_connect", _refusing(self._file))
        fork.tell(self)

    def connected(self, dbapi: Any, record: ConnectionPoolEntry) -> None:
        """Called by the pool for each connection it opens."""
        self._records.add(ref(record, self._records.discard))

    def forking(self) -> None:
        """Runs in the parent, before it forks."""
        engine = self._engine()
        if self._file is None or engine is None:
            return
        pool, is_async = engine.pool, engine.dialect.is_async
        engine.dispose(close=not is_async)  # closing needs a loop, which may not run
        # After an earlier fork the old pool holds connections that were in use then; the new pool, one that is
        # just being checked out.
        in_use = (engine.pool,) if is_async else (engine.pool, pool)
        for record in self._open():
            if record.fairy_ref is None and _pool_of(record) not in in_use:
                (_stop if is_async else type(record).close)(record)

    def forked(self) -> None:
        """Runs in the child."""
        engine = self._engine()
        for record in self._open():
            _part(record)
            if self._file is not None:
                _HELD.add(self._file)
        self._records.clear()
        if engine is not None:
            pool = engine.pool
            engine.dispose(close=False)
            # A connection that returns to the old pool object must meet no lock that a thread of the parent held.
            vars(pool).update(vars(pool.recreate()))

    def _open(self) -> list[Any]:
        records = [known() for known in tuple(self._records)]
        return [each for each in records if each is not None and each.dbapi_connection is not None]


class _Parents:
    """Replaces a connection of the parent: releasing it does nothing, and everything else is refused."""

    def rollback(self) -> None: ...

    def close(self) -> None: ...

    def terminate(self) -> None: ...

    def __getattr__(self, name: str) -> Any:
        raise fork.inside()


def _part(record: Any) -> None:
    driver = record.driver_connection
    fork.pin(record.dbapi_connection)
    with suppress(Exception):  # closed already
        _cut(_descriptor(driver))
    instead = _Parents()
    for kept in tuple(record.info.values()):
        told: Callable[[Any], None] | None = getattr(kept, "parted", None)
        if told is not None:
            told(instead)
    fairy = record.fairy_ref and record.fairy_ref()
    if fairy is not None:
        fairy.dbapi_connection = instead
    record.dbapi_connection = instead


def _descriptor(driver: Any) -> int:
    """Return the socket's number: of psycopg, PyMySQL, asyncmy; others raise."""
    if hasattr(driver, "fileno"):
        return int(driver.fileno())
    if hasattr(driver, "_sock"):
        return int(driver._sock.fileno())  # noqa: SLF001  (no other name for it)
    return int(driver._transport.get_extra_info("socket").fileno())  # noqa: SLF001


def _cut(descriptor: int) -> None:
    """Put a dead socket under this descriptor. The original socket stays open in the parent."""
    ours, other = socket.socketpair()
    other.close()
    os.dup2(ours.fileno(), descriptor, inheritable=False)
    ours.close()


def _pool_of(record: Any) -> Any:
    return getattr(record, "_ConnectionRecord__pool", None)  # no public name for it


def _stop(record: Any) -> None:
    """Close an idle connection of aiosqlite without its loop, which may not run."""
    idle, record.dbapi_connection = record.driver_connection, None
    with suppress(Exception):  # older versions have no stop(); then the child is refused the database
        idle.stop()
        idle._thread.join(_STOP_S)  # noqa: SLF001


def _refusing(file: str) -> Callable[..., None]:
    def connecting(dialect: Any, record: Any, arguments: Any, options: Any) -> None:
        if file in _HELD:
            raise ForkedProcess(
                f"This process was forked while a transaction was open in the SQLite file {file}, whose locks belong to"
                " processes: here it cannot be used. Fork while no handler runs, or start the process by subprocess or by"
                " multiprocessing's 'spawn'."
            )

    return connecting
