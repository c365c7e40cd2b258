"""Claims with a lease on MySQL and MariaDB: an INSERT, and if the key exists an UPDATE that takes a free claim.

An upsert would not do: if the driver counts found rows, its row count cannot tell a taken row from an untouched one. The
loser of an INSERT keeps a shared lock on the row, so it rolls back, and looks without a lock before the UPDATE: a lock on
the row of a running lease would keep that lease from being renewed. Called by `guards.lease.sql`.
"""

from collections.abc import MutableMapping
from datetime import UTC, timedelta
from typing import Any, Final

from exactly_once.claim import ClaimRow, LeaseAnswer, StepRow
from exactly_once.database.dialects.contract import ClaimBusy, Dialect, TraceState, steps_of
from exactly_once.database.dialects.mysql_errors import DUPLICATE, busy_of, errno
from exactly_once.database.dialects.mysql_wire import bound, digits, identity
from exactly_once.database.mysql_committed import COMMITTED_ALONE
from exactly_once.database.mysql_session import RIGHT_SESSION, SESSION_IS_RIGHT
from exactly_once.database.schema import UNFINISHED

__all__ = ["BREAK", "CLAIM", "LOOK", "STEPS", "TAKE", "UNTAKE", "Claims"]

CLAIM: Final = (
    "INSERT INTO {table} (consumer_group, handler, business_key, status, message_id, fingerprint, retry_times, owner,"
    " token, lease_until, born_at, created_at) SELECT UNHEX(%s), UNHEX(%s), UNHEX(%s), 0,"
    " CONVERT(UNHEX(%s) USING utf8mb4), UNHEX(%s), 0, %s, %s,"
    " TIMESTAMPADD(MICROSECOND, %s, UTC_TIMESTAMP(6)), %s, UTC_TIMESTAMP(6) FROM DUAL WHERE {right}"
)
TAKE: Final = (
    "UPDATE {table} SET message_id = CONVERT(UNHEX(%s) USING utf8mb4), fingerprint = UNHEX(%s),"
    " retry_times = retry_times + 1, owner = %s, token = %s,"
    " lease_until = TIMESTAMPADD(MICROSECOND, %s, UTC_TIMESTAMP(6))"
    " WHERE consumer_group = UNHEX(%s) AND handler = UNHEX(%s) AND business_key = UNHEX(%s) AND status = 0"
    " AND (token IS NULL OR lease_until <= UTC_TIMESTAMP(6)) AND fingerprint IN (UNHEX(%s), UNHEX(%s))"
)
LOOK: Final = (
    "SELECT status, CAST(token AS BINARY), fingerprint, retry_times,"
    " TIMESTAMPDIFF(MICROSECOND, UTC_TIMESTAMP(6), lease_until), CAST(owner AS BINARY) FROM {table}"
    " WHERE consumer_group = UNHEX(%s) AND handler = UNHEX(%s) AND business_key = UNHEX(%s) LIMIT 1"
)
BREAK: Final = (
    "UPDATE {table} SET status = 2, consumed_at = UTC_TIMESTAMP(6), lease_until = NULL"
    " WHERE consumer_group = UNHEX(%s) AND handler = UNHEX(%s) AND business_key = UNHEX(%s) AND status = 0 AND token = %s"
)
UNTAKE: Final = (
    "UPDATE {table} SET token = NULL, lease_until = NULL, retry_times = retry_times - 1"
    " WHERE consumer_group = UNHEX(%s) AND handler = UNHEX(%s) AND business_key = UNHEX(%s) AND status = 0 AND token = %s"
)
STEPS: Final = (
    "SELECT step, ordinal, status, result, attempt FROM {steps}"
    " WHERE consumer_group = UNHEX(%s) AND handler = UNHEX(%s) AND business_key = UNHEX(%s) AND status < 2 ORDER BY ordinal"
    " LIMIT 18446744073709551615"  # else sql_select_limit applies, which may have been left in the session
)


