"""The same on MariaDB: the cost for a single message in a transaction of its own, and in a batch.

There the claim needs a savepoint, and a second statement at the end. Skipped if no MariaDB can be started.
"""

from collections.abc import Iterator
from statistics import median
from typing import Final

from sqlalchemy import create_engine, make_url

from benchmarks.crew import crews
from benchmarks.measure import US, Figure, ratios, take_turns
from benchmarks.shop import Bare, Ours, make_tables, require
from benchmarks.stage import Database, Stage
from tests.services import mariadb

__all__ = ["measure"]

SKUS: Final = 20_000
GROUPS, ALONE = "groups", "handlers alone"


def measure(stage: Stage, *, quick: bool) -> Iterator[Figure]:
    """Measure both."""
    if (reason := mariadb.missing()) is not None:
        yield Figure(name="MariaDB", what="ours / no deduplication", skipped=reason)
        return
    with mariadb.MariaDB() as server:
        root = create_engine(server.url, isolation_level="AUTOCOMMIT")
        with root.connect() as connection:
            connection.exec_driver_sql("CREATE DATABASE benchmark DEFAULT CHARACTER SET utf8mb4")
        root.dispose()
        url = make_url(server.url).set(database="benchmark").render_as_string(hide_password=False)
        engine = create_engine(url)
        make_tables(engine, skus=SKUS)
        rounds, each = (10, 40) if quick else (200, 20)
        ours, bare = Ours(url), Bare(create_engine(url))
        times = take_turns({"ours": ours.first, "bare": bare.first}, rounds=rounds, each=each)
        handled = 2 * (rounds + 1) * each
        require(engine, handled)
        yield Figure(
            name="MariaDB, one message: price of being sure",
            what="ours / no deduplication",
            rounds=ratios(times["ours"], times["bare"]),
            measured={name: f"{median(times[name]) / each * US:,.0f} us" for name in times},
            note="information",
        )
        with crews(stage, Database(url, engine), GROUPS, ALONE, skus=SKUS) as at_work:
            rounds, each = (1, 2000) if quick else (5, 5000)
            rates = take_turns({name: at_work[name].rate for name in (GROUPS, ALONE)}, rounds=rounds, each=each)
            require(engine, handled + sum(crew.handled for crew in at_work.values()))
        yield Figure(
            name="MariaDB, groups: price of being sure",
            what="no deduplication / ours, throughput",
            rounds=ratios(rates[ALONE], rates[GROUPS]),
            measured={name: f"{median(rates[name]):,.0f}/s" for name in rates},
            note="information",
        )
        engine.dispose()
