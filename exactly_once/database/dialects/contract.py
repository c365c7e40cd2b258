"""What a dialect is: the texts of our statements for one database server, and what its errors mean. Guards hold no SQL.

A claim goes below SQLAlchemy, as fixed text on the driver's connection, because round trips decide the cost and a
driver's own error is exact. Everything here is synchronous: on an async engine it runs in SQLAlchemy's greenlet, where
the adapted driver connection awaits by itself.

Errors are told apart by SQLSTATE or errno, never by their text: servers speak many languages.
"""

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from datetime import timedelta
from enum import Enum
from typing import Any, Final, NamedTuple, Protocol

from sqlalchemy import Connection, Insert, Update

from exactly_once.claim import ClaimRow, ExistingClaim, LeaseAnswer
from exactly_once.database.dialects.keywords import Read

__all__ = [
    "LEARNT",
    "WAIT_MS",
    "BatchClaims",
    "ClaimBusy",
    "Dialect",
    "ErrorKind",
    "Gone",
    "LeaseClaims",
    "State",
    "Trace",
    "steps_of",
]

LEARNT: Final = "exactly_once.learnt"
"""The key in a connection's `info` of what `Dialect.learn` returned, before anybody else used the connection."""


class Trace(NamedTuple):
    """A row that is written first in a transaction under a lease, and deleted with our COMMIT.

    If the row is there afterwards, something else has committed that transaction, and the message must not run again.
    """

    row: ClaimRow
    name: str
    """In the column of a step's name; unique to this transaction."""
    attempt: int
    token: str


class TraceState(Enum):
    """What the transactions of earlier runs under a lease left behind."""

    NONE = "nothing that is, or can be, committed behind their backs"
    COMMITTED = "something else than a run's own COMMIT has committed it"
    RUNNING = "the server still runs a statement of a run that is over, which may commit"


class State(Enum):
    """The driver's own report of the transaction. SQLAlchemy's view of it proves nothing."""

    IDLE = "no transaction"
    OPEN = "in a transaction"
    BUSY = "in the middle of a statement, or of reading its rows"
    ABORTED = "in a transaction that can only be rolled back"
    CLOSED = "closed by whoever has the connection, and not by the server: what was committed before is not known"


class ErrorKind(Enum):
    """What a database error means for the attempt in which it was raised."""

    TRANSIENT = "deadlock, serialization or lock timeout: a fresh transaction may succeed at once"
    UNAVAILABLE = "the server does not answer, or cannot write now"
    REFUSED = "the server said no and rolled back: nothing of this was committed"
    UNKNOWN = "none of these"


class ClaimBusy(Exception):
    """Another transaction holds the key, and `claim_wait` is over.

    Args:
        again: One more try at once may succeed.
        lost: The server rolled the whole transaction back, with everything done in it before.
        cut: A time limit of the session ended the wait, not ours. An earlier user of the connection may have left that limit:
            `Dialect.limit_was_left` tells.
    """

    def __init__(self, again: bool, *, lost: bool = False, cut: bool = False) -> None:
        super().__init__()
        self.again, self.lost, self.cut = again, lost, cut


class Gone(Exception):
    """The transaction in which the claim was written no longer exists. This attempt's COMMIT was not sent."""


