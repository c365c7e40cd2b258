"""Work by the clock: done again and again, later and later where it fails, and ended with the executor."""

import logging
from datetime import timedelta
from threading import Event

import pytest

from exactly_once.executor.background import LONGEST, Background, Job
from exactly_once.executor.executor import Executor
from tests.waiting import until

SOON = timedelta(milliseconds=5)


class Work:
    """Counts its runs; the first ones fail."""

    def __init__(self, fails: int = 0) -> None:
        self.fails, self.runs = fails, 0

    def __call__(self) -> None:
        self.runs += 1
        if self.runs <= self.fails:
            raise SystemExit("a job may even exit")


def test_a_job_is_done_again_and_again_until_it_is_told_to_stop() -> None:
    work = Work()
    background = Background([Job("sweep", SOON, work)])
    until(lambda: work.runs >= 3, "three runs")
    background.stop()
    runs = work.runs
    assert background.dead() == ()
    assert not Event().wait(0.05)
    assert work.runs == runs


def test_a_job_that_fails_is_told_once_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    work, other = Work(fails=3), Work()
    background = Background([Job("sweep", SOON, work), Job("tidy", SOON, other)])
    until(lambda: work.runs >= 5, "it goes on behind its failures")
    assert background.dead() == []
    background.stop()
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [line.splitlines()[0] for line in told] == [
        "job_failed name=sweep failures_in_a_row=1; it is done again in 0 s"
    ]
    assert other.runs >= 1


def test_a_job_that_fails_waits_twice_as_long_each_time_and_never_less_than_it_does_anyway() -> None:
    job = Job("sweep", timedelta(seconds=30), print)
    assert [job.pause(failed).total_seconds() for failed in (0, 1, 2, 4, 5, 99)] == [30, 60, 120, 480, 600, 600]
    rare = Job("look", timedelta(hours=1), print)
    assert rare.pause(0) == rare.pause(9) == timedelta(hours=1) > LONGEST


def test_an_executor_keeps_jobs_until_it_stops() -> None:
    work = Work()
    executor = Executor(lambda delivery: [], [], threads=1)
    executor.keep([Job("sweep", SOON, work)])
    until(lambda: work.runs >= 2, "two runs")
    assert executor.dead() == []
    executor.stop()
    runs = work.runs
    assert not Event().wait(0.05)
    assert work.runs == runs
