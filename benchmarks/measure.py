"""Rounds, turns and ratios, of which the measurements are made. Measures nothing by itself."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final

__all__ = ["Figure", "Span", "WrongRows", "ratios", "take_turns"]

US: Final = 1e6


class WrongRows(Exception):
    """A message was lost or doubled in a measurement, so there is no number to report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One ratio, measured in several rounds."""

    name: str
    what: str
    """The two quantities of the ratio, in words."""
    rounds: Sequence[float] = ()
    """The ratio of each round."""
    target: float | None = None
    least: bool = False
    """True: the target is the smallest allowed ratio. False: the largest."""
    measured: Mapping[str, str] = field(default_factory=dict)
    """The medians behind the ratio, with units: information only."""
    note: str = ""
    skipped: str = ""
    """Why it was not measured."""

    @property
    def ratio(self) -> float:
        """The median over the rounds."""
        return median(self.rounds)

    @property
    def reached(self) -> bool | None:
        """Whether the target is reached. None: there is no target, or no measurement."""
        if self.target is None or not self.rounds:
            return None
        return self.ratio >= self.target if self.least else self.ratio <= self.target

    def as_json(self) -> dict[str, Any]:
        """Return all its values, for a file."""
        told: dict[str, Any] = {"name": self.name, "what": self.what}
        if self.rounds:
            told |= {
                "median": self.ratio,
                "min": min(self.rounds),
                "max": max(self.rounds),
                "rounds": list(self.rounds),
            }
        told |= {"target": self.target, "target_is": "at least" if self.least else "at most", "reached": self.reached}
        return told | {"measured": dict(self.measured), "note": self.note, "skipped": self.skipped}


@dataclass(frozen=True, slots=True)
class Span:
    """How many messages were handled between two times."""

    handled: int
    began: float
    """By `perf_counter`, which is the same in all processes of a machine."""
    ended: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended - self.began

    @property
    def rate(self) -> float:
        """Messages a second."""
        return self.handled / self.seconds


def take_turns(
    competitors: Mapping[str, Callable[[int], float]],
    *,
    rounds: int,
    each: int,
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Let each competitor do `each` units of work, one after the other in a new random order, `rounds` times.

    Args:
        competitors: By name. Each is called with the number of units, and returns its measurement (a time or a rate).
        rounds: How many rounds count.
        each: The units in one turn.
        warm_up: Run one more round first, which does not count: it warms caches, plans and connections.

    Returns:
        For each competitor what it returned in each round.
    """
    dice = random.Random(5)
    found: dict[str, list[float]] = {name: [] for name in competitors}
    for turn in range(0 if warm_up else 1, rounds + 1):
        names = list(competitors)
        dice.shuffle(names)
        for name in names:
            value = competitors[name](each)
            if turn:
                found[name].append(value)
    return found


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Return the ratio of each round."""
    return [a / b for a, b in zip(above, below, strict=True)]
