"""The due rows of the failure store, for the pump: takes them for a run, postpones them, and closes them.

Each method is a part of the caller's transaction. `processing` writes what became of a message, by `FailureStore.record` and
`resolve`; here a row is closed only if nothing else would close it. Called by the pump, and by the `maintenance` job (`sweep`).
"""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Row,
    Table,
    and_,
    exists,
    false,
    func,
    not_,
    or_,
    select,
    update,
)

from exactly_once.database.mysql_committed import see_committed
from exactly_once.database.schema import CONSUMED, Tables
from exactly_once.database.server_clock import utcnow
from exactly_once.failures.states import RESOLVABLE, RUNNABLE, blocking
from exactly_once.message import Message

__all__ = ["DueFailures", "Taken", "message_of"]

_SWEPT_AT_ONCE: Final = 1000  # the next sweep, half a minute later, takes the rest


@dataclass(frozen=True, slots=True)
class Taken:
    """The state of a row when the pump took it, except its due time."""

    id: int
    attempts: int
    last_failed_at: datetime
    decided_at: datetime | None

    @classmethod
    def of(cls, row: Row[Any]) -> "Taken":
        return cls(row.id, row.attempts, row.last_failed_at, row.decided_at)


class DueFailures:
    """The failure rows of one database, for the pump."""

    def __init__(self, tables: Callable[[], Tables]) -> None:
        self._tables = tables

    @property
    def _t(self) -> Table:
        return self._tables().failure

    @property
    def _claims(self) -> Table:
        return self._tables().idempotent

    def take(
        self,
        connection: Connection,
        group: str,
        handlers: Sequence[str],
        ordered: Sequence[str],
        waits: Sequence[str],
        *,
        limit: int,
        lease: timedelta,
    ) -> Sequence[Row[Any]]:
        """Take due rows for a run, and postpone them by `lease`, so that no other pump takes them meanwhile.

        Of an ordering key only the oldest open row is taken. This rule depends on rows only, so a restart changes nothing.
        """
        t, older = self._t, self._t.alias("older")
        first_of_key = not_(
            exists().where(
                older.c.consumer_group == t.c.consumer_group,
                older.c.handler == t.c.handler,
                older.c.ordering_key == t.c.ordering_key,
                older.c.id < t.c.id,
                or_(
                    blocking(older, after_dead_wait=False),
                    and_(blocking(older, after_dead_wait=True), _among(t.c.handler, waits)),
                ),
                # but not a row of the same message, from before the handler's key= changed; `order_position` checks exactly
                or_(
                    older.c.message_id.is_(None),
                    t.c.message_id.is_(None),
                    older.c.message_id != t.c.message_id,
                    older.c.body.is_distinct_from(t.c.body),
                ),
            )
        )
        due = (
            select(t)
            .where(
                t.c.consumer_group == group,
                t.c.state.in_(RUNNABLE),
                t.c.next_attempt_at <= utcnow(),
                _among(t.c.handler, handlers),
                or_(t.c.ordering_key.is_(None), not_(_among(t.c.handler, ordered)), first_of_key),
            )
            .order_by(t.c.next_attempt_at)
            .limit(limit)
            .with_for_update(skip_locked=True, of=t if connection.dialect.name == "postgresql" else None)
        )
        rows = connection.execute(due).all()
        if rows:
            self.postpone(connection, [row.id for row in rows], lease)
        return rows

    def postpone(self, connection: Connection, ids: Sequence[int], delay: timedelta) -> None:
        """Let these rows be due `delay` from now. Rows that a person decided meanwhile are left alone."""
        t = self._t
        connection.execute(
            update(t)
            .where(t.c.id.in_(ids), t.c.state.in_(RUNNABLE), t.c.next_attempt_at.is_not(None))
            .values(next_attempt_at=utcnow(delay.total_seconds()))
        )

    def close(self, connection: Connection, rows: Sequence[Taken]) -> None:
        """Close rows that were not written since they were taken. (A recorded failure would change `last_failed_at`.)"""
        t = self._t
        for row in rows:
            connection.execute(
                update(t)
                .where(
                    t.c.id == row.id,
                    t.c.state.in_(RUNNABLE),
                    t.c.attempts == row.attempts,
                    t.c.last_failed_at == row.last_failed_at,
                    t.c.decided_at.is_not_distinct_from(row.decided_at),
                )
                .values(state="resolved", next_attempt_at=None)
            )

    def sweep(self, begin: Callable[[], AbstractContextManager[Connection]], group: str) -> int:
        """Close open rows whose message was processed on another path (a producer's resend). Returns how many.

        Args:
            begin: Begins a transaction. Called once to read, and once to change.
            group: The consumer group of the rows.
        """
        t, c = self._t, self._claims
        consumed = exists().where(
            c.c.consumer_group == t.c.consumer_group,
            c.c.handler == t.c.handler,
            c.c.business_key == t.c.business_key,
            # a claim without a fingerprint, as another program writes it, is compared with nothing: a failure that is to run
            # again would be its duplicate. But a dead failure may have another payload, and a person has not looked yet
            or_(
                c.c.fingerprint == t.c.fingerprint,
                and_(func.length(c.c.fingerprint) == 0, t.c.state.in_(RUNNABLE)),
            ),
            c.c.status == CONSUMED,
        )
        processed = select(t.c.id).where(
            t.c.consumer_group == group, t.c.state.in_(RESOLVABLE), t.c.business_key.is_not(None), consumed
        )
        # read first, without a lock: on InnoDB an UPDATE that reads the claims waits for each running handler whose key has
        # failed before. Meanwhile it locks the failure rows that these handlers need at their end: a deadlock
        with begin() as connection:
            if connection.dialect.name in ("mysql", "mariadb"):
                see_committed(connection.connection.dbapi_connection)
            ids = connection.execute(processed.limit(_SWEPT_AT_ONCE)).scalars().all()
        if not ids:
            return 0
        close = (
            update(t).where(t.c.id.in_(ids), t.c.state.in_(RESOLVABLE)).values(state="resolved", next_attempt_at=None)
        )
        with begin() as connection:
            return connection.execute(close).rowcount


def _among(column: Column[str], names: Sequence[str]) -> ColumnElement[bool]:
    """The condition that the column is one of these names. No names: false, as an empty IN has another meaning if we send hex."""
    return column.in_(names) if names else false()


def message_of(row: Row[Any]) -> Message:
    """Return the message that a failure row keeps."""
    kept = json.loads(row.properties)
    unread, properties = kept if isinstance(kept, list) else (None, kept)
    return Message(
        row.topic,
        row.body,
        tag=row.tag,
        key=row.message_key,
        ordering_key=row.ordering_key,
        properties=properties,
        message_id=row.message_id,
        born_at=row.born_at,
        attempt=row.attempts + 1,
        unread=unread,
    )
