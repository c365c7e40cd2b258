"""The transaction guard: the claim is a row in the handler's own transaction, written as consumed.

The row is visible only if that transaction commits. So effects and claim stand or fall together, and a crash at any line leaves
neither. A concurrent duplicate waits for the winner's end, at most `claim_wait`. Called by `attempt` and `processor`.
"""

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property, partial
from typing import Any, Final

from sqlalchemy import Connection
from sqlalchemy.orm import Session

from exactly_once.claim import ClaimRow, ExistingClaim
from exactly_once.database.connections.had_before import moment
from exactly_once.database.dialects.claim_refusal import (
    is_refusal,
    of_nobody,
    raise_for_the_store,
    raise_for_the_table,
    tried,
)
from exactly_once.database.dialects.contract import (
    BatchClaims,
    ClaimBusy,
    Dialect,
    ErrorKind,
    TraceState,
)
from exactly_once.database.dialects.firsthand import ready
from exactly_once.database.dialects.registry import batch_claims_for
from exactly_once.database.errors.interrupted import interrupted
from exactly_once.database.errors.unreached import unreached
from exactly_once.database.schema import CONSUMED, UNFINISHED
from exactly_once.database.watched.session import elsewhere
from exactly_once.database.watched.watch import Watch, attach
from exactly_once.errors import Misuse
from exactly_once.exceptions.stops import asked_from_outside
from exactly_once.guards.contract import Busy, Claim, Conflict, Consumed, HookRaised, OpenOurs, Unfinished, Won
from exactly_once.guards.lease.sql import SqlLeases
from exactly_once.guards.our_session import in_our_session
from exactly_once.handlers.fingerprint import Differs, compare

__all__ = ["BatchClaim", "TransactionGuard", "standing"]

_BATCH_WAIT_MS: Final = 50


@dataclass(frozen=True, slots=True)
class BatchClaim:
    """The answer to a batch's claim."""

    won: Won | None
    """The transaction in which keys were claimed. None: no key was won."""
    others: Mapping[str, Consumed | Busy | Conflict | Unfinished]
    """The keys that were not won, and why."""


