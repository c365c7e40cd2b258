"""Listens to engines and sessions, so that a watched handler stays inside its transaction.

What ends a transaction is refused before it is sent: every way to call commit(), and statements, judged by their first words. A
rollback is only marked: a failed flush rolls back too, and an error raised there leaks the connection.

There is one set of listeners for each engine, installed once. For connections without a watch they return at the first line. They
are attached to the engine's dialect: one listener on the engine itself makes SQLAlchemy rebuild its dispatch for each connection
that is checked out, which cost more than all of the watching. Called by `store` and `guards.callers_commit`.
"""

import re
from collections.abc import Callable
from typing import Any, Final
from weakref import WeakSet

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import ExceptionContext, ExecutionContext
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.pool import PoolProxiedConnection

from exactly_once.database.dialects.contract import State
from exactly_once.database.dialects.keywords import LOCK
from exactly_once.database.errors.whose import mark_origin, watch_made
from exactly_once.database.listeners import listen
from exactly_once.database.watched.deferred_watch import DeferredWatch
from exactly_once.database.watched.misuse_texts import LEFT
from exactly_once.database.watched.session import WATCHED
from exactly_once.database.watched.transaction_end import TransactionEnd
from exactly_once.database.watched.watch import Watch, thrown_away
from exactly_once.exceptions.words import place_here

__all__ = ["install", "install_session", "seeing"]

_INSTALLED: "WeakSet[Any]" = WeakSet()
_CLOCK: Final = re.compile(r"(?:\bSET|,|\bSESSION|@@(?:session\.)?)\s*`?timestamp`?\s*:?=", re.IGNORECASE)
_Send = Callable[[PoolProxiedConnection], None]
_Execute = Callable[..., None]


def install(engine: Engine) -> None:
    """Listen to one engine, once. Engines that share its dialect (execution options, asyncio) are listened to with it."""
    dialect = engine.dialect
    if dialect in _INSTALLED:
        return
    _INSTALLED.add(dialect)
    # First: a listener of the application may say that it has run the statement, and then SQLAlchemy calls no other.
    for name in ("do_execute", "do_executemany"):
        listen(engine, name, _refusing(getattr(dialect, name)), insert=True)
    listen(engine, "do_execute_no_params", _refusing_bare(dialect.do_execute_no_params), insert=True)
    # First: SQLAlchemy calls no other listener after one that raises, as one that translates errors does. Listeners on the class
    # Engine come before ours in any case, so we also see the driver's errors where SQLAlchemy itself examines them
    # (`is_disconnect`).
    listen(engine, "handle_error", _failed, insert=True)
    watch_made(engine)
    dialect.is_disconnect = seeing(dialect.is_disconnect, _met)  # type: ignore[method-assign]
    # There is no event for COMMIT and ROLLBACK beside the engine's own, so we replace the dialect's two methods on this instance.
    dialect.do_commit = _refusing_commit(dialect.do_commit)  # type: ignore[method-assign, assignment]
    dialect.do_rollback = _marking_rollback(dialect.do_rollback)  # type: ignore[method-assign, assignment]
    if dialect.name != "postgresql":  # its driver itself reports a statement under way
        for name in ("do_execute", "do_executemany"):
            setattr(dialect, name, _counting(getattr(dialect, name)))


def _refusing(send: _Execute) -> Callable[..., bool | None]:
    return lambda cursor, text, values, context: _sending(
        text, values, context, lambda: send(cursor, text, values, context)
    )


def _refusing_bare(send: _Execute) -> Callable[..., bool | None]:
    return lambda cursor, text, context: _sending(text, None, context, lambda: send(cursor, text, context))


def _sending(statement: str, values: object, context: ExecutionContext, send: Callable[[], None]) -> bool | None:
    """Runs before a statement is sent. True says that it was sent here."""
    watch = _watch_of(context.root_connection.connection)
    if watch is None and statement[:3] in ("SET", "set") and _sets_the_clock(statement, context):
        # Other code sets the clock of a MySQL session: its next user gets another connection.
        context.root_connection.connection.invalidate(soft=True)
    if watch is None or watch.connection is not context.root_connection:
        return None
    watch.admit()
    dialect, dbapi = watch.dialect, watch.dbapi
    if (state := dialect.state(dbapi)) is State.IDLE:
        # The transaction ended since the last statement, or by it. This statement would begin another one, which
        # looks open at the end. After a rollback, that one's effects would be kept without the claim.
        raise watch.ended()
    if state is State.CLOSED:
        raise watch.closed()
    if watch.call is not None:
        watch.called(sends=True)
    watch.last = statement
    # of SQLite's own driver every one, for any may leave rows unread; aiosqlite reads them at once
    if context.execution_options.get("stream_results") or (dialect.embedded and not hasattr(context.cursor, "_cursor")):
        watch.reads(context)
    read = dialect.read(dbapi, watch.info, statement)
    if read.refused is not None:
        raise watch.record_leaving(
            TransactionEnd.REFUSED,
            f"The handler sent {read.refused}, which ends the transaction it was given; it was not sent. Delete that"
            " statement: the transaction is committed for you when the handler returns.",
        )
    if read.session == LOCK:
        watch.locked = True
    elif read.session is not None and (changed := read.changes(values)) is not None:
        watch.changed = changed
    if read.unseen is None or not dialect.asks_around_calls:
        return None
    watch.call = dialect.before_call(dbapi, watch.info, watch.owner)
    send()
    watch.called(sends=False)
    return True


