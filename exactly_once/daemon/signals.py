"""Turns signals into an exit code: the first signal stops a worker gently, a second one ends the process at once.

Never starts or stops the worker's threads itself; never exits if returning is enough. Called by `eo.run` and by the
command line, in the main thread, because Python runs signal handlers in no other thread.
"""

import os
import selectors
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Thread, current_thread, main_thread
from types import FrameType
from typing import Any, Final, Generic, NoReturn, Protocol, TypeVar

from exactly_once import fork
from exactly_once.configuration.supervised import is_supervised
from exactly_once.daemon.heartbeat import HeartbeatSender
from exactly_once.errors import ConfigurationError
from exactly_once.wording.steady_log import steady

__all__ = ["KILLED", "run_until_signal", "signals_wake"]

KILLED: Final = 143
"""The exit code after a second signal; a shell reports the same for a process that SIGTERM ended (128 + 15)."""
_LOOK_S: Final = 0.5

_log = steady("exactly_once.worker")
T = TypeVar("T")


class Stoppable(Protocol):
    """What can be stopped: the worker."""

    def stop(self) -> int:
        """Stop, or stop starting, and return how many messages were given back."""

    def unready(self) -> str | None:
        """Say why nothing is received."""


def run_until_signal(
    worker: Stoppable, *, start: Callable[[], None] | None = None, announce: Callable[[str], None] = _log.info
) -> int:
    """Wait for SIGTERM or SIGINT, then stop the worker within its drain timeout.

    A second signal while it stops ends the process at once with 143, whatever runs. The messages come back by
    themselves. In a supervisor's child a second signal does nothing.

    Args:
        worker: A worker; started, unless `start` is given.
        start: Starts it. A signal is noticed while it still waits for a server; then `worker.stop()` is
            called to end the waiting. This raises what it raises.
        announce: Called when stopping begins, and with how it ended.

    Returns:
        0, or 1 if messages were given back. Also when other code stopped the worker.

    Raises:
        ConfigurationError: Called outside the main thread.

    Example:
        sys.exit(run_until_signal(worker, start=worker.start))
    """
    supervised = is_supervised()
    heartbeat = HeartbeatSender(worker)

    def received(number: int, count: int) -> None:
        if count > 1 and not supervised:
            leave()

    # start and stop have threads of their own: this thread must notice signals even while a client blocks inside C.
    with signals_wake({signal.SIGTERM: received, signal.SIGINT: received}) as wait:
        starting = _Aside(start or (lambda: None))
        while starting.runs and not wait(0.05):
            heartbeat.send()
        early = starting.runs
        if not early:
            starting.outcome()
            while worker.unready() != "stopped":
                heartbeat.send()
                if wait(_LOOK_S):
                    break
        if first := wait(0.0):
            more = "" if supervised else " A second signal ends at once; what is in hand then comes back by itself."
            announce(f"{first.name}: finishing what runs.{more}")
        stopping = _Aside(worker.stop)
        while stopping.runs or starting.runs:
            wait(0.05)
            heartbeat.send()
        if early:  # it may have started just as it was told to stop: then it must be stopped again
            stopping.outcome()
            stopping = _Aside(worker.stop)
            while stopping.runs:
                wait(0.05)
    given_back = stopping.outcome()
    announce(f"Stopped; {given_back} message(s) given back.")
    return 1 if given_back else 0


class _Aside(Generic[T]):
    """A call in a thread of its own."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._future: Future[T] = Future()
        Thread(target=self._run, args=(call,), daemon=True, name="start and stop").start()

    @property
    def runs(self) -> bool:
        return not self._future.done()

    def outcome(self) -> T:
        return self._future.result()

    def _run(self, call: Callable[[], T]) -> None:
        try:
            self._future.set_result(call())
        except BaseException as error:  # noqa: BLE001, RUF100  (raised again by `outcome`)
            self._future.set_exception(error)


def leave(code: int = KILLED) -> NoReturn:
    """End the process now and run nothing more: no `atexit`, and no thread is waited for."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, RuntimeError):  # closed, a broken pipe, or in the middle of a write
            continue
    os._exit(code)


class _Inherited:
    """Restores the previous signal handlers in a child that is forked meanwhile.

    The child has no worker to stop, and the code that started it, such as `multiprocessing`, relies on SIGTERM to end it.
    """

    def __init__(self, before: Mapping[signal.Signals, Any]) -> None:
        self._before = before
        fork.tell(self)

    def forked(self) -> None:
        """Runs in the child."""
        signal.set_wakeup_fd(-1)
        for number, old in self._before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)


Handler = Callable[[int, int], None]
Wait = Callable[[float], "signal.Signals | None"]


@contextmanager
def signals_wake(handlers: Mapping[signal.Signals, Handler]) -> Iterator[Wait]:
    """Catch these signals inside the block, and restore the previous handlers after it.

    A handler is called with the signal's number and the count of such signals so far, this one included. The block
    gets a `wait(seconds)`, which ends early at a signal and returns the first signal that ever came, or None. It sleeps on
    a pipe: an Event that a handler sets can deadlock with the wait it interrupts.

    Raises:
        ConfigurationError: Called outside the main thread.
    """
    if current_thread() is not main_thread():
        raise ConfigurationError(
            "Signals can be caught in the main thread only. Call this from the main thread, or use the worker as a"
            " context manager and stop it yourself."
        )
    came: list[signal.Signals] = []

    def handle(number: int, frame: FrameType | None) -> None:
        came.append(signal.Signals(number))
        handlers[signal.Signals(number)](number, len(came))

    out, into = os.pipe()
    os.set_blocking(out, False)
    os.set_blocking(into, False)
    before = {number: signal.signal(number, handle) for number in handlers}
    woken = signal.set_wakeup_fd(into, warn_on_full_buffer=False)
    selector = selectors.DefaultSelector()
    selector.register(out, selectors.EVENT_READ)
    inherited = _Inherited(before)

    def wait(seconds: float) -> signal.Signals | None:
        if selector.select(seconds):
            os.read(out, 4096)
        return came[0] if came else None

    try:
        yield wait
    finally:
        fork.forget(inherited)
        signal.set_wakeup_fd(woken)
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)
        selector.close()
        os.close(out)
        os.close(into)
