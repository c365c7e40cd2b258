"""Limits log lines that repeat: writes one in a while, with the number of lines left out. Decides nothing else.

Called by threads that retry for ever (receiving, settling, probing a store, jobs). While a broker is away each of them meets the
same error many times a second, and a disk full of log lines would be a second outage.
"""

from datetime import timedelta
from time import monotonic
from typing import Final

from exactly_once.exceptions.words import trace_of
from exactly_once.wording.steady_log import Log

__all__ = ["ThrottledLog"]

_EVERY: Final = timedelta(seconds=10)


class ThrottledLog:
    """Writes the first line of each kind at once, and then one line in each `every`, with the count of those left out.

    Args:
        log: The log.
        every: The shortest time between two lines of one kind.

    Example:
        >>> log = ThrottledLog(steady("doctest"))
        >>> log.warning("receive", "The broker is away: %s", "refused")
    """

    def __init__(self, log: Log, every: timedelta = _EVERY) -> None:
        self._log, self._every = log, every.total_seconds()
        self._next: dict[str, float] = {}
        self._left_out: dict[str, int] = {}

    def warning(self, kind: str, text: str, *args: object, error: BaseException | None = None) -> None:
        """Log `text % args`, unless a line of this kind was written a moment ago.

        Args:
            kind: Identifies lines that repeat. Use few kinds: each is kept in memory.
            text: A sentence, with %-placeholders for `args`.
            args: The values for the placeholders.
            error: An exception, whose traceback is added.
        """
        now = monotonic()
        if now < self._next.get(kind, 0.0):
            self._left_out[kind] = self._left_out.get(kind, 0) + 1  # threads may lose a count: harmless
            return
        self._next[kind] = now + self._every
        left_out = self._left_out.pop(kind, 0)
        more = f" ({left_out} more like it since the last such line)" if left_out else ""
        if error is None:
            self._log.warning(text + more, *args)
        else:  # not `exc_info`, which would print the values in a statement
            self._log.warning(text + more + "\n%s", *args, trace_of(error))