class TransactionGuard:
    """Claims on one database.

    Args:
        dialect: The dialect of that database.
        leases: The leases in the same database: in an earlier release the handler may have been under a lease.
        claim_wait: How long a claim waits for another run of the same key. It bounds the claim only.
    """

    def __init__(self, dialect: Dialect, leases: SqlLeases, *, claim_wait: timedelta) -> None:
        self._dialect, self._leases = dialect, leases
        self._wait_ms = max(1, round(claim_wait.total_seconds() * 1000))

    def claim(self, session: Session, row: ClaimRow) -> Claim:
        """See `Guard.claim`."""
        dialect, won, since = self._dialect, False, moment()
        asked: ClaimRow | None = row
        while not won:
            connection, dbapi, info, used = self._connected(session, since)
            try:
                won = dialect.claim(dbapi, info, row, wait_ms=self._wait_ms, savepoint=False)
                if not won:
                    known = dialect.read_claim(dbapi, row, end=True)
                    if known is None or known.status in (CONSUMED, UNFINISHED):
                        return standing(known, row)
                    trace_state = self._leases.trace_state_in(connection, row)
                    if trace_state is TraceState.RUNNING:
                        return Busy()
                    if trace_state is TraceState.COMMITTED:
                        return Unfinished(known.owner or "")
                    # reading the claim ended what the session's hooks had set up, which the handler's transaction needs
                    session.rollback()
                    connection, dbapi, info, used = self._connected(session, since)
                    if not self._cleared(connection, row):
                        return standing(known, row)
                    won = dialect.claim(dbapi, info, row, wait_ms=self._wait_ms, savepoint=False)
                    break
            except ClaimBusy as busy:
                if not (busy.cut and used and self._limit_was_left(session, connection)):
                    return Busy(again=busy.again)
                asked = self._failed(session, connection, busy, asked, used=used)
            except Exception as error:
                asked = self._failed(session, connection, error, asked, used=used)
        if not won:  # the old lease was cleared, but another run claimed the key before us
            session.rollback()
            return Busy(again=True)
        watch = Watch(connection, dialect, dbapi, row.owner, (row,))
        attach(session, watch)
        return Won(watch)

    def claim_batch(
        self,
        session: Session,
        rows: Sequence[ClaimRow],
        *,
        owner: str,
        patient: bool = True,
        meanwhile: Iterable[object] = (),
    ) -> "BatchClaim | None":
        """Take the keys of a whole batch before user code runs. The answer names the keys that were not won.

        If any key was won, the session is in the transaction that the handler will use. Else it is in none.

        Args:
            session: In no transaction.
            rows: The claims of one handler, each key once, sorted by key; at least one.
            owner: This attempt.
            patient: Wait a moment for another run that holds one of the keys.
            meanwhile: Work to do while the server executes the claim; one step for each element.

        Returns:
            None if another run holds one of the keys, and it is not known which.

        Raises:
            StoreUnavailable: The store does not answer. As far as is known, nothing was claimed.
        """
        # a short limit: one key in progress would delay all the others
        wait_ms = min(self._wait_ms, _BATCH_WAIT_MS) if patient else 0
        standing_by_key: Mapping[str, ExistingClaim | None] | None = None
        asked: ClaimRow | None = rows[0]
        since = moment()
        while standing_by_key is None:
            connection, dbapi, info, used = self._connected(session, since)
            try:
                standing_by_key = self._batch_claims.claim(
                    dbapi, info, rows, owner=owner, wait_ms=wait_ms, meanwhile=meanwhile
                )
            except ClaimBusy as busy:
                if not (busy.cut and used and self._limit_was_left(session, connection)):
                    return None
                asked = self._failed(session, connection, busy, asked, used=used)
            except Exception as error:
                asked = self._failed(session, connection, error, asked, used=used)
        by_key = {row.key: row for row in rows} if standing_by_key else {}
        others = {key: standing(known, by_key[key]) for key, known in standing_by_key.items()}
        if len(others) == len(rows):
            session.rollback()
            return BatchClaim(None, others)
        ours = [row for row in rows if row.key not in others] if others else rows
        watch = Watch(connection, self._dialect, dbapi, owner, ours)
        attach(session, watch)
        return BatchClaim(Won(watch), others)

    @cached_property
    def _batch_claims(self) -> BatchClaims:
        return batch_claims_for(self._dialect)

    def _connected(self, session: Session, since: int) -> tuple[Connection, Any, MutableMapping[Any, Any], bool]:
        """Return the session's connection, prepared, and whether it had a user before (was not opened after `since`)."""
        dialect = self._dialect
        try:
            # first, so that SQLAlchemy knows of the transaction that we begin on the driver; costs no round trip
            connection = session.connection()
            if (wrong := elsewhere(session, connection)) is not None:
                raise Misuse(wrong)  # noqa: TRY301
            while (used := ready(dialect, connection, wait_ms=self._wait_ms, since=since)) is None:
                # an earlier user may have changed the connection so that a key would be stored as another key
                connection.invalidate()
                session.rollback()
                connection = session.connection()
        except Exception as error:
            raise_for_the_store(dialect, error, session.get_bind().engine)
            raise
        except BaseException as error:
            if asked_from_outside(error) or unreached(error, (session.get_bind().engine,)):
                raise
            raise HookRaised(error) from error  # nothing was sent: a hook such as after_begin raised it
        return connection, connection.connection.dbapi_connection, connection.info, used

    def _limit_was_left(self, session: Session, connection: Connection) -> bool:
        try:
            return self._dialect.limit_was_left(connection.connection.dbapi_connection, connection.info)
        except Exception as error:
            self._failed(session, connection, error, None, used=False)
            raise

    def _failed(
        self, session: Session, connection: Connection, error: Exception, row: ClaimRow | None, *, used: bool
    ) -> ClaimRow | None:
        """After a claim that failed: return if the claim must be sent again on another connection, else raise.

        Two kinds of error must not be blamed on the message. First, an earlier user of the connection may have left a role, a
        time limit or AUTOCOMMIT in it: the claim is sent again on another connection. The error counts if the connection had no
        earlier user, or if a signal handler raised it. Second, the table may refuse every claim: a test claim of a message that
        does not exist shows that. If the table takes the test claim, this claim is sent once more, because a person may have
        repaired the table in between. `row` is this claim before the test claim, and None after it.

        An outage is not checked here: `processor` does that.

        Raises:
            Exception: What failed; a `StoreUnavailable` if it is an outage.
        """
        dialect = self._dialect
        away = dialect.error_kind(error) is ErrorKind.UNAVAILABLE or unreached(error, (connection.engine,))
        if used and not away and not interrupted(error) and not dialect.unstorable(error):
            connection.invalidate()
            session.rollback()
            return row
        if away or interrupted(error):
            # SQLAlchemy did not see this driver error, and would reuse the connection, perhaps in the middle of a statement
            connection.invalidate(error)
        elif row is not None and is_refusal(dialect, error):
            self._tried(session, of_nobody(row))
            session.rollback()
            return None
        raise_for_the_store(dialect, error, connection.engine)
        raise error

    def _tried(self, session: Session, row: ClaimRow) -> None:
        """Send a test claim. Return if the table takes it: then it refused a value of this message.

        Raises:
            StoreUnavailable: The table takes no claim, or the server does not answer.
        """
        dialect, since = self._dialect, moment()
        while True:
            session.rollback()
            connection, dbapi, info, used = self._connected(session, since)
            try:
                tried(dialect, dbapi, info, row, wait_ms=self._wait_ms)
            except Exception as refusal:
                if used and not interrupted(refusal):
                    connection.invalidate()
                    continue
                raise_for_the_table(dialect, refusal, row, partial(_looked, session), connection.engine)
            return

    def _cleared(self, connection: Connection, row: ClaimRow) -> bool:
        """Delete, in the handler's transaction, a lease that no run holds now: the handler's guard was changed since."""
        dbapi = connection.connection.dbapi_connection
        self._dialect.begin(dbapi, connection.info, row.owner)
        if self._leases.clear_in(connection, row):
            return True
        connection.connection.rollback()
        return False

    def complete(self, session: Session, won: Won) -> None:
        """Nothing to do: the claim is in the transaction already."""

    def consume(self, won: Won) -> None:
        """Nothing to do: COMMIT made the claim consumed."""

    def end(self, won: Won) -> None:
        """Nothing to do: this claim is not renewed."""

    def release(self, won: Won, *, broken: bool = False) -> bool:
        """Nothing to do: the rollback removed the claim. The claim of a broken message was committed with its effects."""
        return True

    def look(self, open_ours: OpenOurs, row: ClaimRow) -> Consumed | Unfinished | None:
        """See `Guard.look`."""
        dialect = self._dialect

        def known_of(session: Session) -> ExistingClaim | None:
            return dialect.read_claim(session.connection().connection.dbapi_connection, row, end=True, wait=False)

        try:
            known = in_our_session(open_ours, dialect, known_of)
        except Exception as error:
            raise_for_the_store(dialect, error, open_ours()[0].get_bind().engine)
            raise
        found = standing(known, row)
        return found if isinstance(found, (Consumed, Unfinished)) else None


def _looked(session: Session, statement: str) -> None:
    session.rollback()
    session.connection().exec_driver_sql(statement)


def standing(known: ExistingClaim | None, row: ClaimRow) -> Consumed | Busy | Conflict | Unfinished:
    """Return what the row that stands under our key means for our claim."""
    if known is None:
        return Busy(again=True)  # the row that refused our claim is gone: its transaction was rolled back
    if known.status not in (CONSUMED, UNFINISHED):
        return Busy()
    if isinstance(compare(known.fingerprint, row.fingerprint), Differs):
        return Conflict(known.fingerprint)
    return Unfinished(known.owner or "") if known.status == UNFINISHED else Consumed(known.owner)
