"""What a lease is, and the interface of every lease store. Data, and one decision, `judge`. Never opens or waits for anything.

    absent --claim--> consuming (token, attempt, lease end) --complete--> consumed
                          |  ^-- renew, by a third of the lease                  every later claim: Consumed
                          |  ^-- record a step
                          |-- release, or the end of the lease: the next claim takes it over as attempt n + 1

Each claim has a new fencing token, and every change names it: a run whose lease was taken over can change nothing. Time is always
the store's, never a worker's. A store is thin: one statement or one script for each arrow (`sql`, `redis`), and `judge` decides
for all stores what a claim's answer means. `renewal` renews the leases of running messages. Called by `guards.lease` and the
command line.
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
    """Seconds that also pass while the machine sleeps, if the system has such a clock: a lease runs out meanwhile."""
    return time.clock_gettime(_CLOCK)


@dataclass(eq=False, slots=True)
class HeldLease:
    """A lease that is ours while its message runs. Any thread that learns of the loss sets `lost`."""

    row: ClaimRow
    token: str
    attempt: int
    """The number of this claim of the message, from 1. Services that can compare it use it as a fencing number."""
    lease: timedelta
    steps: tuple[StepRow, ...] = ()
    """The steps that earlier attempts recorded, in order."""
    max_run: timedelta | None = None
    began: float = field(default_factory=time.monotonic)
    renewed: float = field(default_factory=clock)
    """When the lease was last known to be ours, by this process' `clock`. It shows when it may be lost, never that it is ours."""
    lost: bool = False
    ending: bool = False
    """The lease is being completed or released: a missing token then does not prove a loss."""
    process: object = field(default_factory=lambda: fork.here)
    """The process that has the lease. A forked child has a copy, and must not use it."""
    context: Context = field(default_factory=copy_context)
    """The context of the run. The application's engine listeners, which may read a tenant there, are also called in a renewal."""

    def error(self) -> LeaseLost:
        """Make the error that says that the lease is lost."""
        return LeaseLost(
            f"The lease on {escaped(self.row.key)!r} of {self.row.handler!r} ran out, and another run has the message"
            f" (this was attempt {self.attempt}): nothing of this run is recorded from here on. If it happens without a"
            " machine that stood still, give a longer lease."
        )

    def check(self) -> None:
        """Raise `LeaseLost` if the lease is lost, and `ForkedProcess` in a child process."""
        if self.process is not fork.here:
            raise fork.inside()
        if self.lost:
            raise self.error()

    @property
    def overran(self) -> bool:
        """Whether the run takes longer than its `max_run`."""
        return self.max_run is not None and time.monotonic() - self.began >= self.max_run.total_seconds()

    def may_insist(self) -> bool:
        """Whether the lease can still be ours, as far as this process knows."""
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
    """Decide what a claim's answer means for a message with this fingerprint.

    Another payload is a conflict even while the first message runs: this message would take over the steps of the other.
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
    """The result of recording a step."""

    STORED = "stored"
    LOST = "not stored: the lease is not ours any more"
    KNOWN = "not stored: there is a record of that name, and it is not from this attempt"


class LeaseStore(Protocol):
    """Keeps leases, and the steps under them. Synchronous: called in a thread, or in a greenlet under asyncio.

    Each method is one round trip, and its change is durable when it returns. If the store does not answer, each raises
    `StoreUnavailable` (with the store's name), and it is not known whether the change happened. Each is idempotent for one token.
    """

    name: str
    """For logs, and to ask whether this store answers. Without passwords."""

    def claim(self, row: ClaimRow, token: str, lease: timedelta, *, also: bytes, steps: bool) -> LeaseAnswer:
        """Take the key if it is new, or if it is free and has this fingerprint (or `also`). Return what stands there.

        Args:
            row: The claim.
            token: The new claim's fencing token.
            lease: The length of the lease.
            also: Another fingerprint that counts as that of this message.
            steps: Also read the recorded steps.

        Returns:
            What stands under the key. `remaining` is a moment if another transaction is just changing it.
        """

    def complete(self, held: HeldLease) -> bool:
        """Write *consumed*. False: the lease is no longer ours."""

    def release(self, held: HeldLease) -> bool:
        """Release the lease of a failed attempt; its number and steps stay. False: the lease is no longer ours."""

    def renew(self, held: Sequence[HeldLease]) -> Sequence[HeldLease]:
        """Extend these leases, all of one length, by that length from now. Return those that are no longer ours.

        A lease that another transaction is just changing is neither renewed nor lost: its `renewed` stays as it was.
        """

    def record(self, held: HeldLease, step: StepRow, *, begun: bool = False) -> Recorded:
        """Store the beginning or the result of a step, if the lease is ours.

        Args:
            held: The lease.
            step: The step.
            begun: This attempt has recorded the beginning of the step.
        """

    def look(self, row: ClaimRow) -> LeaseAnswer | None:
        """Return what stands under a key, with its steps. None: nothing."""

    def resolve(self, row: ClaimRow, step: str, result: bytes) -> bool:
        """Write a step's result that a person gives. False: the message runs, is consumed or is not known."""
