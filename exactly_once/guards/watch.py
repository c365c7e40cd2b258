"""Sees that a handler stays inside the transaction it was given, from the claim to our own COMMIT.

A handler that ends the transaction would keep effects without their claim, or the claim without its effects. What can
be refused is refused before it is sent: commit() in any spelling, and statements that end a transaction, by their first
words. What can only be noticed afterwards (a driver's own call, a procedure, an implicit commit) is noticed by the
driver's transaction state before the next statement and at the end: then something is committed already, and the message
is for a person. A rollback is only marked, for a failed flush rolls back too, and raising there leaks the connection.

One set of listeners an engine, installed once; for connections nobody watches they return at the first line. They hang on
the engine's dialect: a single listener on the engine itself makes SQLAlchemy build its dispatch anew for each
connection that is checked out, which cost more than all of the watching. Limit: a handler that calls the raw driver
object (its commit, its cursor) is seen only by the state it leaves behind.
"""

from collections.abc import Callable, MutableMapping
from enum import Enum
from typing import Any, Final
from weakref import WeakSet

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import ExceptionContext, ExecutionContext
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.pool import PoolProxiedConnection

from exactly_once.dialects import Dialect, State, Trouble, raise_for_the_store
from exactly_once.errors import Misuse
from exactly_once.fork import engines as forked_engines
from exactly_once.leases import WAIT_MS, Held
from exactly_once.wording import escaped

__all__ = ["Left", "Watch", "begin", "install", "install_session", "let_go"]

_KEY: Final = "exactly_once.watch"
_INSTALLED: "WeakSet[Any]" = WeakSet()
_Send = Callable[[PoolProxiedConnection], None]


class Left(Enum):
    """How the transaction was left, if it was."""

    NOT = "still in it"
    REFUSED = "tried to, and was stopped: nothing was committed"
    ROLLED_BACK = "rolled back: nothing was committed"
    BROKEN = "ended by something only noticed afterwards: it may have been committed"


class Watch:
    """One attempt's transaction: which connection, which root transaction, and what the handler did to it."""

    __slots__ = (
        "begun", "connection", "dbapi", "dialect", "error", "held", "info", "last", "left", "lost", "ours", "root"
    )  # fmt: skip

    def __init__(self, connection: Connection, dialect: Dialect, dbapi: Any, held: Held | None = None) -> None:
        self.connection = connection
        self.dialect = dialect
        self.dbapi = dbapi
        self.held = held
        self.root = connection.get_transaction()
        self.begun: SessionTransaction | None = None
        self.left = Left.NOT
        self.error: Misuse | None = None
        self.lost: BaseException | None = None
        self.ours = False
        self.last = ""
        self.info: MutableMapping[Any, Any] = connection.info
        self.info[_KEY] = self

    def leave(self, how: Left, text: str) -> Misuse:
        """Remember the worst that happened; the first error is the one that names the line."""
        if self.error is None:
            self.error = Misuse(text)
        if self.left is not Left.BROKEN:
            self.left = how
        return self.error

    def ended(self) -> Misuse:
        """The driver says that no transaction is open: something committed or rolled back where nobody could refuse it."""
        last = f" The last statement through SQLAlchemy: {escaped(self.last, 120)}" if self.last else ""
        return self.leave(Left.BROKEN, _ENDED + last)

    def verify(self, session: Session) -> Misuse | None:
        """After the handler and the flush, before COMMIT: same connection, same root transaction, and the driver says open."""
        if self.error is not None:
            return self.error
        if self.lost is not None:  # before the look at the driver, which would take it for a commit behind our back
            return self.leave(Left.ROLLED_BACK, _SWALLOWED)
        root = self.connection.get_transaction() if not self.connection.closed else None
        if root is None or root is not self.root or not root.is_active:
            return self.leave(Left.ROLLED_BACK, _LEFT)
        state = self.dialect.state(self.dbapi)
        if state is State.ABORTED:
            return self.leave(Left.ROLLED_BACK, _SWALLOWED)
        if state is State.IDLE:
            return self.ended()
        if session.get_transaction() is not self.begun:  # another one, on whatever connection; or none at all
            return self.leave(Left.ROLLED_BACK, _LEFT)
        return None

    def check(self, session: Session) -> None:
        """Raise what `verify` finds, before more is done in this transaction: that would be taken for what did it.

        Raises:
            Misuse: The handler has left its transaction, or it is lost.
        """
        misuse = self.verify(session)
        if misuse is not None:
            raise misuse

    def parted(self, instead: Any) -> None:
        """In a process just forked: the connection is the parent's, and what stands in its place refuses all use of it."""
        self.dbapi = instead

    def committing(self) -> None:
        """From here on COMMIT is ours."""
        self.ours = True

    def end(self, session: Session) -> None:
        """Give the connection back clean, whatever happened on it; never raises for what is already over.

        The driver's own rollback, not only the Session's: after a refused commit SQLAlchemy believes the transaction is
        over and sends nothing, the connection goes back to the pool with it open, and a stranger commits it.
        """
        if self.info.get(_KEY) is self:
            del self.info[_KEY]
        connection = self.connection
        if not connection.closed and not connection.invalidated:
            if self.left is Left.BROKEN:
                # whatever ended the transaction may have left its mark: autocommit, a procedure's locks, temporary tables
                connection.invalidate()
                session.close()
                return
            try:
                if self.dialect.state(self.dbapi) is not State.IDLE:
                    self.dbapi.rollback()
                if self.dialect.state(self.dbapi) is not State.IDLE:
                    connection.invalidate()
            except Exception as error:  # a dead connection: whatever it says, it must not be used again
                connection.invalidate(error)
            except BaseException:  # cancelled in the rollback: nobody knows what the connection is in
                connection.invalidate()
                session.invalidate()
                raise
        let_go(session)