class Dialect(Protocol):
    """One database server through one driver. `dbapi` is SQLAlchemy's `dbapi_connection`, which adapts an async driver."""

    name: str
    kept_as: str
    """The key under which `prepare` keeps in a connection's `info` what it saw.

    It is made of the settings that decide what to look for, and of nothing else. What is kept refers to no application, so all
    applications on one engine, one after the other, find it there.
    """
    asks_around_calls: bool
    """A statement whose text we cannot read can end the transaction without notice."""
    embedded: bool
    """The database is a library in this process: no statement continues after its connection is closed."""
    learns: bool
    """`prepare` learns settings that others may have changed in the connection. It needs a connection that nobody else used."""

    @property
    def table(self) -> str:
        """The table of claims as statements name it: with its schema, so that no search path redirects it.

        Looked up at first use, which may connect.
        """

    def learn(self, dbapi: Any) -> Any:
        """Ask a connection for settings that others may change.

        If `learns`, the caller keeps the answer in `info` under `LEARNT`.
        """

    def prepare(self, dbapi: Any, info: MutableMapping[Any, Any], *, wait_ms: int, varies: bool = False) -> None:
        """Examine a new connection once: refuse one on which we cannot claim, and remember what later statements need.

        Once for each `kept_as`. What is already learnt is not asked again.

        Args:
            dbapi: The driver's connection.
            info: The connection's `info`.
            wait_ms: The longest that a claim waits.
            varies: The application changes its connections' settings at each checkout: what is learnt now may not hold later.
        """

    def settings_changed(self, dbapi: Any, info: MutableMapping[Any, Any]) -> bool:
        """Say whether a connection differs from what it was when prepared. Then it must be thrown away. Free, no round trip."""

    def claim(
        self, dbapi: Any, info: MutableMapping[Any, Any], row: ClaimRow, *, wait_ms: int, savepoint: bool
    ) -> bool:
        """Insert `row`, as the first statement of its transaction, and say whether it is ours (False: the key has a row already).

        Args:
            dbapi: The driver's connection.
            info: What `prepare` remembered of it.
            row: Who claims what; its owner is this attempt's alone.
            wait_ms: The longest to wait for another transaction that holds the key.
            savepoint: The transaction is the caller's, and the caller commits it: its earlier work survives a refusal. Else it is
                ours, and ends by `commit`.

        Raises:
            ClaimBusy: Another transaction holds the key. Any other refusal is the driver's error.
        """

    def begin(self, dbapi: Any, info: MutableMapping[Any, Any], owner: str, trace: Trace | None = None) -> None:
        """Begin a transaction without a claim, so that the driver reports it as open. It ends by `commit`.

        If a hook has already written something on this connection, this continues the hook's transaction.

        Args:
            dbapi: The driver's connection.
            info: What `prepare` remembered of it.
            owner: The attempt that owns the transaction.
            trace: Written on servers where something other than the attempt can commit it without notice.
        """

    def commit(
        self,
        dbapi: Any,
        info: MutableMapping[Any, Any],
        owner: str,
        rows: Sequence[ClaimRow],
        trace: Trace | None,
        send_commit: Callable[[], None],
    ) -> None:
        """Commit durably the transaction in which `owner` claimed `rows`: by `claim`, by a batch claim, or by `begin`.

        Args:
            dbapi: The driver's connection.
            info: What `prepare` remembered of it.
            owner: The attempt that should own the transaction.
            rows: What was claimed in it; none after `begin`.
            trace: What `begin` was given.
            send_commit: Sends the driver's own COMMIT. A dialect may send its own text instead.

        Raises:
            Gone: It is another transaction by now; nothing was sent. Any other refusal is the driver's error.
        """

    def cut(self, dbapi: Any) -> None:
        """End a connection whose user is in the middle of a statement: that user gets an error, and does not wait for ever.

        The caller must throw the connection away after that. Never raises.
        """

    def intact(self, dbapi: Any, info: MutableMapping[Any, Any], owner: str) -> bool | None:
        """Say whether this is still the transaction that `owner` began; None if we cannot tell. The caller ends it after that."""

    def read_out(self, dbapi: Any) -> bool:
        """Read the rest of the answer to the last statement. Free where it was read to its end.

        A procedure can fail after its first rows. Some drivers read the rest only with the next statement and raise that error
        there: a statement of ours would take the error for its own.

        Returns:
            Whether somebody reads its rows one by one (`stream_results`). Those are left alone; the next
            statement ends that reading.

        Raises:
            Exception: The driver's error of that last statement.
        """

    def rows_as(self, dbapi: Any) -> tuple[Any, ...]:
        """Return the row factory of this connection, which also applies to its later users. Free."""

    def make_rows(self, dbapi: Any, rows_as: tuple[Any, ...]) -> None:
        """Set this row factory again."""

    def before_call(self, dbapi: Any, info: MutableMapping[Any, Any], owner: str) -> Any:
        """Prepare for a statement that can end the transaction without notice. The result is for `after_call`.

        Called if `Read.unseen` says so, and only on servers that set `asks_around_calls`.
        """

    def after_call(self, dbapi: Any, info: MutableMapping[Any, Any], owner: str, *, drop: bool) -> bool | None:
        """Say whether the transaction survived that statement; None: not known yet, its rows are not read.

        Args:
            dbapi: The driver's connection.
            info: What `prepare` remembered of it.
            owner: The attempt that should own the transaction.
            drop: Discard unread rows, because the next statement is about to be sent and would lose them anyway.
        """

    def committed_since(self, dbapi: Any, info: MutableMapping[Any, Any], before: Any) -> bool | None:
        """Say whether this connection committed anything since `before_call` returned `before`; None if we cannot tell."""

    def logged_since(self, dbapi: Any, info: MutableMapping[Any, Any], trace: Trace | None) -> bool | None:
        """Say the same for the time since the claim, or since `begin`, from the server's own log of commits; None if
        it does not tell.

        Args:
            dbapi: The driver's connection.
            info: What `prepare` remembered of it.
            trace: What `begin` was given.
        """

    def server_session(self, dbapi: Any) -> object:
        """Return an object that stands for the driver's session with its server. After a reconnect it is another object. Free."""

    def position(self, dbapi: Any) -> Any:
        """Prepare to see what is sent on the driver directly. The result is for `sent_since`, and never None.

        Called when the transaction is over and nothing is open. Free, no round trip.
        """

    def sent_since(self, dbapi: Any, position: Any) -> bool:
        """Say whether anything that may have been committed was sent since that position. Free, no round trip."""

    def read_claim(self, dbapi: Any, row: ClaimRow, *, end: bool, wait: bool = True) -> ExistingClaim | None:
        """Read the row under the key.

        Args:
            dbapi: The driver's connection.
            row: The claim whose key to read.
            end: Roll the transaction back in the same round trip.
            wait: The transaction may be older than the row: wait for another transaction that is writing the row, if the
                server needs that to show it. Else this begins a transaction, and committed rows are enough.
        """

    def trace_state(self, dbapi: Any, row: ClaimRow) -> TraceState:
        """Say what earlier runs of this message left behind. Free, no round trip, on servers where nothing else
        can commit for us.

        Args:
            dbapi: The driver's connection, in no transaction or in one that the caller will roll back; it stays so.
            row: The claim of the message.
        """

    def state(self, dbapi: Any) -> State:
        """Read the driver's own transaction state: free, no round trip."""

    def error_kind(self, error: BaseException) -> ErrorKind:
        """Say what a driver's error means."""

    def no_table(self, error: BaseException) -> bool:
        """Did the claim find no table to stand in?"""

    def refused(self, dbapi: Any, error: BaseException) -> bool:
        """Did the server refuse this COMMIT for certain? Then the same connection still answers, in no transaction of ours."""

    def in_our_name(self, connection: Connection, statement: Insert | Update, values: Mapping[str, Any]) -> int:
        """Execute a statement of ours in the handler's transaction; return how many rows it changed.

        The handler may have changed the role for its own statements (`SET LOCAL ROLE`). Our statement must not use that role. The
        handler, and everything that runs with COMMIT, must find it again afterwards.
        """

    def no_room(self, error: BaseException) -> bool:
        """Does the server say that it has no room left: a full disk, or a table of the handler's own that is full?"""

    def locked(self, error: BaseException) -> bool:
        """Is another transaction in the way, although `error_kind` says that the database cannot work? SQLite locks the file."""

    def gave_up(self, error: BaseException) -> bool:
        """Did the driver itself end the connection, because an answer took longer than its limit (`read_timeout`)?"""

    def timed_out(self, error: BaseException) -> bool:
        """Did a statement exceed a time limit, which an earlier user of the connection may have left in the session?"""

    def limit_was_left(self, dbapi: Any, info: MutableMapping[Any, Any]) -> bool:
        """After a claim that a time limit ended: does the limit differ from the one the connection had when it was prepared?

        A limit of a role, a database, an engine or a listener applies to every connection, so another connection
        would wait no longer.
        Ends the transaction, and with it what was set for it alone.
        """

    def unstorable(self, error: BaseException) -> bool:
        """Does it mean that a text has characters which this database, or the connection to it, lacks?"""

    def gives_no_more(self, error: BaseException) -> bool:
        """Did connecting fail for a reason that does not concern the existing connections: too many of them, for example?"""

    def hopeless(self, error: BaseException) -> bool:
        """Did connecting fail for a reason that waiting does not repair: no such user, password or database?"""

    def lost(self, dbapi: Any, info: MutableMapping[Any, Any], error: BaseException) -> bool:
        """Did this error roll the whole transaction back, so that later statements would commit without the claim?"""

    def read(self, dbapi: Any, info: MutableMapping[Any, Any], statement: str) -> Read:
        """Say, from its first words, what a handler's statement would do to its transaction and its connection."""


