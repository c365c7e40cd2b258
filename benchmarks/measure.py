"""Rounds, turns and ratios. Measures nothing by itself; the measurements are made of these."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final

__all__ = ["Figure", "Span", "WrongRows", "ratios", "take_turns"]

US: Final = 1e6


class WrongRows(Exception):
    """A measurement lost or doubled a message: there is no number to give."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One ratio, measured in several rounds."""

    name: str
    what: str
    """What is divided by what."""
    rounds: Sequence[float] = ()
    """The ratio of each round."""
    target: float | None = None
    least: bool = False
    """The target is the least the ratio may be; else the most."""
    measured: Mapping[str, str] = field(default_factory=dict)
    """The medians behind it, with units: information."""
    note: str = ""
    skipped: str = ""
    """Why it was not measured."""

    @property
    def ratio(self) -> float:
        """The median over the rounds."""
        return median(self.rounds)

    @property
    def reached(self) -> bool | None:
        """Whether the target is reached; None where there is none, or no measurement."""
        if self.target is None or not self.rounds:
            return None
        return self.ratio >= self.target if self.least else self.ratio <= self.target

    def as_json(self) -> dict[str, Any]:
        """Return everything in it, for a file."""
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
    """So many messages handled from here to there."""

    handled: int
    began: float
    """By `perf_counter`, which all processes of a machine share."""
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
    """Let each competitor do `each` units of work, one after the other in an order drawn anew, `rounds` times.

    Args:
        competitors: By name; each is told how many units to do and returns how long they took, or how much.
        rounds: How many rounds count.
        each: Units in one turn.
        warm_up: One round more comes before them and does not count: it warms caches, plans and connections.

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