def let_go(session: Session) -> None:
    """Close a session, also one whose connection is dead: closing rolls back, and a dead connection cannot."""
    try:
        session.close()
    except Exception:  # the connection is lost: what matters is that nobody gets it from the pool again
        session.invalidate()
    except BaseException:  # cancelled while it rolled back
        session.invalidate()
        raise


_LEFT: Final = (
    "The handler left the transaction it was given: session.rollback(), session.close() or `with session:` ends it, and"
    " the claim with it. Delete that line; raise an exception to roll back, use session.begin_nested() for a part."
)
_SWALLOWED: Final = (
    "The handler swallowed a database error that aborted the transaction: COMMIT would keep nothing. Let the error out,"
    " or put the statement that may fail into `with session.begin_nested():`."
)
_ENDED: Final = (
    "A statement of the handler ended the transaction behind SQLAlchemy's back (a COMMIT inside a procedure or a"
    " multi-statement text, a call on the driver, or DDL that commits by itself). What came before it may be committed."
    " Take it out of the handler."
)
_COMMITTED: Final = (
    "The handler called commit() on the session it was given; nothing was committed. Delete that line: the transaction is"
    " committed for you when the handler returns."
)
_SECOND: Final = (
    "The handler's session began on a second connection: two commits cannot be one. All tables of a handler must be in"
    " the database that holds the claims; leave its transaction open, and use no routing get_bind()."
)


def install(engine: Engine) -> None:
    """Listen to one engine, once; what shares its dialect (execution options, asyncio) is listened to with it."""
    dialect = engine.dialect
    if dialect in _INSTALLED:
        return
    _INSTALLED.add(dialect)
    # first, for a listener of the user's may say that it has run the statement, and then no other is asked
    event.listen(engine, "do_execute", lambda cursor, text, values, context: _sending(text, context), insert=True)
    event.listen(engine, "do_executemany", lambda cursor, text, values, context: _sending(text, context), insert=True)
    event.listen(engine, "do_execute_no_params", lambda cursor, text, context: _sending(text, context), insert=True)
    event.listen(engine, "handle_error", _failed)
    # no event tells of COMMIT and ROLLBACK but the engine's own, so the dialect's two methods are replaced on this instance
    dialect.do_commit = _refusing_commit(dialect.do_commit)  # type: ignore[method-assign, assignment]
    dialect.do_rollback = _marking_rollback(dialect.do_rollback)  # type: ignore[method-assign, assignment]


