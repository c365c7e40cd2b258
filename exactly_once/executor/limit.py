"""How many runs of one handler go on at once, of threads and of the loop alike. Runs nothing.

A task of the loop waits for its place on the loop, and holds no thread meanwhile. A place that is given back goes to whoever
has waited longest.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Lock

from sqlalchemy.util import await_only

__all__ = ["Limit"]


class Limit:
    """Places for the runs of one handler.

    Args:
        most: How many runs go on at once.

    Example:
        >>> with Limit(1).place(on_loop=False) as waited:
        ...     waited
        False
    """

    def __init__(self, most: int) -> None:
        self._free = most
        self._waiting: deque[Future[None]] = deque()
        self._lock = Lock()

    @contextmanager
    def place(self, *, on_loop: bool) -> Iterator[bool]:
        """Wait for a place, and give it back in the end; yields whether it had to be waited for.

        Args:
            on_loop: We are in a greenlet of an event loop: await. Else the thread waits.
        """
        waited = self.acquire(on_loop=on_loop)
        try:
            yield waited
        finally:
            self.release()

    def acquire(self, *, on_loop: bool) -> bool:
        """Wait for a place; returns whether it had to be waited for. `release` gives it back, from any thread."""
        turn = self._take()
        if turn is not None:
            try:
                if on_loop:
                    import asyncio

                    await_only(asyncio.wrap_future(turn))
                else:
                    turn.result()
            except BaseException:
                # cancelled; the place may have been given to us in that very moment
                if not turn.cancel():
                    self.release()
                raise
        return turn is not None

    def _take(self) -> "Future[None] | None":
        with self._lock:
            if self._free:
                self._free -= 1
                return None
            turn = Future[None]()
            self._waiting.append(turn)
            return turn

    def release(self) -> None:
        """Give a place back."""
        while True:
            with self._lock:
                if not self._waiting:
                    self._free += 1
                    return
                turn = self._waiting.popleft()
            if turn.set_running_or_notify_cancel():  # False: it was cancelled, and waits no longer
                turn.set_result(None)
                return
