"""Two processes against one: what a second core brings, for single messages and for batches.

The database needs a core, too. On a machine with two cores, two busy workers and the server share them.
"""

import os
from collections.abc import Callable, Iterator
from statistics import median
from typing import Final

from benchmarks import contenders
from benchmarks.crew import crews
from benchmarks.measure import Figure, ratios, take_turns
from benchmarks.shop import require
from benchmarks.stage import Stage

__all__ = ["measure"]

TARGET: Final = 1.5
SKUS: Final = 20_000
WHAT: Final = {"ours": "single messages", "sorted groups": f"batch={contenders.GROUP}"}
TIMES: Final = {"sorted groups": 4}


def measure(stage: Stage, *, quick: bool) -> Iterator[Figure]:
    """Measure both."""
    with stage.database(skus=SKUS) as database, crews(stage, database, *WHAT, size=2, skus=SKUS) as at_work:

        def turn(name: str, workers: int) -> Callable[[int], float]:
            return lambda each: at_work[name].rate(each * TIMES.get(name, 1) * workers, workers=workers)

        turns = {f"{name}, {workers}": turn(name, workers) for name in WHAT for workers in (1, 2)}
        rounds, each = (2, 100) if quick else (7, 500)
        rates = take_turns(turns, rounds=rounds, each=each)
        require(database.engine, sum(crew.handled for crew in at_work.values()))
    for name, what in WHAT.items():
        one, two = rates[f"{name}, 1"], rates[f"{name}, 2"]
        yield Figure(
            name="processes",
            what=f"2 processes / 1, throughput; {what}",
            rounds=ratios(two, one),
            target=TARGET,
            least=True,
            measured={"1": f"{median(one):,.0f}/s", "2": f"{median(two):,.0f}/s"},
            note=f"{os.cpu_count()} cores, the database on them too",
        )
