"""A child reports its health to the supervisor through a pipe, so that one port can answer for all children.

Only one process can listen on a port, and a supervisor cannot learn of its children's outages in another way. The child writes a
line of JSON when something changed, and as a sign of life. Never blocks the child: a supervisor that does not read
misses a line. Called by `signals` in the child, and by `supervisor`.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from time import monotonic
from typing import Final, Protocol

__all__ = ["HeartbeatReader", "HeartbeatSender", "open_heartbeat"]

REPORT_TO: Final = "EXACTLY_ONCE_REPORT_FD"
"""Set in a child's environment: the descriptor of the pipe's writing end."""
SIGN_OF_LIFE_S: Final = 5.0
STUCK_AFTER: Final = timedelta(seconds=60)
"""Long polls take seconds, and a client's own timeouts up to half a minute. A minute without progress is neither."""


class _Told(Protocol):
    def unready(self) -> str | None: ...


class HeartbeatSender:
    """The child's end. Does nothing without a supervisor.

    Args:
        worker: The worker to ask; its `stuck` too, if it has that method.
    """

    def __init__(self, worker: _Told) -> None:
        self._worker = worker
        number = os.environ.get(REPORT_TO, "")
        self._into = int(number) if number.isdigit() else None
        self._last, self._next = "", 0.0
        if self._into is not None:
            try:
                os.set_inheritable(self._into, False)
                os.set_blocking(self._into, False)
            except OSError:  # the process between us and the supervisor closed the descriptor
                self._into = None

    def send(self) -> None:
        """Report the worker's health, if it has changed or was not reported for a while."""
        if self._into is None:
            return
        stuck = getattr(self._worker, "stuck", lambda after: ())(STUCK_AFTER)
        line = json.dumps({"stuck": list(stuck), "unready": self._worker.unready()}) + "\n"
        now = monotonic()
        if line == self._last and now < self._next:
            return
        try:
            os.write(self._into, line.encode())
        except BlockingIOError:
            return  # the pipe is full: reported at the next call
        except OSError:
            self._into = None  # nobody reads any more
        self._last, self._next = line, now + SIGN_OF_LIFE_S


@dataclass(eq=False, slots=True)
class HeartbeatReader:
    """The supervisor's end for one child."""

    out: int
    unready: str | None = "not started"
    stuck: Sequence[str] = ()
    heard: float = field(default_factory=monotonic)
    _rest: bytes = b""

    def read(self) -> None:
        """Read what was reported since the last call. Never blocks."""
        try:
            while said := os.read(self.out, 65536):
                *lines, self._rest = (self._rest + said).split(b"\n")
                if lines:
                    news = json.loads(lines[-1])
                    self.unready, self.stuck, self.heard = news["unready"], news["stuck"], monotonic()
        except BlockingIOError:
            return

    def is_silent(self, after: timedelta) -> bool:
        """Whether there was no report for so long that the child's main thread cannot be making progress."""
        return monotonic() - self.heard > after.total_seconds()

    def close(self) -> None:
        """Stop reading."""
        os.close(self.out)


def open_heartbeat() -> tuple[HeartbeatReader, int]:
    """Return a reader, and the writing end of its pipe, to pass on to the child and then to close here."""
    out, into = os.pipe()
    os.set_blocking(out, False)
    return HeartbeatReader(out), into
