"""A pytest plugin that says again what earlier runs of pytest found, from their JUnit files: one summary over all tiers.

It runs no test. `make test` ends with it: pytest -p tests.tally build/junit/*.xml
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Take the files that end in .xml."""
    return Tier.from_parent(parent, path=file_path) if file_path.suffix == ".xml" else None


class Tier(pytest.File):
    """One earlier run."""

    def collect(self) -> Iterator[pytest.Item]:
        """Give its results, one by one."""
        for case in ElementTree.parse(self.path).getroot().iter("testcase"):
            name = f"{case.get('classname', '')}::{case.get('name', '')}".removeprefix("::")
            yield Result.from_parent(self, name=name, case=case)


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
