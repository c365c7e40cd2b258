"""One attempt's transaction: whether the handler is still in the one it was given, from the claim to our own COMMIT.

A handler that ends the transaction would keep effects without their claim, or the claim without its effects. What can be
refused is refused before it is sent (`listening` does). What can only be noticed afterwards (a call on the driver, a
procedure, an implicit commit) shows in the driver's transaction state, and where that does not tell, in the dialect's
witness: then the attempt is *broken*, unless it is shown that nothing of it was committed. It is asked on every way out of a
handler, also when the handler raises. Limit: a handler that calls the raw driver object is seen only by what it leaves behind.

Made by the guards, by `deferred_watch` and by steps; asked by `attempt`.
"""

from collections.abc import Callable, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, NoReturn, Protocol
from weakref import WeakSet

from sqlalchemy import Connection, Engine
from sqlalchemy.engine import ExecutionContext
from sqlalchemy.exc import IllegalStateChangeError, PendingRollbackError
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.orm.session import SessionTransactionState

from exactly_once.claim import ClaimRow
from exactly_once.database.dialects.contract import Dialect, Gone, State, Trace
from exactly_once.database.in_memory import in_memory
from exactly_once.database.watched.unread import raise_as_sqlalchemy_does
from exactly_once.errors import Misuse
from exactly_once.exceptions.drivers import is_drivers
from exactly_once.exceptions.leaves import leaves
from exactly_once.exceptions.stops import asked_from_outside
from exactly_once.wording.redaction import redacted
from exactly_once.wording.text import escaped

__all__ = [
    "DOUBTFUL",
    "HOME",
    "LEFT",
    "SWALLOWED",
    "WATCHED",
    "BrokenTransaction",
    "LostTransaction",
    "Shut",
    "TransactionEnd",
    "UnderLease",
    "Watch",
    "begin",
    "elsewhere",
    "flush",
    "let_go",
    "over",
]

WATCHED: Final = "exactly_once.watch"
"""Where a watch stands in the `info` of its connection and of its session."""
HOME: Final = "exactly_once.home"
"""Where a session keeps the engine of the store that made it."""
_LAST: Final = " The last statement through SQLAlchemy: "
_SHOWN: Final = 120  # characters of a statement in an error


class TransactionEnd(Enum):
    """How the transaction was left, if it was; from harmless to worst."""

    NOT = "still in it"
    REFUSED = "tried to, and was stopped: nothing was committed"
    ROLLED_BACK = "rolled back: nothing was committed"
    GONE = "it is not there any more, and whether it was committed or rolled back is to be found out"
    BROKEN = "ended by something only noticed afterwards: it may have been committed"


_WORSE: Final = tuple(TransactionEnd)


class UnderLease(Protocol):
    """The claim of a transaction that holds none itself: `guards.lease.contract.HeldLease`."""

    @property
    def row(self) -> ClaimRow:
        """Whose it is."""

    @property
    def token(self) -> str:
        """That of this attempt."""

    @property
    def attempt(self) -> int:
        """Which one it is, from 1."""

    def check(self) -> None:
        """Raise where another run has the message."""


class BrokenTransaction(Misuse):
    """Of a step: its transaction ended behind our back, and what came before may be committed; the message is for a person."""


class LostTransaction(Exception):
    """It was thrown away, with nothing of it committed: worth trying at once, whatever the handler made of the error.

    Args:
        error: What did it.
    """

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error


@dataclass(slots=True)
class Shut:
    """The session cannot be used at the moment."""

    why: str
    tried: bool = False
    """Somebody tried."""

    def refusal(self) -> Misuse:
        """Note the try, and return what it is told."""
        self.tried = True
        return Misuse(self.why)


