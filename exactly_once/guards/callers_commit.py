"""After a claim in the caller's transaction: refuses to send a COMMIT that would not keep the claim.

A caller may catch the error that ended their transaction, and go on. PostgreSQL answers ROLLBACK, and no error, to the COMMIT of
an aborted transaction. MySQL and MariaDB roll a whole transaction back in a deadlock, and begin another with the next statement.
SQLite and its driver do the same after ON CONFLICT ROLLBACK. The claim would be gone, nothing or only the later half of the work
would be committed, and the message acknowledged. So this module rolls the transaction back, and raises.

A caller who never commits gets no error: `with Session(engine) as session:`, without begin(). If a transaction with a claim ends
like that, this module logs it. Only for a Session in a thread: an AsyncSession is closed in a task of its own, where this end
looks the same as the end by an error.

A savepoint with a claim in it may be rolled back, and the rest committed. That is right when each of several messages has a
savepoint, and the caller saw an error. For a caller who still relies on `eo.claim` having returned True, that COMMIT logs it.

This costs no round trip, and nothing for a statement that succeeds: only the driver's transaction state and errors are read. It
cannot see what ends a transaction without an error when another is open by then: a procedure, DDL, a call on the driver. If the
process dies on a line of this file, no COMMIT was sent: claim and work are rolled back together.

Called by `claiming`.
"""

import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, Final
from weakref import ReferenceType, WeakSet, ref

from sqlalchemy import Connection, RootTransaction
from sqlalchemy.pool import PoolProxiedConnection

from exactly_once.claim import ClaimRow
from exactly_once.database.dialects.contract import Dialect, State
from exactly_once.database.watched.interception import seeing
from exactly_once.errors import Misuse
from exactly_once.exceptions.words import words_of
from exactly_once.wording.steady_log import steady
from exactly_once.wording.text import escaped

__all__ = ["admit", "claimed"]

_CLAIMED: Final = "exactly_once.claimed"
"""The key in a connection's `info` under which the transaction with a claim is kept."""
_INSTALLED: "WeakSet[Any]" = WeakSet()
_IDENTITY: Final = 3  # group, handler and key: the first fields of a claim's row
_SHOWN: Final = 160  # characters of the server's error

_log = steady("exactly_once.claim")


class _Claimed:
    """A transaction of the caller with at least one claim in it.

    Args:
        root: The transaction. Weak, because a connection that is never closed returns to the pool when nothing refers to it.
        dialect: The dialect of its database.
        row: The first claim, which the error names.
    """

    __slots__ = ("dialect", "lost", "nested", "root", "row", "server_session", "undone")

    def __init__(self, root: "ReferenceType[RootTransaction]", dialect: Dialect, row: ClaimRow, dbapi: Any) -> None:
        self.root, self.dialect, self.row = root, dialect, row
        self.server_session = dialect.server_session(dbapi)
        self.lost = ""
        """The text of the error with which the server rolled the transaction back."""
        self.nested: list[tuple[tuple[str, ...], ClaimRow]] = []
        """The claims made in SQLAlchemy's savepoints, with the names of these savepoints."""
        self.undone: list[ClaimRow] = []
        """The claims that were rolled back with a savepoint and not made again."""

    def made(self, row: ClaimRow, savepoints: tuple[str, ...]) -> None:
        """Record a claim that stands."""
        if self.undone:
            self.undone = [each for each in self.undone if each[:_IDENTITY] != row[:_IDENTITY]]
        if savepoints:
            self.nested.append((savepoints, row))

    def rolled_back_to(self, savepoint: str) -> None:
        """Record that the claims made in this savepoint are gone."""
        self.undone += [row for names, row in self.nested if savepoint in names]
        self.nested = [each for each in self.nested if savepoint not in each[0]]

    def ended(self, dbapi: Any) -> str:
        """Return why COMMIT would not keep the claim. Empty: nothing shows that."""
        if self.lost:
            return _LOST.format(error=self.lost)
        if self.dialect.server_session(dbapi) is not self.server_session:
            return _ANEW
        match self.dialect.state(dbapi):
            case State.ABORTED:
                return _ABORTED
            case State.IDLE:
                return _ENDED
            case _:
                return ""

    def misuse(self, why: str) -> Misuse:
        return Misuse(f"The key {escaped(self.row.key)!r} of {self.row.handler!r} was claimed, and {why}")


