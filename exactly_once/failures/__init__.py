"""The failure store: every message that failed, whole, with its reason, until it is resolved or a person decides.

Rows are written in a transaction of their own, after the handler's was rolled back; where that fails, nothing is
acknowledged. A row has one owner of its next try: `next_attempt_at` NULL means the broker brings the message again, a
time means the pump does. Called by `delivery`; the `pump` takes what is `due`, and a person's decisions are in `triage`.

States: retrying, waiting (not failed, only not yet: it does not count), requeued -> resolved; dead, broken -> requeued or
discarded by a person.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Column, and_, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError, StatementError
from sqlalchemy.orm import Session

from exactly_once.errors import Reject
from exactly_once.message import Message
from exactly_once.policy import ByBroker, ByPump, Decision, Park
from exactly_once.pooler import begin_bounded
from exactly_once.schema import Tables, utcnow
from exactly_once.wording import storable

__all__ = ["CLOSED", "OPEN", "Failure", "FailureStore", "place_of", "words_of"]

OPEN: Final = ("retrying", "waiting", "requeued", "dead", "broken")
RUNNABLE: Final = ("retrying", "waiting", "requeued")
PARKED: Final = ("dead", "broken")
RESOLVABLE: Final = (*RUNNABLE, "dead")
CLOSED: Final = ("resolved", "discarded")

MESSAGE_ID_BYTES: Final = 255
_NOT_THE_USERS: Final = tuple(f"{Path(file).parents[1]}{os.sep}" for file in (__file__, json.__file__))
_ERROR_TEXT_CHARACTERS: Final = 4000  # enough for a person; a validation error of a large body can be megabytes


@dataclass(frozen=True, slots=True)
class Failure:
    """One message of one handler that was not processed.

    `key` is None where the message has no usable business key; it is then known by its message id.
    """

    group: str
    handler: str
    key: str | None
    fingerprint: bytes
    message: Message
    error: BaseException
    counted: bool = True

    @property
    def failure_key(self) -> str:
        """By what this failure is the same as an earlier one."""
        if self.key is not None:
            return "k:" + self.key
        return "m:" + (storable(self.message.message_id, MESSAGE_ID_BYTES) or "")


class FailureStore:
    """The failure rows of one consumer group in one database."""

    def __init__(self, tables: Tables) -> None:
        self._t = tables.failure

    def record(self, session: Session, failure: Failure, decide: Callable[[int], Decision]) -> tuple[Decision, int]:
        """Write one failure down, counting it, with what is to happen next; commits.

        Args:
            session: A fresh session in no transaction.
            failure: What failed.
            decide: From the number of failures, this one included, what is to happen.

        Returns:
            The decision that was stored, and the number of failures. A row a person discarded stays discarded.
        """
        for last in (False, True):
            try:
                with session.begin():
                    begin_bounded(session.connection())
                    return self._record(session, failure, decide)
            except IntegrityError:
                # two deliveries of one message failed at the same moment; now the row is there to be updated
                if last:
                    raise
        raise AssertionError

    def _record(self, session: Session, failure: Failure, decide: Callable[[int], Decision]) -> tuple[Decision, int]:
        t = self._t
        identity = self._identity(failure)
        known = select(t.c.id, t.c.attempts, t.c.state)
        row = session.execute(known.where(identity)).one_or_none()
        if row is not None:
            # locked by its id, and only when it is there: on InnoDB a locking read of nothing locks the gap around it,
            # and two messages that fail for the first time would deadlock on each other's gap
            row = session.execute(known.where(t.c.id == row.id).with_for_update()).one()
        if row is not None and row.state == "discarded":
            return Park("discarded", "a person discarded this message"), row.attempts
        earlier = row.attempts if row is not None else 0
        attempts = earlier + 1 if failure.counted else earlier
        decision = decide(attempts)
        values = {
            "error_class": type(failure.error).__name__[:255],
            "error_text": _text_of(failure.error),
            "attempts": attempts,
            "last_failed_at": utcnow(),
            **_state(decision, failure.counted),
        }
        if row is not None:
            session.execute(update(t).where(t.c.id == row.id).values(**values))
        else:
            session.execute(insert(t).values(**values, **self._new(failure)))
        return decision, attempts

    def resolve(
        self, session: Session, group: str, handler: str, key: str, fingerprint: bytes, message_id: str | None
    ) -> None:
        """Close the row of a message that was processed, in the caller's transaction."""
        t = self._t
        same = t.c.fingerprint == fingerprint
        if message_id:
            # the handler's fingerprint= was changed since it failed: another fingerprint, and yet this very message
            same = or_(same, t.c.message_id == storable(message_id, MESSAGE_ID_BYTES))
        session.execute(
            update(t)
            .where(
                t.c.consumer_group == group,
                t.c.handler == handler,
                t.c.failure_key == "k:" + key,
                same,
                # not a broken one: its claim stands, so its next copy is a duplicate, and half of its effects are missing
                t.c.state.in_(RESOLVABLE),
            )
            .values(state="resolved", next_attempt_at=None)
        )

    def blocked(self, session: Session, failure: Failure, *, after_dead_wait: bool) -> bool:
        """Say whether an older message of this one's ordering key must come first; in the caller's transaction."""
        t = self._t
        of_key = and_(
            t.c.consumer_group == failure.group,
            t.c.handler == failure.handler,
            t.c.ordering_key == _fitting(failure.message.ordering_key, t.c.ordering_key),
        )
        own: Any = select(t.c.id).where(self._identity(failure)).scalar_subquery()
        if failure.message.message_id:
            # its row may be from before the handler's key= or fingerprint= was changed: it would wait for itself, for ever
            known = t.c.message_id == storable(failure.message.message_id, MESSAGE_ID_BYTES)
            own = func.coalesce(select(func.min(t.c.id)).where(of_key, known).scalar_subquery(), own)
        older = select(t.c.id).where(
            of_key,
            t.c.state.in_(OPEN if after_dead_wait else RUNNABLE),
            or_(own.is_(None), t.c.id < own),
        )
        return session.execute(older.limit(1)).first() is not None

    def any_blocking(self, session: Session, group: str, handler: str, *, after_dead_wait: bool) -> bool:
        """Say whether any ordering key of this handler may be blocked: mostly none is, and one look tells for all."""
        t = self._t
        states = t.c.state.in_(OPEN if after_dead_wait else RUNNABLE)
        found = select(t.c.id).where(
            t.c.consumer_group == group, t.c.handler == handler, t.c.ordering_key.is_not(None), states
        )
        return session.execute(found.limit(1)).first() is not None

    def _identity(self, failure: Failure) -> Any:
        t = self._t
        return and_(
            t.c.consumer_group == failure.group,
            t.c.handler == failure.handler,
            t.c.failure_key == failure.failure_key,
            t.c.fingerprint == failure.fingerprint,
        )

    def _new(self, failure: Failure) -> dict[str, Any]:
        m, t = failure.message, self._t.c
        return {
            "consumer_group": failure.group,
            "handler": failure.handler,
            "failure_key": failure.failure_key,
            "fingerprint": failure.fingerprint,
            "business_key": failure.key,
            "topic": _fitting(m.topic, t.topic),
            "tag": _fitting(m.tag, t.tag),
            "message_key": _fitting(m.key, t.message_key),
            "ordering_key": _fitting(m.ordering_key, t.ordering_key),
            "body": m.body,
            "properties": _properties_of(m),
            "message_id": storable(m.message_id, MESSAGE_ID_BYTES),
            "born_at": m.born_at,
            "first_failed_at": utcnow(),
        }


