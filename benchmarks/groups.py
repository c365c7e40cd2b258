"""Throughput of batches: up to a hundred messages in one commit, each a call of its own, against hand-written code one by one.

On a cold table each message uses another stock row, on a hot table one of 200. There a batch locks many of the rows until it
commits: several workers wait for one another, and without `batch_order` they deadlock. Each worker is a process of its own, also
for the hand-written code. All are fed from memory, so that no broker is measured. The handler's ORM insert is flushed before each
update: that, and not the commit, is the cost of a message in a batch.
"""

from collections.abc import Callable, Iterator
from statistics import median
from typing import Final

from benchmarks import contenders
from benchmarks.crew import crews
from benchmarks.measure import Figure, ratios, take_turns
from benchmarks.shop import require
from benchmarks.stage import Stage

__all__ = ["measure"]

COLD, HOT = 20_000, 200
COLD_TARGET: Final = 3.0
HOT_TARGET: Final = 2.0
NEVER_BELOW: Final = 1.0
BY_HAND: Final = "by hand"
ALONE: Final = "handlers alone"
HOT_GROUPS: Final = ("groups", "sorted groups")
TIMES: Final = {BY_HAND: 1}
USUAL: Final = 10
"""Messages in batches for each hand-written message, so that turns have about the same length."""


def measure(stage: Stage, *, quick: bool) -> Iterator[Figure]:
    """Measure the cold table with one worker, and the hot one with one, two and four."""
    rates = _rates(stage, COLD, ("groups", ALONE), (1,), *((1, 200) if quick else (5, 1000)))
    yield _figure("groups, cold", "groups", 1, rates, COLD_TARGET)
    yield Figure(
        name="groups, cold: what the handler leaves",
        what="the calls alone, 100 in a commit, no deduplication / by hand, throughput",
        rounds=ratios(rates[ALONE, 1], rates[BY_HAND, 1]),
        measured={"alone": f"{median(rates[ALONE, 1]):,.0f}/s"},
        note="information",
    )
    sizes = (1, 2) if quick else (1, 2, 4)
    rates = _rates(stage, HOT, HOT_GROUPS, sizes, *((1, 200) if quick else (3, 400)))
    hot = {
        (name, workers): _figure("groups, hot", name, workers, rates, NEVER_BELOW)
        for name in HOT_GROUPS
        for workers in sizes
    }
    best = max(hot, key=lambda setting: hot[setting].ratio)
    name, workers = best
    yield _figure("groups, hot: best setting", name, workers, rates, HOT_TARGET)
    yield from hot.values()


Rates = dict[tuple[str, int], list[float]]


def _rates(stage: Stage, skus: int, grouped: tuple[str, ...], sizes: tuple[int, ...], rounds: int, each: int) -> Rates:
    """Let each contender take its turns with each number of workers."""
    names = (BY_HAND, *grouped)
    with (
        stage.database(skus=skus) as database,
        crews(stage, database, *names, size=max(sizes), skus=skus) as at_work,
    ):

        def turn(name: str, workers: int) -> Callable[[int], float]:
            return lambda each: at_work[name].rate(each * TIMES.get(name, USUAL), workers=workers)

        settings = {f"{name}, {workers}": (name, workers) for name in names for workers in sizes}
        found = take_turns({shown: turn(*setting) for shown, setting in settings.items()}, rounds=rounds, each=each)
        require(database.engine, sum(crew.handled for crew in at_work.values()))
    return {setting: found[shown] for shown, setting in settings.items()}


def _figure(title: str, name: str, workers: int, rates: Rates, target: float) -> Figure:
    ours, by_hand = rates[name, workers], rates[BY_HAND, workers]
    how = "batch_order" if name.startswith("sorted") else "no batch_order"
    return Figure(
        name=title,
        what=f"ours / by hand, throughput; {workers} worker{'s' if workers > 1 else ''}, {how}",
        rounds=ratios(ours, by_hand),
        target=target,
        least=True,
        measured={"ours": f"{median(ours):,.0f}/s", "by hand": f"{median(by_hand):,.0f}/s"},
        note=f"batch={contenders.GROUP}",
    )