def claimed(connection: Connection, dialect: Dialect, row: ClaimRow) -> None:
    """Record a claim that stands in this connection's transaction. From here on its COMMIT is checked."""
    if connection.dialect not in _INSTALLED:
        _install(connection.dialect)
    root = connection.get_transaction()
    noted: _Claimed | None = connection.info.get(_CLAIMED)
    if root is not None and (noted is None or noted.root() is not root):
        dbapi = connection.connection.dbapi_connection
        connection.info[_CLAIMED] = noted = _Claimed(ref(root), dialect, row, dbapi)
    if root is not None and noted is not None:
        noted.made(row, _savepoints(connection))


def _savepoints(connection: Connection) -> tuple[str, ...]:
    """The names of the savepoints that this connection is in, innermost first. SQLAlchemy has no public way to get them."""
    names: list[str] = []
    at: Any = connection.get_nested_transaction()
    while at is not None:
        names.append(getattr(at, "_savepoint", ""))
        at = getattr(at, "_previous_nested", None)
    return tuple(names)


def admit(connection: Connection) -> None:
    """Check the transaction before another claim in it.

    Raises:
        Misuse: The server rolled it back since the last claim, and the caller caught the error.
    """
    noted = _noted(connection.connection)
    if noted is not None and noted.lost:
        raise noted.misuse(_LOST.format(error=noted.lost))


def _met(pooled: PoolProxiedConnection, error: BaseException) -> None:
    """Remember an error with which the server rolled back a transaction with a claim."""
    noted = _noted(pooled)
    if noted is not None and not noted.lost and noted.dialect.lost(pooled.dbapi_connection, pooled.info, error):
        # the text only: the error itself would keep the caller's frames, and so the session and its connection
        noted.lost = escaped(f"{type(error).__name__}: {words_of(error)}", _SHOWN)


def _noted(pooled: PoolProxiedConnection) -> _Claimed | None:
    """Return what is recorded of this connection's transaction. None: it is about an earlier user of the connection."""
    try:
        noted: _Claimed | None = pooled.info.get(_CLAIMED)
    except NotImplementedError:
        return None  # the engine inspects its server for the first time, before the pool gives out a connection
    root = None if noted is None else noted.root()
    if root is None or not root.is_active:
        return None
    connection = root.connection
    if connection.closed or connection.invalidated or connection.connection is not pooled:
        return None
    return noted


def _install(dialect: Any) -> None:
    """Install the checks once for each engine, on its dialect: a listener on the engine would slow all its connections."""
    _INSTALLED.add(dialect)
    dialect.is_disconnect = seeing(dialect.is_disconnect, _met)
    dialect.do_commit = _refusing(dialect.do_commit, dialect.do_rollback)
    dialect.do_rollback_to_savepoint = _undoing(dialect.do_rollback_to_savepoint)
    dialect.do_prepare_twophase = _refusing_to_prepare(dialect.do_prepare_twophase)
    if not dialect.is_async:
        dialect.do_rollback = _telling(dialect.do_rollback)


def _refusing(
    commit: Callable[[PoolProxiedConnection], None], roll_back: Callable[[PoolProxiedConnection], None]
) -> Callable[[PoolProxiedConnection], None]:
    def do_commit(pooled: PoolProxiedConnection) -> None:
        noted = _noted(pooled)
        if noted is not None:
            del pooled.info[_CLAIMED]
            if why := noted.ended(pooled.dbapi_connection):
                # roll back here, because SQLAlchemy considers a refused transaction ended. If this fails, the connection is
                # lost, and that is the error
                roll_back(pooled)
                raise noted.misuse(why)
        commit(pooled)
        if noted is not None and noted.undone:
            row, more = noted.undone[0], len(noted.undone) - 1
            others = f" (and {more} more)" if more else ""
            _log.warning(_UNDONE, f"'{escaped(row.key)}'", f"'{escaped(row.handler)}'", others)

    return do_commit


