"""The failure store: keeps every failed message whole, with its reason, until it is resolved or a person decides.

A row is written in a transaction of its own, after the handler's was rolled back. If that fails, nothing is acknowledged. The
next try has one owner: `next_attempt_at` NULL means that the broker redelivers the message, a time means that the pump does.
Called by `processing`. The pump takes due rows by `due`, and a person's decisions are in `decisions`.

States: retrying, waiting (not failed, only not run yet: not counted), requeued -> resolved; dead, broken -> requeued or discarded
by a person.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Row,
    Select,
    Table,
    Update,
    and_,
    bindparam,
    delete,
    func,
    insert,
    literal,
    not_,
    or_,
    select,
    update,
)
from sqlalchemy.orm import Session

from exactly_once.claim import ClaimRow
from exactly_once.database import claim_rows
from exactly_once.database.characters import characters_of
from exactly_once.database.connections.beginning import begin_ours
from exactly_once.database.dialects.contract import Dialect
from exactly_once.database.errors.drivers_own import is_taken
from exactly_once.database.schema import CONSUMED, UNFINISHED, Tables, all_rows
from exactly_once.database.server_clock import utcnow
from exactly_once.failures.failure import (
    MESSAGE_ID_BYTES,
    NO_PROPERTIES,
    WITHOUT_BODY,
    Failure,
    Form,
    content_of,
    kept_text,
    known_by,
    new_row,
    order_of,
)
from exactly_once.failures.large import append
from exactly_once.failures.policy import ByBroker, ByPump, Decision, Park
from exactly_once.failures.states import CLOSED, OPEN, RESOLVABLE, blocking
from exactly_once.handlers.fingerprint import TAG_BYTES
from exactly_once.wording.text import storable

__all__ = ["FailureStore", "OrderPosition"]

_ASCII: Final = "ascii"
_MOST_FORMER: Final = 100
_BROUGHT_AGAIN: Final = timedelta(seconds=60)


@dataclass(frozen=True, slots=True)
class OrderPosition:
    """The place of a message among the messages of its ordering key."""

    blocked: bool
    """An older message must come first."""
    known: bool
    """The message has a row, with its present or an earlier identity: it failed before."""
    former: Sequence[int] = ()
    """Its rows from before the handler's key= or fingerprint= was changed."""


def _bodiless(t: Table) -> Any:
    """The column that says whether a row was written `WITHOUT_BODY`."""
    return (t.c.properties == NO_PROPERTIES).label("bodiless")


def _tag(t: Table) -> Any:
    """The tag of a row's fingerprint, which says by which `fingerprint=` it was made. For an empty one SQLite returns NULL."""
    type_ = t.c.fingerprint.type
    return func.coalesce(func.substr(t.c.fingerprint, 1, TAG_BYTES, type_=type_), literal(b"", type_), type_=type_)


