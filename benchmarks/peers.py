"""Against DBOS, for the same task: effects of a handler once for each message, in the transaction of the handler.

`dbos_workflow` says what of DBOS is used, and how. Equal ways are compared: one message after the other on both sides, or eight
at once on both. A set is compared with the better of DBOS's two ways.
"""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from statistics import median
from typing import Final

from benchmarks.crew import crews
from benchmarks.measure import Figure, ratios, take_turns
from benchmarks.shop import require
from benchmarks.stage import Stage

__all__ = ["measure"]

SINGLE: Final = 6.0
IN_SETS: Final = 200.0
DBOS, DBOS_AHEAD = "DBOS", "DBOS, 8 in the background"
OURS, OURS_AT_ONCE, SETS = "ours", "ours, in 8 threads", "in sets"
PAIRS: Final = {"one after the other": (OURS, DBOS), "8 at once": (OURS_AT_ONCE, DBOS_AHEAD)}
SKUS: Final = 20_000  # so that messages at the same time do not wait for each other's stock rows
TIMES: Final = {OURS: 4, OURS_AT_ONCE: 4, SETS: 100}
"""Messages for each message of DBOS: otherwise our turns would last only a few milliseconds."""


def measure(stage: Stage, *, quick: bool) -> Iterator[Figure]:
    """Measure single messages and sets."""
    what = {pair: f"ours / DBOS, {pair}, throughput" for pair in PAIRS}
    what_in_sets = "ours, in sets of 500 / DBOS, throughput"
    if find_spec("dbos") is None:
        reason = "DBOS is not installed: pip install '.[bench]'"
        for told, target in [*((told, SINGLE) for told in what.values()), (what_in_sets, IN_SETS)]:
            yield Figure(name="peers", what=told, target=target, least=True, skipped=reason)
        return
    names = (OURS, OURS_AT_ONCE, DBOS, DBOS_AHEAD, SETS)
    with stage.database(skus=SKUS) as database, crews(stage, database, *names, skus=SKUS) as at_work:

        def turn(name: str) -> Callable[[int], float]:
            return lambda each: at_work[name].rate(each * TIMES.get(name, 1))

        rounds, each = (2, 30) if quick else (5, 200)
        rates = take_turns({name: turn(name) for name in names}, rounds=rounds, each=each)
        require(database.engine, sum(crew.handled for crew in at_work.values()))
    shown = {name: f"{median(rates[name]):,.0f}/s" for name in names}
    for pair, (ours, theirs) in PAIRS.items():
        yield Figure(
            name="peers",
            what=what[pair],
            rounds=ratios(rates[ours], rates[theirs]),
            target=SINGLE,
            least=True,
            measured={name: shown[name] for name in (ours, theirs)},
        )
    best = [max(both) for both in zip(rates[DBOS], rates[DBOS_AHEAD], strict=True)]
    yield Figure(
        name="peers",
        what=what_in_sets,
        rounds=ratios(rates[SETS], best),
        target=IN_SETS,
        least=True,
        measured={SETS: shown[SETS]},
        note="against the better of DBOS's two",
    )
