"""What became of a message, as `delivery` tells its caller."""

from enum import Enum
from typing import NoReturn

__all__ = ["Outcome"]


class Outcome(Enum):
    """What became of a message; `acknowledge` is all a consumer loop has to ask.

    Example:
        >>> Outcome.DUPLICATE.acknowledge
        True
        >>> Outcome.UNKNOWN.acknowledge
        False
    """

    PROCESSED = "processed"
    """The handler ran and its transaction committed."""
    DUPLICATE = "duplicate"
    """The key was consumed before; nothing ran."""
    DEAD = "dead"
    """Kept whole in the failure store until a person decides; the broker is done with it."""
    NOT_MINE = "not mine"
    """No handler of this application wants it."""
    IN_PROGRESS = "in progress"
    """Another run holds the key right now; ask again later."""
    FAILED = "failed"
    """The handler failed and nothing was committed; it will be tried again."""
    UNKNOWN = "unknown"
    """The commit's fate could not be learnt; the redelivery finds out."""
    WAITING = "waiting"
    """Nothing ran: the store did not answer, or an older message of the same ordering key comes first."""

    @property
    def acknowledge(self) -> bool:
        """True when the broker may forget the message."""
        return self in _FINISHED

    def __bool__(self) -> NoReturn:
        # as any Enum it would be true: `if eo.process(message): acknowledge()` would lose every message that failed
        raise TypeError(
            "An Outcome is neither true nor false: FAILED too would be acknowledged. Write: if outcome.acknowledge:"
        )


_FINISHED = frozenset({Outcome.PROCESSED, Outcome.DUPLICATE, Outcome.DEAD, Outcome.NOT_MINE})
