"""Watches one attempt's transaction: whether the handler is still in it, from the claim to our own COMMIT.

A handler that ends the transaction would keep effects without their claim, or the claim without its effects. What can be
refused is refused before it is sent (by `interception`). What can only be noticed afterwards (a call on the driver, a
procedure, an implicit commit) shows in the driver's transaction state; if not there, in the dialect's
witness. Then the attempt is *broken*, unless we can show that nothing of it was committed. We look whenever a
handler ends, also when it raises. Limit: of calls on the raw driver object we see only the results.

Made by the guards, by `deferred_watch` and by steps; asked by `processing.attempt`.
"""

from collections.abc import Callable, MutableMapping, Sequence
from contextlib import suppress
from typing import Any, Final, NoReturn
from weakref import WeakSet

from sqlalchemy import Connection
from sqlalchemy.engine import ExecutionContext
from sqlalchemy.exc import PendingRollbackError
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.orm.session import SessionTransactionState
from sqlalchemy.pool import PoolProxiedConnection

from exactly_once.claim import ClaimRow
from exactly_once.database.dialects.contract import Dialect, Gone, State, Trace
from exactly_once.database.in_memory import in_memory
from exactly_once.database.watched.misuse_texts import (
    AFTER,
    ANEW,
    CLOSED,
    CUT_OFF,
    ENDED,
    GONE,
    LEFT,
    MEANWHILE,
    SAVEPOINT_ENDED,
    STILL_USED,
    SWALLOWED,
    TOO_LATE,
    UNCOMMITTED,
)
from exactly_once.database.watched.session import WATCHED, let_go, over
from exactly_once.database.watched.transaction_end import WORSE, LostTransaction, Shut, TransactionEnd, UnderLease
from exactly_once.database.watched.unread import raise_as_sqlalchemy_does
from exactly_once.errors import Misuse
from exactly_once.exceptions.drivers import is_drivers
from exactly_once.exceptions.leaves import leaves
from exactly_once.wording.text import escaped

__all__ = ["Watch", "attach", "flush", "thrown_away"]

thrown_away: Final["WeakSet[PoolProxiedConnection]"] = WeakSet()
"""Connections that are cut while a task or a thread still waits for an answer on them, and that we throw away.

Whoever waits meets an error there, and SQLAlchemy would throw the connection away for that, too. The pool does not expect two at
once: the second could close the connection that the same place in the pool has by then, which is another message's.
"""
_LAST: Final = " The last statement through SQLAlchemy: "
_SHOWN: Final = 120  # characters of a statement in an error


