"""How the worker's threads start and end. Never receives, settles or decides. Called by the worker alone."""

from collections.abc import Callable, Sequence
from threading import Thread, current_thread
from time import monotonic

from exactly_once.events.throttled_log import ThrottledLog
from exactly_once.exceptions.words import trace_of
from exactly_once.wording.steady_log import steady
from exactly_once.worker.lane import Lane

__all__ = ["join", "lasting", "on_each"]

_log = steady("exactly_once.worker")


def lasting(name: str, life: Callable[[], None], breathe: Callable[[], None], log: ThrottledLog) -> Thread:
    """Make a daemon thread, which runs `life` again after any exception. Daemon: a client that hangs must not keep the process.

    `breathe` waits a moment before each new run; it does not wait once the worker stops.
    """

    def live() -> None:
        while True:
            try:
                life()
            except BaseException as error:  # noqa: BLE001, RUF100
                log.warning(name, "The thread %r met an error it should not; going on.", name, error=error)
                breathe()
            else:
                return

    return Thread(target=live, daemon=True, name=name)


def on_each(lanes: Sequence[Lane], verb: str, deadline: float) -> None:
    """Call `stop` or `close` of all consumers at the same time, because one client may be slow."""

    def call(lane: Lane) -> None:
        try:
            getattr(lane.consumer, verb)()
        except BaseException as error:  # noqa: BLE001, RUF100
            _log.warning("%s: %s failed; going on.\n%s", lane.name, verb, trace_of(error))

    threads = [Thread(target=call, args=(lane,), daemon=True) for lane in lanes]
    for thread in threads:
        thread.start()
    for thread in threads:
        join(thread, deadline)


def join(thread: Thread, deadline: float) -> None:
    if thread.ident is not None and thread is not current_thread():
        thread.join(max(0.0, deadline - monotonic()))
