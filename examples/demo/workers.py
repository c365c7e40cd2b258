"""The worker processes of one shop: started as a supervisor would, killed with SIGKILL, started again.

A kill is the kernel's: no handler runs, nothing is flushed, what was in hand stays unsettled. Both shops' workers are
killed alike, by `run`, and each while it is at work, in the middle of a transaction.
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
KEPT: Final = "EXACTLY_ONCE_LIBROCKETMQ"  # where the machine's librocketmq is; everything else is ours to say


def worker_name(side: str, number: int) -> str:
    """Return the name a worker's database connections carry (`application_name`)."""
    return f"demo-{side}-{number}"


class Worker:
    """One place for a process of one shop, and whichever process fills it at present.

    Args:
        side: The shop it belongs to.
        number: Its place among the shop's processes.
        arguments: What follows the interpreter, such as `["-m", "examples.demo.naive"]`.
        settings: Its environment, by names of exactly_once's settings.
        directory: Where its log goes.
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
        """SIGKILL, and a new process in its place."""
        self._child.end(signal.SIGKILL)
        self._child.start()

    def stop(self) -> None:
        """Let it finish (SIGTERM); SIGKILL when it takes too long."""
        self._child.end(signal.SIGTERM, patience_s=STOP_PATIENCE_S)

    def kill(self) -> None:
        """SIGKILL, for good."""
        self._child.end(signal.SIGKILL)

    def require_alive(self) -> None:
        """Raise `ServerFailed` with the last lines of its log if it has ended by itself."""
        if not self._child.running:
            raise self._child.failure("ended by itself")