def _undoing(roll_back_to: Callable[[Connection, str], None]) -> Callable[[Connection, str], None]:
    def do_rollback_to_savepoint(connection: Connection, name: str) -> None:
        roll_back_to(connection, name)
        noted = _noted(connection.connection)
        if noted is not None and noted.nested:
            noted.rolled_back_to(name)

    return do_rollback_to_savepoint


def _telling(roll_back: Callable[[PoolProxiedConnection], None]) -> Callable[[PoolProxiedConnection], None]:
    def do_rollback(pooled: PoolProxiedConnection) -> None:
        # the pool rolls back each connection that is returned to it, so this check runs for each of them
        noted = None if pooled.dbapi_connection is None else _noted(pooled)
        if noted is not None and _is_forgotten():
            with suppress(Exception):  # the connection is lost, or belongs to the parent: the rollback below will raise
                if not noted.ended(pooled.dbapi_connection):
                    row = noted.row
                    _log.warning(_FORGOTTEN, f"'{escaped(row.key)}'", f"'{escaped(row.handler)}'")
        roll_back(pooled)

    return do_rollback


def _is_forgotten() -> bool:
    """Whether nobody asked for this rollback: no exception is being raised, and no `rollback` was called."""
    if sys.exc_info()[0] is not None:
        return False
    frame: FrameType | None = sys._getframe(2)  # noqa: SLF001
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _BETWEEN:
        if frame.f_code.co_name == "rollback":
            return False
        frame = frame.f_back
    return True


def _refusing_to_prepare(prepare: Callable[[Connection, Any], None]) -> Callable[[Connection, Any], None]:
    def do_prepare_twophase(connection: Connection, xid: Any) -> None:
        # PostgreSQL answers ROLLBACK here, too. Before this one is prepared, SQLAlchemy can still roll the other databases back
        noted = _noted(connection.connection)
        if noted is not None and (why := noted.ended(connection.connection.dbapi_connection)):
            raise noted.misuse(why)
        prepare(connection, xid)

    return do_prepare_twophase


_BETWEEN: Final = ("sqlalchemy", "exactly_once")
_FORGOTTEN: Final = (
    "The claim of the key %s of %s was rolled back, with all that was written beside it: its session was closed, and nobody had"
    " committed. Write `with Session(engine) as session, session.begin():`, or call session.commit(). A message that is"
    " acknowledged for it is lost."
)
_UNDONE: Final = (
    "The claim of the key %s of %s%s was rolled back with the savepoint it was made in (session.begin_nested()), and with what"
    " was written there; the rest of the transaction is committed. That eo.claim had returned True does not hold any more. Do not"
    " acknowledge the message: its next copy runs."
)
_LOST: Final = (
    "then a database error threw the whole transaction away, and it was caught ({error}). The claim is gone, with all that was"
    " written before that error; what was written since is not committed either. Do not acknowledge the message. Let such an"
    " error leave the transaction, and run all of it again: no savepoint outlives it."
)
_ABORTED: Final = (
    "then a database error aborted the transaction, and it was caught: COMMIT would keep nothing, and say nothing. All of it is"
    " rolled back, the claim too. Do not acknowledge the message. Let the error leave the transaction, or put the statement that"
    " may fail into `with session.begin_nested():`."
)
_ANEW: Final = (
    "then the driver connected anew (ping(reconnect=True) or connect() on its own connection): the claim's transaction ended with"
    " the session before, and what was written since would be committed without its claim. Nothing of it is committed. Do not"
    " acknowledge the message: its next copy runs. Delete that call: the error of a connection that is lost is to end the work."
)
_ENDED: Final = (
    "its transaction had ended before your COMMIT: a procedure sent ROLLBACK or COMMIT, DDL committed by itself, or commit() or"
    " rollback() was called on the driver's own connection. Whether the claim and its work stand is not known here. Do not"
    " acknowledge the message: its next copy runs, or is a duplicate. Take that out of the transaction."
)
