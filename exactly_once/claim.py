"""The words of a claim, for every store: what is claimed, and what stands under a key. Data only; imports nothing of ours."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple

__all__ = ["ClaimRow", "ExistingClaim", "LeaseAnswer", "StepRow"]


class ClaimRow(NamedTuple):
    """What is written when a key is claimed, and by which it is found again. Made for each message: a tuple costs least."""

    group: str
    handler: str
    key: str
    fingerprint: bytes
    message_id: str | None = None
    attempt: int = 1
    owner: str = ""
    born_at: datetime | None = None
    content: bytes | None = None


@dataclass(frozen=True, slots=True)
class ExistingClaim:
    """A row that stands under the key already."""

    status: int
    fingerprint: bytes
    owner: str | None


@dataclass(frozen=True, slots=True)
class StepRow:
    """One step of a lease-guarded message, as it is recorded."""

    name: str
    ordinal: int
    """0, 1, 2 in the order they ran."""
    finished: bool
    """False: begun, and nobody knows whether it happened."""
    result: bytes | None
    """JSON, once it is finished."""
    attempt: int = 1
    """The claim under which it ran."""


@dataclass(frozen=True, slots=True)
class LeaseAnswer:
    """What stands under a key after a lease was asked for."""

    won: bool
    """It is leased under our token."""
    consumed: bool
    """Nobody is to run it: consumed, or `unfinished`."""
    fingerprint: bytes
    attempt: int
    """Which claim of this message the standing one is, from 1."""
    remaining: timedelta | None = None
    """How long the standing lease goes on by the server's clock; None where nobody has one."""
    steps: tuple[StepRow, ...] = ()
    unfinished: str | None = None
    """The owner of a claim that was written in a transaction, and committed by something else than its attempt."""
    settled: bool = False
    """Consumed by a run that finished, or by a person; not kept for one."""
