"""The statements of the `sql://` broker, one object for each database schema and dialect. Opens nothing and decides nothing.

Called by `exactly_once.transports.sql` alone. A group's row of a message is free when its `deliver_at` is past by the
server's clock. Taking it moves `deliver_at` to the end of the invisible time and writes the holder's token, so a row
whose holder died becomes free by itself. Settling deletes or changes only rows that still have the token.

Locking. A row is taken under FOR UPDATE SKIP LOCKED. For ordered groups that alone would give row 2 of a key to the
second receiver while the first receiver holds row 1. So a row is free only if it is the first existing row of its ordering key,
held or not: row 1 exists until it is acknowledged. The condition is "it is the first", not "no earlier row exists": a
locking read of MySQL and MariaDB sees rows that are newer than the snapshot of its own subquery. If rows 1 and 2 came
after that snapshot, row 2 has no earlier row in it; but neither is the first of any key in it.

All transactions are READ COMMITTED: under REPEATABLE READ, the default of MySQL and MariaDB, the range scan would
take gap locks against every producer. PostgreSQL takes rows by one UPDATE .. RETURNING, and looks again at a row that
was changed meanwhile. MySQL and MariaDB lock, then update. SQLite has one writer, under BEGIN IMMEDIATE.

Cost. The first `limit` free rows are found in the order of an index. Behind a few busy keys with a long backlog we would have
to ask for each row whether an earlier row of its key exists: 700 ms for 100,000 rows. So in an ordered group we ask
only for the `WINDOW` rows that have been due the longest, up to the row that `edge` returns. If all of these are held back,
`heads` and `keyless` name rows farther on, and we ask for those. `heads` goes from key to key in the index of the order: one step
for each key however many rows it has, `WINDOW` keys at a time. A million rows behind a thousand stuck keys cost a thousand steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, Final

from sqlalchemy import (
    CTE,
    ColumnElement,
    Delete,
    Insert,
    Integer,
    ScalarSelect,
    Select,
    Subquery,
    Update,
    and_,
    bindparam,
    delete,
    false,
    func,
    insert,
    literal,
    or_,
    select,
    tuple_,
    update,
)

from exactly_once.database.schema import Tables, all_rows, tables
from exactly_once.database.server_clock import utcnow
from exactly_once.transports.contract import Subscription

__all__ = ["NO_GROUP", "Look", "Statements", "statements"]

NO_GROUP: Final = ""
"""The group of rows that were sent before any group had joined, and of the gate row, which joins and sends of a topic lock."""


WINDOW: Final = 1000
"""How many rows a NEAR look examines at most: a few milliseconds."""


@dataclass(frozen=True, slots=True)
class Look:
    """Which of a group's rows a receiver may take, and how many.

    For ordered groups, see the module: `until` restricts it to rows that are due no later than that row, by time and id;
    `among` restricts it to these rows.
    """

    group: str
    wanted: Subscription
    limit: int
    until: tuple[datetime, int] | None = None
    among: tuple[int, ...] | None = None


class Statements:
    """Every statement on `message_queue` and `message_queue_group`, for one kind of server."""

    def __init__(self, schema: str | None, dialect: str) -> None:
        found: Tables = tables(schema)
        self.queue, self.group = found.queue, found.queue_group
        self._dialect = dialect

    # -- taking -------------------------------------------------------------------------------------------------------

    def due(self, look: Look) -> Select[Any]:
        """Lock free rows, the longest due first, and return them as they will be when held."""
        q = self.queue
        counted = (q.c.attempts + 1).label("attempts")
        return (
            select(*(column for column in q.c if column is not q.c.attempts), counted)
            .where(*self._free(look))
            .order_by(q.c.deliver_at, q.c.id)
            .limit(look.limit)
            .with_for_update(skip_locked=True)
        )

    def any_due(self, group: str, wanted: Subscription) -> Select[Any]:
        """Look without a lock whether a row may be free, so as not to take SQLite's only writer lock for nothing."""
        return select(self.queue.c.id).where(*self._due(group, wanted)).limit(1)

    def edge(self, group: str, wanted: Subscription) -> Select[Any]:
        """The first row after the window: its due time and id. No row if fewer rows are due."""
        q = self.queue
        due = select(q.c.deliver_at, q.c.id).where(*self._due(group, wanted))
        return due.order_by(q.c.deliver_at, q.c.id).offset(WINDOW).limit(1)

    def heads(self, group: str, wanted: Subscription, after: str | None) -> Select[Any]:
        """The next `WINDOW` ordering keys after `after`, in their order, each with its first row if that is due."""
        q, keys = self.queue, self._keys(group, wanted.topic, after)
        mine, first = self._of_topic(group, wanted.topic)
        mine.append(first.c.ordering_key == keys.c.ordering_key)
        if wanted.tags:
            mine.append(first.c.tag.in_(wanted.tags))
        head = select(first.c.id).where(*mine).order_by(first.c.id).limit(1).correlate(keys).scalar_subquery()
        heads = select(keys.c.ordering_key, head.label("id")).where(keys.c.ordering_key.is_not(None)).subquery("heads")
        is_due = and_(q.c.id == heads.c.id, q.c.deliver_at <= self._now())
        return select(heads.c.ordering_key, q.c.id).outerjoin_from(heads, q, is_due).order_by(heads.c.ordering_key)

    def _keys(self, group: str, topic: str, after: str | None) -> CTE | Subquery:
        """The next ordering keys: one step in the index of the order for each key, none for its other rows."""
        mine, other = self._of_topic(group, topic)
        behind = other.c.ordering_key.is_not(None) if after is None else other.c.ordering_key > after
        if self._dialect in ("mysql", "mariadb"):
            # Grouped by all leading columns of the index: else each of its rows is read.
            of_index = (other.c.consumer_group, other.c.topic, other.c.ordering_key)
            keys = select(other.c.ordering_key).where(*mine, behind).group_by(*of_index)
            return keys.order_by(other.c.ordering_key).limit(WINDOW).subquery("key_of_topic")

        def next_key(condition: ColumnElement[bool]) -> ScalarSelect[Any]:
            found = select(other.c.ordering_key).where(*mine, condition).order_by(other.c.ordering_key).limit(1)
            return found.correlate_except(other).scalar_subquery()

        one = literal(1, Integer())
        step = select(next_key(behind).label("ordering_key"), one.label("number")).cte("key_of_topic", recursive=True)
        further = select(next_key(other.c.ordering_key > step.c.ordering_key), step.c.number + one)
        return step.union_all(further.where(step.c.ordering_key.is_not(None), step.c.number < WINDOW))

    def _of_topic(self, group: str, topic: str) -> tuple[list[ColumnElement[bool]], Any]:
        other = self.queue.alias("other")
        return [other.c.consumer_group == group, other.c.topic == topic], other

    def keyless(self, group: str, wanted: Subscription, limit: int) -> Select[Any]:
        """The rows that have no ordering key, and are due."""
        q = self.queue
        # In the order of the index that has them together: in the order of times, finding none would read everything that is due.
        found = select(q.c.id).where(*self._due(group, wanted), q.c.ordering_key.is_(None))
        return found.order_by(q.c.ordering_key, q.c.id).limit(limit)

    def hold(self, ids: Sequence[int], token: str, invisible: timedelta) -> Update:
        """Take locked rows."""
        return update(self.queue).where(self.queue.c.id.in_(ids)).values(self._held(token, invisible))

    def take(self, look: Look, token: str, invisible: timedelta) -> Any:
        """Lock, take and return free rows in one statement; PostgreSQL.

        The locking part is a common table expression because a joined subquery may run more than once, and would
        then lock more than the limit.
        """
        q = self.queue
        due = (
            select(q.c.id)
            .where(*self._free(look))
            .order_by(q.c.deliver_at, q.c.id)
            .limit(look.limit)
            .with_for_update(skip_locked=True)
            .cte("due")
        )
        return update(q).where(q.c.id == due.c.id).values(self._held(token, invisible)).returning(*q.c)

    def _held(self, token: str, invisible: timedelta) -> dict[str, Any]:
        return {
            "holder": token,
            "attempts": self.queue.c.attempts + 1,
            "deliver_at": utcnow(invisible.total_seconds()),
        }

    def _due(self, group: str, wanted: Subscription) -> list[ColumnElement[bool]]:
        q = self.queue
        conditions = [q.c.consumer_group == group, q.c.topic == wanted.topic, q.c.deliver_at <= self._now()]
        if wanted.tags:
            conditions.append(q.c.tag.in_(wanted.tags))
        return conditions

    def _now(self, seconds: float | None = None) -> ColumnElement[Any]:
        # On PostgreSQL the bare function may change from row to row, so the index would not be used for it, and every
        # held and every delayed row would be read; in a subquery it is evaluated once. On MariaDB it is the opposite.
        return select(utcnow(seconds)).scalar_subquery() if self._dialect == "postgresql" else utcnow(seconds)

    def _free(self, look: Look) -> list[ColumnElement[bool]]:
        q, conditions = self.queue, self._due(look.group, look.wanted)
        if look.until is not None:
            conditions += self._not_after(*look.until)
        if look.among is not None:
            conditions.append(q.c.id.in_(look.among))
        if look.wanted.ordered:
            conditions.append(self._first_of_its_key(look.group, look.wanted))
        return conditions

    def _not_after(self, deliver_at: datetime, id_: int) -> list[ColumnElement[bool]]:
        """Due no later than that row. By id, too: all rows of one statement may have the same time."""
        q = self.queue
        moment = literal(deliver_at, q.c.deliver_at.type)
        if self._dialect in ("mysql", "mariadb"):  # they cannot look up pairs in an index
            return [q.c.deliver_at <= moment, or_(q.c.deliver_at < moment, q.c.id <= id_)]
        return [tuple_(q.c.deliver_at, q.c.id) <= tuple_(moment, literal(id_))]

    def _first_of_its_key(self, group: str, wanted: Subscription) -> ColumnElement[bool]:
        q, first = self.queue, self.queue.alias("first_of_key")
        mine = [
            first.c.consumer_group == group,
            first.c.topic == wanted.topic,
            first.c.ordering_key == q.c.ordering_key,
        ]
        if wanted.tags:  # a row that nobody of this group wants must not hold its key back for ever
            mine.append(first.c.tag.in_(wanted.tags))
        # With an order: if PostgreSQL has no statistics of a young backlog, the two indexes look alike to it. It
        # read the wrong one for each row, 2,500 ms instead of 4. Only the right index has this order.
        head = select(first.c.id).where(*mine).order_by(first.c.id).limit(1).correlate(q).scalar_subquery()
        return or_(q.c.ordering_key.is_(None), q.c.id == head)

    # -- settling -----------------------------------------------------------------------------------------------------

    def finish(self, held: Sequence[tuple[int, str]]) -> Delete:
        """Delete what is acknowledged and still held with its token."""
        return delete(self.queue).where(self._ours(held))

    def bring_again(self, held: Sequence[tuple[int, str]], delay: timedelta) -> Update:
        """Free rows again after `delay`."""
        values = {"deliver_at": utcnow(delay.total_seconds()), "holder": None}
        return update(self.queue).where(self._ours(held)).values(values)

    def untake(self, held: Sequence[tuple[int, str]]) -> Update:
        """Free rows that were taken but not handed out: no attempt is counted."""
        values = {"deliver_at": utcnow(), "holder": None, "attempts": self.queue.c.attempts - 1}
        return update(self.queue).where(self._ours(held)).values(values)

    def extend(self, held: Sequence[tuple[int, str]], invisible: timedelta) -> Update:
        """Keep rows invisible for another span."""
        return update(self.queue).where(self._ours(held)).values(deliver_at=utcnow(invisible.total_seconds()))

    def _ours(self, held: Sequence[tuple[int, str]]) -> ColumnElement[bool]:
        # The ids alone once more, for the primary key's index. Sorted, so that two statements lock in the same order.
        pairs = sorted(held)
        ids = self.queue.c.id.in_([id_ for id_, _ in pairs])
        return and_(ids, tuple_(self.queue.c.id, self.queue.c.holder).in_(pairs))

    # -- sending and joining ------------------------------------------------------------------------------------------

    def gate(self, topics: Sequence[str], *, alone: bool) -> Select[Any]:
        """Lock the gate row of each topic: shared for sends, alone for a join. A send precedes a join or sees its group.

        The groups must be read by a later statement: this statement's snapshot is older than the lock it waited for.
        """
        g = self.group
        gates = (
            select(g.c.topic)
            .where(g.c.topic.in_(sorted(topics)), g.c.consumer_group == NO_GROUP)
            .order_by(g.c.topic)
            .with_for_update(read=not alone)
        )
        return all_rows(gates, self._dialect)

    def groups(self, topics: Sequence[str]) -> Select[Any]:
        """The groups that have joined each of these topics."""
        g = self.group
        joined = select(g.c.topic, g.c.consumer_group).where(g.c.topic.in_(topics), g.c.consumer_group != NO_GROUP)
        return all_rows(joined, self._dialect)

    def add_group(self, topic: str, group: str) -> Insert:
        """Record that a group has joined; for NO_GROUP, make the topic's gate row."""
        return insert(self.group).values(topic=topic, consumer_group=group, joined_at=utcnow())

    def adopt(self, topic: str, group: str) -> Update:
        """Give the first group what was sent before any group had joined."""
        q = self.queue
        return update(q).where(q.c.consumer_group == NO_GROUP, q.c.topic == topic).values(consumer_group=group)

    def put(self, delay: timedelta) -> Insert:
        """Insert rows; executed with one dict for each row."""
        due = utcnow(delay.total_seconds()) if delay else utcnow()
        return insert(self.queue).values(deliver_at=due)

    # -- housekeeping -------------------------------------------------------------------------------------------------

    def unwanted(self, group: str, wanted: Subscription, age: timedelta, limit: int) -> Select[Any]:
        """Rows with tags that no member of the group has asked for in all that time."""
        q = self.queue
        return (
            select(q.c.id)
            .where(
                q.c.consumer_group == group,
                q.c.topic == wanted.topic,
                q.c.deliver_at <= self._now(-age.total_seconds()),
                or_(q.c.tag.is_(None), q.c.tag.not_in(wanted.tags)),
            )
            .limit(limit)
            .with_for_update(skip_locked=True)
        )

    def tags(self, group: str, topic: str, limit: int) -> Select[Any]:
        """Count the rows of each tag, and those without a tag, among the rows that have been due the longest."""
        q = self.queue
        oldest = select(q.c.tag).where(q.c.consumer_group == group, q.c.topic == topic).order_by(q.c.deliver_at, q.c.id)
        looked = oldest.limit(limit).subquery()
        return all_rows(select(looked.c.tag, func.count()).group_by(looked.c.tag), self._dialect)

    def needed(self) -> Sequence[Any]:
        """Statements on no row, for the rights that every receiver needs. A receiver need not have the right to send."""
        q, g = self.queue, self.group
        return (
            select(q.c.id).where(false()).with_for_update(),
            # By its key: under sql_safe_updates MySQL and MariaDB refuse a change that names no key.
            update(q).where(q.c.id == -1).values(holder=None),
            delete(q).where(q.c.id == -1),
            select(g.c.topic).where(false()).with_for_update(),
        )

    def groupless(self, limit: int) -> Select[Any]:
        """Count the rows of each topic that no group has joined, among so many rows."""
        q = self.queue
        looked = select(q.c.topic).where(q.c.consumer_group == NO_GROUP).limit(limit).subquery()
        counted = select(looked.c.topic, func.count()).group_by(looked.c.topic).order_by(looked.c.topic)
        return all_rows(counted, self._dialect)

    def drop(self) -> Delete:
        """Delete rows by id."""
        return delete(self.queue).where(self.queue.c.id.in_(bindparam("ids", expanding=True)))


@lru_cache(maxsize=16)
def statements(schema: str | None, dialect: str) -> Statements:
    """Return the statements for one database schema on one kind of server; the same object for the same arguments."""
    return Statements(schema, dialect)
