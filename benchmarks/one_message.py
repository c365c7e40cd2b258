"""One message in a transaction: a first delivery and a duplicate, against hand-written SQLAlchemy."""

from collections.abc import Iterator
from datetime import timedelta
from statistics import median
from typing import Final

from sqlalchemy import create_engine

from benchmarks.measure import US, Figure, ratios, take_turns
from benchmarks.shop import Bare, Floor, HandWritten, Ours, clear, require
from benchmarks.stage import Database, Stage
from tests.services.proxy import Proxy, far_away

__all__ = ["measure"]

DELAY: Final = timedelta(milliseconds=0.5)
FIRST: Final = 0.70
FIRST_AWAY: Final = 0.80
DUPLICATE: Final = 0.5
DUPLICATE_BY_HAND: Final = 0.60


def measure(stage: Stage, *, quick: bool) -> Iterator[Figure]:
    """Measure both, with the server near and through a slower network."""
    # short turns, so that other work of the machine slows both alike
    rounds, each = (10, 40) if quick else (200, 20)
    with stage.database() as database:
        trips = _round_trips(database)
        yield from _measured(database, database.url, rounds, each, "one message", "on this machine", trips, FIRST)
    rounds, each = (6, 20) if quick else (60, 20)
    with stage.database() as database, far_away(database.url, DELAY, stage.folder) as url:
        where = "0.5 ms added each way"
        yield from _measured(database, url, rounds, each, "one message, 0.5 ms away", where, trips, FIRST_AWAY)


def _measured(
    database: Database,
    url: str,
    rounds: int,
    each: int,
    name: str,
    where: str,
    trips: dict[str, int],
    target: float,
) -> Iterator[Figure]:
    engine = create_engine(url)
    ours, by_hand, bare, floor = Ours(url), HandWritten(engine), Bare(engine), Floor(engine)
    times = take_turns(
        {
            "ours": ours.first,
            "by hand": by_hand.first,
            "no deduplication": bare.first,
            "the claim alone": floor.first,
        },
        rounds=rounds,
        each=each,
    )
    require(database.engine, 4 * (rounds + 1) * each)
    engine.dispose()

    def shown(*names: str) -> dict[str, str]:
        found = {name: f"{median(times[name]) / each * US:,.0f} us" for name in names}
        return {name: f"{value}, {trips[name]} round trips" for name, value in found.items()}

    yield Figure(
        name=name,
        what="ours / by hand",
        rounds=ratios(times["ours"], times["by hand"]),
        target=target,
        measured=shown("ours", "by hand"),
        note=where,
    )
    yield Figure(
        name=f"{name}: price of being sure",
        what="ours / no deduplication",
        rounds=ratios(times["ours"], times["no deduplication"]),
        measured=shown("no deduplication"),
        note="information",
    )
    yield Figure(
        name=f"{name}: of it, the server's share",
        what="claim and COMMIT alone / no deduplication",
        rounds=ratios(times["the claim alone"], times["no deduplication"]),
        measured=shown("the claim alone"),
        note="information",
    )
    yield from _duplicates(database, url, rounds, each, name)


def _duplicates(database: Database, url: str, rounds: int, each: int, name: str) -> Iterator[Figure]:
    clear(database.engine)
    engine = create_engine(url)
    ours, by_hand = Ours(url), HandWritten(engine)
    first: list[float] = []
    again: list[float] = []
    by_hand_again: list[float] = []
    for turn in range(rounds + 1):
        took = ours.first(each), ours.again(each)
        by_hand.first(each)
        took_by_hand = by_hand.again(each)
        if turn:
            first.append(took[0])
            again.append(took[1])
            by_hand_again.append(took_by_hand)
    require(database.engine, 2 * (rounds + 1) * each)
    engine.dispose()
    shown = {
        what: f"{median(values) / each * US:,.0f} us"
        for what, values in (("first", first), ("duplicate", again), ("duplicate by hand", by_hand_again))
    }
    name = name.replace("one message", "duplicate")
    yield Figure(
        name=name, what="ours, duplicate / first", rounds=ratios(again, first), target=DUPLICATE, measured=shown
    )
    yield Figure(
        name=f"{name}: against by hand",
        what="ours / by hand",
        rounds=ratios(again, by_hand_again),
        target=DUPLICATE_BY_HAND,
    )


def _round_trips(database: Database) -> dict[str, int]:
    """Count the round trips of each way for one message: what costs time on any network."""
    found = {}
    with Proxy(database.url) as proxy:
        engine = create_engine(proxy.url)
        for name, runner in (
            ("ours", Ours(proxy.url)),
            ("by hand", HandWritten(engine)),
            ("no deduplication", Bare(engine)),
            ("the claim alone", Floor(engine)),
        ):
            runner.first(20)  # connected, prepared
            before = proxy.round_trips
            runner.first(10)
            found[name] = round((proxy.round_trips - before) / 10)
        engine.dispose()
    clear(database.engine)
    return found
