"""Processes of `lease_shop`, to be killed, stopped and replaced often: forked off one that has imported all it needs.

Each dies with that one, and that one with us, so that a test run which is killed leaves nothing behind. Linux only.
"""

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from tests.acceptance import lease_shop
from tests.waiting import until

PATIENCE_S = 40.0
_NURSERY = multiprocessing.get_context("forkserver")
_NURSERY.set_forkserver_preload(["tests.acceptance.lease_workers", "exactly_once.service.worker_service", "redis"])
_ONE = threading.Lock()  # to start one looks whether others have ended, and of two that look at once one sees nothing
_PR_SET_PDEATHSIG = 1


class Worker:
    """One process.

    Args:
        environ: Set these on top of our own environment.
        log: The file its output is appended to.
        arguments: As `lease_shop` takes them.
    """

    def __init__(self, environ: Mapping[str, str], log: Path, *arguments: str) -> None:
        self._log = log
        self._process = _NURSERY.Process(target=_work, args=(dict(environ), str(log), arguments))
        with _ONE:
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def code(self) -> int | None:
        """What it ended with; a signal's number below zero; None while it lives."""
        with _ONE:
            return self._process.exitcode

    @property
    def is_stopped(self) -> bool:
        """It stands still."""
        assert self.code is None, f"it ended with {self.code}: {self.told()}"
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    @property
    def is_started(self) -> bool:
        """It receives."""
        assert self.code is None, f"it ended with {self.code}: {self.told()}"
        return f"{self.pid} exactly_once.worker worker_started" in self._log.read_text()

    def ended(self) -> int:
        """Wait for its end, and return what it ended with."""
        until(lambda: self.code is not None, self.told)
        assert self.code is not None
        return self.code

    def end(self) -> None:
        """Be done with it, whatever it is doing."""
        if self.code is None:
            self.send(signal.SIGKILL)
            self.ended()

    def told(self) -> str:
        """The last of what it said."""
        return self._log.read_text()[-3000:]


def _work(environ: Mapping[str, str], log: str, arguments: tuple[str, ...]) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.environ |= environ
    with Path(log).open("ab", buffering=0) as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(name)s %(message)s")
    sys.exit(lease_shop.main(*arguments))
