"""Processes one delivery for one handler: reads it, tries it, records a failure, and returns what the worker must do.

The only caller of `attempt`; `batch` builds on it. Read it from top to bottom: that is the order of events. It writes in two
transactions only: the attempt's and the failure store's. `policy` makes the decisions between them, from values. Never knows a
broker: what the broker can do arrives as `Features`. Called by the executor.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

from sqlalchemy import Row
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from exactly_once.claim import ClaimRow
from exactly_once.database.store import Store
from exactly_once.database.watched.transaction_end import BrokenTransaction
from exactly_once.errors import (
    BadKey,
    ConfigurationError,
    Misuse,
    PayloadConflict,
    Reject,
    RetryLater,
    StepError,
    StoreUnavailable,
)
from exactly_once.events.alert import Hook
from exactly_once.exceptions.finishing import finish
from exactly_once.exceptions.other_queues import advice_on
from exactly_once.exceptions.stops import exit_in, is_the_callers, stops
from exactly_once.exceptions.words import trace_of, words_of
from exactly_once.failures.due import message_of
from exactly_once.failures.failure import MESSAGE_ID_BYTES
from exactly_once.failures.policy import Park, counts_as, spent
from exactly_once.failures.store import OrderPosition
from exactly_once.guards.contract import Consumed, Guard, Unfinished, Won
from exactly_once.guards.lease.ledger import StepLedger
from exactly_once.guards.lease.stores import LeasePlacement, LeaseStores, sql_leases
from exactly_once.guards.our_session import in_our_session
from exactly_once.guards.transaction import TransactionGuard
from exactly_once.handlers.one_turn import let_tasks_begin
from exactly_once.handlers.plan import Lease, Lock, Plan, Reading, Transaction, check_result
from exactly_once.handlers.retry import retry_for
from exactly_once.handlers.steps import AsyncSteps, Steps
from exactly_once.message import Message
from exactly_once.outcome import Outcome, Result
from exactly_once.processing.attempt import UNFINISHED, attempt
from exactly_once.processing.attempt_result import AttemptContext, AttemptEnd, AttemptResult, Open
from exactly_once.processing.handler_errors import reported
from exactly_once.processing.recording import ACK, UNRECORDED, Recording, Unrecorded
from exactly_once.processing.work import Work
from exactly_once.transports.contract import Features
from exactly_once.wording.steady_log import steady
from exactly_once.wording.text import escaped, storable

__all__ = ["CALLERS_LOOP", "Processor"]

CALLERS_LOOP: Final = Features(redelivers=True, counts_attempts=False)
"""The features of a consumer loop that is not ours: it redelivers by itself, and nothing else is known about it."""

_TRANSIENT_TRIES: Final = 4  # the victim of a deadlock succeeds at its second try; four are enough for a hot row
_LEARNT_LATE: Final = (
    "An earlier attempt's claim stands, and that attempt failed: something committed its transaction before it ended, and the"
    " database went away before this could be seen. What the handler had written until then is there, and the rest is missing."
)

_log = steady("exactly_once.failures")


class Processor:
    """One handler on one database. Made once, at start.

    Args:
        plan: The handler, with all that was decided about it at import.
        store: The database its messages are routed to.
        group: The consumer group.
        leases: Where leases are kept, for a handler under a lease.
        enforce: False: duplicates run all the same, and are logged.
        alert: The application's hook for messages that are kept for a person.

    Raises:
        ConfigurationError: The database makes sessions of another class than the handler wants, or there is no place for its
            leases.
    """

    def __init__(
        self,
        plan: Plan,
        store: Store,
        group: str,
        *,
        leases: LeaseStores | None = None,
        enforce: bool = True,
        alert: Hook | None = None,
    ) -> None:
        self.plan, self.store, self.group, self.leases = plan, store, group, leases
        self._enforce, self.alert = enforce, alert
        _check_session(plan, store)
        self._placed: LeasePlacement | None = None
        self._guard: Guard = self._guarded(plan, store)
        self._open: Open = store.open_async if plan.is_async else store.open
        # for our own statements: no hook of the application runs in this session
        self._ours: Open = store.open_ours_async if plan.is_async else store.open_ours
        self.recording = Recording(plan, store, group, self._ours, alert)
        self._context = AttemptContext(
            self._open, self._ours, self._guard, store.dialect, store.of_another_database, enforce=enforce
        )
        self._call = self._call_awaited if plan.is_async else self._call_plain

    def _guarded(self, plan: Plan, store: Store) -> Guard:
        match plan.guard:
            case Transaction(claim_wait):
                leases = sql_leases(store, is_async=plan.is_async)
                return TransactionGuard(store.dialect, leases, claim_wait=claim_wait)
            case _ if not self._enforce:
                raise ConfigurationError(
                    f"The handler {plan.name!r} is under a {type(plan.guard).__name__}, and enforce=False is for handlers"
                    " under the transaction guard: a run that another one holds cannot be let through."
                )
            case Lease():
                assert self.leases is not None
                self._placed = self.leases.placed(plan, store)
                return self._placed.guard(plan, store)
            case Lock():
                assert self.leases is not None
                return self.leases.lock_guard(plan, store)

    def read(
        self,
        message: Message,
        features: Features,
        *,
        pumped: bool = False,
        callers_loop: bool = False,
        on_our_thread: bool = False,
    ) -> Work:
        """Read a message. If it cannot be read, the reason is in the reading's `error`; nothing is raised.

        Args:
            message: The delivered message.
            features: What the source of the delivery can do.
            pumped: The message comes from the failure store.
            callers_loop: The caller is a consumer loop that is not ours; no retry is scheduled.
            on_our_thread: The caller is in an event loop, and this thread is ours, not the caller's.
        """
        reading = self.plan.read(message)
        row = self._row(message, reading) if reading.key is not None and reading.error is None else None
        return Work(message, reading, row, features, pumped, callers_loop, on_our_thread)

    def run(
        self,
        message: Message,
        features: Features,
        *,
        pumped: bool = False,
        callers_loop: bool = False,
        on_our_thread: bool = False,
    ) -> Result:
        """Process one delivery. Blocks (in a greenlet: awaits) until there is a result.

        Args:
            message: As of `read`.
            features: As of `read`.
            pumped: As of `read`.
            callers_loop: As of `read`.
            on_our_thread: As of `read`.

        Returns:
            Outcome and verdict. A store that does not answer gives `WaitForStore`.

        Raises:
            ConfigurationError: The database is set up so that no claim can be trusted.
        """
        if self.recording.refused is not None:
            return self.recording.refuse(callers_loop=callers_loop)
        return self.process(
            self.read(message, features, pumped=pumped, callers_loop=callers_loop, on_our_thread=on_our_thread)
        )

    def process(self, work: Work) -> Result:
        """Process a message that was read; as `run`."""
        if work.row is None:
            assert work.reading.error is not None
            return self.recording.failed(work, work.reading.error)
        try:
            if work.message.former is not None:
                work = self._under_former_key(work, work.message.former)
            return self._checked(work)
        except StoreUnavailable as error:
            return self.recording.away(error)
        except BadKey as error:  # the database cannot store the characters of this key
            return self.recording.failed(work, error)
        except ConfigurationError as error:
            error.store = self.store.name
            raise  # the program or the server is wrong: no message is blamed
        except Exception as error:  # a statement of ours failed before the attempt: nothing ran, so no acknowledgement
            key = escaped(work.reading.key or "")
            _log.error("message_not_run handler=%s key=%s\n%s", self.plan.name, key, trace_of(error))
            return self.recording.run_again(work, Outcome.WAITING)

    def _checked(self, work: Work) -> Result:
        """Check first whether the message was processed, must wait, or was given up. Then try it."""
        message, row = work.message, work.row
        assert row is not None
        if not work.pumped and spent(message.attempt, work.features):
            return self._spent(work, row)
        if (
            self.recording.has_unrecorded
            and (owed := self.recording.unrecorded(row.key)) is not None
            and owed.error is not None
        ):
            # broken, but not recorded, because the store went away: another run would repeat what was committed
            return self._broken(work, owed.error, owed.owner, block=owed.block)
        before = work.pumped or self.recording.came_before(message, row.key)
        former: Sequence[int] = ()
        if self.plan.ordered and message.ordering_key is not None:
            position = self._order_position(work)
            if position.blocked:
                # a message that was processed before need not wait behind others
                return self._done(work, row) or self.recording.wait(work, Outcome.WAITING)
            before, former = before or position.known, position.former
        return self._try(work, row, before, former)

    def _row(self, message: Message, reading: Reading) -> ClaimRow:
        assert reading.key is not None
        return ClaimRow(
            self.group,
            self.plan.name,
            reading.key,
            reading.fingerprint,
            # only for people to read, never compared. ASCII, so that no character set can keep the message from running
            storable(message.message_id, MESSAGE_ID_BYTES, "ascii"),
            message.attempt,
            "",
            message.born_at,
        )

    # -- the tries ---------------------------------------------------------------------------------------------------

    def _try(self, work: Work, row: ClaimRow, before: bool, former: Sequence[int]) -> Result:
        message, callers_loop = work.message, work.callers_loop
        sent = False  # whether the COMMIT of a step was sent

        def translate(error: BaseException) -> BaseException:
            # in a loop of the caller's the thread is the caller's, and a signal may have asked the thread to end
            return reported(error, exits=work.on_our_thread or not callers_loop)

        def handle(handed: Any, won: Won) -> None:
            nonlocal sent
            sent = False
            ledger = self._ledger(won)
            try:
                self._call(handed, work.reading, message, ledger)
            except BaseException as error:
                translated = translate(error)
                if ledger is not None:
                    ledger.close()
                    sent = ledger.sent
                    broken = isinstance(ledger.error, BrokenTransaction)
                    if ledger.error is not None and (broken or isinstance(translated, Exception)):
                        # report what stopped a step. The handler's exception may wrap that error, or be the same one: then
                        # its cause may be what stops the task
                        raise ledger.error from (translated.__cause__ if translated is ledger.error else translated)
                    if ledger.why is not None and not stops(translated):
                        raise ledger.why from translated
                if translated is not error:
                    raise translated from error
                raise
            if ledger is not None:
                ledger.end()

        # under a lease the claim's number shows earlier claims, too: one may have failed in another process
        close_failure = self._closing(row, message, before, former) if before or self._placed is not None else None
        transient = immediate = 0
        looked = False
        while True:
            if transient or immediate:
                work = work._replace(
                    reading=self.plan.read(message)
                )  # the handler may have changed the body, so it is read again
            ended = attempt(
                self._context, row, handle, translate=translate, close_failure=close_failure, failed_before=before
            )
            if ended.how is AttemptEnd.FAILED and ended.error is not None and self.store.unreached(ended.error):
                ended = replace(ended, how=AttemptEnd.TRANSIENT)  # the error alone does not show that the store is away
            if ended.stop is not None and ended.how is AttemptEnd.TRANSIENT:
                raise ended.stop
            match ended.how:
                case AttemptEnd.PROCESSED:
                    self.recording.forget(row.key)
                    self.recording.commit_known(row.key)
                    if before:
                        self.recording.forget_failed(row.key)
                    if ended.ran_anyway:
                        _log.warning("duplicate_ran handler=%s key=%s enforce=False", row.handler, escaped(row.key))
                    if ended.stop is not None:
                        raise ended.stop
                    return self.recording.processed
                case AttemptEnd.DUPLICATE:
                    if ended.owner is not None and self.recording.is_unrecorded(row.key, ended.owner):
                        error = Misuse(_LEARNT_LATE)
                        return self._broken(work, error, ended.owner)
                    self.recording.forget(row.key)
                    self.recording.commit_known(row.key)
                    if ended.stop is not None:
                        raise ended.stop
                    return self.recording.duplicate
                case AttemptEnd.AWAY:
                    if ended.owner is not None:
                        self.recording.remember(row.key, Unrecorded(ended.owner))
                    if ended.stop is not None:
                        raise ended.stop
                    return self.recording.away(ended.error)
                case AttemptEnd.IN_PROGRESS if ended.retry_now and transient < 1:
                    transient += 1
                case AttemptEnd.TRANSIENT if transient < _TRANSIENT_TRIES:
                    transient += 1
                case AttemptEnd.TRANSIENT if (works := self._works(ended, sent)) is False:
                    return self.recording.away(ended.error)
                case AttemptEnd.TRANSIENT if works and not looked:
                    # the store works now, but may not have worked a moment ago. If the error comes once more, this message
                    # has failed
                    looked, transient = True, _TRANSIENT_TRIES
                case AttemptEnd.FAILED if ended.stop is None and immediate < self._immediate(ended.error, callers_loop):
                    immediate += 1
                case AttemptEnd.IN_PROGRESS if ended.stop is None:
                    return self._ended(work, ended)
                case _:
                    result, cancelled = finish(partial(self._ended, work, ended))
                    if (stop := ended.stop or cancelled) is not None:
                        raise stop
                    return result

    def _ended(self, work: Work, ended: AttemptResult) -> Result:
        reading, recording = work.reading, self.recording
        if ended.how is not AttemptEnd.BROKEN and reading.key is not None:
            self.recording.forget(reading.key)  # the key was claimed anew, so no claim of an earlier attempt stands
        if ended.how not in (AttemptEnd.UNKNOWN, AttemptEnd.IN_PROGRESS) and reading.key is not None:
            self.recording.commit_known(reading.key)
        match ended.how:
            case AttemptEnd.IN_PROGRESS:
                return recording.wait(work, Outcome.IN_PROGRESS, ended.remaining, ended.error)
            case AttemptEnd.LOST:
                return recording.wait(work, Outcome.IN_PROGRESS, UNRECORDED)
            case AttemptEnd.UNKNOWN:
                return recording.unknown(work, ended.error)
            case AttemptEnd.REFUSED:
                return recording.refuse(ended.error, callers_loop=work.callers_loop)
            case AttemptEnd.CONFLICT:
                assert reading.key is not None
                error = PayloadConflict(self.plan.explain_conflict(ended.fingerprint, work.message, reading.key))
                return self.recording.failed(work, error)
            case AttemptEnd.BROKEN:
                assert ended.error is not None
                assert ended.owner is not None
                return self._broken(work, ended.error, ended.owner, block=ended.block)
            case _:
                assert ended.error is not None
                result = recording.failed(work, ended.error)
                raised = _exit_behind(ended.error) or ended.error
                raises = work.callers_loop and result.outcome is Outcome.FAILED and is_the_callers(raised)
                return replace(result, raises=raised) if raises else result

    def _works(self, ended: AttemptResult, sent: bool) -> bool | None:
        return None if ended.error is None else self.recording.works(ended.error, spoken=ended.answered or sent)

    def _immediate(self, error: BaseException | None, callers_loop: bool) -> int:
        if error is None:
            return 0
        one = counts_as(error, self.plan.retry)
        if isinstance(one, (Reject, RetryLater, StepError)) or advice_on(one):
            return 0
        if isinstance(one, Misuse) and one.at_each_run:
            return 0
        if callers_loop and is_the_callers(error):  # a time limit of the caller: a second run would have no limit
            return 0
        # the server still runs the statement: a second run would wait for it
        if self.store.dialect.gave_up(error):
            return 0
        return retry_for(self.plan.retry, one).immediate

    def _call_plain(self, handed: Any, reading: Reading, message: Message, ledger: StepLedger | None) -> None:
        plan = self.plan
        result = plan.call(handed, reading, message, ledger and Steps(ledger))
        check_result(result, in_lists=plan.in_lists, handler=plan.name)

    def _call_awaited(self, handed: Any, reading: Reading, message: Message, ledger: StepLedger | None) -> None:
        result: Any = self.plan.call(handed, reading, message, ledger and AsyncSteps(ledger))
        given = await_only(result)
        if ledger is not None:
            ledger.returned()
        let_tasks_begin()
        check_result(given, in_lists=self.plan.in_lists, handler=self.plan.name)

    def _ledger(self, won: Won) -> StepLedger | None:
        placed, held, late = self._placed, won.held, won.deferred_watch
        if placed is None or held is None or late is None or not self.plan.takes_steps:
            return None
        return StepLedger(
            held,
            late,
            placed.store,
            placed.local,
            fenced=placed.own,
            dialect=self.store.dialect,
            open_session=self._open,
            pause=placed.pause,
        )

    def _closing(
        self, row: ClaimRow, message: Message, before: bool, former: Sequence[int]
    ) -> Callable[[Session, int], object]:
        failures, dialect = self.recording.failures, self.store.dialect

        def resolve(session: Session, attempt: int) -> None:
            if before or attempt > 1:
                failures.resolve(session, dialect, row, message.message_id, former)

        return resolve

    # -- what is not a success ---------------------------------------------------------------------------------------

    def _spent(self, work: Work, row: ClaimRow) -> Result:
        """End a message whose deliveries are used up: a duplicate if it was consumed (its acks were lost), else parked unrun."""
        if (done := self._done(work, row)) is not None:
            return done
        error = Reject(
            f"attempts spent, never finished: delivered {work.message.attempt} times, and no end of it was written down. Each"
            " time the process ended before the handler did, or what failed could not be recorded (the log says"
            " failure_not_recorded then). Look for what kills it or keeps it, then: exactly-once failures requeue"
        )
        return self.recording.failed(work, error)

    def _done(self, work: Work, row: ClaimRow) -> Result | None:
        """Return the result if an earlier attempt left a claim, else None. Runs nothing."""
        match self._guard.look(self._ours, row):
            case Consumed():
                return self.recording.duplicate
            case Unfinished(owner):
                return self._broken(work, Misuse(UNFINISHED), owner)
            case _:
                return None

    def _broken(self, work: Work, error: BaseException, owner: str, *, block: bool = False) -> Result:
        """Park the message for a person, with the claim that stands for it. Remembered in memory until it is recorded."""
        key = work.reading.key
        assert key is not None
        self.recording.remember(key, Unrecorded(owner, error, block))
        result = self.recording.record(
            work, error, lambda attempts: Park("broken", words_of(error)), claim_owner=owner, block=block
        )
        if result.verdict == ACK:
            self.recording.forget(key)
        return result

    def _under_former_key(self, work: Work, former: Mapping[str, Any]) -> Work:
        """Return the message as the previous release read it, if that release began it: its claim and failures have that key."""
        message, reading = work.message, work.reading
        if message.message_id is None:
            return work  # several keys may have had that same spelling: nothing shows which message the claim is for
        before = replace(message, former=None, **former)
        read = self.plan.read(before)
        key, id_ = read.key, message.message_id
        if key is None or key == reading.key:
            return work
        begun = self.recording.failures.under_former_key
        try:
            found = in_our_session(
                self._ours, self.store.dialect, lambda session: begun(session, self.group, self.plan.name, key, id_)
            )
        except Exception as error:
            if self.store.away(error):
                raise StoreUnavailable("The database does not answer; nothing ran.") from error
            if isinstance(error, UnicodeEncodeError) or self.store.dialect.unstorable(error):
                return work  # the database cannot store that key, so no claim has it
            raise
        return work._replace(message=before, reading=read, row=self._row(before, read)) if found else work

    def _order_position(self, work: Work) -> OrderPosition:
        failure = self.recording.failure(work, Reject(""))
        waits, position = self.plan.after_dead == "wait", self.recording.failures.order_position
        try:
            return in_our_session(
                self._ours,
                self.store.dialect,
                lambda session: position(
                    session, failure, after_dead_wait=waits, is_its_own=lambda row: self._keeps(row, work.reading)
                ),
            )
        except Exception as error:
            if self.store.away(error):
                raise StoreUnavailable("The database does not answer; nothing ran.") from error
            raise

    def _keeps(self, row: Row[Any], reading: Reading) -> bool:
        """Whether the message kept in a failure row has the key and fingerprint of this reading, as the handler reads today."""
        try:
            kept = self.plan.read(message_of(row))
        except Exception:  # the row was changed by hand, or is damaged
            return False
        return (kept.key, kept.fingerprint) == (reading.key, reading.fingerprint)


def _exit_behind(error: BaseException) -> BaseException | None:
    """Return the SystemExit that is reported as a `Misuse`, if this is one."""
    if not isinstance(error, Misuse) or (cause := error.__cause__) is None:
        return None
    return cause if exit_in(cause) is not None else None


def _check_session(plan: Plan, store: Store) -> None:
    wanted = plan.session_type
    if wanted is None or wanted is Session:
        return
    made = store.makes(plan.is_async)
    if not issubclass(made, wanted):
        maker = "async_sessionmaker" if plan.is_async else "sessionmaker"
        one_name = wanted.__name__ == made.__name__  # SQLModel's class is called Session, too
        wants, makes = (f"{each.__module__}.{each.__name__}" if one_name else each.__name__ for each in (wanted, made))
        raise ConfigurationError(
            f"The handler {plan.name!r} wants a {wants}, and the database {store.name!r} makes {makes}."
            f" Give exactly_once {maker}(engine, class_={wanted.__name__}), or write"
            f" `session: {'AsyncSession' if plan.is_async else 'Session'}`{' of SQLAlchemy' if one_name else ''}."
        )
