"""How each database is spoken to: the text of our statements, and what its errors mean. Guards hold no SQL of their own.

A claim goes below SQLAlchemy, as fixed text on the driver's connection, because a round trip is the unit of cost and a
driver's own error is exact. Everything here is synchronous: on an async engine it runs in SQLAlchemy's greenlet, where
the adapted driver connection awaits by itself.

Errors are told apart by SQLSTATE or errno, never by their text: servers speak other languages.
"""

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from datetime import timedelta
from enum import Enum
from typing import Any, Final, NamedTuple, Protocol

from sqlalchemy import Connection, Engine, Insert, Update
from sqlalchemy.exc import TimeoutError as PoolTimeout

from exactly_once.claim import ClaimRow, ExistingClaim, LeaseAnswer
from exactly_once.database.dialects.keywords import Read
from exactly_once.database.errors.crowded import none_free
from exactly_once.database.errors.drivers_own import original
from exactly_once.database.errors.not_made import not_made
from exactly_once.database.errors.unreached import unreached
from exactly_once.errors import BadKey, SchemaError, StoreUnavailable
from exactly_once.exceptions.words import words_of

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
    "first_words",
    "raise_for_the_store",
    "steps_of",
]

LEARNT: Final = "exactly_once.learnt"
"""In the `info` of a connection: what `Dialect.learn` was told, before anybody else had it."""


class Trace(NamedTuple):
    """A row written first in a transaction under a lease, and deleted with our COMMIT.

    Where it stands afterwards, something else has committed that transaction, and the message must not run again.
    """

    row: ClaimRow
    name: str
    """In place of a step's; no other transaction's."""
    attempt: int
    token: str


class Trail(Enum):
    """What earlier runs under a lease left of their transactions."""

    NONE = "nothing that is, or can be, committed behind their backs"
    COMMITTED = "something else than a run's own COMMIT has committed it"
    RUNNING = "the server still runs a statement of a run that is over, which may commit"


class State(Enum):
    """The driver's own word on the transaction; what SQLAlchemy believes proves nothing."""

    IDLE = "no transaction"
    OPEN = "in a transaction"
    BUSY = "in the middle of a statement, or of reading its rows"
    ABORTED = "in a transaction that can only be rolled back"
    CLOSED = "closed by whoever has the connection, and not by the server: what was committed before is not known"


class ErrorKind(Enum):
    """What a database error means for the attempt it struck."""

    TRANSIENT = "deadlock, serialization or lock timeout: a fresh transaction may succeed at once"
    UNAVAILABLE = "the server does not answer, or cannot write now"
    REFUSED = "the server said no and rolled back: nothing of this was committed"
    UNKNOWN = "none of these"


class ClaimBusy(Exception):
    """Another transaction holds the key, and `claim_wait` is over.

    Args:
        again: Worth one more try at once.
        lost: The server threw the whole transaction away, what was done in it before included.
        cut: A time limit of the session ended the wait, and not ours. Whoever had the connection before may have left it there:
            `Dialect.limit_was_left` tells.
    """

    def __init__(self, again: bool, *, lost: bool = False, cut: bool = False) -> None:
        super().__init__()
        self.again, self.lost, self.cut = again, lost, cut


class Gone(Exception):
    """The transaction that the claim was written in is not there any more; this attempt's COMMIT was not sent."""