class Watch:
    """One attempt's transaction: which connection, which root transaction, and what the handler did to it.

    Args:
        connection: Whose transaction it is.
        dialect: How that database is spoken to.
        dbapi: The driver's connection.
        owner: This attempt.
        rows: What it claimed in this transaction.
        held: The lease it runs under, if it does.
        trace: What it wrote in this transaction in place of a claim.
    """

    __slots__ = (
        "begun", "busy", "call", "changed", "committed", "connection", "current", "dbapi", "dialect", "error", "held",
        "info", "last", "left", "locked", "lost", "mark", "meanwhile", "met", "ours", "owner", "pooled", "refused", "replaced",
        "rolled_back", "root", "rows", "rows_as", "sent", "server_session", "shut", "stopped", "streams", "trace", "whole"
    )  # fmt: skip

    def __init__(
        self,
        connection: Connection,
        dialect: Dialect,
        dbapi: Any,
        owner: str,
        rows: Sequence[ClaimRow] = (),
        held: UnderLease | None = None,
        trace: Trace | None = None,
    ) -> None:
        self.connection = connection
        self.dialect = dialect
        self.dbapi = dbapi
        self.owner = owner
        self.rows = rows
        self.held = held
        self.trace = trace
        self.root = connection.get_transaction()
        self.current: ClaimRow | None = None
        """Of a group: the message that is being handled; None where all are at once."""
        self.begun: SessionTransaction | None = None
        self.left = TransactionEnd.NOT
        self.error: Misuse | None = None
        self.stopped = False
        """`error` is of a try to leave, the first that was noticed, and what is raised after that is made of it."""
        self.lost: BaseException | None = None
        """The error with which the server threw the transaction away."""
        self.mark: Any = None
        """What `Dialect.mark` gave when it was known to be over, with nothing committed until then."""
        self.last = ""
        self.busy = 0
        """Statements under way, on this connection."""
        self.shut: Shut | None = None
        self.changed: str | None = None
        """The statement that changed the session for whoever has the connection next."""
        self.locked = False
        """The session has a lock of its own, or had one: it outlives the transaction, and ends with the connection.

        To let go of all of a session's locks instead would take those, too, that the application took as the connection was made.
        """
        self.met: Exception | None = None
        """What our COMMIT met with."""
        self.call: Any = None
        """What `Dialect.before_call` gave, while it is not known whether the transaction survived that statement."""
        self.ours = False
        self.sent = False
        """COMMIT was sent: an error that comes now may come from its answer."""
        self.refused = False
        """COMMIT was answered with an error that says for certain that nothing was committed."""
        self.committed = False
        """COMMIT was answered."""
        self.meanwhile = False
        """Somebody used the session while COMMIT was under way: it was refused, and is missing."""
        self.replaced = False
        """It was lost, and something else may have been committed in its place."""
        self.streams: WeakSet[ExecutionContext] | None = None
        """Statements whose rows are read one by one; None before the first."""
        self.rolled_back = False
        """ROLLBACK was sent by SQLAlchemy, for the handler or for an error."""
        self.whole = False
        """It was shown that nothing of it was committed."""
        self.server_session = dialect.server_session(dbapi)
        """That of the transaction."""
        self.rows_as = dialect.rows_as(dbapi)
        self.pooled = connection.connection
        """The pool's loan of it: whoever has the driver's connection through another loan is a neighbour."""
        self.info: MutableMapping[Any, Any] = connection.info
        self.info[WATCHED] = self

    # -- what is noticed ---------------------------------------------------------------------------------------------

    def leave(self, how: TransactionEnd, text: str) -> Misuse:
        """Remember the worst that happened; the first error is the one that names the line."""
        if self.error is None:
            self.error = Misuse(text)
            self.stopped = how is TransactionEnd.REFUSED
        if _WORSE.index(how) > _WORSE.index(self.left):
            self.left = how
        return self.error

    def ended(self) -> Misuse:
        """The driver says that no transaction is open: something committed or rolled back where nobody could refuse it.

        Also after a deadlock that the driver's own cursor met: the driver shows it only with the server's next answer.
        """
        since = None
        if self.call is None and not self.connected_anew:
            with suppress(Exception):  # the connection is lost: nobody can say
                since = self._logged_since()
        self.replaced = since is not False  # more may have been committed since, without a claim
        return self._over(since, _ENDED)

    @property
    def connected_anew(self) -> bool:
        """The driver did, past SQLAlchemy: what the session before had committed, this one cannot tell."""
        return self.dialect.server_session(self.dbapi) is not self.server_session

    def _logged_since(self) -> bool | None:
        return self.dialect.logged_since(self.dbapi, self.info, self.trace)

    def closed(self) -> Misuse:
        """The handler closed the driver's connection. What it committed before, the claim's row tells, where there is one."""
        misuse = self.leave(TransactionEnd.ROLLED_BACK if self.rows else TransactionEnd.BROKEN, _CLOSED)
        self.stopped = (
            True  # what is raised after that says that the connection is closed, as if the server had ended it
        )
        return misuse

    def gone(self) -> Misuse:
        """A witness says that the claim's transaction is not there any more, though one is open."""
        since = self._committed_since()
        self.replaced = since is not False
        return self._over(since, _GONE)

    def _committed_since(self) -> bool | None:
        if self.connected_anew:
            return None
        if self.call is not None:
            return self.dialect.committed_since(self.dbapi, self.info, self.call)
        # no statement that can commit was seen to end it: a deadlock that a function swallowed, or that was met on the
        # driver's own cursor. The server's log tells what else was committed, where it has one
        since = self._logged_since()
        if since is None and self.rows and self.dialect.asks_around_calls:
            since = False  # the claim's row tells
        return since

    def _over(self, since: bool | None, text: str) -> Misuse:
        text = _ANEW if self.connected_anew else text + self._shown(_LAST)
        if since is not False:
            return self.leave(TransactionEnd.BROKEN, text)
        self.is_over()
        return self.leave(TransactionEnd.GONE, text)

    def lose(self, error: BaseException) -> None:
        """The server threw it away with this error."""
        self.lost = error
        self.is_over()

    def is_over(self) -> None:
        """Nothing of it was committed until now: what the driver is sent from here on is no part of it. Never raises."""
        with suppress(Exception):  # the connection is lost, or the parent's: nothing is sent on it from here on
            self.mark = self.dialect.mark(self.dbapi)

    def swallowed(self) -> Misuse:
        """It is lost, and the handler went on: say so, unless that has committed something of its own."""
        self.ask()
        return self.error or self.leave(TransactionEnd.ROLLED_BACK, SWALLOWED)

    def reads(self, context: ExecutionContext) -> None:
        """A statement begins whose rows are read one by one."""
        if self.streams is None:
            self.streams = WeakSet()
        self.streams.add(context)

    def _shown(self, words: str) -> str:
        return f"{words}{escaped(self.last, _SHOWN)}" if self.last else ""

    def called(self, *, sends: bool) -> None:
        """After a statement that can end the transaction unseen: ask now, so that the error can name it.

        Args:
            sends: Another statement is about to be sent, which may take the witness away: a rollback to a savepoint.

        Raises:
            Misuse: It did.
        """
        survived = self.dialect.after_call(self.dbapi, self.info, self.owner, drop=sends)
        if survived is False:
            raise self.gone()
        if survived:
            self.call = None

    def settle(self) -> None:
        """Before a statement of ours: have the handler's last one told to its end, or its error would be taken for ours.

        A round trip behind a CALL whose rows were not read to their end; else nothing.

        Raises:
            DBAPIError: That statement failed behind its first rows.
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
        """Who made dicts of them on the driver's connection did so for itself: ours, and the next one's, are read by place."""
        if self.dialect.rows_as(self.dbapi) != self.rows_as:
            self.dialect.make_rows(self.dbapi, self.rows_as)

    # -- what is asked -----------------------------------------------------------------------------------------------

    def verify(self, session: Session) -> Misuse | None:
        """After the handler and the flush, before COMMIT: same connection, same root transaction, and the driver says open."""
        if self.error is not None:
            return self.error
        if self.lost is not None:  # before the look at the driver, which would take it for a commit behind our back
            return self.swallowed()
        if self.cut_off:
            return self.leave(TransactionEnd.ROLLED_BACK, CUT_OFF)
        root = self.connection.get_transaction() if not self.connection.closed else None
        if self.given_back:
            return self.leave(TransactionEnd.ROLLED_BACK, LEFT)
        if root is None or root is not self.root or not root.is_active:
            return self.leave(TransactionEnd.ROLLED_BACK, LEFT)
        state = State.BUSY if self.busy or self._reads() else self.dialect.state(self.dbapi)
        if state is State.BUSY:
            return self.still_used()
        if state is State.ABORTED:
            return self.swallowed()
        if state is State.IDLE:
            return self.ended()
        if state is State.CLOSED:
            return self.closed()
        if session.get_transaction() is not self.begun:  # another one, on whatever connection; or none at all
            return self.leave(TransactionEnd.ROLLED_BACK, LEFT)
        return None

    def still_used(self) -> Misuse:
        """Somebody else is in the middle of something on it."""
        return self.leave(TransactionEnd.REFUSED, _STILL_USED + self._shown(" The last statement: "))

    def _reads(self) -> bool:
        """Somebody holds rows that are not read to their end; of an async driver, whose cursor forgets its inner one then."""
        return self.streams is not None and any(
            getattr(each.cursor, "_cursor", None) is not None for each in self.streams
        )

    def check(self, session: Session) -> None:
        """Raise what `verify` finds, so that the error names this call and not a later one.

        Raises:
            Misuse: The handler has left its transaction, or it is lost.
            DBAPIError: Its last statement failed behind its first rows.
        """
        misuse = self.verify(session)
        if misuse is not None:
            raise misuse
        self.settle()

    @property
    def given_back(self) -> bool:
        """The pool has the driver's connection again, while SQLAlchemy believes it is ours: a neighbour may be using it."""
        return self.pooled.dbapi_connection is None

    def parted(self, instead: Any) -> None:
        """In a process just forked: the connection is the parent's, and what stands in its place refuses all use of it."""
        self.dbapi = instead

    def ask(self) -> None:
        """On a way out that is not our COMMIT: learn how the transaction was left, before it is rolled back.

        Never raises: what cannot be asked now is looked up by the claim's row afterwards.
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
        """It was over, with nothing committed: learn whether something was sent since on the driver itself, and committed."""
        if self.mark is None or not self.dialect.sent_since(self.dbapi, self.mark):
            return
        if self._committed_since() is False:
            return
        self.replaced, self.whole = True, False
        self._over(None, _GONE)

    def why(self, error: BaseException) -> BaseException:
        """Return what ended the work, for which `error` was raised: what was seen of its transaction weighs more.

        Of an attempt and of a step alike. Asked after `ask`, of what is not broken, and of nobody's stop.
        """
        if self.left is TransactionEnd.GONE:
            assert self.error is not None
            return LostTransaction(self.error)  # it was shown that nothing was committed since
        if self.lost is not None:
            return LostTransaction(self.lost)
        if self.stopped:
            assert self.error is not None
            return self.error  # also when the handler swallowed it, or rolled back for it and wrapped it in its own
        if self.cut_off and all(isinstance(each, PendingRollbackError) for each in leaves(error)):
            # SQLAlchemy says to roll back, which is not the handler's to do
            return Misuse(CUT_OFF).with_traceback(error.__traceback__)
        return error

    def admit(self) -> None:
        """Raise what speaks against another statement in this transaction.

        Raises:
            Misuse: The handler left it, swallowed its end, or is in a step.
            LeaseLost: Another run has the message.
        """
        if self.committed:
            raise self.leave(TransactionEnd.BROKEN, AFTER)
        if self.error is not None:
            raise self.error  # it has left already: what it sends now would be outside, or undone
        if self.shut is not None:
            raise self.shut.refusal()
        if self.held is not None:
            self.held.check()
        if self.lost is not None:
            # the server threw the transaction away, and this statement would begin another, without the claim
            raise self.swallowed()

    def is_of(self, row: ClaimRow) -> bool:
        """Say whether this is the claim, or the lease, that the handler runs under."""
        ours = self.rows if self.current is None else (self.current,)
        if self.held is not None:
            ours = (self.held.row,)
        return any((own.key, own.handler, own.group) == (row.key, row.handler, row.group) for own in ours)

    @property
    def cut_off(self) -> bool:
        """SQLAlchemy closed the connection, with a statement whose answer did not come; nothing says more of the transaction."""
        return self.lost is None and not self.connection.closed and self.connection.invalidated

    @property
    def doubtful(self) -> bool:
        """A statement that can commit unseen was sent, and nothing has shown what became of the transaction."""
        return (
            self.call is not None and not self.whole and self.left not in (TransactionEnd.GONE, TransactionEnd.BROKEN)
        )

    # -- the end -----------------------------------------------------------------------------------------------------

    def committing(self) -> None:
        """From here on COMMIT is ours; hooks may still write, and what SQLAlchemy refuses behind them is noted."""
        self.ours = True
        if self.begun is not None:
            # private to SQLAlchemy, which names no event for it: under another name it refuses in words of its own
            self.begun._raise_for_prerequisite_state = self._not_now  # type: ignore[assignment, method-assign]  # noqa: SLF001

    def _not_now(self, operation: str, state: Any) -> NoReturn:
        begun = self.begun
        assert begun is not None
        if state is not SessionTransactionState.PREPARED:
            type(begun)._raise_for_prerequisite_state(begun, operation, state)  # noqa: SLF001
        if not self.sent:
            raise self.leave(TransactionEnd.REFUSED, _STILL_USED)
        self.meanwhile = True
        if self.committed:
            self.leave(TransactionEnd.BROKEN, _MEANWHILE)
        raise Misuse(_TOO_LATE)

    def commit(self, send: Callable[[], None]) -> None:
        """Send our COMMIT, unless the transaction is another one by now.

        Raises:
            Misuse: It is.
        """
        self.sent = True
        try:
            self.dialect.commit(self.dbapi, self.info, self.owner, self.rows, self.trace, send)
        except Gone as error:
            self.sent = False
            raise self.gone() from error
        except Exception as error:
            self.met = error
            # asked here: the session gives the connection back in a moment, and then it may be another's
            self.refused = self.dialect.refused(self.dbapi, error)
            raise
        finally:
            if (self.changed is not None or self.locked) and not in_memory(self.connection.engine):
                # closed when somebody would get it; at once where it holds a lock that somebody may wait for
                self.connection.connection.invalidate(soft=not self.locked)
        self.committed = True
        if self.meanwhile:
            self.leave(TransactionEnd.BROKEN, _MEANWHILE)

    def confirm(self) -> None:
        """After `session.commit()` came back: raise what speaks against it being done.

        Raises:
            Exception: What our COMMIT met with, and a class of the application's has swallowed.
            Misuse: Nothing was committed; or a part of what the handler wanted to write is missing.
        """
        if not self.committed:
            raise self.uncommitted()
        if self.left is TransactionEnd.BROKEN and self.meanwhile:
            assert self.error is not None
            raise self.error

    def uncommitted(self) -> Exception:
        """Return what to raise where `session.commit()` came back, and our COMMIT was not answered.

        A class of the application's may override it: roll back and log, or do nothing while somebody is inside.
        """
        return self.met or Misuse(UNCOMMITTED)

    def _forget(self) -> None:
        if self.begun is not None:  # it holds us, and we hold it: not left to the collector
            self.begun.__dict__.pop("_raise_for_prerequisite_state", None)
        for info in (
            self.info,
            self.pooled.info,
        ):  # of a connection that was detached from the pool, the second is a copy
            if info.get(WATCHED) is self:
                del info[WATCHED]

    def end(self, session: Session) -> None:
        """Give the connection back clean, whatever happened on it; never raises for what is already over.

        The driver's own rollback, not only the Session's: after a refused commit SQLAlchemy believes the transaction is
        over and sends nothing, the connection goes back to the pool with it open, and a stranger commits it.
        """
        try:
            self._give_back(session)
        finally:
            over(session)  # last: a hook of the application's may note the rollback

    def _give_back(self, session: Session) -> None:
        self._forget()
        connection = self.connection
        if not connection.closed and not connection.invalidated and not self.given_back:
            # whatever ended the transaction may have left its mark: autocommit, a procedure's locks, temporary tables; so did a
            # statement that changed the session; and what is in the middle of a statement cannot be asked
            marked = (
                self.left in (TransactionEnd.GONE, TransactionEnd.BROKEN) or self.changed is not None or self.locked
            )
            stays = in_memory(connection.engine)
            if self.busy or self.dialect.state(self.dbapi) is State.BUSY:
                self.dialect.cut(self.dbapi)
                if not stays:
                    connection.invalidate()
                let_go(session)
                return
            try:
                # also of one that is closed next: SQLite keeps its locks until the last cursor of the handler's is collected
                if self.dialect.state(self.dbapi) is not State.IDLE:
                    self.dbapi.rollback()
                if not stays and (marked or self.dialect.state(self.dbapi) is not State.IDLE):
                    connection.invalidate()
                else:
                    self._have_rows_as_before()
            except Exception as error:  # a dead connection: whatever it says, it must not be used again
                connection.invalidate(error)
            except BaseException:  # cancelled in the rollback: nobody knows what the connection is in
                connection.invalidate()
                session.invalidate()
                raise
        let_go(session)


def flush(session: Session) -> None:
    """Write what a handler left in its session.

    Raises:
        Misuse: Beside somebody who still uses it: of what the driver or SQLAlchemy makes of two at once nothing tells that.
    """
    try:
        session.flush()
    except Exception as error:
        watch = session.info.get(WATCHED)
        if isinstance(watch, Watch) and (watch.busy or watch.dialect.state(watch.dbapi) is State.BUSY):
            raise watch.still_used() from error
        raise


def over(session: Session, why: str | None = None) -> None:
    """Refuse what uses a session from here on, before it takes a connection that nobody would give back.

    Args:
        session: A handler's.
        why: What whoever uses it is told, where it is not that its message has ended.
    """

    def refused(*_: object, **__: object) -> Any:
        raise Misuse(_OVER if why is None else why)

    session.get_bind = refused  # type: ignore[method-assign]


def let_go(session: Session) -> None:
    """Close a session, also one whose connection is dead or cut off in a statement of ours: rolling that back may raise.

    The rollback comes first and not with the close, which an error of it would end before the connection is given back: the
    pool would miss it until it is collected.
    """
    try:
        try:
            session.rollback()
        except BaseException as error:
            # the connection is lost: the pool, which rolls back once more, throws it away; or a hook raised
            if asked_from_outside(error):
                raise
        session.close()
    except BaseException as error:
        # a task or a thread may be inside a call of the session's, which refuses to be closed then: its connection, which was cut
        # and invalidated, is the pool's again by now
        with suppress(IllegalStateChangeError):
            session.invalidate()
        if asked_from_outside(error):  # cancelled while it rolled back
            raise


def elsewhere(session: Session, connection: Connection) -> str | None:
    """Say what is wrong with a connection that is of no engine of the store's: get_bind() chose it.

    Failures, the pump and what is looked up are the store's; a claim in another database would be seen by none of them. Asked of
    each message's: that the connection was claimed on before may have been for an application whose engine this is.
    """
    home: Engine = session.info.get(HOME, connection.engine)
    if home.dialect is connection.engine.dialect:
        return None
    return _ELSEWHERE.format(chosen=redacted(connection.engine.url), home=redacted(home.url))


def begin(session: Session, watch: Watch) -> None:
    """Tie a session to its watch; the claim has begun its transaction."""
    watch.begun = session.get_transaction()
    session.info[WATCHED] = watch


_ELSEWHERE: Final = (
    "The session's get_bind() chose an engine of its own, {chosen}, and exactly_once was given {home}: claims, effects and"
    " failures belong in one database, and are watched on its engine. Nothing ran. Where a message decides on the database, give"
    " exactly_once all of them by name, and route= (how-to: several-databases)."
)
UNCOMMITTED: Final = (
    "session.commit() came back, and nothing was committed: the class of the session overrides commit(), or the handler replaced"
    " it, and that one swallowed an error or sent no COMMIT. Nothing of this run is kept. Let commit() raise what it met, or give"
    " exactly_once a plain sessionmaker."
)
LEFT: Final = (
    "The handler left the transaction it was given: session.rollback(), session.close(), `with session:` or close() of its"
    " pooled connection ends it, and the claim with it. Delete that line; raise an exception to roll back, use"
    " session.begin_nested() for a part."
)
SWALLOWED: Final = (
    "The handler swallowed a database error that aborted the transaction: COMMIT would keep nothing. Let the error out,"
    " or put the statement that may fail into `with session.begin_nested():`."
)
CUT_OFF: Final = (
    "The connection ended in the midst of the handler, and the handler went on: a statement was given up before its answer came"
    " (asyncio.timeout, wait_for, a cancelled task), the server ended the connection, two threads or tasks used it at once, or"
    " invalidate() was called. What was written before is rolled back. Let the error out of the handler, and use the session in"
    " one thread or task; to go on without one statement, have the server limit it (statement_timeout, max_statement_time)"
    " inside `with session.begin_nested():`."
)
DOUBTFUL: Final = (
    "A procedure was called, and then its transaction was lost before anybody could ask whether the procedure had committed it"
    " (the connection ended, or was rolled back). Look what is there of its work. Take COMMIT, START TRANSACTION and DDL out of"
    " the procedure."
)
_ENDED: Final = (
    "A statement of the handler ended the transaction behind SQLAlchemy's back (a COMMIT inside a procedure or a"
    " multi-statement text, a call on the driver, or DDL that commits by itself). What came before it may be committed."
    " Take it out of the handler."
)
_ANEW: Final = (
    "The driver connected anew while the handler ran: ping(reconnect=True) or connect() was called on its own connection. The"
    " transaction ended with the session before, and nobody can say what that one, or the new one, has committed. Take the call"
    " out: where a connection is lost, let the error out of the handler, and the message runs again."
)
_CLOSED: Final = (
    "The handler closed the driver's own connection (close(), or psycopg's `with connection:`, which commits and closes): its"
    " transaction ended there. Delete that line; the connection is given back for you."
)
_GONE: Final = (
    "The transaction that the claim was written in ended behind SQLAlchemy's back, and another one is open in its place:"
    " commit() or rollback() was called on the driver's own connection; or a procedure committed, began a transaction of its"
    " own, or swallowed the deadlock that threw it away. Take that out: an error must leave a procedure, and COMMIT, ROLLBACK,"
    " START TRANSACTION and DDL do not belong in it."
)
_OVER: Final = (
    "The session was used after what it was given for had ended: its message, or its steps.transaction. A variable, a task or a"
    " thread kept it. Nothing was sent. Use it only until the handler (or the step) returns; await the task, join the thread."
)
AFTER: Final = (
    "A hook committed the handler's transaction itself (connection().commit() in before_commit), and then something more was"
    " sent: what came before is committed, and this is not. Take the commit out of the hook."
)
_STILL_USED: Final = (
    "The handler has returned, and something still uses its session: a task, a thread, or rows that are still read. What it"
    " writes now would be committed in part, or not at all; nothing was committed. Await the task, join the thread, or read"
    " the rows to their end before the handler returns."
)
_TOO_LATE: Final = (
    "The session was used while the COMMIT of its message, or of its steps.transaction, was under way: the handler had returned,"
    " and a task or a thread went on. Nothing of this was sent. Await the task, join the thread, before the handler returns."
)
_MEANWHILE: Final = (
    "The handler had returned, and a task or a thread of it used its session while COMMIT was under way. What the handler had"
    " written until then is committed, and what that one wanted to do is not. Look what is missing. Await the task, join the"
    " thread, before the handler returns."
)
