"""The record of one delivery that has its result, and the counts that the progress line and the screen show.

Made in two places, which run deliveries: the worker, and the command `exactly-once process`. Knows no transport and no database.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import NamedTuple

from exactly_once.outcome import Outcome, Result, WaitForKey, WaitForStore

__all__ = ["OutcomeCounts", "RunEnded"]


class RunEnded(NamedTuple):
    """A delivery has its result."""

    topic: str
    result: Result


class OutcomeCounts:
    """Counts deliveries by outcome. Read without a lock, so the numbers may differ by the deliveries under way.

    A delivery that stays in hand, for its key or its store, has not ended, however often it runs again to look.

    Args:
        handlers: The names of the handlers, so that the counts include those that have run nothing yet.

    Example:
        >>> from exactly_once.outcome import Ack
        >>> counts = OutcomeCounts(["reserve"])
        >>> counts.add(RunEnded("orders", Result(Outcome.PROCESSED, Ack(), handlers=[("reserve", Outcome.PROCESSED)])))
        >>> counts.handlers["reserve"]["processed"]
        1
    """

    def __init__(self, handlers: Sequence[str] = ()) -> None:
        self._counts = _none()
        self._of_handlers: defaultdict[str, dict[Outcome, int]] = defaultdict(
            _none, {name: _none() for name in handlers}
        )
        self._lock = Lock()

    def add(self, event: RunEnded) -> None:
        """Count a delivery. Called by the thread that ended the run."""
        result = event.result
        ended = not isinstance(result.verdict, (WaitForKey, WaitForStore))
        with self._lock:
            if ended:
                self._counts[result.outcome] += 1
            for handler, outcome in result.handlers:
                self._of_handlers[handler][outcome] += 1

    @property
    def outcomes(self) -> Mapping[str, int]:
        """Deliveries by outcome. A delivery of several handlers counts once, with the outcome of its combined result."""
        return _by_name(self._counts)

    @property
    def handlers(self) -> Mapping[str, Mapping[str, int]]:
        """Deliveries by outcome, for each handler that wanted them."""
        return {name: _by_name(counts) for name, counts in self._of_handlers.copy().items()}


def _none() -> dict[Outcome, int]:
    return dict.fromkeys(Outcome, 0)


def _by_name(counts: Mapping[Outcome, int]) -> Mapping[str, int]:
    return {outcome.value: count for outcome, count in counts.items()}
