"""Deliveries of one handler in groups that share a transaction, and what becomes of each message when one of them fails.

A group commits as a whole or not at all. When anything in it goes wrong, nothing of it is recorded and nobody is blamed: it
is cut in two and tried again, down to single messages, and those have the whole story of `delivery`: tries, failures, dead
letters. So one bad message costs its group some time, and changes nothing for the rest. A deadlock is no message's fault
either; then all run alone at once, and the worker makes the next groups smaller. A message that was delivered before runs
alone from the start.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy.util import await_only

from exactly_once.attempt.ending import How
from exactly_once.attempt.group import GroupEnded, attempt_group
from exactly_once.delivery import DUPLICATE, EXITED, PROCESSED, Delivering, Told
from exactly_once.dialects import ClaimRow
from exactly_once.errors import Misuse
from exactly_once.guards import Consumed
from exactly_once.guards.transaction import TransactionGuard
from exactly_once.guards.watch import let_go
from exactly_once.handler import Reading, check_result
from exactly_once.message import Message
from exactly_once.outcome import Outcome
from exactly_once.policy import Park
from exactly_once.transport import Features
from exactly_once.verdict import Hold

__all__ = ["GroupDelivering", "GroupTold"]

_CUT: Final = 8  # a group larger than this is cut in two; the messages of a smaller one run alone


@dataclass(frozen=True, slots=True)
class GroupTold:
    """What became of each delivery of a group, in the order given."""

    told: Sequence[Told]
    deadlocked: bool
    """The database threw it away for another's sake: smaller groups, or `batch_order=`, get into each other's way less."""


@dataclass(slots=True, eq=False)
class _Member:
    message: Message
    features: Features
    reading: Reading
    row: ClaimRow | None
    told: Told | None = None


@dataclass(slots=True)
class _Run:
    """What one `run_group` has found out."""

    held: Told | None = None
    """The store does not answer: what is left is told this."""
    deadlocked: bool = False


class GroupDelivering(Delivering):
    """One handler with `batch=` on one database. See `Delivering`."""

    def run_group(self, given: Sequence[tuple[Message, Features]]) -> GroupTold:
        """Tell the story of several deliveries; blocks (in a greenlet: awaits) until all have an end.

        Args:
            given: Each message, and what the source of its delivery can do. None comes from the failure store.

        Raises:
            ConfigurationError: The database is set up so that no claim can be trusted.
        """
        members = [self._member(message, features) for message, features in given]
        together: dict[str, _Member] = {}
        alone: list[_Member] = []
        repeats: list[tuple[_Member, _Member]] = []
        blocking = self._blocking(members)
        for member in members:
            row, message = member.row, member.message
            waits = blocking and message.ordering_key is not None
            # what came before may be what failed, or killed the process: its company would pay for it again
            if row is None or waits or self._came_before(message, row):
                alone.append(member)
            elif row.key in together:
                repeats.append((member, together[row.key]))
            else:
                together[row.key] = member
        run = _Run()
        self._together(list(together.values()), run)
        for member in alone:
            self._alone(member, run)
        for member, first in repeats:
            same = first.told in (PROCESSED, DUPLICATE) and member.reading.fingerprint == first.reading.fingerprint
            if same:
                member.told = DUPLICATE
            else:
                self._alone(member, run)
        return GroupTold([member.told for member in members if member.told is not None], run.deadlocked)

    def _member(self, message: Message, features: Features) -> _Member:
        reading = self.plan.read(message)
        readable = reading.key is not None and reading.error is None
        return _Member(message, features, reading, self.row(message, reading) if readable else None)

    def _blocking(self, members: Sequence[_Member]) -> bool:
        """Whether messages of some ordering key must wait behind an older one; then those with such a key ask one by one."""
        if not self.plan.ordered or all(member.message.ordering_key is None for member in members):
            return False
        session, _ = self._open()
        try:
            return self.store.failures.any_blocking(
                session, self.group, self.plan.name, after_dead_wait=self.plan.after_dead == "wait"
            )
        except Exception:  # whatever it is, each message finds it out by itself
            return True
        finally:
            let_go(session)

    def _alone(self, member: _Member, run: _Run) -> None:
        """Run a single message; but where the store was found not to answer, not each of a group asks it again."""
        told = member.told = run.held or self.run(member.message, member.features)
        if isinstance(told.verdict, Hold):
            run.held = told

    def _together(self, members: Sequence[_Member], run: _Run) -> None:
        """Run them in one transaction, or in smaller ones."""
        if len(members) < 2 or run.held is not None:
            for member in members:
                self._alone(member, run)
            return
        tried = self._attempt(members)
        ended = tried.ended
        match ended.how:
            case How.PROCESSED | How.DUPLICATE:
                self._settle(members, tried, PROCESSED, run)
            case How.BROKEN | How.UNKNOWN:
                self._settle(members, tried, None, run)
            case How.FAILED | How.IN_PROGRESS if len(members) > _CUT:
                middle = len(members) // 2
                self._together(members[:middle], run)
                self._together(members[middle:], run)
            case how:
                if how is How.AWAY:
                    run.held = self._away(ended.error)
                run.deadlocked = run.deadlocked or how is How.TRANSIENT
                for member in members:
                    self._alone(member, run)

    def _attempt(self, members: Sequence[_Member]) -> GroupEnded:
        rows = sorted((member.row for member in members if member.row is not None), key=lambda row: row.key)
        guard = self._guard
        assert isinstance(guard, TransactionGuard)

        def handle(handed: Any, others: Mapping[str, object]) -> None:
            ours = [member for member in members if member.reading.key not in others]
            try:
                self._call_all(handed, [(member.reading, member.message) for member in ours])
            except SystemExit as error:
                raise Misuse(EXITED.format(code=error.code)) from error

        return attempt_group(self._open, guard, self.store.dialect, rows, handle)

    def _call_all(self, handed: Any, ours: Sequence[tuple[Reading, Message]]) -> None:
        ordered, plan = self.plan.in_batch_order(ours), self.plan
        if not plan.in_lists:
            call = self._call
            for reading, message in ordered:
                call(handed, reading, message, None)
            return
        result: Any = plan.call_with_lists(handed, ordered)
        check_result(await_only(result) if plan.is_async else result)

    def _settle(self, members: Sequence[_Member], tried: GroupEnded, ours: Told | None, run: _Run) -> None:
        """Say of each what the group's end means for it; None: it has to be told of one by one."""
        ended, others = tried.ended, tried.others
        for member in members:
            assert member.row is not None
            standing = others.get(member.row.key)
            if standing is None:
                member.told = ours or self._told_of(member, ended.how, ended.error)
            elif isinstance(standing, Consumed):
                member.told = DUPLICATE
            else:
                self._alone(member, run)

    def _told_of(self, member: _Member, how: How, error: BaseException | None) -> Told:
        """The claim of each stands, or may: what became of its effects nobody knows (BROKEN), or the server will say."""
        message, reading, features = member.message, member.reading, member.features
        if how is How.UNKNOWN:
            return self._wait(Outcome.UNKNOWN, message, reading, features, False)
        assert error is not None
        reason = f"in a group of messages, one of which did this: {error}"
        return self._record(message, reading, error, lambda attempts: Park("broken", reason))