class Watch:
    """One attempt's transaction: its connection, its root transaction, and what the handler did to it.

    Args:
        connection: The connection of the transaction.
        dialect: The dialect of that database.
        dbapi: The driver's connection.
        owner: This attempt.
        rows: The claims in this transaction.
        lease: The lease under which it runs, if there is one.
        trace: The row that it wrote in place of a claim.
    """

    __slots__ = (
        "at_return", "busy", "call", "changed", "committed", "connection", "current", "dbapi", "dialect", "error",
        "info", "last", "lease", "left", "left_open", "locked", "lost", "met", "ours", "owner", "pooled", "position",
        "refused", "replaced", "rolled_back", "root", "rows", "rows_as", "sent", "server_session",
        "session_transaction", "shut", "stopped", "streams", "trace", "used_during_commit", "whole",
    )  # fmt: skip

    def __init__(
        self,
        connection: Connection,
        dialect: Dialect,
        dbapi: Any,
        owner: str,
        rows: Sequence[ClaimRow] = (),
        lease: UnderLease | None = None,
        trace: Trace | None = None,
    ) -> None:
        self.connection = connection
        self.dialect = dialect
        self.dbapi = dbapi
        self.owner = owner
        self.rows = rows
        self.lease = lease
        self.trace = trace
        self.root = connection.get_transaction()
        self.current: ClaimRow | None = None
        """In a batch: the message that is being handled; None while all are handled at once."""
        self.session_transaction: SessionTransaction | None = None
        self.left_open: SessionTransaction | None = None
        """The savepoint that the handler had left open when it returned, if `returned` was called."""
        self.at_return = False
        self.left = TransactionEnd.NOT
        self.error: Misuse | None = None
        self.stopped = False
        """`error` says that the handler tried to leave, and what is raised later is a consequence of that."""
        self.lost: BaseException | None = None
        """The error with which the server rolled the transaction back."""
        self.position: Any = None
        """What `Dialect.position` returned when the transaction was over, with nothing committed until then."""
        self.last = ""
        self.busy = 0
        """The number of running statements on this connection."""
        self.shut: Shut | None = None
        self.changed: str | None = None
        """The statement that changed the session for later users of the connection."""
        self.locked = False
        """The session has, or had, a lock of its own, which outlives the transaction and ends with the connection.

        We do not release all of a session's locks instead: that would release those, too, that the
        application took on connecting.
        """
        self.met: Exception | None = None
        """The error of our COMMIT."""
        self.call: Any = None
        """What `Dialect.before_call` returned, as long as we do not know whether the transaction survived that statement."""
        self.ours = False
        self.sent = False
        """COMMIT was sent: an error from now on may be its answer."""
        self.refused = False
        """COMMIT was answered with an error that says for certain that nothing was committed."""
        self.committed = False
        """COMMIT was answered."""
        self.used_during_commit = False
        """The session was used while COMMIT was running. That use was refused, and its work is missing."""
        self.replaced = False
        """The transaction was lost, and something else may have been committed in its place."""
        self.streams: WeakSet[ExecutionContext] | None = None
        """Statements whose rows are read one by one; None before the first."""
        self.rolled_back = False
        """SQLAlchemy sent ROLLBACK, for the handler or for an error."""
        self.whole = False
        """We have shown that nothing of it was committed."""
        self.server_session = dialect.server_session(dbapi)
        """The session in which the transaction began."""
        self.rows_as = dialect.rows_as(dbapi)
        self.pooled = connection.connection
        """The pool's proxy of this checkout. A user of the same driver connection with another proxy is somebody else."""
        self.info: MutableMapping[Any, Any] = connection.info
        self.info[WATCHED] = self

    # -- what is noticed ---------------------------------------------------------------------------------------------

    def record_leaving(self, how: TransactionEnd, text: str) -> Misuse:
        """Record the worst that happened. The first error is kept, because it names the line."""
        if self.error is None:
            self.error = Misuse(text)
            self.stopped = how is TransactionEnd.REFUSED
        if WORSE.index(how) > WORSE.index(self.left):
            self.left = how
        return self.error

    def ended(self) -> Misuse:
        """The driver reports no open transaction: something committed or rolled back where we could not refuse it.

        Also after a deadlock on the driver's own cursor: the driver shows it only with the server's next answer.
        """
        since = None
        if self.call is None and not self.connected_anew:
            with suppress(Exception):  # the connection is lost: we cannot tell
                since = self._logged_since()
        self.replaced = since is not False  # more may have been committed since, without a claim
        return self._over(since, ENDED)

    @property
    def connected_anew(self) -> bool:
        """The driver reconnected without SQLAlchemy. The new session cannot tell what the old one had committed."""
        return self.dialect.server_session(self.dbapi) is not self.server_session

    def _logged_since(self) -> bool | None:
        return self.dialect.logged_since(self.dbapi, self.info, self.trace)

    def closed(self) -> Misuse:
        """The handler closed the driver's connection. If there is a claim's row, it tells what was committed before."""
        misuse = self.record_leaving(TransactionEnd.ROLLED_BACK if self.rows else TransactionEnd.BROKEN, CLOSED)
        self.stopped = (
            True  # what is raised after that says that the connection is closed, as if the server had ended it
        )
        return misuse

    def gone(self) -> Misuse:
        """A witness says that the claim's transaction no longer exists, although a transaction is open."""
        since = self._committed_since()
        self.replaced = since is not False
        return self._over(since, GONE)

    def _committed_since(self) -> bool | None:
        if self.connected_anew:
            return None
        if self.call is not None:
            return self.dialect.committed_since(self.dbapi, self.info, self.call)
        # We saw no statement that can commit: a function swallowed a deadlock, or the driver's own cursor met one.
        # The server's log, if there is one, tells what else was committed.
        since = self._logged_since()
        if since is None and self.rows and self.dialect.asks_around_calls:
            since = False  # the claim's row tells
        return since

    def _over(self, since: bool | None, text: str) -> Misuse:
        text = ANEW if self.connected_anew else text + self._shown(_LAST)
        if since is not False:
            return self.record_leaving(TransactionEnd.BROKEN, text)
        self.mark_over()
        return self.record_leaving(TransactionEnd.GONE, text)

    def lose(self, error: BaseException) -> None:
        """The server rolled the transaction back with this error."""
        self.lost = error
        self.mark_over()

    def mark_over(self) -> None:
        """Nothing of it was committed until now. What is sent on the driver from here on does not belong to it. Never raises."""
        with suppress(Exception):  # the connection is lost, or the parent's: nothing more is sent on it
            self.position = self.dialect.position(self.dbapi)

    def swallowed(self) -> Misuse:
        """The transaction is lost, and the handler went on.

        Return that error, or a worse one if something was committed since.
        """
        self.ask()
        return self.error or self.record_leaving(TransactionEnd.ROLLED_BACK, SWALLOWED)

    def reads(self, context: ExecutionContext) -> None:
        """Note a statement whose rows are read one by one."""
        if self.streams is None:
            self.streams = WeakSet()
        self.streams.add(context)

    def _shown(self, words: str) -> str:
        return f"{words}{escaped(self.last, _SHOWN)}" if self.last else ""

    def called(self, *, sends: bool) -> None:
        """After a statement that can end the transaction without notice: ask now, so that the error can name the statement.

        Args:
            sends: Another statement, which may remove the witness, is about to be sent: a rollback to a savepoint.

        Raises:
            Misuse: The statement ended the transaction.
        """
        survived = self.dialect.after_call(self.dbapi, self.info, self.owner, drop=sends)
        if survived is False:
            raise self.gone()
        if survived:
            self.call = None

    def read_to_its_end(self) -> None:
        """Before a statement of ours, read the rest of the handler's last answer. Else its error would be taken for ours.

        A round trip after a CALL whose rows were not read to their end; else nothing.

        Raises:
            DBAPIError: That statement failed after its first rows.
            Misuse: It ended the transaction.
        """
        self._have_rows_as_before()
        try:
            self.dialect.read_out(self.dbapi)
            if self.call is not None:
                self.called(sends=True)
        except Misuse:
            raise
        except BaseException as error:
            named = self.call is not None and is_drivers(error)
            raise_as_sqlalchemy_does(self.connection, error, self.last if named else None)

    def _have_rows_as_before(self) -> None:
        """Restore the row factory: a handler may have set one on the driver, but we, and later users, read rows by position."""
        if self.dialect.rows_as(self.dbapi) != self.rows_as:
            self.dialect.make_rows(self.dbapi, self.rows_as)

    # -- what is asked -----------------------------------------------------------------------------------------------

    def verify(self, session: Session) -> Misuse | None:
        """After the handler and the flush, before COMMIT: check the connection, the root transaction, and the driver's state."""
        if self.error is not None:
            return self.error
        if self.lost is not None:  # before the look at the driver, which would take it for somebody else's commit
            return self.swallowed()
        if self.cut_off:
            return self.record_leaving(TransactionEnd.ROLLED_BACK, CUT_OFF)
        root = self.connection.get_transaction() if not self.connection.closed else None
        if self.given_back:
            return self.record_leaving(TransactionEnd.ROLLED_BACK, LEFT)
        if root is None or root is not self.root or not root.is_active:
            return self.record_leaving(TransactionEnd.ROLLED_BACK, LEFT)
        state = State.BUSY if self.busy or self._reads() else self.dialect.state(self.dbapi)
        if state is State.BUSY:
            return self.still_used()
        if state is State.ABORTED:
            return self.swallowed()
        if state is State.IDLE:
            return self.ended()
        if state is State.CLOSED:
            return self.closed()
        if (
            session.get_transaction() is not self.session_transaction
        ):  # another transaction, on whatever connection; or none
            return self.record_leaving(TransactionEnd.ROLLED_BACK, LEFT)
        return None

    def still_used(self) -> Misuse:
        """The session is in use by another task or thread."""
        return self.record_leaving(TransactionEnd.REFUSED, STILL_USED + self._shown(" The last statement: "))

    def _reads(self) -> bool:
        """Rows are being read one by one. For an async driver, whose cursor forgets its inner cursor meanwhile."""
        return self.streams is not None and any(
            getattr(each.cursor, "_cursor", None) is not None for each in self.streams
        )

    def check(self, session: Session) -> None:
        """Raise what `verify` finds, so that the error names this call and not a later one.

        Raises:
            Misuse: The handler has left its transaction, or the transaction is lost.
            DBAPIError: The handler's last statement failed after its first rows.
        """
        misuse = self.verify(session)
        if misuse is None and self.at_return and session.get_nested_transaction() is not self.left_open:
            misuse = self.record_leaving(TransactionEnd.REFUSED, SAVEPOINT_ENDED)
        if misuse is not None:
            raise misuse
        self.read_to_its_end()

    def returned(self, session: Session) -> None:
        """The handler has returned: from now on nothing but our COMMIT may end a savepoint that it left open."""
        self.left_open, self.at_return = session.get_nested_transaction(), True
        self._close_cursors()

    def _close_cursors(self) -> None:
        """On SQLite, end the statements whose rows nobody has read.

        A result that the application keeps (an attribute, a cache) keeps its statement, and that keeps the file's lock: our
        savepoint could not be released, and nobody else could write until Python collects the result. What the statement
        wrote is written: SQLite does all of it before the first row (sqlite.org/lang_returning.html).
        """
        if self.dialect.embedded and self.streams is not None:
            for context in tuple(self.streams):
                if not hasattr(context.cursor, "_cursor"):
                    with suppress(Exception):  # a thread still uses it, which the driver's state shows next
                        context.cursor.close()

    @property
    def given_back(self) -> bool:
        """The driver's connection is back in the pool, but SQLAlchemy believes it is ours. Somebody else may be using it."""
        return self.pooled.dbapi_connection is None

    def parted(self, instead: Any) -> None:
        """Runs in a forked child: the connection is the parent's, and `instead` refuses all use of it."""
        self.dbapi = instead

    def ask(self) -> None:
        """If the end is not our COMMIT, learn how the handler left the transaction, before it is rolled back.

        Never raises: what we cannot learn now is looked up in the claim's row afterwards.
        """
        if self.left is TransactionEnd.BROKEN or self.committed or self.connection.closed:
            return
        if self.connection.invalidated or self.busy or self.given_back:
            return
        try:
            self._have_rows_as_before()
            state = self.dialect.state(self.dbapi)
            if state is State.CLOSED:
                self.closed()
            elif self.left is TransactionEnd.GONE or self.rolled_back or (self.lost is not None and self.call is None):
                self._ask_again()
            elif state is State.IDLE:
                self.ended()
            elif state in (State.OPEN, State.ABORTED):
                whole = self.dialect.intact(self.dbapi, self.info, self.owner)
                if whole is False:
                    self.gone()
                self.whole = bool(whole)
        except Exception:  # the connection is lost: the row tells
            return

    def _ask_again(self) -> None:
        """The transaction was over with nothing committed. Learn whether anything was sent and committed on the driver since."""
        if self.position is None or not self.dialect.sent_since(self.dbapi, self.position):
            return
        if self._committed_since() is False:
            return
        self.replaced, self.whole = True, False
        self._over(None, GONE)

    def why(self, error: BaseException) -> BaseException:
        """Return the cause of the end of the work that raised `error`. What we saw of its transaction counts more.

        For attempts and steps. Called after `ask`, neither for a broken transaction nor for a stop from outside.
        """
        if self.left is TransactionEnd.GONE:
            assert self.error is not None
            return LostTransaction(self.error)  # we have shown that nothing was committed since
        if self.lost is not None:
            return LostTransaction(self.lost)
        if self.stopped:
            assert self.error is not None
            return self.error  # also if the handler swallowed it, or rolled back and wrapped it in its own error
        if self.cut_off and all(isinstance(each, PendingRollbackError) for each in leaves(error)):
            # SQLAlchemy advises a rollback, which the handler must not do.
            return Misuse(CUT_OFF).with_traceback(error.__traceback__)
        return error

    def admit(self) -> None:
        """Raise what forbids another statement in this transaction.

        Raises:
            Misuse: The handler left it, swallowed its end, or is in a step.
            LeaseLost: Another run has the message.
        """
        if self.committed:
            raise self.record_leaving(TransactionEnd.BROKEN, AFTER)
        if self.error is not None:
            raise self.error  # it has left already: what it sends now would be outside, or undone
        if self.shut is not None:
            raise self.shut.refusal()
        if self.lease is not None:
            self.lease.check()
        if self.lost is not None:
            # The server rolled the transaction back, and this statement would begin another, without the claim.
            raise self.swallowed()

    def is_of(self, row: ClaimRow) -> bool:
        """Say whether this is the claim or the lease of the running handler."""
        ours = self.rows if self.current is None else (self.current,)
        if self.lease is not None:
            ours = (self.lease.row,)
        return any((own.key, own.handler, own.group) == (row.key, row.handler, row.group) for own in ours)

    @property
    def cut_off(self) -> bool:
        """SQLAlchemy closed the connection during a statement, and no answer came. Nothing more is known of the transaction."""
        return self.lost is None and not self.connection.closed and self.connection.invalidated

    @property
    def doubtful(self) -> bool:
        """A statement that can commit without notice was sent, and nothing has shown what became of the transaction."""
        return (
            self.call is not None and not self.whole and self.left not in (TransactionEnd.GONE, TransactionEnd.BROKEN)
        )

    # -- the end -----------------------------------------------------------------------------------------------------

    def committing(self) -> None:
        """From here on COMMIT is ours. Hooks may still write; a later use that SQLAlchemy refuses is noted."""
        self.ours = True
        if self.session_transaction is not None:
            # A private method of SQLAlchemy, which has no event for it. If it is renamed, SQLAlchemy refuses with its own text.
            self.session_transaction._raise_for_prerequisite_state = self._not_now  # type: ignore[assignment, method-assign]  # noqa: SLF001

    def _not_now(self, operation: str, state: Any) -> NoReturn:
        begun = self.session_transaction
        assert begun is not None
        if state is not SessionTransactionState.PREPARED:
            type(begun)._raise_for_prerequisite_state(begun, operation, state)  # noqa: SLF001
        if not self.sent:
            raise self.record_leaving(TransactionEnd.REFUSED, STILL_USED)
        self.used_during_commit = True
        if self.committed:
            self.record_leaving(TransactionEnd.BROKEN, MEANWHILE)
        raise Misuse(TOO_LATE)

    def commit(self, send: Callable[[], None]) -> None:
        """Send our COMMIT, unless it is another transaction by now.

        Raises:
            Misuse: It is another transaction.
        """
        self.sent = True
        try:
            self.dialect.commit(self.dbapi, self.info, self.owner, self.rows, self.trace, send)
        except Gone as error:
            self.sent = False
            raise self.gone() from error
        except Exception as error:
            self.met = error
            # Asked here: the session returns the connection next, and then it may be another user's.
            self.refused = self.dialect.refused(self.dbapi, error)
            raise
        finally:
            if (self.changed is not None or self.locked) and not in_memory(self.connection.engine):
                # Closed at its next checkout. At once if it holds a lock that others may wait for.
                self.connection.connection.invalidate(soft=not self.locked)
        self.committed = True
        if self.used_during_commit:
            self.record_leaving(TransactionEnd.BROKEN, MEANWHILE)

    def confirm(self) -> None:
        """After `session.commit()` has returned: raise if the commit was not complete.

        Raises:
            Exception: The error of our COMMIT, which a class of the application has swallowed.
            Misuse: Nothing was committed; or a part of what the handler wanted to write is missing.
        """
        if not self.committed:
            raise self.uncommitted()
        if self.left is TransactionEnd.BROKEN and self.used_during_commit:
            assert self.error is not None
            raise self.error

    def uncommitted(self) -> Exception:
        """Return the error for a `session.commit()` that returned although our COMMIT was not answered.

        A class of the application may override commit(): roll back and log, or do nothing while it is in use.
        """
        return self.met or Misuse(UNCOMMITTED)

    def _forget(self) -> None:
        if self.session_transaction is not None:  # it refers to us, and we to it: not left to garbage collection
            self.session_transaction.__dict__.pop("_raise_for_prerequisite_state", None)
        for info in (
            self.info,
            self.pooled.info,
        ):  # of a connection that was detached from the pool, the second is a copy
            if info.get(WATCHED) is self:
                del info[WATCHED]

    def end(self, session: Session) -> None:
        """Return the connection clean, whatever happened on it. Never raises for a transaction that is already over.

        This uses the driver's own rollback, not only the Session's. After a refused commit SQLAlchemy believes that the
        transaction is over, and sends nothing: the connection would return to the pool with it open, and
        a stranger would commit it.
        """
        try:
            self._give_back(session)
        finally:
            over(session)  # last: a hook of the application may note the rollback

    def _give_back(self, session: Session) -> None:
        self._forget()
        self._close_cursors()
        connection = self.connection
        if not connection.closed and not connection.invalidated and not self.given_back:
            # Whatever ended the transaction may have left something behind: autocommit, a procedure's locks,
            # temporary tables. So may a statement that changed the session. A connection in the middle of a
            # statement cannot be asked.
            marked = (
                self.left in (TransactionEnd.GONE, TransactionEnd.BROKEN) or self.changed is not None or self.locked
            )
            if self.busy or self.dialect.state(self.dbapi) is State.BUSY:
                thrown_away.add(self.pooled)
                self.dialect.cut(self.dbapi)
                if not in_memory(connection.engine):
                    connection.invalidate()
                let_go(session)
                return
            try:
                # Also if it is closed next: SQLite keeps its locks until the handler's last cursor is collected.
                if self.dialect.state(self.dbapi) is not State.IDLE:
                    self.dbapi.rollback()
                spoiled = marked or self.dialect.state(self.dbapi) is not State.IDLE
                if spoiled and not in_memory(connection.engine):
                    connection.invalidate()
                else:
                    self._have_rows_as_before()
            except Exception as error:  # a dead connection: after any error it must not be used again
                connection.invalidate(error)
            except BaseException:  # cancelled in the rollback: the state of the connection is unknown
                connection.invalidate()
                session.invalidate()
                raise
        let_go(session)


def flush(session: Session) -> None:
    """Write what a handler left in its session.

    Raises:
        Misuse: The session is in use elsewhere at the same time. The errors of the driver and of SQLAlchemy do not say that.
    """
    try:
        session.flush()
    except Exception as error:
        watch = session.info.get(WATCHED)
        if isinstance(watch, Watch) and (watch.busy or watch.dialect.state(watch.dbapi) is State.BUSY):
            raise watch.still_used() from error
        raise


def attach(session: Session, watch: Watch) -> None:
    """Connect a session with its watch; the claim has begun its transaction."""
    watch.session_transaction = session.get_transaction()
    session.info[WATCHED] = watch