def _sending(statement: str, context: ExecutionContext) -> None:
    watch = _watch_of(context.root_connection.connection)
    if watch is None or watch.connection is not context.root_connection:
        return
    if watch.error is not None:
        raise watch.error  # it has left already: what it sends now would be outside, or undone
    if watch.held is not None:
        watch.held.check()
    if watch.lost is not None:
        # the server threw the transaction away, and this statement would begin another, without the claim
        raise watch.leave(Left.ROLLED_BACK, _SWALLOWED)
    if watch.dialect.state(watch.dbapi) is State.IDLE:
        # ended since the last statement, or by it; this one would begin another transaction, which looks open at the
        # end: after a rollback its effects would be kept without the claim
        raise watch.ended()
    watch.last = statement
    keyword = watch.dialect.refuses(statement)
    if keyword is not None:
        raise watch.leave(
            Left.REFUSED,
            f"The handler sent {keyword}, which ends the transaction it was given; it was not sent. Delete that"
            " statement: the transaction is committed for you when the handler returns.",
        )


def _failed(context: ExceptionContext) -> None:
    connection = context.connection
    if connection is None or connection.invalidated:
        return  # it has no `info` to ask, and asking raises, in the middle of the user's own rollback
    watch = _watch_of(connection.connection)
    if watch is not None and watch.connection is connection and watch.lost is None:
        error = context.original_exception
        if watch.dialect.lost(watch.dbapi, watch.info, error):
            watch.lost = error


def _watch_of(pooled: PoolProxiedConnection) -> Watch | None:
    try:
        watch: Watch | None = pooled.info.get(_KEY)
    except NotImplementedError:
        return None  # the engine's first look at its server, before the pool gives anything out
    return watch


def _refusing_commit(send: _Send) -> _Send:
    def do_commit(dbapi_connection: PoolProxiedConnection) -> None:
        watch = _watch_of(dbapi_connection)
        if watch is not None:
            if not watch.ours:
                raise watch.leave(Left.REFUSED, _COMMITTED)
            # the last look, after every hook of the user's has run: COMMIT of an aborted transaction succeeds and keeps nothing
            state = watch.dialect.state(watch.dbapi)
            if state is not State.OPEN:
                raise watch.leave(Left.ROLLED_BACK if state is State.ABORTED else Left.BROKEN, _SWALLOWED)
        send(dbapi_connection)

    return do_commit


def _marking_rollback(send: _Send) -> _Send:
    def do_rollback(dbapi_connection: PoolProxiedConnection) -> None:
        watch = _watch_of(dbapi_connection)
        if watch is not None and not watch.ours:
            watch.leave(Left.ROLLED_BACK, _LEFT)
        send(dbapi_connection)

    return do_rollback


def install_session(session_class: Any) -> None:
    """Listen to a sessionmaker (or Session class): a watched session may begin on its claim's connection only."""
    if session_class in _INSTALLED:
        return
    _INSTALLED.add(session_class)

    @event.listens_for(session_class, "after_begin")
    def begun(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
        watch: Watch | Late | None = session.info.get(_KEY)
        if isinstance(watch, Late):
            watch.began(session, connection)
        elif watch is not None and (connection is not watch.connection or watch.left is not Left.NOT):
            raise watch.leave(Left.REFUSED, _SECOND)


class Late:
    """Waits for a session's first statement: before it no transaction is open, and no connection is in use.

    Then the transaction is begun by us, so that the driver says from the first moment on whether it is still open; where
    the driver would have begun it itself this costs no round trip.
    """

    __slots__ = ("_dialect", "held", "watch")

    def __init__(self, session: Session, dialect: Dialect, held: Held | None) -> None:
        self._dialect, self.held = dialect, held
        self.watch: Watch | None = None
        session.info[_KEY] = self

    def began(self, session: Session, connection: Connection) -> None:
        """Watch this connection's transaction from here on."""
        if self.held is not None:
            self.held.check()
        dialect, dbapi, info = self._dialect, connection.connection.dbapi_connection, connection.info
        try:
            if dialect not in info:
                forked_engines.used(connection.engine, connection.connection)
                dialect.prepare(dbapi, info, wait_ms=WAIT_MS)
            dialect.begin(dbapi, info)
        except Exception as error:
            if dialect.trouble(error) is Trouble.UNAVAILABLE:
                connection.invalidate(error)
            raise_for_the_store(dialect, error)
            raise
        self.watch = Watch(connection, dialect, dbapi, self.held)
        begin(session, self.watch)

    def end(self, session: Session) -> None:
        """Give back what was begun, if anything was."""
        if self.watch is not None:
            self.watch.end(session)
        else:
            let_go(session)


def begin(session: Session, watch: Watch) -> None:
    """Tie a session to its watch; the claim has begun its transaction."""
    watch.begun = session.get_transaction()
    session.info[_KEY] = watch
