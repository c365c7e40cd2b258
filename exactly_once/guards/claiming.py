"""The entry point `eo.claim`: one claim in the caller's transaction. Begins a transaction only if there is none, and ends none.

The claim is sent inside a savepoint, so that a refusal does not touch the caller's earlier work. What follows is the caller's
affair; `callers_commit` refuses a COMMIT that would not keep the claim. Called by the facade.
"""

from typing import Any, Final
from weakref import WeakKeyDictionary, ref

from sqlalchemy import Engine
from sqlalchemy.orm import Session, scoped_session

from exactly_once import errors
from exactly_once.claim import ClaimRow
from exactly_once.database.connections import forked_engines
from exactly_once.database.connections.had_before import is_firsthand
from exactly_once.database.connections.pooler import SAID
from exactly_once.database.dialects.claim_refusal import raise_for_the_store
from exactly_once.database.dialects.contract import ClaimBusy, Dialect, ErrorKind, State
from exactly_once.database.dialects.registry import dialect_for
from exactly_once.database.dialects.schema_lookup import schema_in
from exactly_once.database.owner import new_owner
from exactly_once.database.schema import HANDLER_BYTES
from exactly_once.database.watched.session import WATCHED
from exactly_once.database.watched.unread import read_out
from exactly_once.database.watched.watch import Watch
from exactly_once.errors import ConfigurationError, PayloadConflict
from exactly_once.guards import callers_commit
from exactly_once.guards.contract import Conflict, Consumed, Unfinished
from exactly_once.guards.transaction import standing
from exactly_once.handlers.body import parse_json
from exactly_once.handlers.fingerprint import differing_paths, maker
from exactly_once.keys import canonical, check_name
from exactly_once.message import Message
from exactly_once.wording.text import escaped

__all__ = ["Claimer"]

_BODY: Final = maker("body")


