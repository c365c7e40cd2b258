"""A consumer's lane in the worker: its two threads, when each was last alive, and how threads start and end.

Never receives, settles or decides. Called by the worker alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Thread, current_thread
from time import monotonic

from exactly_once.exceptions.words import trace_of
from exactly_once.wording.steady_log import steady
from exactly_once.worker.capacity import Seat
from exactly_once.worker.in_hand import InHand
from exactly_once.worker.log_throttle import ThrottledLog

__all__ = ["Lane", "join", "lasting", "on_each"]

_log = steady("exactly_once.worker")


@dataclass(eq=False, slots=True)
class Lane:
    """A consumer's deliveries in hand, its place in the line, and its two threads."""

    unsettled: InHand
    seat: Seat = field(default_factory=Seat)
    receiver: Thread = field(init=False)
    settler: Thread = field(init=False)
    turned: float = 0.0
    quiet: int = -1
    """The worker's `_events` when the last empty receive began."""


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
            getattr(lane.unsettled.consumer, verb)()
        except BaseException as error:  # noqa: BLE001, RUF100
            _log.warning("%s: %s failed; going on.\n%s", lane.unsettled.name, verb, trace_of(error))

    threads = [Thread(target=call, args=(lane,), daemon=True) for lane in lanes]
    for thread in threads:
        thread.start()
    for thread in threads:
        join(thread, deadline)


def join(thread: Thread, deadline: float) -> None:
    if thread.ident is not None and thread is not current_thread():
        thread.join(max(0.0, deadline - monotonic()))