def _sets_the_clock(statement: str, context: ExecutionContext) -> bool:
    return context.dialect.name in ("mysql", "mariadb") and _CLOCK.search(statement) is not None


def _counting(send: _Execute) -> _Execute:
    """Count the statements that are running, to see those that still run after the handler has returned."""

    def counted(cursor: Any, statement: str, values: Any, context: ExecutionContext | None = None) -> None:
        watch = None if context is None else _watch_of(context.root_connection.connection)
        if watch is None:
            send(cursor, statement, values, context)
            return
        watch.busy += 1
        try:
            send(cursor, statement, values, context)
        finally:
            watch.busy -= 1

    return counted


def _failed(context: ExceptionContext) -> None:
    if context.sqlalchemy_exception is not None:
        mark_origin(context.sqlalchemy_exception, context.dialect)
    connection = context.connection
    if connection is None or connection.invalidated:
        return  # it has no `info`, and asking for it raises in the middle of the user's own rollback
    _met(connection.connection, context.original_exception)


def seeing(
    is_disconnect: Callable[..., bool], met: Callable[[PoolProxiedConnection, BaseException], None]
) -> Callable[..., bool]:
    """Return a replacement for SQLAlchemy's check of each driver error.

    It first reports the error and its connection to `met`.
    """

    def seen(error: Any, connection: Any, cursor: Any) -> bool:
        if isinstance(connection, PoolProxiedConnection):  # a ping has the driver's own connection
            if connection in thrown_away:
                return False  # we throw it away, and nobody else
            met(connection, error)
        return is_disconnect(error, connection, cursor)

    return seen


def _met(pooled: PoolProxiedConnection, error: BaseException) -> None:
    """Record what the error of a statement did to the watched transaction."""
    watch = _watch_of(pooled)
    if watch is None or watch.lost is not None:
        return
    if watch.dialect.state(watch.dbapi) is State.CLOSED:
        watch.closed()  # now, because SQLAlchemy closes the connection next
        return
    if watch.dialect.lost(watch.dbapi, watch.info, error):
        watch.lose(error)
    if watch.dialect.name == "sqlite" and not isinstance(error, Exception):
        # Interrupted: the connection's thread would go on with the statement, and lock the whole file for all others.
        watch.dialect.cut(watch.dbapi)
    if watch.dialect.timed_out(error):
        # An earlier user of the connection may have left the limit: this message's next try must not meet it again.
        watch.changed = watch.changed or "a limit of time"


def _watch_of(pooled: PoolProxiedConnection) -> Watch | None:
    try:
        watch: Watch | None = pooled.info.get(WATCHED)
    except NotImplementedError:
        return None  # the engine's first query to its server, before the pool gives out any connection
    if watch is not None and watch.pooled is not pooled:
        return None  # of a user who returned this connection inside a transaction; its present user is another
    return watch


def _refusing_commit(send: _Send) -> _Send:
    def do_commit(dbapi_connection: PoolProxiedConnection) -> None:
        watch = _watch_of(dbapi_connection)
        if watch is None or watch.committed:  # the present user of the connection is not watched
            send(dbapi_connection)
            return
        if not watch.ours:
            raise watch.record_leaving(TransactionEnd.REFUSED, _COMMITTED)
        if watch.error is not None:
            raise watch.error  # the error of a hook that swallowed it
        # The last look, after every hook of the application: COMMIT of an aborted transaction succeeds, and keeps nothing.
        state = watch.dialect.state(watch.dbapi)
        if state is State.IDLE:
            raise watch.ended()
        if state is State.CLOSED:
            raise watch.closed()
        if state is not State.OPEN:
            raise watch.swallowed()
        watch.read_to_its_end()  # of a hook's statement
        watch.commit(lambda: send(dbapi_connection))

    return do_commit


def _marking_rollback(send: _Send) -> _Send:
    def do_rollback(dbapi_connection: PoolProxiedConnection) -> None:
        if dbapi_connection.dbapi_connection is None:
            return  # returned already; the pool has rolled it back
        watch = _watch_of(dbapi_connection)
        if watch is None or watch.committed:
            send(dbapi_connection)
            return
        if not watch.sent:
            watch.ask()  # after this, no witness shows what a procedure, or the driver itself, committed in place of ours
        watch.rolled_back = True
        if not watch.ours:
            first = watch.error is None
            misuse = watch.record_leaving(TransactionEnd.ROLLED_BACK, LEFT)
            if first:  # it may be raised on another line
                misuse.place = place_here()
        send(dbapi_connection)
        watch.mark_over()

    return do_rollback


def install_session(session_class: Any) -> None:
    """Listen to a sessionmaker (or Session class): a watched session may begin a transaction only on its claim's connection."""
    if session_class in _INSTALLED:
        return
    _INSTALLED.add(session_class)
    # First: SQLAlchemy calls no other hook after one that raises, and never again for this transaction.
    event.listen(session_class, "after_begin", _begun, insert=True)


def _begun(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    watch: Watch | DeferredWatch | None = session.info.get(WATCHED)
    if isinstance(watch, DeferredWatch):
        watch.began(session, connection)
    elif watch is not None and (connection is not watch.connection or watch.left is not TransactionEnd.NOT):
        raise watch.record_leaving(TransactionEnd.REFUSED, _SECOND)


_COMMITTED: Final = (
    "The handler called commit() on the session it was given; nothing was committed. Delete that line: the transaction is"
    " committed for you when the handler returns."
)
_SECOND: Final = (
    "The handler's session began on a second connection: two commits cannot be one. All tables of a handler must be in"
    " the database that holds the claims; leave its transaction open, and use no routing get_bind()."
)