class Claimer:
    """Claims on the engine that a session is bound to, and remembers the dialect of each engine.

    Args:
        pooler: Assume a pooler between us and PostgreSQL, even if none is detected.
        durable: The caller's commit waits for the disk, whatever the session's setting is.
    """

    def __init__(self, *, pooler: bool = False, durable: bool = True) -> None:
        self._pooler, self._durable = pooler, durable
        self._dialects: WeakKeyDictionary[Engine, Dialect] = WeakKeyDictionary()

    def claim(
        self,
        session: "Session | scoped_session[Any]",
        group: str,
        handler: str,
        key: object,
        *,
        payload: bytes | None,
        wait_ms: int,
        schema: str | None,
    ) -> bool:
        """See `ExactlyOnce.claim`."""
        if isinstance(session, scoped_session):
            session = session()  # the session of this thread, task or request
        if not isinstance(session, Session):
            raise ConfigurationError(_no_session(session))
        check_name(handler, HANDLER_BYTES, "handler")
        message = Message("", payload)
        parsed = parse_json(payload)
        row = ClaimRow(
            group,
            handler,
            canonical(key if isinstance(key, tuple) else (key,)),
            b"" if payload is None else _BODY.of(message, parsed),
            owner=new_owner(),
        )
        engine = forked_engines.base_engine(session.get_bind().engine)
        dialect = self._dialects.get(engine)
        if dialect is None:
            dialect = self._dialects[engine] = self._speaking(engine, schema)
        try:
            connection = session.connection()
        except Exception as error:
            raise_for_the_store(dialect, error, engine)
            raise
        dbapi, info = connection.connection.dbapi_connection, connection.info
        watch: Watch | None = info.get(WATCHED)
        begun = dialect.state(dbapi) is not State.IDLE
        if watch is not None and watch.connection is not connection:
            watch = None  # left by a handler that had this connection before
        if watch is not None:
            watch.admit()  # the claim is sent on the driver, where nothing else checks
            if not begun:
                raise watch.ended()  # the handler's transaction is over, and this claim would begin another
            if watch.is_of(row):
                return True  # the handler's own message, which this attempt has claimed already: do its work
        else:
            callers_commit.admit(connection)
        if read_out(connection, dialect, dbapi):
            raise errors.Misuse(_IN_THE_MIDST)
        try:
            if dialect.kept_as not in info or dialect.settings_changed(dbapi, info):
                forked_engines.register_connection(engine, connection.connection)
                if self._pooler:
                    info[SAID] = True
                # the caller may have set a role or a time limit on the connection, and may reset it later. So each claim reads
                # the present setting, and restores it
                dialect.prepare(dbapi, info, wait_ms=wait_ms, varies=True)
            if dialect.name == "sqlite" and watch is None and begun:
                # only here: in a handler BEGIN was sent by us, and without a transaction it is sent with the claim
                from exactly_once.database.dialects.sqlite_savepoint import hold

                hold(connection)
            if dialect.claim(dbapi, info, row, wait_ms=wait_ms, savepoint=True):
                if watch is None:
                    callers_commit.claimed(connection, dialect, row)
                return True
            known = dialect.read_claim(dbapi, row, end=False)
        except ClaimBusy as busy:
            told = errors.InProgress(_told(row, "is being worked on by another transaction, which may still fail"))
            if busy.lost:
                # the server rolled back the caller's earlier work, too: from here only a rollback is allowed
                if watch is not None:
                    # in a handler, whatever it does with this error: the victim of a deadlock runs again at once, others later
                    watch.lost = (busy.__cause__ or told) if busy.again else told
                connection.invalidate(busy)
            elif busy.cut and not is_firsthand(connection):
                # ended by a time limit, which an earlier user of the connection may have left in it
                connection.connection.invalidate(soft=True)
            raise told from busy
        except Exception as error:
            if dialect.error_kind(error) is ErrorKind.UNAVAILABLE or dialect.unstorable(error):
                # the caller's transaction is lost or aborted, but PostgreSQL would answer its COMMIT without an error
                connection.invalidate(error)
            elif not is_firsthand(connection):
                # an earlier user of the connection may have left a role or a mode in it: the caller's next try gets another
                connection.connection.invalidate(soft=True)
            raise_for_the_store(dialect, error, engine)
            raise
        except BaseException as error:
            # interrupted by a timeout or a signal: the claim may stand, and a caller who goes on would commit it
            connection.invalidate(error)
            raise
        match standing(known, row):
            case Consumed():
                return False
            case Conflict(stored):
                paths = differing_paths(stored, _BODY, message, parsed)
                what = f" What differs: {', '.join(escaped(path) for path in paths)}." if paths else ""
                raise PayloadConflict(
                    _told(
                        row,
                        "was consumed with another payload: keep the message for a person, asking again does not help",
                    )
                    + what
                )
            case Unfinished():
                raise errors.InProgress(
                    _told(
                        row,
                        "was claimed by an attempt whose transaction was committed before it ended: do not acknowledge the"
                        " message; what it did is for a person to see. Type: exactly-once failures list",
                    )
                )
            case _:
                raise errors.InProgress(
                    _told(row, "is being worked on by another run: do not acknowledge the message, ask again later")
                )

    def _speaking(self, engine: Engine, schema: str | None) -> Dialect:
        """Make the dialect of an engine. It lives as long as the engine, so it must not keep the engine alive."""
        known = ref(engine)

        def named() -> str | None:
            if schema:
                return schema
            used = known()
            assert used is not None  # called in a claim, whose session refers to the engine
            return schema_in(used)

        return dialect_for(engine, named, durable=self._durable, kept_as=f"claim {schema} {self._pooler}")


def _no_session(given: object) -> str:
    """Return the text that says what to pass instead of this object."""
    names = [each.__name__ for each in type(given).__mro__]
    kind = "a class" if isinstance(given, type) else f"{'an' if names[0][0] in 'AEIOU' else 'a'} {names[0]}"
    wrong = f"eo.claim was given {kind}, not a Session."
    if "AsyncSession" in names or hasattr(given, "registry"):
        of_scope = " (of an async_scoped_session: session = scoped())" if hasattr(given, "registry") else ""
        return f"{wrong} With an AsyncSession{of_scope}: await session.run_sync(eo.claim, handler, key)"
    if names[0].lower().startswith("async"):
        return (
            f"{wrong} Give it the session of your transaction: async with AsyncSession(engine) as session, session.begin():"
            " await session.run_sync(eo.claim, handler, key)"
        )
    return (
        f"{wrong} Give it the session of your transaction: with Session(engine) as session, session.begin():"
        " eo.claim(session, handler, key)"
    )


def _told(row: ClaimRow, what: str) -> str:
    return f"The key {escaped(row.key)!r} of {row.handler!r} {what}."


_IN_THE_MIDST: Final = (
    "eo.claim was called in the midst of another statement on its connection, whose rows are still read one by one"
    " (stream_results, yield_per). Nothing was claimed, and no row is lost. Read them to their end first (.all()), or in a"
    " session of their own."
)
