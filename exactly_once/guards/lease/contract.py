"""What a lease is, and what every store of leases can do. Words, and the one decision over them; opens and waits on nothing.

    absent --claim--> consuming (token, attempt, lease end) --complete--> consumed
                          |  ^-- renew, by a third of the lease                  every later claim: Consumed
                          |  ^-- record a step
                          |-- release, or the end of the lease: the next claim takes it over as attempt n + 1

A token is made for each claim, and every change names it: what was taken over cannot be changed by whoever had it before.
Time is the store's own, never a worker's. A store is thin: one statement, or one script, for each arrow (`leases.sql`,
`leases.redis`), and `judge` says for all of them what a claim's answer means. `renewal` keeps the leases of running
messages alive. Called by `guards.lease` and the command line.
"""

import time
from collections.abc import Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum
from typing import Final, Protocol

from exactly_once import fork
from exactly_once.claim import ClaimRow, LeaseAnswer, StepRow
from exactly_once.errors import LeaseLost
from exactly_once.handlers.fingerprint import Differs, NotCompared, compare
from exactly_once.wording.text import escaped

__all__ = ["HeldLease", "LeaseState", "LeaseStore", "Recorded", "clock", "judge"]

_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def clock() -> float:
    """Seconds that also pass while the machine sleeps, where it can tell: a lease runs out in them."""
    return time.clock_gettime(_CLOCK)


@dataclass(eq=False, slots=True)
class HeldLease:
    """A lease that is ours, while its message runs. `lost` is written by whoever learns it first, in any thread."""

    row: ClaimRow
    token: str
    attempt: int
    """Which claim of this message this is, from 1: the fencing number for services that can compare it."""
    lease: timedelta
    steps: tuple[StepRow, ...] = ()
    """What earlier attempts recorded, in order."""
    max_run: timedelta | None = None
    began: float = field(default_factory=time.monotonic)
    renewed: float = field(default_factory=clock)
    """When it was last seen to be ours, by this process' `clock`: says when it may not be, never that it is."""
    lost: bool = False
    ending: bool = False
    """It is being completed or let go of: that its token is gone proves nothing."""
    process: object = field(default_factory=lambda: fork.here)
    """Whose it is: a child that is forked meanwhile has a copy, and may do nothing with it."""
    context: Context = field(default_factory=copy_context)
    """The run's: listeners of the application's, which find its tenant there, are called where it is renewed, too."""

    def error(self) -> LeaseLost:
        """Say that it is lost."""
        return LeaseLost(
            f"The lease on {escaped(self.row.key)!r} of {self.row.handler!r} ran out, and another run has the message"
            f" (this was attempt {self.attempt}): nothing of this run is recorded from here on. If it happens without a"
            " machine that stood still, give a longer lease."
        )

    def check(self) -> None:
        """Raise `LeaseLost` if it is lost, and `ForkedProcess` in a child that was forked under it."""
        if self.process is not fork.here:
            raise fork.inside()
        if self.lost:
            raise self.error()

    @property
    def overran(self) -> bool:
        """It runs for longer than its `max_run`."""
        return self.max_run is not None and time.monotonic() - self.began >= self.max_run.total_seconds()

    def may_insist(self) -> bool:
        """Say whether the lease can still be ours, as far as this process knows."""
        return not self.lost and clock() - self.renewed < self.lease.total_seconds()


class LeaseState(Enum):
    """What a claim's answer means."""

    WON = "ours"
    CONSUMED = "done before"
    CONFLICT = "known under another payload"
    RUNNING = "another run has the lease"
    UNFINISHED = "claimed in a transaction that something else than its attempt committed"
    FREE = (
        "nobody has it, and it was written under fingerprints that cannot be compared with ours: ask for it by its own"
    )


def judge(seen: LeaseAnswer, fingerprint: bytes) -> LeaseState:
    """Say what a claim's answer means for a message with this fingerprint.

    Another payload is a conflict also while the first one runs: its steps would be taken for this one's.
    """
    if seen.won:
        return LeaseState.WON
    verdict = compare(seen.fingerprint, fingerprint)
    if isinstance(verdict, Differs):
        return LeaseState.CONFLICT
    if seen.consumed:
        return LeaseState.CONSUMED if seen.unfinished is None else LeaseState.UNFINISHED
    if isinstance(verdict, NotCompared) and (seen.remaining is None or seen.remaining <= timedelta(0)):
        return LeaseState.FREE
    return LeaseState.RUNNING


class Recorded(Enum):
    """What became of a step's record."""

    STORED = "stored"
    LOST = "not stored: the lease is not ours any more"
    KNOWN = "not stored: there is a record of that name, and it is not from this attempt"


class LeaseStore(Protocol):
    """Remembers leases, and the steps under them. Synchronous: called in a thread, or in a greenlet under asyncio.

    Each verb is one round trip of its own and stands when it returns; each raises `StoreUnavailable` (with the store's
    name) when the store does not answer, and then it is not known whether it happened. Sent twice with one token, each does
    what once does.
    """

    name: str
    """For logs and for asking whether it answers; without passwords."""

    def claim(self, row: ClaimRow, token: str, lease: timedelta, *, also: bytes, steps: bool) -> LeaseAnswer:
        """Take the key if it is new, or free and of this payload (or that of `also`); say what stands there.

        Args:
            row: Who claims what.
            token: The new claim's.
            lease: How long it holds.
            also: Another fingerprint that counts as this payload's.
            steps: Read the recorded steps, too.

        Returns:
            What stands. `remaining` is a moment where somebody is just changing it.
        """

    def complete(self, held: HeldLease) -> bool:
        """Write *consumed*; False where the lease is not ours any more."""

    def release(self, held: HeldLease) -> bool:
        """Let go of an attempt that failed, keeping its number and steps; False where the lease is not ours any more."""

    def renew(self, held: Sequence[HeldLease]) -> Sequence[HeldLease]:
        """Let these, all of one length, hold that long from now; return those that are not ours any more.

        One that somebody is changing at the moment is neither renewed nor lost: its `renewed` stays as it was.
        """

    def record(self, held: HeldLease, step: StepRow, *, begun: bool = False) -> Recorded:
        """Store a step: its beginning, or its result, where the lease is ours.

        Args:
            held: Under which lease.
            step: What.
            begun: Its beginning was recorded by this attempt.
        """

    def look(self, row: ClaimRow) -> LeaseAnswer | None:
        """Say what stands under a key, steps included; None where nothing does."""

    def resolve(self, row: ClaimRow, step: str, result: bytes) -> bool:
        """Write a step's result for a person who knows it; False where the message runs, is consumed or is not known."""