class FailureStore:
    """The failure rows of one consumer group in one database."""

    def __init__(self, tables: Callable[[], Tables]) -> None:
        self._tables = tables

    @property
    def _t(self) -> Table:
        return self._tables().failure

    def record(self, session: Session, failure: Failure, decide: Callable[[int], Decision]) -> tuple[Decision, int]:
        """Record one failure, count it, and store the decision about it. Commits.

        Args:
            session: A new session, whose transaction has sent nothing yet.
            failure: The failure.
            decide: Returns the decision for a number of failures, this one included.

        Returns:
            The decision that was stored, and the number of failures. A message that a person discarded stays discarded. A message
            that only had to wait stays resolved if it was processed meanwhile.
        """
        for last in (False, True):
            try:
                begin_ours(session.connection())
                recorded = self._record(session, failure, decide)
                session.commit()
            except Exception as error:
                if last or not is_taken(error):
                    raise
                # two deliveries of one message failed at the same moment: now the row exists and can be updated
                session.rollback()
            else:
                return recorded
        raise AssertionError

    def _record(self, session: Session, failure: Failure, decide: Callable[[int], Decision]) -> tuple[Decision, int]:
        t, form = self._t, failure.form
        characters = characters_of(session.connection())
        key = failure.failure_key_in(_ASCII if form is Form.ASCII else characters)
        identity = self._identity(failure, key)
        texts = characters if form is Form.WHOLE else _ASCII
        known = all_rows(
            select(t.c.id, t.c.attempts, t.c.state, t.c.message_id, _bodiless(t)),
            session.connection().dialect.name,
        )
        row = session.execute(known.where(identity)).one_or_none()
        if row is not None:
            # lock by id, and only an existing row: on InnoDB a locking read that finds nothing locks the gap, and two messages
            # that fail for the first time would deadlock on each other's gap
            row = session.execute(known.where(t.c.id == row.id).with_for_update()).one_or_none()
        if row is not None and row.state in CLOSED:
            again = row.message_id == storable(failure.message.message_id, MESSAGE_ID_BYTES, texts)
            if row.state == "discarded" and (again or self._is_claimed(session, failure)):
                return Park("discarded", "a person discarded this message"), row.attempts
            if row.state == "resolved" and not failure.counted and self._is_consumed(session, failure):
                return Park("resolved", "another run has processed it"), row.attempts
            # under a lock guard, or after its claim was purged, the same key may come again as another message, which needs its
            # own id and its own place in the order
            session.execute(delete(t).where(t.c.id == row.id))
            row = None
        earlier = row.attempts if row is not None else 0
        attempts = earlier + 1 if failure.counted else earlier
        # the content is written once; again only if the database did not take it before
        first, *more = content_of(session.connection(), failure, texts) if row is None or row.bodiless else (None,)
        # only the broker has the whole message: never acknowledge it, whatever the decision would be
        bodiless = first is not None and "body" not in first
        decision = ByBroker(_BROUGHT_AGAIN) if bodiless else decide(attempts)
        said = WITHOUT_BODY.format(size=len(failure.message.body or b"")) if bodiless else ""
        values = {
            "error_class": storable(type(failure.error).__name__, None, texts, limit=255),
            "error_text": said + kept_text(failure.error, texts, short=form is not Form.WHOLE),
            "attempts": attempts,
            "last_failed_at": utcnow(),
            **_state(decision, failure.counted),
        }
        if failure.claim_owner is not None:
            values["claim_owner"] = failure.claim_owner
            self._claim(session, failure)
        values |= first or {}
        if row is not None:
            id_ = row.id
            session.execute(update(t).where(t.c.id == id_).values(**values))
        else:
            inserted: Any = session.execute(insert(t).values(**values, **new_row(t, failure, key, texts, form)))
            id_ = inserted.inserted_primary_key[0]
        for part in more:
            append(session.connection(), t, id_, part)
        return decision, attempts

    def _is_claimed(self, session: Session, failure: Failure) -> bool:
        """Whether a discarded key still has the claim that was written for it: then a resend with another id is a copy."""
        if failure.key is None:
            return False
        claims = self._tables().idempotent
        stands = claim_rows.of(claims, failure.group, failure.handler, failure.key)
        known = select(claims.c.status).where(stands)
        return session.execute(all_rows(known, session.connection().dialect.name)).first() is not None

    def _is_consumed(self, session: Session, failure: Failure) -> bool:
        """Whether the run that this message waited for has processed it meanwhile.

        That run closed the row and committed before this transaction got the row. If the row were opened again, a person would
        see it, and might discard a message that took effect.
        """
        if failure.key is None:
            return False
        claims = self._tables().idempotent
        stands = claim_rows.of(claims, failure.group, failure.handler, failure.key)
        same = and_(stands, claims.c.status == CONSUMED, claims.c.fingerprint == failure.fingerprint)
        # a locking read: a plain read on InnoDB shows what was there when this transaction began
        known = select(claims.c.status).where(same).with_for_update(read=True)
        return session.execute(all_rows(known, session.connection().dialect.name)).first() is not None

    def _claim(self, session: Session, failure: Failure) -> None:
        """Make sure that a broken message has a consumed claim, so that no copy runs before a person has looked.

        Mostly the claim stands, and is set to consumed here. If its transaction was lost and something else was committed after
        it, the claim is written.
        """
        if failure.key is None:
            return
        claims, connection = self._tables().idempotent, session.connection()
        stands = claim_rows.of(claims, failure.group, failure.handler, failure.key)
        done = {"status": CONSUMED, "consumed_at": utcnow()}
        connection.execute(update(claims).where(stands, claims.c.status == UNFINISHED).values(done))
        if not failure.block:
            return
        message = failure.message
        values = {
            "consumer_group": failure.group,
            "handler": failure.handler,
            "business_key": failure.key,
            "message_id": storable(message.message_id, MESSAGE_ID_BYTES, "ascii"),
            "fingerprint": failure.fingerprint,
            "retry_times": message.attempt - 1,
            "owner": failure.claim_owner,
            "born_at": message.born_at,
        }
        claim_rows.write(connection, claims, values)

    def resolve(
        self, session: Session, dialect: Dialect, row: ClaimRow, message_id: str | None, former: Sequence[int] = ()
    ) -> None:
        """Close the failure row of a processed message, in the handler's transaction.

        Args:
            session: The session in that transaction.
            dialect: The dialect of its database.
            row: The claim of the processed message.
            message_id: The message id of this delivery.
            former: For an ordered message: the rows that `order_position` found.
        """
        connection = session.connection()
        characters = characters_of(connection)
        values = {
            "b_group": row.group,
            "b_handler": row.handler,
            "b_key": "k:" + row.key,
            "b_fingerprint": row.fingerprint,
            "b_tag": row.fingerprint[:TAG_BYTES],
            "b_message_id": storable(message_id, MESSAGE_ID_BYTES, characters),
        }
        dialect.in_our_name(connection, self._resolving, values)
        for id_ in former:
            dialect.in_our_name(connection, self._resolving_former, {"b_id": id_})

    @cached_property
    def _resolving_former(self) -> Update:
        """Closes an ordered message's row from before the handler's key= was changed: later messages would wait for ever.

        Only a row whose message the broker was to redeliver, and has redelivered now. The pump closes its rows itself.
        """
        t = self._t
        return (
            update(t)
            .where(
                t.c.id == bindparam("b_id", type_=t.c.id.type),
                t.c.state == "retrying",
                t.c.next_attempt_at.is_(None),
            )
            .values(state="resolved")
        )

    @cached_property
    def _resolving(self) -> Update:
        t = self._t
        named = {"b_group": t.c.consumer_group, "b_handler": t.c.handler, "b_key": t.c.failure_key}
        same = or_(
            t.c.fingerprint == bindparam("b_fingerprint", type_=t.c.fingerprint.type),
            t.c.message_id == bindparam("b_message_id", type_=t.c.message_id.type),
            # the handler's fingerprint= was changed since it failed: another fingerprint, but the same message
            _tag(t) != bindparam("b_tag", type_=t.c.fingerprint.type),
        )
        return (
            update(t)
            .where(
                *(column == bindparam(name, type_=column.type) for name, column in named.items()),
                same,
                # not a broken row: its claim stands, so its next copy is a duplicate, but half of its effects are missing
                or_(*(t.c.state == state for state in RESOLVABLE)),
            )
            .values(state="resolved", next_attempt_at=None)
        )

    def order_position(
        self, session: Session, failure: Failure, *, after_dead_wait: bool, is_its_own: Callable[[Row[Any]], bool]
    ) -> OrderPosition:
        """Return the place of a message among the open rows of its ordering key, in the caller's transaction.

        Args:
            session: The session in that transaction.
            failure: A failure made of the message.
            after_dead_wait: The message also waits behind dead messages.
            is_its_own: Whether a row with the same body, and the same id or key, keeps this very message.
        """
        t = self._t
        characters = characters_of(session.connection())
        of_key = and_(
            t.c.consumer_group == failure.group,
            t.c.handler == failure.handler,
            t.c.ordering_key == order_of(failure.message, t, characters),
        )
        key = failure.failure_key_in(characters)
        known = self._identity(failure, key)
        mine = select(t.c.id).where(known, t.c.state.in_(OPEN)).scalar_subquery()
        open_ = select(t.c.id).where(of_key, blocking(t, after_dead_wait=after_dead_wait), not_(known))
        wanted: Select[Any] = select(open_.order_by(t.c.id).limit(1).scalar_subquery(), mine)
        first, own = session.execute(all_rows(wanted, session.connection().dialect.name)).one()
        if first is None:
            return OrderPosition(False, own is not None)
        former = self._former(session, failure, and_(of_key, not_(known)), key, characters, is_its_own)
        since = min((id_ for id_ in (own, *former) if id_ is not None), default=None)
        return OrderPosition(since is None or first < since, since is not None, former)

    def _former(
        self,
        session: Session,
        failure: Failure,
        others: ColumnElement[bool],
        key: str,
        characters: str,
        is_its_own: Callable[[Row[Any]], bool],
    ) -> Sequence[int]:
        """Find rows of this message from before the handler's key= or fingerprint= was changed: it would wait for itself."""
        t, message = self._t, failure.message
        alike = and_(t.c.failure_key == key, _tag(t) != failure.fingerprint[:TAG_BYTES])
        if message.message_id:
            # an id alone proves little: producers may use the id of the order, the request or the batch
            alike = or_(t.c.message_id == storable(message.message_id, MESSAGE_ID_BYTES, characters), alike)
        # compare lengths first: to compare bodies, each query would send the body, and servers refuse long statements
        as_long = func.length(t.c.body) == len(message.body) if message.body is not None else t.c.body.is_(None)
        found = select(t).where(others, t.c.state.in_(OPEN), as_long, alike).order_by(t.c.id).limit(_MOST_FORMER)
        rows = session.execute(all_rows(found, session.connection().dialect.name)).all()
        return tuple(row.id for row in rows if row.body == message.body and is_its_own(row))

    def under_former_key(self, session: Session, group: str, handler: str, key: str, message_id: str) -> bool:
        """Whether a message with this id has a claim or a failure with this key."""
        claims, t = self._tables().idempotent, self._t
        characters = characters_of(session.connection())
        claimed = select(claims.c.status).where(
            claim_rows.of(claims, group, handler, key),
            claims.c.message_id == storable(message_id, MESSAGE_ID_BYTES, "ascii"),
        )
        failed = select(t.c.id).where(
            t.c.consumer_group == group,
            t.c.handler == handler,
            t.c.failure_key == "k:" + known_by(key, characters),
            t.c.message_id == storable(message_id, MESSAGE_ID_BYTES, characters),
        )
        return any(session.execute(found.limit(1)).first() is not None for found in (claimed, failed))

    def any_blocking(self, session: Session, group: str, handler: str, *, after_dead_wait: bool) -> bool:
        """Whether any ordering key of this handler may be blocked. Mostly none is, and one query answers for all messages."""
        t = self._t
        found = select(t.c.id).where(
            t.c.consumer_group == group,
            t.c.handler == handler,
            t.c.ordering_key.is_not(None),
            blocking(t, after_dead_wait=after_dead_wait),
        )
        return session.execute(found.limit(1)).first() is not None

    def _identity(self, failure: Failure, key: str) -> Any:
        t = self._t
        return and_(
            t.c.consumer_group == failure.group,
            t.c.handler == failure.handler,
            t.c.failure_key == key,
            t.c.fingerprint == failure.fingerprint,
        )


def _state(decision: Decision, counted: bool) -> dict[str, Any]:
    match decision:
        case Park(state):
            return {"state": state, "next_attempt_at": None}
        case ByPump(delay):
            return {"state": "retrying" if counted else "waiting", "next_attempt_at": utcnow(delay.total_seconds())}
        case ByBroker():
            return {"state": "retrying" if counted else "waiting", "next_attempt_at": None}
