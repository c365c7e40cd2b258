"""The worker's places: how many more messages it may take in hand, and which consumer may ask for them next.

Consumers are served in the order in which they ask, and while others wait none gets more than its share. An idle consumer books
one place for its long poll; a busy consumer doubles its number. Otherwise long polls would starve the busy consumers. A nearly
full worker gives out nothing until a quarter of its places is free: else every message would need a receive of its own. Never
receives or starts a thread. Called by the worker's receiving threads, and by its settling threads, which return places.
"""

from collections.abc import Callable
from dataclasses import dataclass
from threading import Condition

__all__ = ["Capacity", "Seat"]


@dataclass(eq=False, slots=True)
class Seat:
    """One consumer in the line for places."""

    want: int = 1
    ticket: int = 0
    """Its number in the line. Kept when a wait ends without a place, so that the consumer keeps its turn. 0: none."""
    in_line: bool = False


class Capacity:
    """The places: one for each message that may be in hand at once.

    Args:
        capacity: The number of places.
        changed: The worker's condition. All methods but `book` are called with its lock held.
        closed: Whether no place may be given out now (an outage).
    """

    def __init__(self, capacity: int, changed: Condition, closed: Callable[[], bool]) -> None:
        self._free, self._changed, self._closed = capacity, changed, closed
        self._in_hand, self._full_from = 0, capacity - capacity // 4
        self._line: list[Seat] = []
        self._tickets = 0

    def book(self, seat: Seat, wait_s: float, stopping: Callable[[], bool]) -> int:
        """Wait in line for places, at most `wait_s`.

        Returns:
            How many were booked, at most `seat.want`. 0: none came free in time, or the worker stops.
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
        """Record how many of the booked places have a message now, and return the other places."""
        self._free += booked - taken
        self._in_hand += taken
        if booked:
            seat.want = 2 * seat.want if taken else 1

    def free(self, places: int) -> None:
        """Return places."""
        self._free += places
        self._in_hand -= places

    @property
    def is_full(self) -> bool:
        """Whether no place is given out until more come free."""
        return self._free <= 0 or self._in_hand > self._full_from

    def _is_next(self, seat: Seat) -> bool:
        return not self.is_full and not self._closed() and all(other.ticket >= seat.ticket for other in self._line)
