"""How a supervised child is, told to its supervisor through a pipe, so that one port can answer for all of them.

A port can be listened on by one process, and a supervisor cannot know of its children's outages otherwise. A line of
JSON goes over when something changed, and as a sign of life. Never blocks the child: a supervisor that does not read
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
"""Set in a child's environment: the number of the pipe's writing end."""
SIGN_OF_LIFE_S: Final = 5.0
STUCK_AFTER: Final = timedelta(seconds=60)
"""Long polls take seconds and a client's own timeouts up to half a minute: a minute without a turn is neither."""


class _Told(Protocol):
    def unready(self) -> str | None: ...


class HeartbeatSender:
    """The child's end; does nothing where nobody listens.

    Args:
        worker: Whom to ask; its `stuck` too, if it has one.
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
            except OSError:  # not passed on by whatever is between us and the supervisor
                self._into = None

    def send(self) -> None:
        """Say how the worker is, if that is news or was not said for a while."""
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
            return  # full: said at the next look
        except OSError:
            self._into = None  # nobody listens any more
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
        """Take in what was said since; blocks on nothing."""
        try:
            while said := os.read(self.out, 65536):
                *lines, self._rest = (self._rest + said).split(b"\n")
                if lines:
                    news = json.loads(lines[-1])
                    self.unready, self.stuck, self.heard = news["unready"], news["stuck"], monotonic()
        except BlockingIOError:
            return

    def is_silent(self, after: timedelta) -> bool:
        """Whether nothing was heard for so long that its main thread cannot be turning."""
        return monotonic() - self.heard > after.total_seconds()

    def close(self) -> None:
        """Listen no more."""
        os.close(self.out)


def open_heartbeat() -> tuple[HeartbeatReader, int]:
    """Return a reader, and the end of its pipe to pass on to the child and then to close here."""
    out, into = os.pipe()
    os.set_blocking(out, False)
    return HeartbeatReader(out), into
