"""How the tests are told apart and summed up: what only `make nightly` runs, and the summary over all tiers."""

import os
import subprocess
import sys
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tests.meeting import chosen

ROOT = Path(__file__).parents[3]

TESTS = """
import pytest

def test_usual(figure): figure("7 messages")

@pytest.mark.nightly
def test_short_or_long(): pass

@pytest.mark.nightly(only=True)
def test_long(): pass

@pytest.mark.parametrize("kills", [1, pytest.param(100, marks=pytest.mark.nightly(only=True))])
def test_matrix(kills): assert kills == 1, "one too many"
"""


def run(*arguments: object, whole: str = "") -> tuple[int, str]:
    environment = os.environ | {"EXACTLY_ONCE_TEST_FULL": whole, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout


def marked(folder: Path) -> tuple[object, ...]:
    file = folder / "test_marked.py"
    file.write_text(TESTS)
    return "-p", "tests.conftest", file


def test_what_is_only_for_the_night_is_left_out_by_day(tmp_path: Path) -> None:
    chosen = marked(tmp_path)
    code, told = run(*chosen)
    assert code == 0, told
    assert "3 passed, 2 deselected" in told
    code, told = run(*chosen, "-m", "nightly", whole="1")
    assert code == 1, told
    assert "1 failed, 2 passed, 2 deselected" in told


def test_the_summary_over_all_tiers_says_failures_and_figures_again(tmp_path: Path) -> None:
    results = tmp_path / "some.xml"
    run(*marked(tmp_path), f"--junit-xml={results}", whole="1")
    code, told = run("-p", "tests.tally", results)
    assert code == 1
    assert "one too many" in told
    assert "some: 5 results" in told
    assert "7 messages" in told
    assert "1 failed, 4 passed" in told.splitlines()[-1]


def test_a_tier_in_which_nothing_was_chosen_is_no_failure_of_the_summary(tmp_path: Path) -> None:
    none, some = tmp_path / "none.xml", tmp_path / "some.xml"
    run(*marked(tmp_path), f"--junit-xml={none}", "-k", "no_such_test")
    run(*marked(tmp_path), f"--junit-xml={some}")
    code, told = run("-p", "tests.tally", none, some)
    assert code == 0, told
    assert "none: 0 results" in told


CROSSED = """
import pytest

@pytest.fixture(params=[(dialect, colour) for dialect in "pms" for colour in ("sync", "async")], ids="-".join)
def shop(request): return request.param

@pytest.mark.nightly(meet=2)
@pytest.mark.where(lambda shop, given, **_: given != 3 or shop[0] == "s")
@pytest.mark.parametrize("way", ["alone", "together", "leased"])
@pytest.mark.parametrize("given", [1, 2, 3, 4])
def test_crossed(shop, way, given): assert given != 3 or shop[0] == "s"
"""


def test_by_day_each_two_values_of_a_large_matrix_meet_and_at_night_all_that_means_something_runs(
    tmp_path: Path,
) -> None:
    file = tmp_path / "test_crossed.py"
    file.write_text(CROSSED)
    day, told = run("-p", "tests.conftest", file)
    assert day == 0, told
    assert "12 passed, 60 deselected" in told
    night, told = run("-p", "tests.conftest", file, "-m", "nightly", whole="1")
    assert night == 0, told
    assert "60 passed, 12 deselected" in told
    named, told = run("-p", "tests.conftest", f"{file}::test_crossed[m-async-4-leased]")
    assert named == 0, told
    assert "1 passed" in told


@pytest.mark.parametrize("meet", [2, 3])
def test_the_chosen_let_all_meet_that_can_and_are_few_and_the_same_each_time(meet: int) -> None:
    unhashable = [[then] for then in range(4)]
    given: list[dict[str, Any]] = [
        {"ground": (dialect, colour), "way": way, "how": how, "then": then}
        for dialect in "pms"
        for colour in ("sync", "async")
        for way in range(5)
        for how in range(5)
        for then in unhashable
        if not (dialect == "m" and how == 1)
    ]

    def met(places: Iterable[int]) -> set[tuple[object, ...]]:
        values = ((*one["ground"], one["way"], one["how"], *one["then"]) for one in map(given.__getitem__, places))
        return {each for one in values for each in combinations(enumerate(one), meet)}

    places = chosen(given, meet)
    assert met(places) == met(range(len(given)))
    assert len(places) < len(given) / (12 if meet == 2 else 4)
    assert places == chosen(given, meet)


@pytest.mark.parametrize("meet", [2, 3])
def test_a_test_with_fewer_parameters_than_are_to_meet_runs_with_each_value(meet: int) -> None:
    """It met with nothing, and was not collected at all."""
    assert chosen([{"colour": "sync"}, {"colour": "async"}], meet) == [0, 1]
    assert chosen([{}], meet) == [0]
