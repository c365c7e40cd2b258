"""What the worker is told to do with a delivery. Data only.

`Ack` and `Redeliver` go on to the transport, each delivery settled exactly once. `Hold` never reaches a transport: the
worker keeps the delivery in its hands, renews its invisibility, receives nothing, and runs it again when the store
answers, so that an outage does not spend the broker's delivery attempts.
"""

from dataclasses import dataclass
from datetime import timedelta

__all__ = ["Ack", "Hold", "Redeliver", "Verdict"]


@dataclass(frozen=True, slots=True)
class Ack:
    """Finished with: processed, duplicate, or kept whole in the failure store."""


@dataclass(frozen=True, slots=True)
class Redeliver:
    """Not finished with: bring it again, not before `delay`."""

    delay: timedelta = timedelta(0)


@dataclass(frozen=True, slots=True)
class Hold:
    """Not run, because the database named `store` does not answer: keep it until it does."""

    store: str


Verdict = Ack | Redeliver
