"""Finds out, once for each connection, whether there is a pooler before the server, and stops psycopg from preparing there.

A pooler answers the start of a connection with a process id of its own, so `pg_backend_pid()` returns another one:
PgBouncer does so in every mode. With other poolers equal ids prove nothing; for those there is the setting `pooler`. The
limit on transactions that a vanished program left open is a session setting on our direct connections. Behind a pooler it
goes with each BEGIN. It is never looser than the server's own. Called by the store for its engines, and by the dialect for a
connection that was made before we saw its engine.
"""

from collections.abc import MutableMapping
from typing import Any, Final
from weakref import WeakKeyDictionary

from psycopg import errors
from sqlalchemy import Engine

from exactly_once.database.connections.pooler import IDLE_MS, LINK, SAID, Link
from exactly_once.database.dialects.postgresql_settings import DURABLE, SessionSettings, text_of_our_begin
from exactly_once.database.dialects.postgresql_wire import driver_of, ignore_driver_begin, send
from exactly_once.database.errors.drivers_own import original
from exactly_once.database.listeners import listen

__all__ = ["look", "look_at_each", "may_be_left"]

# The value with which a session begins: behind a pooler strangers may have changed the present value.
_OWN: Final = b"SELECT reset_val FROM pg_settings WHERE name = 'idle_in_transaction_session_timeout'"
# Errors that a mode, a role or a time limit causes.
_BY_WHAT_WAS_LEFT: Final = (errors.ReadOnlySqlTransaction, errors.InsufficientPrivilege, errors.QueryCanceled)
# Another style may be set for the database, or left by a handler: psycopg reads times in this style alone.
_ISO: Final = b"SET LOCAL datestyle = ISO;"
_looked_at: "WeakKeyDictionary[Any, bool]" = WeakKeyDictionary()  # by dialect: `said` of `look_at_each`


def look_at_each(engine: Engine, *, ours: bool, said: bool) -> None:
    """Examine each connection of an engine when it is made. Existing connections are examined at their next use.

    Args:
        engine: An engine of psycopg; for asyncio the inner sync engine.
        ours: We made it, so its transactions are limited in time.
        said: The setting says that there is a pooler, even if we detect none.
    """
    known = _looked_at.get(engine.dialect)
    if known is not None and known >= said:
        return
    _looked_at[engine.dialect] = said

    def seen(dbapi: Any, record: Any, *_: Any) -> None:
        link: Link | None = record.info.get(LINK)
        if link is None or (said and not link.pooled):
            look(dbapi, record.info, ours=ours, said=said)

    # First: the queries that SQLAlchemy itself sends on a new connection must not be prepared either.
    listen(engine, "connect", seen, insert=True)
    pool: Any = engine.pool
    if not ours and hasattr(pool, "checkedin") and pool.checkedin() + pool.checkedout():
        listen(engine, "checkout", seen)


def look(dbapi: Any, info: MutableMapping[Any, Any], *, ours: bool = False, said: bool = False) -> Link:
    """Examine one connection, inside or outside a transaction, and keep the result in its `info`.

    Args:
        dbapi: SQLAlchemy's `dbapi_connection`.
        info: The connection's `info`.
        ours: As for `look_at_each`.
        said: As for `look_at_each`.
    """
    driver = driver_of(dbapi)
    (answer,) = send(driver, b"SELECT pg_backend_pid()")
    pooled = said or SAID in info or int(answer.get_value(0, 0)) != driver.pgconn.backend_pid
    settings = b""
    if pooled:
        driver.prepare_threshold = None
    if pooled or ours:
        (own,) = send(driver, _OWN)
        idle = b"idle_in_transaction_session_timeout = %d;" % _stricter(int(own.get_value(0, 0)))
        if pooled:
            # A stranger may have switched durable commits off on the server connection that our transaction gets.
            settings = DURABLE.encode() + (b"SET LOCAL " + idle if ours else b"")
        else:
            send(driver, b"SET " + idle)
    link = info[LINK] = Link(pooled, settings, _Begin(settings))
    return link


def may_be_left(error: BaseException) -> bool:
    """Say whether a server's refusal may be due to what a stranger left on the server connection that we got."""
    own = original(error)
    return isinstance(own, _BY_WHAT_WAS_LEFT)


def _stricter(own_ms: int) -> int:
    """The stricter of our limit and the server's; 0 means no limit."""
    return min(own_ms, IDLE_MS) if own_ms else IDLE_MS


class _Begin:
    """See `Link.begin`."""

    __slots__ = ("_settings",)

    def __init__(self, settings: bytes) -> None:
        self._settings = SessionSettings(
            b"DEFAULT", b"'none'", None, prepared=False, encoding=None, limit=None, settings=settings
        )

    def __call__(self, dbapi: Any) -> None:
        driver = driver_of(dbapi)
        text = text_of_our_begin(driver, self._settings) + DURABLE.encode()
        if not (driver.pgconn.parameter_status(b"DateStyle") or b"ISO").startswith(b"ISO"):
            text += _ISO
        ignore_driver_begin(driver)
        send(driver, text)
