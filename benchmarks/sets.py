"""A handler that takes 500 messages at once and uses set-based SQL: how near it comes to what is possible.

It is an `@eo.batch_handler` with one INSERT and one UPDATE, run by the worker over a broker in memory. It is compared with
hand-written deduplication one by one, and with the limit: the same statements by psycopg alone, from a plain list (`raw`).
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

BY_HAND_TARGET: Final = 40.0
LIMIT_TARGET: Final = 0.80
SKUS: Final = 20_000
SETS, BY_HAND, LIMIT = "in sets", "by hand", "raw, in sets"
OTHERS: Final = ("raw", "raw, pipelined", "raw, grouped")
TIMES: Final = {SETS: 50, LIMIT: 50, "raw, grouped": 5}
"""Messages for each hand-written message, so that turns have about the same length."""


def measure(stage: Stage, *, quick: bool) -> Iterator[Figure]:
    """Measure it."""
    names = (SETS, BY_HAND, LIMIT, *OTHERS)
    with stage.database(skus=SKUS) as database, crews(stage, database, *names, skus=SKUS) as at_work:

        def turn(name: str) -> Callable[[int], float]:
            return lambda each: at_work[name].rate(each * TIMES.get(name, 1))

        rounds, each = (2, 60) if quick else (7, 500)
        rates = take_turns({name: turn(name) for name in names}, rounds=rounds, each=each)
        require(database.engine, sum(crew.handled for crew in at_work.values()))
    shown = {name: f"{median(rates[name]):,.0f}/s" for name in names}
    for below, target in ((BY_HAND, BY_HAND_TARGET), (LIMIT, LIMIT_TARGET)):
        yield Figure(
            name="sets",
            what=f"ours, batch={contenders.SET} / {below}, throughput",
            rounds=ratios(rates[SETS], rates[below]),
            target=target,
            least=True,
            measured={name: shown[name] for name in (SETS, below)},
        )
    for name in (*OTHERS, LIMIT):
        yield Figure(
            name="psycopg alone",
            what=f"{name} / by hand, throughput",
            rounds=ratios(rates[name], rates[BY_HAND]),
            measured={each: shown[each] for each in (name, BY_HAND)},
            note="information",
        )
