"""A pytest plugin that says again what earlier runs of pytest found, from their JUnit files: one summary over all tiers.

It runs no test. Before the summary it says how long each run took, what took longest in it, and what tests measured (the
fixture `figure`). `make test` ends with it: pytest -p tests.tally build/junit/*.xml
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

LONGEST = 3  # results of each run that are named with their seconds
_tiers = pytest.StashKey[list["Tier"]]()


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Take the files that end in .xml."""
    return Tier.from_parent(parent, path=file_path) if file_path.suffix == ".xml" else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what the earlier runs took and measured."""
    tiers = terminalreporter.config.stash.get(_tiers, [])
    terminalreporter.section("seconds")
    for tier in tiers:
        terminalreporter.write_line(f"{tier.took_s:7.0f}  {tier.path.stem}: {tier.longest()}")
    figures = [told for tier in tiers for told in tier.figures()]
    if figures:
        terminalreporter.section("figures")
        for told in figures:
            terminalreporter.write_line(told)


class Tier(pytest.File):
    """One earlier run."""

    def collect(self) -> Iterator[pytest.Item]:
        """Give its results, one by one."""
        root = ElementTree.parse(self.path).getroot()
        self.cases = list(root.iter("testcase"))
        # a run says how long it took; sections, which are no run, have only their own times
        took_s = [float(suite.get("time") or 0) for suite in root.iter("testsuite")]
        self.took_s = sum(took_s) or sum(map(_seconds, self.cases))
        self.config.stash.setdefault(_tiers, []).append(self)
        for case in self.cases:
            yield Result.from_parent(self, name=_name(case), case=case)

    def longest(self) -> str:
        """Name what took longest in it, with the seconds."""
        cases = sorted(self.cases, key=_seconds, reverse=True)[:LONGEST]
        named = (f"{_name(each).rpartition('::')[2]} {_seconds(each):.0f}" for each in cases)
        return f"{len(self.cases)} results" + "".join(f"\n{'':9}{each}" for each in named)

    def figures(self) -> Iterator[str]:
        """Give what its tests measured, each with the test's name."""
        for case in self.cases:
            for told in case.iterfind("properties/property[@name='figure']"):
                lines = (told.get("value") or "").splitlines()
                yield f"{_name(case)}, {_seconds(case):.0f} s" + "".join(f"\n    {line}" for line in lines)


class Result(pytest.Item):
    """One result of an earlier run."""

    def __init__(self, *, case: ElementTree.Element, **rest: Any) -> None:
        super().__init__(**rest)
        self.case = case

    def runtest(self) -> None:
        """Have the same outcome again."""
        for trouble in (*self.case.iter("failure"), *self.case.iter("error")):
            raise Again(trouble.text or trouble.get("message") or "")
        for skip in self.case.iter("skipped"):
            reason = skip.get("message", "")
            if skip.get("type") == "pytest.xfail":
                pytest.xfail(reason)
            pytest.skip(reason)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> str:
        """Show what the earlier run showed, and no traceback of ours."""
        return str(excinfo.value) if isinstance(excinfo.value, Again) else str(super().repr_failure(excinfo))

    def reportinfo(self) -> tuple[Path, None, str]:
        """Name the earlier run."""
        return self.path, None, f"{self.path.stem}: {self.name}"


class Again(Exception):
    """It failed then, so it fails now."""


def _name(case: ElementTree.Element) -> str:
    return f"{case.get('classname', '')}::{case.get('name', '')}".removeprefix("::")


def _seconds(case: ElementTree.Element) -> float:
    return float(case.get("time") or 0)
