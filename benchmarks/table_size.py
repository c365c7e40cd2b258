"""Does a claim slow down as the table grows, and while its oldest rows are deleted?

Measures throughput with ten million retained rows against ten thousand, and while another connection deletes the oldest of the
ten million in small batches, as pruning does. The keys of retained rows and of new messages are scattered: in an index with keys
in order, a claim would touch only the last page. Before the turns the large table is analysed, vacuumed and written to the disk:
that work is not part of a claim.

    python -m benchmarks --only table_size --rows 100000000      # by hand: 30 GB, and half an hour to fill
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from statistics import median
from threading import Event, Thread
from time import perf_counter
from typing import Final

from sqlalchemy import text

from benchmarks.contenders import BY_NAME, Contender
from benchmarks.measure import Figure, WrongRows, ratios, take_turns
from benchmarks.orders import messages
from benchmarks.shop import require
from benchmarks.stage import Database, Stage

__all__ = ["measure"]

TARGET: Final = 0.90
FEW: Final = 10_000
MANY, MANY_QUICKLY = 10_000_000, 200_000
SKUS: Final = 20_000
BATCH: Final = 1_000
ROWS_A_SECOND: Final = 20
WINDOW: Final = timedelta(seconds=BATCH / ROWS_A_SECOND)
PAUSE_S: Final = 0.05
_OLDEST: Final = text("SELECT min(created_at) FROM message_idempotent")
_PRUNE: Final = text("DELETE FROM message_idempotent WHERE created_at >= :from AND created_at < :to AND status = 1")
KEY: Final = "ALTER TABLE message_idempotent ADD CONSTRAINT {name} PRIMARY KEY (consumer_group, handler, business_key)"
FILL: Final = (
    "INSERT INTO message_idempotent (consumer_group, handler, business_key, status, message_id, fingerprint, retry_times,"
    " owner, created_at, consumed_at) SELECT 'benchmark', 'reserve_stock', substr(md5(n::text), 1, 24), 1, md5(n::text),"
    " decode(md5(n::text), 'hex'), 0, 'filled', moment, moment FROM generate_series(1, {rows}) AS filled (n),"
    " LATERAL (SELECT now() - make_interval(secs => ({rows} - n) / {rows_a_second}.0) AS moment) AS at"
)


def measure(stage: Stage, *, quick: bool) -> Iterator[Figure]:
    """Fill two tables. Measure single messages on both in turn, and on the larger table while it is pruned."""
    rows = stage.rows or (MANY_QUICKLY if quick else MANY)
    rounds, each = (4, 50) if quick else (60, 100)
    with stage.database(skus=SKUS) as large, stage.database(skus=SKUS) as small:
        for database, how_many in ((large, rows), (small, FEW)):
            _fill(database, how_many)
        pruner = Pruner(large)
        at_work = BY_NAME["ours"](large.url)
        turns = {"many": _turn(at_work), "few": _turn(BY_NAME["ours"](small.url)), "pruned": _pruned(at_work, pruner)}
        rates = take_turns(turns, rounds=rounds, each=each)
        handled = (rounds + 1) * each
        require(large.engine, 2 * handled)
        require(small.engine, handled)
        _require_claims(large, rows + 2 * handled - pruner.deleted)
        _require_claims(small, FEW + handled)
    per_second = {name: f"{median(found):,.0f}/s" for name, found in rates.items()}
    yield Figure(
        name="table size",
        what=f"throughput with {rows:,} retained rows / with {FEW:,}",
        rounds=ratios(rates["many"], rates["few"]),
        target=TARGET,
        least=True,
        measured={f"{rows:,} rows": per_second["many"], f"{FEW:,} rows": per_second["few"]},
        note="single messages",
    )
    yield Figure(
        name="table size, pruning",
        what=f"throughput while the oldest of {rows:,} rows are deleted / without",
        rounds=ratios(rates["pruned"], rates["many"]),
        measured={"pruned": per_second["pruned"], "not": per_second["many"]},
        note=f"{pruner.deleted:,} rows deleted, {BATCH:,} a transaction, {pruner.deleted / pruner.seconds:,.0f} a second",
    )


class Pruner:
    """Deletes the oldest rows of a database during `at_work`, on a connection of its own."""

    def __init__(self, database: Database) -> None:
        self._engine = database.engine
        with database.engine.connect() as connection:
            self._reached: datetime = connection.execute(_OLDEST).scalar_one()
        self.deleted = 0
        self.seconds = 0.0
        """The time spent at work, pauses included."""

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Delete until the block ends."""
        done, began = Event(), perf_counter()
        thread = Thread(target=self._until, args=(done,), name="pruner")
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.seconds += perf_counter() - began

    def _until(self, done: Event) -> None:
        with self._engine.connect() as connection:
            while True:
                with connection.begin():
                    to = self._reached + WINDOW
                    # a window of time, not "the oldest 1,000": a BRIN index finds a window. To find the oldest rows, it would
                    # read all rows that are deleted and not yet vacuumed
                    self.deleted += connection.execute(_PRUNE, {"from": self._reached, "to": to}).rowcount
                    self._reached = to
                if done.wait(PAUSE_S):
                    return


def _turn(contender: Contender) -> Callable[[int], float]:
    def turn(each: int) -> float:
        contender.take(messages(each, skus=SKUS, scattered=True), each)
        return contender.run().rate

    return turn


def _pruned(contender: Contender, pruner: Pruner) -> Callable[[int], float]:
    turn = _turn(contender)

    def while_pruned(each: int) -> float:
        with pruner.at_work():
            return turn(each)

    return while_pruned


def _fill(database: Database, rows: int) -> None:
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        name = connection.exec_driver_sql(
            "SELECT conname FROM pg_constraint WHERE conrelid = 'message_idempotent'::regclass AND contype = 'p'"
        ).scalar_one()
        # build the index at the end, sorted: row by row, ten million scattered keys take a quarter of an hour
        connection.exec_driver_sql(f"ALTER TABLE message_idempotent DROP CONSTRAINT {name}")
        connection.exec_driver_sql(FILL.format(rows=rows, rows_a_second=ROWS_A_SECOND))
        connection.exec_driver_sql("SET maintenance_work_mem = '512MB'")
        connection.exec_driver_sql(KEY.format(name=name))
        connection.exec_driver_sql("VACUUM (ANALYZE) message_idempotent")
        connection.exec_driver_sql("CHECKPOINT")


def _require_claims(database: Database, rows: int) -> None:
    with database.engine.connect() as connection:
        found = connection.exec_driver_sql("SELECT count(*) FROM message_idempotent").scalar_one()
    if found != rows:
        raise WrongRows(f"there are {found} claims, not {rows}")
