"""Which combinations of its parameters a test runs with, where all of them would take too long.

A test marked `nightly(meet=2)` runs by day with so many of them that each two values of different parameters meet: each
input on each dialect, in each colour, in each way; with `meet=3` each three do. At full length it runs with all. The choice is
the same each time. What is left out is not collected; and a combination that is named alone, by its id or with -k, runs.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

__all__ = ["chosen"]


def chosen(given: Sequence[Mapping[str, object]], meet: int) -> list[int]:
    """Choose of these combinations, by their places, as few as let each `meet` values meet that do so in any of them.

    Args:
        given: Of each combination, its values by the names of their parameters. A tuple is several values.
        meet: How many; or all there are, of a test with fewer parameters.
    """
    left = {place: set(_meetings(one, meet)) for place, one in enumerate(given)}
    places: list[int] = []
    while left:
        best = max(left, key=lambda place: len(left[place]))  # of several, the first
        met = left.pop(best)
        if met:
            places.append(best)
        left = {place: more for place, each in left.items() if (more := each - met)}
    return sorted(places)


def _meetings(one: Mapping[str, object], meet: int) -> Iterator[tuple[object, ...]]:
    values = list(_values(one))
    # where a test has fewer parameters than are to meet, each value of them is one
    return combinations(values, min(meet, len(values)))


def _values(one: Mapping[str, object]) -> Iterator[tuple[str, int, object]]:
    for name, value in sorted(one.items()):
        for at, part in enumerate(value if isinstance(value, tuple) else (value,)):
            yield name, at, part if part.__hash__ else id(part)
