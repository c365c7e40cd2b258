"""A session whose transaction begins with its first statement: for handlers that may do their work without a database.

Before it no transaction is open, and no connection is in use. Then the transaction is begun by us, so that the driver says
from the first moment on whether it is still open. Made by the guards of leases and locks, and for the transaction of a step.
"""

from typing import Final

from sqlalchemy import Connection
from sqlalchemy.orm import Session

from exactly_once.database.connections import forked as forked_engines
from exactly_once.database.dialects.contract import WAIT_MS, Dialect, ErrorKind, State, Trace, raise_for_the_store
from exactly_once.database.dialects.firsthand import moment, ready, varies
from exactly_once.database.errors.interrupted import interrupted
from exactly_once.database.errors.unreached import unreached
from exactly_once.database.owner import new_owner
from exactly_once.database.watched.watch import WATCHED, Shut, UnderLease, Watch, begin, elsewhere, let_go, over
from exactly_once.errors import Misuse

__all__ = ["DeferredWatch"]


class DeferredWatch:
    """Waits for a session's first statement, and watches its transaction from there on."""

    __slots__ = ("_dialect", "_session", "_unwritten", "failed", "held", "shut", "watch")

    def __init__(self, session: Session, dialect: Dialect, held: UnderLease | None) -> None:
        self._dialect, self._session, self.held = dialect, session, held
        self.watch: Watch | None = None
        self.shut: Shut | None = None
        self.failed: BaseException | None = None
        """Why its transaction could not begin: what is written on it after that is never committed."""
        self._unwritten: set[int] = set()
        session.info[WATCHED] = self

    def begin(self) -> None:
        """Have the session say that a transaction is begun, as under a claim: code that asks nests by savepoints.

        SQLAlchemy takes the connection at the first statement. Hooks of the application's may raise here.
        """
        if not self._session.in_transaction():
            self._session.begin()

    def close_for(self, why: str) -> None:
        """Let the session not be used until `reopen`.

        Args:
            why: What whoever uses it is told.
        """
        self.shut = Shut(why)
        if self.watch is not None:
            self.watch.shut = self.shut
        self._unwritten = self._pending()

    def reopen(self) -> bool:
        """Let it be used again; say whether somebody tried meanwhile, also by objects added or changed and not written yet."""
        shut, self.shut = self.shut, None
        if self.watch is not None:
            self.watch.shut = None
        return shut is not None and (shut.tried or not self._pending() <= self._unwritten)

    def _pending(self) -> set[int]:
        session = self._session
        return {id(each) for some in (session.new, session.dirty, session.deleted) for each in some}

    def began(self, session: Session, connection: Connection) -> None:
        """Watch this connection's transaction from here on."""
        if self.shut is not None:
            raise self.shut.refusal()
        if self.held is not None:
            self.held.check()
        dialect, held, trace = self._dialect, self.held, None
        if held is not None:
            # of each transaction its own: a step's may be open beside the handler's
            trace = Trace(held.row, new_owner(), held.attempt, held.token)
        owner = (held.row.owner if held is not None else "") or new_owner()
        # where a hook may have set something on it, or the connection has an option of its own, it is the one there is
        idle = dialect.state(connection.connection.dbapi_connection) is State.IDLE
        hooked = len(session.dispatch.after_begin) > 1 or bool(connection.dispatch.begin)  # one of them is ours
        exchange = idle and not hooked and "isolation_level" not in connection.get_execution_options()
        since = moment()
        try:
            while not self._begun_on(connection, owner, trace, exchange=exchange, since=since):
                pass
        except Exception:
            # SQLAlchemy has the connection in the session's transaction by now, and asks nobody again: a handler that goes on
            # would send on it
            over(session, _NOT_BEGUN)
            raise
        dbapi = connection.connection.dbapi_connection
        self.watch = Watch(connection, dialect, dbapi, owner, held=held, trace=trace)
        begin(session, self.watch)

    def _begun_on(self, connection: Connection, owner: str, trace: Trace | None, *, exchange: bool, since: int) -> bool:
        """Begin the transaction; False: there is another connection now, for whoever had this one left it changed.

        A role, a time limit or AUTOCOMMIT that was left there is no fault of this message's. A connection that nobody used
        before is believed.
        """
        dialect, dbapi, info = self._dialect, connection.connection.dbapi_connection, connection.info
        try:
            if (wrong := elsewhere(self._session, connection)) is not None:
                raise Misuse(wrong)  # noqa: TRY301
            used = ready(dialect, connection, wait_ms=WAIT_MS, since=since)
            if used is None:
                if exchange:
                    _exchange(connection)
                    return False
                if dialect.kept_as not in info:
                    forked_engines.used(connection.engine, connection.connection)
                    dialect.prepare(dbapi, info, wait_ms=WAIT_MS, varies=varies(connection))
            try:
                dialect.begin(dbapi, info, owner, trace)
            except Exception as error:
                passes = dialect.error_kind(error) in (ErrorKind.UNAVAILABLE, ErrorKind.TRANSIENT)
                passes = passes or unreached(error, (connection.engine,)) or interrupted(error)
                if not used or not exchange or passes or dialect.unstorable(error):
                    raise
                _exchange(connection)
                return False
        except Exception as error:
            self.failed = error
            if dialect.error_kind(error) is ErrorKind.UNAVAILABLE:
                connection.invalidate(error)
            raise_for_the_store(dialect, error, connection.engine)
            raise
        except BaseException as error:  # a timeout of the handler's own, or the end of all
            self.failed = error
            # in the middle of a statement that SQLAlchemy knows nothing of: a rollback behind it may raise, and be cancelled too
            connection.invalidate(error)
            raise
        return True

    def check(self) -> None:
        """Raise what kept its transaction from beginning, also where the handler has swallowed it.

        Raises:
            Misuse: It was no error of the database's, and the handler went on; or we were not asked.
        """
        if self.failed is None:
            if self.watch is not None:
                return
            transaction = self._session.get_transaction()
            # private to SQLAlchemy, which tells nobody what a hook before ours has ended
            if transaction is not None and transaction._connections:  # noqa: SLF001
                raise Misuse(_KEPT_OUT)
            if not self._pending():
                self._session.close()  # nothing was done in it: its hooks are not told of a rollback
            return
        if isinstance(self.failed, Exception):
            raise self.failed
        raise Misuse(
            f"The session's first statement ended with {type(self.failed).__name__} before its transaction had begun, and the"
            " handler went on: nothing that it wrote is committed. Let that out of the handler."
        ) from self.failed

    def end(self, session: Session) -> None:
        """Give back what was begun, if anything was."""
        if self.watch is not None:
            self.watch.end(session)
        else:
            let_go(session)
            over(session)


_NOT_BEGUN: Final = (
    "The session's first statement failed before its transaction had begun, and the handler swallowed that error and went on:"
    " nothing is sent in it, and nothing committed. Let the error out of the handler, and the message runs again."
)
_KEPT_OUT: Final = (
    "A hook of the application's (after_begin) raised as the session's transaction began, before exactly_once had begun it, and"
    " the handler swallowed that error and went on: nothing of it is committed. Let the error out of the handler."
)


def _exchange(connection: Connection) -> None:
    """Put another of the pool's in the place of a connection on which nothing of this transaction was done.

    SQLAlchemy does so by itself for a lost connection, but not within a transaction, and the session has begun one by now.
    """
    connection.connection.invalidate()
    connection._dbapi_connection = connection.engine.raw_connection()  # noqa: SLF001