class Dialect(Protocol):
    """One database server through one driver. `dbapi` is SQLAlchemy's `dbapi_connection`, adapted where it is async."""

    name: str
    kept_as: str
    """Under which name `prepare` remembers in a connection's `info` what it saw.

    It tells the settings that decide on that, and no more: what is remembered refers to no application, and however many there
    are on one engine, one after the other, they find it there.
    """
    asks_around_calls: bool
    """A statement whose text is not there to read can end the transaction unseen."""
    embedded: bool
    """The database is a library in this process: nothing that was sent goes on once its connection is closed."""
    learns: bool
    """`prepare` learns what others may have changed in the connection: it is asked of one that nobody had."""

    @property
    def table(self) -> str:
        """Where claims are kept, as it stands in statements: with its schema, so that no search path moves it.

        Looked up at first use, which may connect.
        """

    def learn(self, dbapi: Any) -> Any:
        """Ask a connection for what others may change in it; where `learns`, the answer is kept in its `info` under `LEARNT`."""

    def prepare(self, dbapi: Any, info: MutableMapping[Any, Any], *, wait_ms: int, varies: bool = False) -> None:
        """Look once at a connection we have not seen: refuse what cannot be claimed on, remember what later statements need.

        Once for each `kept_as`. What is learnt already is not asked again.

        Args:
            dbapi: The driver's connection.
            info: The connection's.
            wait_ms: The longest that a claim waits.
            varies: The application sets its connections anew as they are taken: what is learnt now need not hold later.
        """

    def strange(self, dbapi: Any, info: MutableMapping[Any, Any]) -> bool:
        """Say whether a connection is not what it was when it was prepared: free, no round trip. It is to be thrown away."""

    def claim(
        self, dbapi: Any, info: MutableMapping[Any, Any], row: ClaimRow, *, wait_ms: int, savepoint: bool
    ) -> bool:
        """Insert `row`, first thing in its transaction, and say whether it is ours (False: it stands there already).

        Args:
            dbapi: The driver's connection.
            info: What `prepare` remembered of it.
            row: Who claims what; its owner is this attempt's alone.
            wait_ms: The longest to wait for another transaction that holds the key.
            savepoint: The transaction is the caller's, who commits it: its earlier work survives a refusal. Else it is ours,
                and ends by `commit`.

        Raises:
            ClaimBusy: Another transaction holds the key. Else the driver's error.
        """

    def begin(self, dbapi: Any, info: MutableMapping[Any, Any], owner: str, trace: Trace | None = None) -> None:
        """Begin a transaction without a claim, so that the driver says that it is open; it ends by `commit`.

        Where a hook has written something on this connection before, it goes on in the transaction that this has begun.

        Args:
            dbapi: The driver's connection.
            info: What `prepare` remembered of it.
            owner: Whose transaction it is.
            trace: To be written where something else than the attempt can commit it unseen.
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
        """Commit durably the transaction in which `owner` claimed `rows`, by `claim`, a group's claim or `begin`.

        Args:
            dbapi: The driver's connection.
            info: What `prepare` remembered of it.
            owner: Whose transaction it is to be.
            rows: What was claimed in it; none by `begin`.
            trace: What `begin` was given.
            send_commit: Sends the driver's own COMMIT.

        Raises:
            Gone: It is another transaction by now; nothing was sent. Else the driver's error.
        """

    def cut(self, dbapi: Any) -> None:
        """End the connection of somebody who is in the middle of a statement: they get an error, instead of waiting for ever.

        It is to be thrown away after that. Never raises.
        """

    def intact(self, dbapi: Any, info: MutableMapping[Any, Any], owner: str) -> bool | None:
        """Say whether this is still the transaction that `owner` began; None where nobody can tell. It is to end after that."""

    def read_out(self, dbapi: Any) -> bool:
        """Read what is left of the answer to the last statement; nothing, and free, where it was read to its end.

        A procedure can fail behind its first rows. Drivers that read the rest with the next statement would raise that error
        there, and a statement of ours would take it for its own.

        Returns:
            Whether somebody reads its rows one by one (`stream_results`): these are left alone, and the next statement ends that.

        Raises:
            Exception: The driver's error, of that last statement.
        """

    def rows_as(self, dbapi: Any) -> tuple[Any, ...]:
        """Return what makes the rows that are read on this connection, of all who have it after this one. Free."""

    def make_rows(self, dbapi: Any, rows_as: tuple[Any, ...]) -> None:
        """Have them made by this again."""

    def before_call(self, dbapi: Any, info: MutableMapping[Any, Any], owner: str) -> Any:
        """Make ready for a statement that can end the transaction unseen; what is returned is for `after_call`.

        Called where `Read.unseen` says so, and only where `asks_around_calls`.
        """

    def after_call(self, dbapi: Any, info: MutableMapping[Any, Any], owner: str, *, drop: bool) -> bool | None:
        """Say whether the transaction survived that statement; None: not now, its rows are not read yet.

        Args:
            dbapi: The driver's connection.
            info: What `prepare` remembered of it.
            owner: Whose transaction it is to be.
            drop: Rows that are not read yet are lost in any case: the next statement is about to be sent.
        """

    def committed_since(self, dbapi: Any, info: MutableMapping[Any, Any], before: Any) -> bool | None:
        """Say whether this connection committed anything since `before_call` gave `before`; None where nobody can tell."""

    def logged_since(self, dbapi: Any, info: MutableMapping[Any, Any], trace: Trace | None) -> bool | None:
        """Say the same of the time since the claim, or `begin`, by the server's own log of commits; None where it does not tell.

        Args:
            dbapi: The driver's connection.
            info: What `prepare` remembered of it.
            trace: What `begin` was given.
        """

    def server_session(self, dbapi: Any) -> object:
        """Return what stands for the session that the driver has with its server; another object once it connected anew. Free."""

    def mark(self, dbapi: Any) -> Any:
        """Make ready to see what is sent on the driver itself; what is returned is for `sent_since`, and never None.

        Asked where the transaction is over and nothing is open. Free, no round trip.
        """

    def sent_since(self, dbapi: Any, mark: Any) -> bool:
        """Say whether anything that may have been committed was sent on it since `mark` gave `mark`: free, no round trip."""

    def known(self, dbapi: Any, row: ClaimRow, *, end: bool, wait: bool = True) -> ExistingClaim | None:
        """Read what stands under the key.

        Args:
            dbapi: The driver's connection.
            row: Whose key.
            end: Roll the transaction back in the same breath.
            wait: In a transaction that may be older than what is asked for: wait for who is just writing it, where the
                server needs that to show it. Else this begins a transaction, and what is committed is enough.
        """

    def trail(self, dbapi: Any, row: ClaimRow) -> Trail:
        """Say what earlier runs of this message left behind. Free, no round trip, where nothing can commit behind our backs.

        Args:
            dbapi: The driver's connection, in no transaction or in one that is to be rolled back, as it is afterwards.
            row: Which message.
        """

    def state(self, dbapi: Any) -> State:
        """Read the driver's own transaction state: free, no round trip."""

    def error_kind(self, error: BaseException) -> ErrorKind:
        """Say what a driver's error means."""

    def no_table(self, error: BaseException) -> bool:
        """Did the claim find no table to stand in?"""

    def refused(self, dbapi: Any, error: BaseException) -> bool:
        """Did the server refuse this COMMIT for certain? The same connection still answers then, in no transaction of ours."""

    def in_our_name(self, connection: Connection, statement: Insert | Update, values: Mapping[str, Any]) -> int:
        """Execute a statement of ours in the handler's transaction; return how many rows it changed.

        The handler may have taken another role for its own statements (`SET LOCAL ROLE`), which must not be ours, and which
        it, and what runs with COMMIT, must find again.
        """

    def no_room(self, error: BaseException) -> bool:
        """Does the server say that it has no room left: a full disk, or a table of the handler's own that is full?"""

    def locked(self, error: BaseException) -> bool:
        """Is another transaction in the way, where `trouble` says that the database cannot work? SQLite locks the whole of it."""

    def gave_up(self, error: BaseException) -> bool:
        """Did the driver itself end the connection, for an answer that took longer than it was told to wait (`read_timeout`)?"""

    def timed_out(self, error: BaseException) -> bool:
        """Did a statement run into a limit of time, which the session may have from whoever had it before?"""

    def limit_was_left(self, dbapi: Any, info: MutableMapping[Any, Any]) -> bool:
        """After a claim that a time limit ended: is it another one than the connection had when it was prepared?

        That of a role, a database, an engine or a listener is on every connection, and no other one waits longer. Ends the
        transaction, and with it what was set for it alone.
        """

    def unstorable(self, error: BaseException) -> bool:
        """Does it say that a text has characters which this database, or the connection to it, lacks?"""

    def gives_no_more(self, error: BaseException) -> bool:
        """Did connecting fail for a reason that says nothing of the connections there are: too many of them, say?"""

    def hopeless(self, error: BaseException) -> bool:
        """Did connecting fail for a reason that waiting does not mend: no such user, password or database?"""

    def lost(self, dbapi: Any, info: MutableMapping[Any, Any], error: BaseException) -> bool:
        """Did this error throw the whole transaction away, so that later statements would commit without the claim?"""

    def read(self, dbapi: Any, info: MutableMapping[Any, Any], statement: str) -> Read:
        """Say what a handler's statement would do to its transaction and its connection, by its first words."""


