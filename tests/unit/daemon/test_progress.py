"""Progress: a live line on a terminal, a few log lines elsewhere."""

import io
import logging
from dataclasses import replace
from datetime import timedelta
from time import sleep

import pytest

from exactly_once.daemon.progress import Progress, is_terminal
from exactly_once.worker.worker import Counts
from tests.waiting import until

NONE = Counts(received=0, acked=0, redelivered=0, given_back=0, in_hand=0, held=0, outages=(), outcomes={})
SOME = replace(NONE, received=7, acked=5, in_hand=2, outcomes={"processed": 4, "duplicate": 1, "in progress": 0})
EVERY = timedelta(milliseconds=20)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Worked:
    """Counts that a test changes while they are shown."""

    def __init__(self, now: Counts) -> None:
        self.now, self.read = now, 0

    def __call__(self) -> Counts:
        self.read += 1
        return self.now


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "exactly_once.progress"]


def test_a_line_is_logged_only_when_something_changed(caplog: pytest.LogCaptureFixture) -> None:
    worked = Worked(SOME)
    with caplog.at_level(logging.INFO), Progress(worked, stream=io.StringIO(), every=EVERY):
        until(lambda: worked.read >= 5, "it looked a few times")
        assert len(lines(caplog)) == 1
        worked.now = replace(SOME, held=2, outages=("eu",))
        until(lambda: len(lines(caplog)) == 2, "the change is logged")
    first, second = lines(caplog)
    assert first.startswith("processed=4 duplicate=1 in_hand=2 received=7 acked=5 redelivered=0 per_second=")
    assert "held=2 no_answer_from=eu" in second


def test_the_log_record_carries_the_same_as_data(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), Progress(lambda: SOME, stream=io.StringIO(), every=EVERY):
        until(lambda: lines(caplog), "a line")
    [record] = [record for record in caplog.records if record.name == "exactly_once.progress"]
    data = record.__dict__["exactly_once"]
    assert (data["processed"], data["in_hand"]) == (4, 2)


def test_the_last_state_is_logged_at_stop(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), Progress(lambda: SOME, stream=io.StringIO(), every=timedelta(seconds=60)):
        assert lines(caplog) == []
    assert len(lines(caplog)) == 1


def test_a_terminal_gets_a_live_line_and_the_log_none(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    terminal = Terminal()
    with caplog.at_level(logging.INFO), Progress(lambda: replace(SOME, held=1, outages=("eu",)), stream=terminal):
        until(lambda: "no answer from eu" in terminal.getvalue(), "it is drawn")
        sleep(0)
    assert "1 duplicates" in terminal.getvalue()
    assert lines(caplog) == []


@pytest.mark.parametrize("name", ["NO_COLOR", "CI"])
def test_nobody_watches_where_no_color_or_ci_is_set(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in ("NO_COLOR", "CI"):
        monkeypatch.delenv(each, raising=False)
    assert is_terminal(Terminal())
    monkeypatch.setenv(name, "1")
    assert not is_terminal(Terminal())
    assert not is_terminal(io.StringIO())
