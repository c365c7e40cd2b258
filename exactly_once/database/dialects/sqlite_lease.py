"""Claims with a lease on SQLite. BEGIN IMMEDIATE admits one writer, so nothing happens between the statements.

The driver waits while the file is BUSY, as everywhere on SQLite. Called by `guards.lease.sql`.
"""

from collections.abc import MutableMapping
from datetime import UTC, timedelta
from typing import Any, Final

from exactly_once.claim import ClaimRow, LeaseAnswer, StepRow
from exactly_once.database.dialects.contract import steps_of
from exactly_once.database.dialects.sqlite import SQLite
from exactly_once.database.schema import UNFINISHED

__all__ = ["CLAIM", "LOOK", "STEPS", "Claims"]

_NOW: Final = "strftime('%Y-%m-%d %H:%M:%f', 'now') || '000'"
_LATER: Final = "strftime('%Y-%m-%d %H:%M:%f', 'now', :lease) || '000'"
CLAIM: Final = (
    "INSERT INTO {table} AS held (consumer_group, handler, business_key, status, message_id, fingerprint, retry_times,"
    " owner, token, lease_until, born_at, created_at) VALUES (:group, :handler, :key, 0, :message_id, :fingerprint, 0,"
    " :owner, :token, {later}, :born_at, {now})"
    " ON CONFLICT (consumer_group, handler, business_key) DO UPDATE SET"
    " message_id = excluded.message_id, fingerprint = excluded.fingerprint, retry_times = held.retry_times + 1,"
    " owner = excluded.owner, token = excluded.token, lease_until = excluded.lease_until"
    " WHERE held.status = 0 AND (held.token IS NULL OR held.lease_until <= {now})"
    " AND held.fingerprint IN (excluded.fingerprint, :also)"
)
LOOK: Final = (
    "SELECT status, token, fingerprint, retry_times, (julianday(lease_until) - julianday('now')) * 86400, owner"
    " FROM {table}"
    " WHERE consumer_group = ? AND handler = ? AND business_key = ?"
)
STEPS: Final = (
    "SELECT step, ordinal, status, result, attempt FROM {steps}"
    " WHERE consumer_group = ? AND handler = ? AND business_key = ? ORDER BY ordinal"
)


class Claims:
    """See `LeaseClaims`."""

    def __init__(self, dialect: SQLite) -> None:
        self._dialect, table = dialect, dialect.table
        self._claim = CLAIM.replace("{table}", table).replace("{now}", _NOW).replace("{later}", _LATER)
        self._look = LOOK.replace("{table}", table)
        self._steps = STEPS.replace("{steps}", steps_of(table))

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
        """See `LeaseClaims.claim`."""
        identity = (row.group, row.handler, row.key)
        born = None if row.born_at is None else row.born_at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")
        values = {
            "group": row.group,
            "handler": row.handler,
            "key": row.key,
            "message_id": row.message_id,
            "fingerprint": row.fingerprint,
            "owner": row.owner,
            "token": token,
            "born_at": born,
            "also": also,
            "lease": f"{lease.total_seconds():.3f} seconds",
        }
        cursor = dbapi.cursor()
        try:
            self._dialect.begin_writing(cursor)
            cursor.execute(self._claim, values)
            cursor.execute(self._look, identity)
            status, standing, fingerprint, retry_times, remaining, owner = cursor.fetchone()
            if isinstance(standing, bytes):  # an earlier user of the connection set text_factory
                standing, owner = standing.decode(), owner.decode() if owner else owner
            recorded: tuple[Any, ...] = ()
            if steps:
                cursor.execute(self._steps, identity)
                recorded = tuple(cursor.fetchall())
            dbapi.commit()
        except Exception:
            dbapi.rollback()
            raise
        finally:
            cursor.close()
        return LeaseAnswer(
            won=standing == token and not status,
            consumed=bool(status),
            unfinished=owner or "" if status == UNFINISHED else None,
            fingerprint=bytes(fingerprint),
            attempt=retry_times + 1,
            remaining=None if remaining is None or standing is None else timedelta(seconds=remaining),
            steps=tuple(
                StepRow(name, ordinal, bool(done), None if result is None else bytes(result), attempt)
                for name, ordinal, done, result, attempt in recorded
            ),
        )