class BatchClaims(Protocol):
    """Claims of a whole group of messages on one database server."""

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
        """Insert `rows`, first thing in a transaction that this begins; what stood there already is left as it is.

        Args:
            dbapi: The driver's connection, in no transaction.
            info: What `Dialect.prepare` remembered of it.
            rows: Of one consumer group and handler, each key once, sorted by key; at least one.
            owner: Whose they are to be: this attempt's.
            wait_ms: The longest to wait for another run of any of these keys; 0: not at all. MySQL
                waits as long as its session says.
            meanwhile: Work to do while the server answers, a step for each element; what is left when it has answered, or
                where the driver does not let go of the thread, is not done.

        Returns:
            The keys that are not ours, with what stands there (None: it is gone again). Empty: all are ours. If none is,
            the transaction may have been ended.

        Raises:
            ClaimBusy: Another run holds one of the keys, nobody says which; none is ours. Else the driver's error.
        """


WAIT_MS: Final = 2000
"""How long to wait for a row under a lease that somebody is changing: a complete or a record takes a round trip."""


class LeaseClaims(Protocol):
    """Claims with a lease on one database server. One verb: the other changes of a lease need nothing of a driver."""

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
        """Take the key if it is new, or free and of this payload; say what stands there. Begins and ends its transaction.

        Args:
            dbapi: The driver's connection, in no transaction.
            info: What `Dialect.prepare` remembered of it.
            row: Who claims what.
            token: The new claim's.
            lease: How long it holds, by the server's clock.
            also: Another stored fingerprint that counts as this payload's.
            wait_ms: The longest to wait for somebody who changes this row at the moment.
            steps: Read the recorded steps, too.

        Raises:
            ClaimBusy: Somebody holds the row itself; nothing was changed. Else the driver's error.
        """


