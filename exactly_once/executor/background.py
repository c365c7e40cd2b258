"""Runs jobs by the clock that are no handler's: sweeps, and later a relay. One thread for each job.

A job that fails runs again after longer and longer pauses. Its exception is logged and never ends the thread. `stop` stops all
jobs, and `dead` names a thread that ended by itself, for `/ready` and `/live`. Called by the executor.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from threading import Event, Thread
from time import monotonic
from typing import Final

from exactly_once import fork
from exactly_once.events.throttled_log import ThrottledLog
from exactly_once.wording.steady_log import steady

__all__ = ["Background", "Job"]

LONGEST: Final = timedelta(minutes=10)
"""The longest pause after a failure, unless the job's own interval is longer."""
_ENDS_S: Final = 1.0
"""How long `stop` waits for a job under way. A job that waits for a server without an answer ends by itself."""

_log = steady("exactly_once.worker")


@dataclass(frozen=True, slots=True)
class Job:
    """Work by the clock.

    Args:
        name: For logs and thread names.
        every: The time between two runs.
        run: Does the work once. May block and raise.
        first: The time from the start to the first run.
    """

    name: str
    every: timedelta
    run: Callable[[], object]
    first: timedelta = timedelta(0)

    def pause(self, failed: int) -> timedelta:
        """Return the time until the next run, after so many failures in a row.

        Example:
            >>> Job("sweep", timedelta(seconds=30), print).pause(3)
            datetime.timedelta(seconds=240)
        """
        return max(self.every, min(self.every * (1 << min(failed, 10)), LONGEST))


class Background:
    """Runs jobs until `stop`.

    Args:
        jobs: The jobs.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._stopping = Event()
        self._throttled = ThrottledLog(_log)
        self._process = fork.here
        self._threads = [Thread(target=self._live, args=(job,), name=job.name, daemon=True) for job in jobs]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Start no more runs, and wait a moment for those under way. After a crash in a run, the next run does its work."""
        self._stopping.set()
        deadline = monotonic() + _ENDS_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - monotonic()))

    def dead(self) -> Sequence[str]:
        """Return the names of the jobs whose thread ended although nobody stopped it."""
        return () if self._stopping.is_set() else [thread.name for thread in self._threads if not thread.is_alive()]

    def _live(self, job: Job) -> None:
        pause, failed = job.first, 0
        while not self._stopping.wait(pause.total_seconds()):
            try:
                job.run()
            except BaseException as error:  # noqa: BLE001, RUF100  (the next run may succeed)
                if self._process is not fork.here:
                    fork.end(fork.inside())
                failed += 1
                text = "job_failed name=%s failures_in_a_row=%d; it is done again in %d s"
                self._throttled.warning(
                    job.name, text, job.name, failed, job.pause(failed).total_seconds(), error=error
                )
            else:
                failed = 0
            pause = job.pause(failed)
