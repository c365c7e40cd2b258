"""The worker processes of one shop: starts them as a supervisor would, kills them with SIGKILL, and starts them again.

The kernel does the kill: no signal handler runs, nothing is flushed, and messages in hand stay unsettled. `run` kills the workers
of both shops in the same way, each in the middle of a transaction.
"""

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from exactly_once.testing.child import Child

__all__ = ["Worker", "worker_name"]

ROOT: Final = Path(__file__).parents[2]
STOP_PATIENCE_S: Final = 30.0
KEPT: Final = "EXACTLY_ONCE_LIBROCKETMQ"  # the path of librocketmq; all other settings are set here


def worker_name(side: str, number: int) -> str:
    """Return the `application_name` of a worker's database connections."""
    return f"demo-{side}-{number}"


class Worker:
    """One worker of a shop. Each time it is killed, a new process takes its place.

    Args:
        side: The shop it belongs to.
        number: Its number among the shop's processes.
        arguments: The arguments of the interpreter, such as `["-m", "examples.demo.naive"]`.
        settings: Its environment, by names of exactly_once's settings.
        directory: The folder for its log.
    """

    def __init__(
        self, side: str, number: int, arguments: Sequence[str], settings: Mapping[str, str], directory: Path
    ) -> None:
        self.side, self.name = side, worker_name(side, number)
        inherited = {
            variable: "" for variable in os.environ if variable.startswith("EXACTLY_ONCE_") and variable != KEPT
        }
        ours = {f"EXACTLY_ONCE_{setting.upper()}": value for setting, value in settings.items()}
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self._child = Child(
            self.name,
            [sys.executable, *arguments],
            output=directory / f"{self.name}.log",
            environ={**inherited, **ours, "PYTHONPATH": path},
        )

    @property
    def running(self) -> bool:
        """Whether its process is alive."""
        return self._child.running

    def start(self) -> None:
        """Start the process."""
        self._child.start()

    def kill_and_start(self) -> None:
        """Kill the process with SIGKILL, and start a new one in its place."""
        self._child.end(signal.SIGKILL)
        self._child.start()

    def stop(self) -> None:
        """Let it finish (SIGTERM). SIGKILL if it takes too long."""
        self._child.end(signal.SIGTERM, patience_s=STOP_PATIENCE_S)

    def kill(self) -> None:
        """Kill the process with SIGKILL, and start no other."""
        self._child.end(signal.SIGKILL)

    def require_alive(self) -> None:
        """Raise `ServerFailed`, with the last lines of its log, if the process has ended by itself."""
        if not self._child.running:
            raise self._child.failure("ended by itself")