class Claims:
    """See `LeaseClaims`."""

    def __init__(self, dialect: Dialect) -> None:
        table, steps = dialect.table, steps_of(dialect.table)
        self._dialect = dialect
        self._claim, self._take, self._untake, self._break, self._look, self._steps = (
            text.replace("{table}", table).replace("{steps}", steps).replace("{right}", SESSION_IS_RIGHT)
            for text in (CLAIM, TAKE, UNTAKE, BREAK, LOOK, STEPS)
        )

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
        """See `LeaseClaims.claim`.

        A crash before COMMIT leaves nothing. A crash after it leaves the claim, until its lease ends.
        """
        bounded = bound(info[self._dialect.kept_as], wait_ms)
        named = identity(row)
        microseconds = lease // timedelta(microseconds=1)
        born = None if row.born_at is None else row.born_at.astimezone(UTC).replace(tzinfo=None)
        fingerprint = row.fingerprint.hex()
        claimed = (*named, digits(row.message_id), fingerprint, row.owner, token, microseconds, born)
        cursor = dbapi.cursor()
        try:
            try:
                cursor.execute(bounded + self._claim, claimed)
                if not cursor.rowcount:  # the session's settings were wrong, and apply to later statements, too
                    cursor.execute(RIGHT_SESSION)
                    cursor.execute(bounded + self._claim, claimed)
                recorded = self._recorded(cursor, named) if steps else ()  # steps of a claim that an operator deleted
                dbapi.commit()
                return LeaseAnswer(True, False, row.fingerprint, 1, lease, recorded)
            except Exception as error:
                if errno(error) != DUPLICATE:
                    raise
                dbapi.rollback()
            found = self._looked(cursor, named)
            if found is not None and _free(found):
                dbapi.rollback()
                taken = (digits(row.message_id), fingerprint, row.owner, token, microseconds)
                cursor.execute(bounded + self._take, (*taken, *named, fingerprint, also.hex()))
                dbapi.commit()
                # A crash before the trace is looked at: the lease runs out, and the next claim looks at it.
                found = self._looked(cursor, named)
            recorded = self._recorded(cursor, named) if steps else ()
            dbapi.rollback()
            if found is not None and found[1] == token and not found[0]:
                trace_state = self._dialect.trace_state(dbapi, row)
                if trace_state is not TraceState.NONE:
                    dbapi.rollback()  # nothing is written in a transaction that only looks
                if trace_state is TraceState.RUNNING:
                    cursor.execute(self._untake, (*named, token))
                    dbapi.commit()
                    raise ClaimBusy(again=False)  # noqa: TRY301
                if trace_state is TraceState.COMMITTED:
                    # Something else has committed an earlier run's work, and that run never ended. A requeue takes this back.
                    cursor.execute(self._break, (*named, token))
                    dbapi.commit()
                    found = (UNFINISHED, *found[1:])
        except Exception as error:
            code = errno(error)
            if code is None:
                raise
            dbapi.rollback()
            busy = busy_of(error)
            if busy is None:
                raise
            raise busy from error
        finally:
            cursor.close()
        if found is None:
            raise ClaimBusy(again=True)  # deleted between the two statements: the next try may insert it
        status, standing, known, retry_times, remaining, owner = found
        return LeaseAnswer(
            won=standing == token and not status,
            consumed=bool(status),
            unfinished=owner or "" if status == UNFINISHED else None,
            fingerprint=known,
            attempt=int(retry_times) + 1,
            remaining=None if remaining is None or standing is None else timedelta(microseconds=int(remaining)),
            steps=recorded,
        )

    def _looked(self, cursor: Any, named: tuple[str, ...]) -> Any:
        """Begin a transaction that sees committed rows alone: a run that completes may still roll back."""
        cursor.execute(COMMITTED_ALONE)
        cursor.execute(self._look, named)
        found = cursor.fetchone()
        if found is None:
            return None
        status, token, fingerprint, retry_times, remaining, owner = found
        # A number may come as text, if the application has set converters on the driver; and "0" is true.
        return int(status), _decoded(token), bytes(fingerprint), int(retry_times), remaining, _decoded(owner)

    def _recorded(self, cursor: Any, named: tuple[str, ...]) -> tuple[StepRow, ...]:
        cursor.execute(self._steps, named)
        return tuple(
            StepRow(bytes(name).decode(), ordinal, bool(int(done)), None if result is None else bytes(result), attempt)
            for name, ordinal, done, result, attempt in cursor.fetchall()
        )


def _decoded(value: bytes | None) -> str | None:
    return None if value is None else value.decode()


def _free(found: Any) -> bool:
    status, token, _, _, remaining, _ = found
    return not status and (token is None or remaining <= 0)
