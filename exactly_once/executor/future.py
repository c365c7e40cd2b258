"""What a delivery's run will say: a future that nobody waits for, only calls back. Made for each message, so it is small.

`concurrent.futures.Future` makes a condition and two locks for each, about a tenth of what a message of a set-based batch
costs the interpreter. Here all share one lock, which is held for a few instructions. The names are those of `Future`.
"""

from collections.abc import Callable
from concurrent.futures import CancelledError
from enum import Enum
from threading import Lock
from typing import Any, Final

from exactly_once.outcome import Result

__all__ = ["SmallFuture"]

_LOCK: Final = Lock()


class _State(Enum):
    WAITING = 0
    RUNNING = 1
    CANCELLED = 2
    DONE = 3


_WAITING, _RUNNING, _CANCELLED, _DONE = _State


class SmallFuture:
    """The end of one run, which is to come. At most one callback."""

    __slots__ = ("_callback", "_error", "_result", "_state", "given_back")

    def __init__(self) -> None:
        self._state = _WAITING
        self.given_back = False
        """Nobody waits for its result any more; what has not begun to work need not begin."""
        self._result: Result | None = None
        self._error: BaseException | None = None
        self._callback: Callable[[Any], object] | None = None

    def add_done_callback(self, callback: Callable[[Any], object]) -> None:
        """Have this called with it when it has ended, by whoever ends it; at once if it has."""
        with _LOCK:
            if self._state is _WAITING or self._state is _RUNNING:
                assert self._callback is None
                self._callback = callback
                return
        callback(self)

    def set_running_or_notify_cancel(self) -> bool:
        """Say that it begins, and cannot be cancelled any more; False if it was cancelled before."""
        with _LOCK:
            if self._state is _WAITING:
                self._state = _RUNNING
        return self._state is _RUNNING

    def cancel(self) -> bool:
        """Keep it from beginning; False if it has begun."""
        with _LOCK:
            if self._state is not _WAITING:
                self.given_back = True
                return self._state is _CANCELLED
            self._state = _CANCELLED
        self._call()
        return True

    def set_result(self, result: Result) -> None:
        """End it."""
        self._result = result
        self._end()

    def set_exception(self, error: BaseException) -> None:
        """End it: it broke."""
        self._error = error
        self._end()

    def done(self) -> bool:
        """Whether it has ended, or never begins."""
        return self._state is _DONE or self._state is _CANCELLED

    def cancelled(self) -> bool:
        """Whether it never begins."""
        return self._state is _CANCELLED

    def exception(self) -> BaseException | None:
        """What it broke with; of one that has ended."""
        return self._error

    def result(self) -> Result:
        """What it said; of one that has ended.

        Raises:
            CancelledError: It was kept from beginning. Else what it broke with.
        """
        if self._state is _CANCELLED:
            raise CancelledError
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def _end(self) -> None:
        with _LOCK:
            assert self._state is not _DONE
            self._state = _DONE
        self._call()

    def _call(self) -> None:
        callback = self._callback
        if callback is not None:
            callback(self)