class BatchClaims(Protocol):
    """Claims of a batch of messages on one database server."""

    def claim(
        self,
        dbapi: Any,
        info: MutableMapping[Any, Any],
        rows: Sequence[ClaimRow],
        *,
        owner: str,
        wait_ms: int,
        meanwhile: Iterable[object] = (),
    ) -> Mapping[str, ExistingClaim | None]:
        """Insert `rows`, as the first statement of a transaction that this begins. Existing rows are left as they are.

        Args:
            dbapi: The driver's connection, in no transaction.
            info: What `Dialect.prepare` remembered of it.
            rows: Of one consumer group and handler, each key once, sorted by key; at least one.
            owner: This attempt, which is to own them.
            wait_ms: The longest to wait for another run of any of these keys; 0: not at all. MySQL
                waits as long as its session says.
            meanwhile: Work to do while the server answers, a step for each element. What is left when it has answered is not
                done, and nothing is done if the driver keeps the thread.

        Returns:
            The keys that are not ours, each with its existing claim (None: it is gone again). Empty: all are ours. If none is,
            the transaction may have been ended.

        Raises:
            ClaimBusy: Another run holds one of the keys, we do not know which; none is ours. Any other refusal is the driver's
                error.
        """


WAIT_MS: Final = 2000
"""How long to wait for a row under a lease that another transaction is changing: a complete or a record takes a round trip."""


class LeaseClaims(Protocol):
    """Claims with a lease on one database server. It has one method: the other changes of a lease need nothing of a driver."""

    def claim(
        self,
        dbapi: Any,
        info: MutableMapping[Any, Any],
        row: ClaimRow,
        token: str,
        *,
        lease: timedelta,
        also: bytes,
        wait_ms: int,
        steps: bool,
    ) -> LeaseAnswer:
        """Take the key if it is new, or free and of this payload; return what is there. Begins and ends its transaction.

        Args:
            dbapi: The driver's connection, in no transaction.
            info: What `Dialect.prepare` remembered of it.
            row: Who claims what.
            token: The fencing token of the new claim.
            lease: How long the claim holds, by the server's clock.
            also: Another stored fingerprint that counts as this payload's.
            wait_ms: The longest to wait for another transaction that is changing this row.
            steps: Read the recorded steps, too.

        Raises:
            ClaimBusy: Another transaction holds the row itself; nothing was changed. Any other refusal is the driver's error.
        """


def steps_of(table: str) -> str:
    """Return the name of the table of steps that belongs to this table of claims.

    Example:
        >>> steps_of("`shop`.message_idempotent")
        '`shop`.message_step'
    """
    return table.removesuffix("message_idempotent") + "message_step"
