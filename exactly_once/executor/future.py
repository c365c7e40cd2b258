"""The future of a delivery's run. Nobody waits for it: it only calls back. One is made for each message, so it is small.

Each `concurrent.futures.Future` makes a condition and two locks. That is about a tenth of the interpreter's time for a message of
a set-based batch. Here all futures share one lock, which is held for a few instructions. Methods have the names of `Future`.
Called by the executor and the worker.
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
    """The result of one run that has not ended yet. At most one callback."""

    __slots__ = ("_callback", "_error", "_result", "_state", "given_back")

    def __init__(self) -> None:
        self._state = _WAITING
        self.given_back = False
        """Nobody waits for its result any more; what has not begun to work need not begin."""
        self._result: Result | None = None
        self._error: BaseException | None = None
        self._callback: Callable[[Any], object] | None = None

    def add_done_callback(self, callback: Callable[[Any], object]) -> None:
        """Call this with the future when the run ends, in the thread that ends it. Called at once if the run has ended."""
        with _LOCK:
            if self._state is _WAITING or self._state is _RUNNING:
                assert self._callback is None
                self._callback = callback
                return
        callback(self)

    def set_running_or_notify_cancel(self) -> bool:
        """Mark the run as begun: it cannot be cancelled any more. False if it was cancelled before."""
        with _LOCK:
            if self._state is _WAITING:
                self._state = _RUNNING
        return self._state is _RUNNING

    def cancel(self) -> bool:
        """Prevent the run from beginning. False if it has begun."""
        with _LOCK:
            if self._state is not _WAITING:
                self.given_back = True
                return self._state is _CANCELLED
            self._state = _CANCELLED
        self._call()
        return True

    def set_result(self, result: Result) -> None:
        """End the run with its result."""
        self._result = result
        self._end()

    def set_exception(self, error: BaseException) -> None:
        """End the run with the exception it raised."""
        self._error = error
        self._end()

    def done(self) -> bool:
        """Whether the run has ended, or was cancelled."""
        return self._state is _DONE or self._state is _CANCELLED

    def cancelled(self) -> bool:
        """Whether the run was cancelled before it began."""
        return self._state is _CANCELLED

    def exception(self) -> BaseException | None:
        """Return the exception of a run that has ended, or None."""
        return self._error

    def result(self) -> Result:
        """Return the result of a run that has ended.

        Raises:
            CancelledError: The run was cancelled before it began.
            BaseException: What the run raised.
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