def raise_for_the_store(dialect: Dialect, error: BaseException, engine: Engine, store: str | None = None) -> None:
    """Raise what an error of a claim or a look-up says about the store; return if it says nothing: the error stands.

    Args:
        dialect: How that database is spoken to.
        error: What was raised.
        engine: Whose connection it was, or was to be.
        store: The database's name, where it is not the handler's own.

    Raises:
        StoreUnavailable: The server does not answer, or no connection to it was to be had.
        SchemaError: There is no table to claim in: no message is to blame, and none is to be counted.
        BadKey: The key has characters that the database lacks; no retry mends that.
    """
    if isinstance(error, StoreUnavailable):  # said as the connection was taken
        raise StoreUnavailable(f"{error}; nothing ran.", store=store) from error
    if isinstance(error, PoolTimeout):
        raise StoreUnavailable(none_free(engine), store=store) from error
    if dialect.error_kind(error) is ErrorKind.UNAVAILABLE:
        raise StoreUnavailable(
            f"The database does not answer ({type(error).__name__}: {first_words(error)}); nothing ran.", store=store
        ) from error
    if unreached(error, (engine,)):
        told = StoreUnavailable(
            f"No connection to the database was given: {type(error).__name__} was raised as one was made or taken, by a listener"
            " of the engine's, by its creator=, or by the driver; nothing ran.",
            store=store,
        )
        told.by_application = True
        raise told from error
    if dialect.no_table(error):
        schema = dialect.table.rpartition(".")[0].strip('"`') or None
        raise SchemaError(not_made(engine, schema=schema, ran="nothing ran")) from error
    if isinstance(error, UnicodeEncodeError) or dialect.unstorable(error):
        raise BadKey(
            "The business key (or the name of a step) has characters that the database's character set lacks; nothing ran."
            " Use a database in UTF8, or a key in ASCII. Type: exactly-once doctor"
        ) from error


def first_words(error: BaseException) -> str:
    """Return the first line of what a server or its driver said."""
    words = words_of(original(error)).strip()
    return words.splitlines()[0] if words else "no text"


def steps_of(table: str) -> str:
    """Return where steps are recorded, beside these claims.

    Example:
        >>> steps_of("`shop`.message_idempotent")
        '`shop`.message_step'
    """
    return table.removesuffix("message_idempotent") + "message_step"
