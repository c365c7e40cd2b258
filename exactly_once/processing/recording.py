"""Reports and records a delivery that did not succeed: failures, waits, and stores that do not answer.

`policy` makes the decisions, from values. The effect is a row of the failure store, in a transaction of its own. If the row
cannot be written, nothing is acknowledged and the message is redelivered. Called by `processor` and `batch`.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from random import random
from time import monotonic, sleep
from typing import Any, Final
from uuid import uuid4

from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from exactly_once.database.dialects.contract import ErrorKind
from exactly_once.database.store import Store
from exactly_once.errors import Reject, StoreUnavailable
from exactly_once.events.alert import Alert, Hook, raise_alert
from exactly_once.exceptions.words import words_of
from exactly_once.failures.failure import Failure, text_of
from exactly_once.failures.policy import ByBroker, ByPump, Decision, Park, decide, wait_delay
from exactly_once.failures.store import FailureStore
from exactly_once.guards.our_session import in_our_session
from exactly_once.handlers.plan import Plan
from exactly_once.message import Message
from exactly_once.outcome import Ack, Outcome, Redeliver, Result, Verdict, WaitForKey, WaitForStore
from exactly_once.processing.work import Work
from exactly_once.wording.steady_log import steady
from exactly_once.wording.text import escaped

__all__ = ["ACK", "UNRECORDED", "Recording", "Unrecorded"]

_RECORD_PAUSE_S: Final = 0.02
_RECORD_TRIES: Final = 5  # of each form, where a deadlock or a cut connection was in the way
_UNRECORDED_LONGEST: Final = timedelta(minutes=2)
UNRECORDED: Final = timedelta(seconds=5)  # neither run nor stored: not in a tight circle
# keys that failed in this process, for loops that do not count deliveries; one forgotten leaves its row to the sweep
_REMEMBERED: Final = 10_000
_UNKNOWN_TRIES: Final = 5
_FOR_GOOD: Final = timedelta(days=3650)
_LOOK_AGAIN: Final = timedelta(seconds=0.5)
_LOOK_LONGEST: Final = timedelta(seconds=5)
_TELL_AGAIN_S: Final = 10.0
_LOOKED_S: Final = 1.0  # a store that was seen not to work is not checked again for so long

_log = steady("exactly_once.failures")


@dataclass(frozen=True, slots=True)
class Unrecorded:
    """What could not be recorded about a message, because the store went away."""

    owner: str
    """The owner of the claim that stands for the message, or may stand."""
    error: BaseException | None = None
    """Why the message is broken. None: it is not known whether it is."""
    block: bool = False
    """Write the claim if none stands."""


ACK: Final = Ack()


class Recording:
    """Records the failures of one handler on one database, and returns what the worker must do.

    Args:
        plan: The handler.
        store: The database.
        group: The consumer group.
        open_session: Makes a session.
        alert: The application's hook for messages that are kept for a person.
    """

    def __init__(
        self, plan: Plan, store: Store, group: str, open_session: Callable[[], tuple[Session, Any]], alert: Hook | None
    ) -> None:
        self._handler, self._retry, self._is_async = plan.name, plan.retry, plan.is_async
        self._store, self._group, self._open, self._alert = store, group, open_session, alert
        self.failures = FailureStore(lambda: store.tables)
        self._failed_keys: dict[str, None] = {}
        self._pending: dict[str, Unrecorded] = {}
        self._unknown: dict[str, int] = {}
        self.processed, self.duplicate = (self.result(each, ACK) for each in (Outcome.PROCESSED, Outcome.DUPLICATE))
        self.refused: BaseException | None = None
        """Why this handler is held: the handler is wrong, not a message."""
        self._tell_away_at = self._cannot_until = 0.0

    def result(self, outcome: Outcome, verdict: Verdict, *, in_handler: bool = False) -> Result:
        """Make the result of a message for this handler. It is counted, unless the message stays in hand and runs again."""
        counted = () if isinstance(verdict, (WaitForKey, WaitForStore)) else ((self._handler, outcome),)
        return Result(outcome, verdict, in_handler=in_handler, handlers=counted)

    def run_again(self, work: Work, outcome: Outcome) -> Result:
        """Nothing of this run is written down: run it again, without spending the broker's deliveries on it at first.

        At the broker's last delivery the message would be parked, and nothing would say what had failed.
        """
        then = Redeliver(UNRECORDED)
        return self.result(outcome, then if work.callers_loop else WaitForKey(UNRECORDED, _UNRECORDED_LONGEST, then))

    def came_before(self, message: Message, key: str) -> bool:
        """Whether the message came before. Only then can a failure row exist; others save the statement that closes it."""
        return message.attempt > 1 or key in self._failed_keys

    def forget_failed(self, key: str) -> None:
        """Forget that this key failed in this process."""
        self._failed_keys.pop(key, None)

    # -- what could not be written ------------------------------------------------------------------------------------

    @property
    def has_unrecorded(self) -> bool:
        """Whether anything is still to be recorded."""
        return bool(self._pending)

    def unrecorded(self, key: str) -> Unrecorded | None:
        """Return what is still to be recorded for this key."""
        return self._pending.get(key)

    def is_unrecorded(self, key: str, owner: str) -> bool:
        """Whether the claim that stands belongs to an attempt whose end is not known."""
        what = self._pending.get(key)
        return what is not None and what.owner == owner

    def remember(self, key: str, what: Unrecorded) -> None:
        """Remember what is to be recorded. Never evicted: the message would be taken for a duplicate."""
        self._pending[key] = what

    def forget(self, key: str) -> None:
        """Forget it: it is recorded, or nothing was to be recorded."""
        if self._pending:
            self._pending.pop(key, None)

    def wait(
        self,
        work: Work,
        outcome: Outcome,
        remaining: timedelta | None = None,
        said: BaseException | None = None,
    ) -> Result:
        """Postpone a message that did not fail: it comes again, uncounted. Near the broker's limit the failure store keeps it.

        Args:
            work: The message.
            outcome: What became of it.
            remaining: How long the lease of another run still lasts.
            said: What the handler raised to ask for this. None: another run holds the message's own key.
        """
        decision = wait_delay(
            outcome,
            features=work.features,
            delivery_attempt=work.message.attempt,
            remaining=remaining,
            callers_loop=work.callers_loop,
        )
        if said is not None:
            # only this line names a part whose holder never releases it, such as another session of the same handler
            _log.warning(
                "part_in_progress handler=%s message_id=%s error=%s",
                self._handler,
                escaped(work.message.message_id or ""),
                escaped(words_of(said), 300),
            )
        if isinstance(decision, ByBroker):
            then = Redeliver(decision.delay)
            # under a lease the other run may end at any moment: the worker looks for a while, which spends no broker's attempt
            kept = remaining is not None and not work.callers_loop
            return self.result(
                outcome, WaitForKey(_LOOK_AGAIN, _LOOK_LONGEST, then) if kept else then, in_handler=said is not None
            )
        error = said or Reject(f"{outcome.value}: not run yet, and the broker would not bring it again")
        return self.record(work, error, lambda attempts: decision, counted=False, outcome=outcome)

    def unknown(self, work: Work, error: BaseException | None) -> Result:
        """COMMIT was sent but not answered, and its row is not there. The redelivery finds out; the fifth time, park it."""
        key = work.reading.key or ""
        times = self._unknown[key] = self._unknown.get(key, 0) + 1
        words = words_of(error) if error is not None else "no answer"
        _log.warning(
            "commit_unknown handler=%s key=%s times=%d error=%s",
            self._handler,
            escaped(key),
            times,
            escaped(words, 300),
        )
        if times < _UNKNOWN_TRIES:
            if len(self._unknown) > _REMEMBERED:
                self._unknown.clear()
            return self.wait(work, Outcome.UNKNOWN)
        self.commit_known(key)
        reason = (
            f"COMMIT was sent {times} times, and each time the connection ended without an answer and nothing of it was"
            f" there afterwards; the last time: {words}. Look for what ends it: a timeout of the server (wait_timeout,"
            " idle_in_transaction_session_timeout) that is shorter than the handler, a proxy between the two. Then:"
            " exactly-once failures requeue"
        )
        return self.record(work, error or Reject(reason), lambda attempts: Park("waiting", reason), counted=False)

    def commit_known(self, key: str) -> None:
        """Reset the count: the end of this key's COMMIT is known. Only unknown ends in a row are counted."""
        if self._unknown:
            self._unknown.pop(key, None)

    def refuse(self, error: BaseException | None = None, *, callers_loop: bool) -> Result:
        """Hold a handler that is wrong. Until it is repaired its messages are not counted, stored or acknowledged.

        Args:
            error: What shows that the handler is wrong. None: that is known already.
            callers_loop: The caller's loop has the message, so it cannot be kept in hand here.
        """
        if self.refused is None:
            self.refused = error
            _log.error(
                "handler_held handler=%s: %s Its messages wait until the program is mended and started again.",
                self._handler,
                error,
            )
        again = Redeliver(UNRECORDED)
        return self.result(Outcome.WAITING, again if callers_loop else WaitForKey(UNRECORDED, _FOR_GOOD, again))

    def failed(self, work: Work, error: BaseException) -> Result:
        """Record a failure that counts. The handler's policy decides: tried again, or parked for a person."""
        retry = self._retry

        def by_policy(attempts: int) -> Decision:
            return decide(
                error,
                attempts=attempts,
                retry=retry,
                features=work.features,
                delivery_attempt=work.message.attempt,
                callers_loop=work.callers_loop,
            )

        return self.record(work, error, by_policy)

    def record(
        self,
        work: Work,
        error: BaseException,
        decision_of: Callable[[int], Decision],
        *,
        counted: bool = True,
        outcome: Outcome = Outcome.FAILED,
        claim_owner: str | None = None,
        block: bool = False,
    ) -> Result:
        """Record it in a new transaction. If that fails, nothing is acknowledged and the message is redelivered."""
        failure = replace(self.failure(work, error), counted=counted, claim_owner=claim_owner, block=block)

        def recorded(session: Session) -> tuple[Decision, int]:
            return self.failures.record(session, failure, decision_of)

        tries = 1
        while True:
            try:
                decision, attempts = in_our_session(self._open, self._store.dialect, recorded)
                break
            except Exception as problem:
                self._remember_failed(failure.key)  # the answer of COMMIT may be what is missing: then the row is there
                if self.works(problem) is False:
                    return self.away(problem)
                trouble = self._store.dialect.error_kind(problem)
                # someone holds a lock on the table, or a time limit was reached: the row itself is not the reason
                waited = trouble is ErrorKind.TRANSIENT or self._store.dialect.timed_out(problem)
                if (waited or trouble is ErrorKind.UNAVAILABLE) and tries < _RECORD_TRIES:
                    if trouble is ErrorKind.TRANSIENT:
                        self._pause(tries)  # at SERIALIZABLE those who met would only meet again
                    tries += 1
                elif not waited and (shorter := failure.form.shorter) is not None:
                    failure, tries = replace(failure, form=shorter), 1
                else:
                    self._unrecorded(failure, problem)
                    return self.run_again(work, outcome)
        _log.log(
            logging.WARNING if counted else logging.INFO,
            "message_failed handler=%s key=%s attempts=%d next=%s error=%s: %s",
            self._handler,
            escaped(failure.failure_key[2:], 120),
            attempts,
            _told(decision),
            type(error).__name__,
            escaped(text_of(error), 400),
        )
        match decision:
            case Park("resolved"):
                return self.duplicate
            case Park(state, reason):
                if state != "discarded":
                    known_by = failure.key or failure.message.message_id or ""
                    raise_alert(self._alert, Alert("parked", self._group, self._handler, known_by, reason))
                return self.result(Outcome.DEAD, ACK)
            case ByPump():
                return self.result(outcome, ACK)  # stored with a time: the pump makes the next try, the broker none
            case ByBroker(delay):
                self._remember_failed(failure.key)
                return self.result(outcome, Redeliver(delay))

    def _remember_failed(self, key: str | None) -> None:
        if key is None:
            return
        if len(self._failed_keys) >= _REMEMBERED:
            self._failed_keys.clear()
        self._failed_keys[key] = None

    def _pause(self, tries: int) -> None:
        seconds = _RECORD_PAUSE_S * 2**tries * random()  # noqa: S311
        if not self._is_async:
            sleep(seconds)
            return
        import asyncio

        await_only(asyncio.sleep(seconds))

    def failure(self, work: Work, error: BaseException) -> Failure:
        """Make the failure row of a message that is not finished."""
        message, reading = work.message, work.reading
        if reading.key is None and not message.message_id:
            # the message has no identity. It gets one of its own: if two shared a row, one would be lost on requeue
            message = replace(message, message_id=f"anonymous-{uuid4().hex}")
        return Failure(self._group, self._handler, reading.key, reading.fingerprint, message, error)

    def _unrecorded(self, failure: Failure, problem: Exception) -> None:
        """Log all that names this message: not even the short form could be stored, so only the log knows of it."""
        m = failure.message
        _log.error(
            "failure_not_recorded group=%s handler=%s key=%s message_id=%s topic=%s fingerprint=%s error=%s: %s"
            " reason=%s: %s; it is not acknowledged and comes again",
            failure.group,
            failure.handler,
            escaped(failure.failure_key, 300),
            escaped(m.message_id or "", 300),
            escaped(m.topic, 300),
            failure.fingerprint.hex(),
            type(failure.error).__name__,
            escaped(text_of(failure.error), 400),
            type(problem).__name__,
            escaped(text_of(problem), 400),
        )

    def works(self, problem: BaseException, *, spoken: bool = False) -> bool | None:
        """Check whether the store works, after an error that says it does not. None: the error says nothing about that.

        A server cuts the connection when a body is too large for it. A full MEMORY table of the handler's own gives the same
        error as a full disk. If these were taken for outages, such a message would stop the whole worker again and again, for
        ever. So the store itself is asked, unless there was no connection at all.

        Args:
            problem: The error.
            spoken: The error is that of a COMMIT, so there was a connection.
        """
        if self._store.unreached(problem):
            return False  # no connection, whatever was raised
        if self._store.dialect.error_kind(problem) is not ErrorKind.UNAVAILABLE:
            return None
        if isinstance(problem, DBAPIError) and not spoken and not _spoke(problem):
            return False
        if monotonic() < self._cannot_until:
            return False  # checked a moment ago for another message
        self._store.seen(problem)
        if self._store.look(is_async=self._is_async):
            return True
        self._cannot_until = monotonic() + _LOOKED_S
        return False

    def away(self, error: BaseException | None) -> Result:
        """Hold the delivery: the store does not answer. Logged once in a while, not for each message."""
        if error is not None:
            self._store.seen(error)
        now = monotonic()
        store = (error.store if isinstance(error, StoreUnavailable) else None) or self._store.name
        if now >= self._tell_away_at:
            self._tell_away_at = now + _TELL_AGAIN_S
            words = "" if error is None else words_of(error)
            told = " ".join(filter(None, (escaped(words, 300), self._store.remedy(error))))
            _log.warning("store_away store=%s error=%s", store, told)
        return self.result(Outcome.WAITING, WaitForStore(store))


def _spoke(problem: BaseException | None) -> bool:
    """Whether a statement was sent. The error of a ROLLBACK that fails after it names no statement, so look at the context."""
    while problem is not None:
        if isinstance(problem, DBAPIError) and problem.statement is not None:
            return True
        problem = problem.__context__
    return False


def _told(decision: Decision) -> str:
    match decision:
        case Park(state):
            return state
        case ByPump(delay):
            return f"pump+{delay.total_seconds():g}s"
        case ByBroker(delay):
            return f"broker+{delay.total_seconds():g}s"
