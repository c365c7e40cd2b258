"""The data of a claim, for every store: what is claimed, and what exists under a key. Imports nothing of ours."""

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
    """A row that already exists under the key."""

    status: int
    fingerprint: bytes
    owner: str | None


@dataclass(frozen=True, slots=True)
class StepRow:
    """One recorded step of a message under a lease."""

    name: str
    ordinal: int
    """0, 1, 2 in the order in which they ran."""
    finished: bool
    """False: begun, and we do not know whether it happened."""
    result: bytes | None
    """JSON, once it is finished."""
    attempt: int = 1
    """The number of the claim under which it ran."""


@dataclass(frozen=True, slots=True)
class LeaseAnswer:
    """What exists under a key after a lease was asked for."""

    won: bool
    """It is leased under our token."""
    consumed: bool
    """No attempt may run it: consumed, or `unfinished`."""
    fingerprint: bytes
    attempt: int
    """The number of this message's present claim, from 1."""
    remaining: timedelta | None = None
    """How long the present lease goes on by the server's clock; None if there is none."""
    steps: tuple[StepRow, ...] = ()
    unfinished: str | None = None
    """The owner of a claim that was written in a transaction which something other than its attempt committed."""
    settled: bool = False
    """Consumed by a run that finished, or by a person; not kept for a person."""
