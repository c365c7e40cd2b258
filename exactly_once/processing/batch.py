"""Processes deliveries of one handler in batches that share a transaction, and decides what follows when a message fails.

A batch commits as a whole or not at all. After a failure nothing is recorded and no message is blamed. The batch is cut in two
and tried again, down to single messages. `processor` runs a single message with its tries, failures and dead letters. So one bad
message costs its batch some time, and changes nothing for the others. Two ends are recorded for every message of the batch: a
handler committed by itself, or it is not known whether COMMIT happened. A deadlock is no message's fault: all messages run alone
at once, and the executor makes the next batches smaller. A message that was delivered before runs alone from the start.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Final

from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from exactly_once.claim import ClaimRow
from exactly_once.database.dialects.contract import ErrorKind
from exactly_once.database.watched.watch import Watch, flush
from exactly_once.errors import ConfigurationError, Misuse
from exactly_once.exceptions.stops import stops
from exactly_once.guards.contract import Consumed, Won
from exactly_once.guards.our_session import in_our_session
from exactly_once.handlers.one_turn import let_tasks_begin
from exactly_once.handlers.plan import Reading, check_result
from exactly_once.message import Message
from exactly_once.outcome import Outcome, Result, WaitForStore
from exactly_once.processing.attempt import BatchAttemptResult, attempt_batch
from exactly_once.processing.attempt_result import AttemptEnd, AttemptResult
from exactly_once.processing.handler_errors import reported
from exactly_once.processing.processor import Processor
from exactly_once.processing.recording import Unrecorded
from exactly_once.processing.work import BatchResults, Member, Work
from exactly_once.transports.contract import Features
from exactly_once.wording.steady_log import steady
from exactly_once.wording.text import escaped

__all__ = ["BatchProcessor", "stay"]

_log = steady("exactly_once.delivery")
_WAITS_S: Final = 2.0
"""How long a batch waits for keys that other runs hold. After that, a message that would have to wait is redelivered later."""
_CUT: Final = 8  # a larger batch is cut in two; the messages of a smaller batch run alone


def stay(error: BaseException) -> None:
    """Do not re-raise: without an event loop only the handler raises these."""


@dataclass(slots=True)
class _Run:
    """The state of one `run_batch`."""

    leave: Callable[[BaseException], None]
    """Called with what a handler raised that is no `Exception`. Re-raises it if the loop ends."""
    meanwhile: Iterable[object]
    away: Result | None = None
    """Set when the store does not answer: the result of all messages that are left."""
    deadlocked: bool = False
    waited_s: float = 0.0
    """How long the messages together waited for keys that other runs hold."""
    reached: list[Member] = field(default_factory=list)
    """The messages for which the latest attempt called the handler, in that order."""


class BatchProcessor(Processor):
    """One handler with `batch=` on one database. See `Processor`."""

    _told_unordered = False

    def run_batch(
        self,
        members: Sequence[Member],
        *,
        leave: Callable[[BaseException], None] = stay,
        meanwhile: Iterable[object] = (),
    ) -> BatchResults:
        """Process several deliveries. Blocks (in a greenlet: awaits) until each has its result.

        Args:
            members: The messages, each read by `member`. None comes from the failure store.
            leave: Called with what a handler raised that is no `Exception` (cancellation and the like). Re-raises it if the
                whole run must end. If it returns, only this message fails, and the others go on.
            meanwhile: Work to do while the server executes the claim; one step for each element. May be left undone.

        Raises:
            ConfigurationError: The database is set up so that no claim can be trusted.
        """
        together: dict[str, Member] = {}
        alone: list[Member] = []
        repeats: list[tuple[Member, Member]] = []
        blocking = self._blocking(members)
        for member in members:
            row, message = member.work.row, member.work.message
            waits = blocking and message.ordering_key is not None
            # a message that came before may have failed, or killed the process: the rest of its batch would suffer again
            if (
                row is None
                or waits
                or message.former is not None
                or self.recording.came_before(message, row.key)
                or self._is_unrecorded(row)
            ):
                alone.append(member)
            elif row.key in together:
                repeats.append((member, together[row.key]))
            else:
                together[row.key] = member
        run = _Run(leave, meanwhile)
        self._together(list(together.values()), run)
        for member in alone:
            self._alone(member, run)
        for member, first in repeats:
            same = (
                first.result in (self.recording.processed, self.recording.duplicate)
                and member.work.reading.fingerprint == first.work.reading.fingerprint
            )
            if same:
                member.result = self.recording.duplicate
            else:
                self._alone(member, run)
        return BatchResults([member.result for member in members if member.result is not None], run.deadlocked)

    def _is_unrecorded(self, row: ClaimRow) -> bool:
        return self.recording.has_unrecorded and self.recording.unrecorded(row.key) is not None

    def member(self, message: Message, features: Features) -> Member:
        """Read a message.

        Args:
            message: The message.
            features: What the source of its delivery can do.
        """
        try:
            return Member(self.read(message, features))
        except Exception:
            raise
        except BaseException:  # a key function that exits: the message runs alone, so that the others do not suffer
            return Member(Work(message, Reading(None, b"", None, None), None, features))

    def _blocking(self, members: Sequence[Member]) -> bool:
        """Whether a failed message blocks any ordering key. If so, each message with an ordering key asks for its own."""
        if not self.plan.ordered or all(member.work.message.ordering_key is None for member in members):
            return False
        waits, any_blocking = self.plan.after_dead == "wait", self.recording.failures.any_blocking
        try:
            return in_our_session(
                self._ours,
                self.store.dialect,
                lambda session: any_blocking(session, self.group, self.plan.name, after_dead_wait=waits),
            )
        except Exception:  # each message will meet the same error by itself
            return True

    def _alone(self, member: Member, run: _Run) -> None:
        """Run a single message, unless the store does not answer or the batch has waited for other runs too long."""
        if run.away is not None:
            member.result = run.away
            return
        if self.recording.refused is not None:
            member.result = self.recording.refuse(callers_loop=False)
            return
        if member.work.row is not None and run.waited_s > _WAITS_S:
            member.result = self._in_progress(member)
            return
        began = monotonic()
        try:
            result = self.run(member.work.message, member.work.features)
        except Exception:
            raise
        except BaseException as error:
            run.leave(error)
            member.result = error
            return
        member.result = result
        if isinstance(result.verdict, WaitForStore):
            run.away = result
        if result.outcome is Outcome.IN_PROGRESS and not result.in_handler:
            run.waited_s += monotonic() - began

    def _together(self, members: Sequence[Member], run: _Run) -> None:
        """Run these messages in one transaction, or in several smaller transactions."""
        if len(members) < 2 or run.away is not None or self.recording.refused is not None:
            for member in members:
                self._alone(member, run)
            return
        tried = self._attempt(members, run)
        ended = tried.ended
        match ended.how:
            case AttemptEnd.PROCESSED | AttemptEnd.DUPLICATE | AttemptEnd.BROKEN | AttemptEnd.UNKNOWN:
                self._settle(members, tried, run)
                self._raise_on(ended, run)
            case AttemptEnd.FAILED | AttemptEnd.IN_PROGRESS if len(members) > _CUT:
                middle = len(members) // 2
                self._together(members[:middle], run)
                self._together(members[middle:], run)
            case AttemptEnd.IN_PROGRESS:
                for member in members:
                    self._if_free(member, run)
            case AttemptEnd.REFUSED:
                for member in members:
                    member.result = self.recording.refuse(ended.error, callers_loop=False)
            case how:
                if how is AttemptEnd.AWAY:
                    self._away(members, ended, run)
                run.deadlocked = run.deadlocked or self._thrown_away(ended)
                for member in members:
                    self._alone(member, run)

    def _away(self, members: Sequence[Member], ended: AttemptResult, run: _Run) -> None:
        """The store does not answer: hold these messages, and remember those whose claim may stand."""
        run.away = self.recording.away(ended.error)
        if ended.owner is not None:  # it is not known whether their claims stand
            for member in members:
                assert member.work.row is not None
                self.recording.remember(member.work.row.key, Unrecorded(ended.owner))
        self._raise_on(ended, run)

    def _raise_on(self, ended: AttemptResult, run: _Run) -> None:
        if ended.stop is not None:
            run.leave(ended.stop)

    def _thrown_away(self, ended: AttemptResult) -> bool:
        """Whether the server rolled the batch back in favour of another transaction. A lost connection is not that."""
        error = ended.error
        return (
            ended.how is AttemptEnd.TRANSIENT
            and error is not None
            and self.store.dialect.error_kind(error) is ErrorKind.TRANSIENT
        )

    def _if_free(self, member: Member, run: _Run) -> None:
        """Run a message of a batch in which other runs hold some keys. Unlike `_alone`, do not wait for its key."""
        if run.away is not None:
            self._alone(member, run)
            return
        tried = self._attempt([member], run)
        match tried.ended.how:
            case AttemptEnd.IN_PROGRESS:
                member.result = self._in_progress(member)
            # a broken message must not run again: its claim stands, and it would be taken for a duplicate
            case AttemptEnd.PROCESSED | AttemptEnd.DUPLICATE | AttemptEnd.BROKEN | AttemptEnd.UNKNOWN:
                self._settle([member], tried, run)
                self._raise_on(tried.ended, run)
            case AttemptEnd.AWAY:
                self._away([member], tried.ended, run)
                self._alone(member, run)
            case _:
                self._alone(member, run)

    def _in_progress(self, member: Member) -> Result:
        return self.recording.wait(member.work, Outcome.IN_PROGRESS)

    def _attempt(self, members: Sequence[Member], run: _Run) -> BatchAttemptResult:
        rows = sorted((row for member in members if (row := member.work.row) is not None), key=lambda row: row.key)

        def handle(session: Session, handed: Any, others: Mapping[str, object], won: Won) -> None:
            watch = won.watch
            assert watch is not None
            ours = [member for member in members if member.work.reading.key not in others] if others else members
            try:
                self._call_all(session, handed, self._in_order(ours), watch, run)
            except BaseException as error:
                if (translated := reported(error)) is not error:
                    raise translated from error
                if not stops(error):
                    raise
                run.leave(error)
                raise Misuse(
                    f"The handler raised {type(error).__name__}, which is none of its own to raise."
                ) from error

        began = monotonic()
        patient = not run.waited_s
        try:
            tried = attempt_batch(
                self._context, rows, handle, translate=reported, patient=patient, meanwhile=run.meanwhile
            )
        except ConfigurationError as error:
            error.store = self.store.name
            raise
        if tried.ended.how is AttemptEnd.IN_PROGRESS and tried.ended.error is None:
            run.waited_s += monotonic() - began
        return tried

    def _in_order(self, ours: Sequence[Member]) -> Sequence[Member]:
        """Return the messages in the order of `batch_order=`, else in the order received."""
        if self.plan.batch_order is None:
            return ours
        ordered = sorted(ours, key=lambda member: member.work.reading.order)
        if not ordered[0].work.reading.order and not self._told_unordered:
            self._told_unordered = True
            _log.warning(
                "no_batch_order handler=%s key=%s batch_order= finds nothing in this message, or raises. Such messages run in"
                " no order, and batches may deadlock on the rows they lock; this is said once.",
                self.plan.name,
                escaped(ordered[0].work.reading.key or ""),
            )
        return ordered

    def _call_all(self, session: Session, handed: Any, ordered: Sequence[Member], watch: Watch, run: _Run) -> None:
        plan = self.plan
        run.reached = reached = []
        if not plan.in_lists:
            call = self._call
            for member in ordered:
                reading = member.unchanged(plan)
                reached.append(member)
                watch.current = member.work.row
                call(handed, reading, member.work.message, None)
                # asked first: an event loop may end it while the flush is awaited, and what was written in it would be missing
                if session.in_nested_transaction():
                    raise Misuse(
                        "The handler left a savepoint open, and the next message's work would stand inside it."
                    )
                # before the next call, which may refresh, expire or expunge what this call has changed
                flush(session)
                watch.check(session)
            return
        given = [(member.unchanged(plan), member.work.message) for member in ordered]
        reached.extend(ordered)
        result: Any = plan.call_with_lists(handed, given)
        if plan.is_async:
            result = await_only(result)
            let_tasks_begin()
        check_result(result, in_lists=True, handler=plan.name)

    def _settle(self, members: Sequence[Member], tried: BatchAttemptResult, run: _Run) -> None:
        """Give each message the result that follows from the batch's end."""
        ended, others = tried.ended, tried.others
        ours = None if ended.how in (AttemptEnd.BROKEN, AttemptEnd.UNKNOWN) else self.recording.processed
        for member in members:
            row = member.work.row
            assert row is not None
            standing = others.get(row.key)
            if standing is None:
                member.result = ours or self._told_of(member, ended, run.reached)
            elif isinstance(standing, Consumed) and not self._is_unrecorded(row):
                member.result = self.recording.duplicate
            else:
                self._alone(member, run)

    def _told_of(self, member: Member, ended: AttemptResult, reached: Sequence[Member]) -> Result:
        """The result of a message whose claim stands or may stand (BROKEN), or whose COMMIT was not answered (UNKNOWN)."""
        if ended.how is AttemptEnd.UNKNOWN:
            return self.recording.unknown(member.work, ended.error)
        assert ended.error is not None
        assert ended.owner is not None
        text = f"{ended.error} {self._in_company(member, reached)}"
        error = Misuse(text).with_traceback(ended.error.__traceback__)
        return self._broken(member.work, error, ended.owner, block=ended.block)

    def _in_company(self, member: Member, reached: Sequence[Member]) -> str:
        """Tell the operator, when a whole batch is parked, whether the handler was called for this message."""
        if self.plan.in_lists:
            return f"This message was one of {len(reached)} in the list."
        found = (
            f"at '{escaped(reached[-1].work.reading.key or '')}', call {len(reached)}"
            if reached
            else "before the first call"
        )
        had = (
            "was called: look what is there of its work"
            if member in reached
            else "was not called: requeue it by its id"
        )
        return f"It was found {found} of a batch in one transaction; this message {had}."
