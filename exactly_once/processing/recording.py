"""What is said and written down of a delivery that did not succeed: failures, waits, and stores that do not answer.

The decisions are `policy`'s, from values; the effect is a row of the failure store, in a transaction of its own. Where that
cannot be written, nothing is acknowledged and the message comes again.
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

from exactly_once.alert import Alert, Hook, raise_alert
from exactly_once.database.dialects.contract import ErrorKind
from exactly_once.database.store import Store
from exactly_once.errors import Reject, StoreUnavailable
from exactly_once.exceptions.words import words_of
from exactly_once.failures.policy import ByBroker, ByPump, Decision, Park, decide, wait_delay
from exactly_once.failures.store import Failure, FailureStore, text_of
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
_LOOKED_S: Final = 1.0  # so long a store that was seen not to work is not looked at again

_log = steady("exactly_once.failures")


@dataclass(frozen=True, slots=True)
class Unrecorded:
    """What is not written down of a message, because the store went away."""

    owner: str
    """Whose claim stands for it, or may."""
    error: BaseException | None = None
    """Why it is broken; None where it is not known whether it is."""
    block: bool = False
    """Its claim is to be written where none stands."""


ACK: Final = Ack()


class Recording:
    """Writes down what failed of one handler on one database, and says what the worker is to do.

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
        self._seen: dict[str, None] = {}
        self._owed: dict[str, Unrecorded] = {}
        self._unknown: dict[str, int] = {}
        self.processed, self.duplicate = (self.result(each, ACK) for each in (Outcome.PROCESSED, Outcome.DUPLICATE))
        self.refused: BaseException | None = None
        """Why this handler is held: it is wrong, and no message."""
        self._tell_away_at = self._cannot_until = 0.0

    def result(self, outcome: Outcome, verdict: Verdict, *, in_handler: bool = False) -> Result:
        """What became of a message for this handler; counted unless it waits for its key."""
        counted = () if type(verdict) is WaitForKey else ((self._handler, outcome),)
        return Result(outcome, verdict, in_handler=in_handler, handlers=counted)

    def again(self, work: Work, outcome: Outcome) -> Result:
        """Nothing of this run is written down: run it again, without spending the broker's deliveries on it at first.

        At the broker's last delivery the message would be parked, and nothing would say what had failed.
        """
        then = Redeliver(UNRECORDED)
        return self.result(outcome, then if work.foreign else WaitForKey(UNRECORDED, _UNRECORDED_LONGEST, then))

    def came_before(self, message: Message, key: str) -> bool:
        """Only a message that came before can have a failure row to close; others do not pay a statement for it."""
        return message.attempt > 1 or key in self._seen

    def succeeded(self, key: str) -> None:
        """Forget that it failed in this process."""
        self._seen.pop(key, None)

    # -- what could not be written ------------------------------------------------------------------------------------

    @property
    def owes(self) -> bool:
        """Something is not written down."""
        return bool(self._owed)

    def owed(self, key: str) -> Unrecorded | None:
        """What is not written down of this key."""
        return self._owed.get(key)

    def is_owed(self, key: str, owner: str) -> bool:
        """Whether a claim that stands is that of an attempt whose end nobody could learn."""
        owed = self._owed.get(key)
        return owed is not None and owed.owner == owner

    def owe(self, key: str, owed: Unrecorded) -> None:
        """Remember it; not dropped for want of room, for forgotten it would pass for a duplicate."""
        self._owed[key] = owed

    def paid(self, key: str) -> None:
        """It is written, or turned out to be nothing."""
        if self._owed:
            self._owed.pop(key, None)

    def wait(
        self,
        work: Work,
        outcome: Outcome,
        remaining: timedelta | None = None,
        said: BaseException | None = None,
    ) -> Result:
        """Not failed, only not now: asked again later, uncounted; near the broker's limit kept in the failure store.

        Args:
            work: The message.
            outcome: What became of it.
            remaining: How long another run's lease goes on.
            said: What the handler raised to say so; None where the message's own key is another run's.
        """
        decision = wait_delay(
            outcome,
            features=work.features,
            delivery_attempt=work.message.attempt,
            remaining=remaining,
            foreign=work.foreign,
        )
        if said is not None:
            # else nothing would name a part whose holder never lets go, such as the handler's own other session
            _log.warning(
                "part_in_progress handler=%s message_id=%s error=%s",
                self._handler,
                escaped(work.message.message_id or ""),
                escaped(words_of(said), 300),
            )
        if isinstance(decision, ByBroker):
            then = Redeliver(decision.delay)
            # under a lease the other run may end at any moment: looked at for a while, at no cost to the broker's attempts
            kept = remaining is not None and not work.foreign
            return self.result(
                outcome, WaitForKey(_LOOK_AGAIN, _LOOK_LONGEST, then) if kept else then, in_handler=said is not None
            )
        error = said or Reject(f"{outcome.value}: not run yet, and the broker would not bring it again")
        return self.record(work, error, lambda attempts: decision, counted=False, outcome=outcome)

    def unknown(self, work: Work, error: BaseException | None) -> Result:
        """COMMIT was sent and not answered, and its row is not there: the redelivery finds out, for a few times."""
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
        self.known(key)
        reason = (
            f"COMMIT was sent {times} times, and each time the connection ended without an answer and nothing of it was"
            f" there afterwards; the last time: {words}. Look for what ends it: a timeout of the server (wait_timeout,"
            " idle_in_transaction_session_timeout) that is shorter than the handler, a proxy between the two. Then:"
            " exactly-once failures requeue"
        )
        return self.record(work, error or Reject(reason), lambda attempts: Park("waiting", reason), counted=False)

    def known(self, key: str) -> None:
        """What became of its COMMIT is known: only those in a row are counted."""
        if self._unknown:
            self._unknown.pop(key, None)

    def refuse(self, error: BaseException | None = None, *, foreign: bool) -> Result:
        """Hold a handler that is wrong: its messages are neither counted nor kept nor acknowledged until it is mended.

        Args:
            error: What shows that it is wrong; None where that is known.
            foreign: The caller's loop holds the message, we cannot.
        """
        if self.refused is None:
            self.refused = error
            _log.error(
                "handler_held handler=%s: %s Its messages wait until the program is mended and started again.",
                self._handler,
                error,
            )
        again = Redeliver(UNRECORDED)
        return self.result(Outcome.WAITING, again if foreign else WaitForKey(UNRECORDED, _FOR_GOOD, again))

    def failed(self, work: Work, error: BaseException) -> Result:
        """It failed, and counts: tried again as the handler's policy says, or kept for a person."""
        retry = self._retry

        def by_policy(attempts: int) -> Decision:
            return decide(
                error,
                attempts=attempts,
                retry=retry,
                features=work.features,
                delivery_attempt=work.message.attempt,
                foreign=work.foreign,
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
        """Write it down in a new transaction; if that fails, nothing is acknowledged and the message comes again."""
        failure = replace(self.failure(work, error), counted=counted, claim_owner=claim_owner, block=block)

        def recorded(session: Session) -> tuple[Decision, int]:
            return self.failures.record(session, failure, decision_of)

        tries = 1
        while True:
            try:
                decision, attempts = in_our_session(self._open, self._store.dialect, recorded)
                break
            except Exception as problem:
                if self.works(problem) is False:
                    return self.away(problem)
                trouble = self._store.dialect.error_kind(problem)
                # whoever holds the table, or a limit of time: what is to be written is not what is wrong
                waited = trouble is ErrorKind.TRANSIENT or self._store.dialect.timed_out(problem)
                if (waited or trouble is ErrorKind.UNAVAILABLE) and tries < _RECORD_TRIES:
                    if trouble is ErrorKind.TRANSIENT:
                        self._pause(tries)  # at SERIALIZABLE those who met would only meet again
                    tries += 1
                elif not waited and (shorter := failure.form.shorter) is not None:
                    failure, tries = replace(failure, form=shorter), 1
                else:
                    self._unrecorded(failure, problem)
                    return self.again(work, outcome)
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
                return self.result(outcome, ACK)  # stored with its time: the pump owns the next try, the broker is done
            case ByBroker(delay):
                if failure.key is not None:
                    if len(self._seen) >= _REMEMBERED:
                        self._seen.clear()
                    self._seen[failure.key] = None
                return self.result(outcome, Redeliver(delay))

    def _pause(self, tries: int) -> None:
        seconds = _RECORD_PAUSE_S * 2**tries * random()  # noqa: S311
        if not self._is_async:
            sleep(seconds)
            return
        import asyncio

        await_only(asyncio.sleep(seconds))

    def failure(self, work: Work, error: BaseException) -> Failure:
        """What is written of a message that is not finished."""
        message, reading = work.message, work.reading
        if reading.key is None and not message.message_id:
            # nothing to know it by: never the same as another, or one of the two would be lost on requeue
            message = replace(message, message_id=f"anonymous-{uuid4().hex}")
        return Failure(self._group, self._handler, reading.key, reading.fingerprint, message, error)

    def _unrecorded(self, failure: Failure, problem: Exception) -> None:
        """Not even the short form was taken: nobody but the log will know of this message, so it says all that names it."""
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
        """Say whether the store can work, after an error that says it cannot; None where the error says nothing of that.

        A server cuts the connection of a body that is too large for it, and a full MEMORY table of the handler's own says
        what a full disk says. Taken for outages, such messages would stop the whole worker again and again, for ever. So
        the store is looked at, unless no connection was had at all.

        Args:
            problem: The error.
            spoken: It is of a COMMIT, so there was a connection.
        """
        if self._store.unreached(problem):
            return False  # whatever was raised there
        if self._store.dialect.error_kind(problem) is not ErrorKind.UNAVAILABLE:
            return None
        if isinstance(problem, DBAPIError) and not spoken and not _spoke(problem):
            return False
        if monotonic() < self._cannot_until:
            return False  # another message has just looked
        self._store.seen(problem)
        if self._store.look(is_async=self._is_async):
            return True
        self._cannot_until = monotonic() + _LOOKED_S
        return False

    def away(self, error: BaseException | None) -> Result:
        """The store does not answer: the delivery is held; said in the log once in a while, not for each message."""
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
    """Say whether a statement was sent: of the ROLLBACK that fails behind it, the error names none."""
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
