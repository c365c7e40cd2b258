"""The words of the watch: how a handler left its transaction, the errors that say so, and a session that is shut. Data only."""

from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

from exactly_once.claim import ClaimRow
from exactly_once.errors import Misuse

__all__ = ["WORSE", "BrokenTransaction", "LostTransaction", "Shut", "TransactionEnd", "UnderLease"]


class TransactionEnd(Enum):
    """How the handler left the transaction, from harmless to worst."""

    NOT = "still in it"
    REFUSED = "tried to, and was stopped: nothing was committed"
    ROLLED_BACK = "rolled back: nothing was committed"
    GONE = "it is not there any more, and whether it was committed or rolled back is to be found out"
    BROKEN = "ended by something only noticed afterwards: it may have been committed"


WORSE: Final = tuple(TransactionEnd)


class UnderLease(Protocol):
    """The lease of a transaction that contains no claim: `guards.lease.contract.HeldLease`."""

    @property
    def row(self) -> ClaimRow:
        """The claim's row."""

    @property
    def token(self) -> str:
        """The fencing token of this attempt."""

    @property
    def attempt(self) -> int:
        """The number of the attempt, from 1."""

    def check(self) -> None:
        """Raise if another run has the message."""


class BrokenTransaction(Misuse):
    """The transaction of a step was ended by something else, and earlier work may be committed.

    A person must look at the message.
    """


class LostTransaction(Exception):
    """The transaction was rolled back, and nothing of it committed. Worth an immediate retry, whatever the handler raised.

    Args:
        error: The error that rolled it back.
    """

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error


@dataclass(slots=True)
class Shut:
    """The session cannot be used at the moment."""

    why: str
    tried: bool = False
    """Whether anybody tried to use it."""

    def refusal(self) -> Misuse:
        """Note the try, and return the error to raise."""
        self.tried = True
        return Misuse(self.why)
