"""The worker's places: how many messages may still be taken in hand, and whose turn it is to ask for them.

First come, first served, and nobody takes more than a fair share while others stand in line. An idle consumer books
one place for its long poll and a busy one doubles, or long polls would starve the busy ones. A worker that is nearly full
asks for nothing until a quarter of its places is free: asking for each place as it comes free would make every message a
receive of its own. Never receives, never starts a thread. Called by the worker's receiving threads, and by settling
threads that hand places back.
"""

from collections.abc import Callable
from dataclasses import dataclass
from threading import Condition

__all__ = ["Capacity", "Seat"]


@dataclass(eq=False, slots=True)
class Seat:
    """One consumer's standing in the line."""

    want: int = 1
    ticket: int = 0
    """Its number; kept when a wait ends without a place, so that it does not go to the end again. 0: none."""
    in_line: bool = False


class Capacity:
    """The places: as many as messages may be in hand at once.

    Args:
        capacity: How many there are.
        changed: The worker's condition; all methods but `book` are called with its lock held.
        closed: Whether none is to be given out at present (an outage).
    """

    def __init__(self, capacity: int, changed: Condition, closed: Callable[[], bool]) -> None:
        self._free, self._changed, self._closed = capacity, changed, closed
        self._in_hand, self._full_from = 0, capacity - capacity // 4
        self._line: list[Seat] = []
        self._tickets = 0

    def book(self, seat: Seat, wait_s: float, stopping: Callable[[], bool]) -> int:
        """Wait in line for places, at most `wait_s`.

        Returns:
            How many were booked, at most `seat.want`; 0 where there were none in time, or the worker stops.
        """
        with self._changed:
            if not seat.ticket:
                self._tickets += 1
                seat.ticket = self._tickets
            self._line.append(seat)
            try:
                self._changed.wait_for(lambda: stopping() or self._is_next(seat), wait_s)
                if stopping() or not self._is_next(seat):
                    return 0
                taken = min(seat.want, max(1, self._free // len(self._line)))
                self._free -= taken
                seat.ticket = 0
                return taken
            finally:
                self._line.remove(seat)
                if self._line:
                    self._changed.notify_all()

    def used(self, seat: Seat, booked: int, taken: int) -> None:
        """Note how many of the booked places messages now sit on, and hand back the others."""
        self._free += booked - taken
        self._in_hand += taken
        if booked:
            seat.want = 2 * seat.want if taken else 1

    def free(self, places: int) -> None:
        """Hand back."""
        self._free += places
        self._in_hand -= places

    @property
    def is_full(self) -> bool:
        """No place is given out until some come free."""
        return self._free <= 0 or self._in_hand > self._full_from

    def _is_next(self, seat: Seat) -> bool:
        return not self.is_full and not self._closed() and all(other.ticket >= seat.ticket for other in self._line)