def _state(decision: Decision, counted: bool) -> dict[str, Any]:
    match decision:
        case Park(state):
            return {"state": state, "next_attempt_at": None}
        case ByPump(delay):
            return {"state": "retrying" if counted else "waiting", "next_attempt_at": utcnow(delay.total_seconds())}
        case ByBroker():
            return {"state": "retrying" if counted else "waiting", "next_attempt_at": None}


def _fitting(text: str | None, column: Column[str]) -> str | None:
    return storable(text, column.type.bytes)  # type: ignore[attr-defined]


def _properties_of(message: Message) -> str:
    text = json.dumps(dict(message.properties), ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which no server takes; less readable, but as it was
        return json.dumps(dict(message.properties))
    return text


def words_of(error: BaseException) -> str:
    """Return what an error says, without the values of a statement: those are customers' data, in logs and rows."""
    if isinstance(error, StatementError):
        statement = f" [in: {' '.join(error.statement.split())[:500]}]" if error.statement else ""
        return f"{str(error.orig).strip()}{statement}"
    return str(error)


def place_of(error: BaseException) -> str:
    """Return the line an error was raised in, the last that is neither a library's nor ours; "" where there is none.

    Not of a `Reject`: that is no mistake in the program, and its reason is for a person to read.
    """
    if isinstance(error, Reject):
        return ""
    found = ""
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        # "<...": made at run time, as SQLAlchemy makes its wrappers
        if not code.co_filename.startswith((*_NOT_THE_USERS, "<")) and "site-packages" not in code.co_filename:
            found = f" (at {'/'.join(Path(code.co_filename).parts[-2:])}:{trace.tb_lineno} in {code.co_name})"
        trace = trace.tb_next
    return found


def _text_of(error: BaseException) -> str:
    # NUL cannot be stored as text on PostgreSQL, and an error may quote a body that has one
    text = f"{words_of(error)}{place_of(error)}".replace("\x00", "\\0").encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= _ERROR_TEXT_CHARACTERS else text[:_ERROR_TEXT_CHARACTERS] + " [cut]"
