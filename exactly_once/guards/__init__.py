"""The contract with whatever remembers claims: what a claim can come back with, and the two verbs around a handler.

Called in a thread, or in SQLAlchemy's greenlet under asyncio: never async itself. Called by `attempt`, and by
`delivery` for a message that has no delivery left.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from sqlalchemy.orm import Session

from exactly_once.dialects import ClaimRow

if TYPE_CHECKING:
    from exactly_once.guards.watch import Watch

__all__ = ["Claim", "Conflict", "Consumed", "Guard", "InProgress", "Won"]


@dataclass(frozen=True, slots=True)
class Won:
    """The key is ours until this transaction ends; `watch` sees that the handler does not end it."""

    watch: "Watch"


@dataclass(frozen=True, slots=True)
class Consumed:
    """Done before: acknowledge."""


@dataclass(frozen=True, slots=True)
class InProgress:
    """Another run holds it. `again`: one more try at once may already see how that run ended."""

    again: bool = False


@dataclass(frozen=True, slots=True)
class Conflict:
    """Consumed before under another payload, whose fingerprint this is."""

    fingerprint: bytes


Claim = Won | Consumed | InProgress | Conflict


class Guard(Protocol):
    """Decides whether a message may run, and makes that decision part of what the handler commits."""

    def claim(self, session: Session, row: ClaimRow) -> Claim:
        """Take the key before user code runs.

        After `Won` the session is in the transaction the handler will use; after anything else in none.

        Raises:
            StoreUnavailable: The database does not answer; nothing was claimed.
        """

    def consumed(self, session: Session, row: ClaimRow) -> bool:
        """Look once, on a fresh session, whether this key is consumed with this payload; the session ends in no transaction."""
