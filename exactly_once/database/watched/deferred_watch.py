"""A session whose transaction begins with its first statement: for handlers that may do their work without a database.

Before that no transaction is open, and no connection is in use. Then we begin the transaction, so that from the start the driver
reports whether it is still open. Made by the guards of leases and locks, and for the transaction of a step.
"""

from typing import Final

from sqlalchemy import Connection
from sqlalchemy.orm import Session

from exactly_once.database.connections import forked_engines
from exactly_once.database.connections.had_before import moment
from exactly_once.database.dialects.claim_refusal import raise_for_the_store
from exactly_once.database.dialects.contract import WAIT_MS, Dialect, ErrorKind, State, Trace
from exactly_once.database.dialects.firsthand import ready, varies
from exactly_once.database.errors.interrupted import interrupted
from exactly_once.database.errors.unreached import unreached
from exactly_once.database.owner import new_owner
from exactly_once.database.watched.session import WATCHED, elsewhere, let_go, over
from exactly_once.database.watched.transaction_end import Shut, UnderLease
from exactly_once.database.watched.watch import Watch, attach
from exactly_once.errors import ConfigurationError, Misuse

__all__ = ["DeferredWatch"]


class DeferredWatch:
    """Waits for a session's first statement, and watches its transaction from there on."""

    __slots__ = ("_dialect", "_session", "_unwritten", "failed", "lease", "shut", "watch")

    def __init__(self, session: Session, dialect: Dialect, lease: UnderLease | None) -> None:
        self._dialect, self._session, self.lease = dialect, session, lease
        self.watch: Watch | None = None
        self.shut: Shut | None = None
        self.failed: BaseException | None = None
        """Why its transaction could not begin. Anything written on it after that is never committed."""
        self._unwritten: set[int] = set()
        session.info[WATCHED] = self

    def begin(self) -> None:
        """Make the session report an open transaction, as under a claim: code that asks then nests by savepoints.

        SQLAlchemy takes the connection at the first statement. Hooks of the application may raise here.
        """
        if not self._session.in_transaction():
            self._session.begin()

    def close_for(self, why: str) -> None:
        """Refuse every use of the session until `reopen`.

        Args:
            why: The text of the refusal.
        """
        self.shut = Shut(why)
        if self.watch is not None:
            self.watch.shut = self.shut
        self._unwritten = self._pending()

    def reopen(self) -> bool:
        """Allow use of the session again.

        Say whether anybody tried meanwhile, also by adding or changing objects without a flush.
        """
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
        if self.lease is not None:
            self.lease.check()
        dialect, lease, trace = self._dialect, self.lease, None
        if lease is not None:
            # One trace for each transaction: a step's transaction may be open beside the handler's.
            trace = Trace(lease.row, new_owner(), lease.attempt, lease.token)
        owner = (lease.row.owner if lease is not None else "") or new_owner()
        # If a hook may have set something on the connection, or it has an option of its own, it is not exchanged for another.
        idle = dialect.state(connection.connection.dbapi_connection) is State.IDLE
        hooked = len(session.dispatch.after_begin) > 1 or bool(connection.dispatch.begin)  # one of them is ours
        exchange = idle and not hooked and "isolation_level" not in connection.get_execution_options()
        since = moment()
        try:
            while not self._begun_on(connection, owner, trace, exchange=exchange, since=since):
                pass
        except Exception as error:
            # also where our tables are missing; not where the handler has asked for AUTOCOMMIT
            if isinstance(error, ConfigurationError) and "isolation_level" not in connection.get_execution_options():
                error.of_the_server, self.failed = True, error
            # SQLAlchemy already has the connection in the session's transaction, and calls no hook again: a handler that goes on
            # would use it.
            over(session, _NOT_BEGUN)
            raise
        dbapi = connection.connection.dbapi_connection
        self.watch = Watch(connection, dialect, dbapi, owner, lease=lease, trace=trace)
        attach(session, self.watch)

    def _begun_on(self, connection: Connection, owner: str, trace: Trace | None, *, exchange: bool, since: int) -> bool:
        """Begin the transaction. False: an earlier user had changed the connection, and it was exchanged for another.

        A role, a time limit or AUTOCOMMIT that was left there is not this message's fault. An error on a
        connection that nobody used before counts.
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
                    forked_engines.register_connection(connection.engine, connection.connection)
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
        except BaseException as error:  # a timeout of the handler's own, or the end of the process
            self.failed = error
            # It interrupted a statement that SQLAlchemy does not know of: a rollback after it may raise, and be cancelled too.
            connection.invalidate(error)
            raise
        return True

    def check(self) -> None:
        """Raise the error that kept the transaction from beginning, even if the handler swallowed it.

        Raises:
            Misuse: It was not a database error, and the handler went on; or our hook was not called.
        """
        if self.failed is None:
            if self.watch is not None:
                return
            transaction = self._session.get_transaction()
            # A private attribute: SQLAlchemy does not report that a hook before ours has ended the transaction.
            if transaction is not None and transaction._connections:  # noqa: SLF001
                raise Misuse(_KEPT_OUT)
            if not self._pending():
                self._session.close()  # nothing was done in it: its hooks hear of no rollback
            return
        if isinstance(self.failed, Exception):
            raise self.failed
        raise Misuse(
            f"The session's first statement ended with {type(self.failed).__name__} before its transaction had begun, and the"
            " handler went on: nothing that it wrote is committed. Let that out of the handler."
        ) from self.failed

    def end(self, session: Session) -> None:
        """End the transaction and release its connection, if it has begun."""
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
    """Replace a connection on which nothing of this transaction was done by another one of the pool.

    SQLAlchemy does that by itself for a lost connection, but not within a transaction, and the session has already begun one.
    """
    connection.connection.invalidate()
    connection._dbapi_connection = connection.engine.raw_connection()  # noqa: SLF001
