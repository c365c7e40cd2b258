"""Does a claim slow down as the table grows? Throughput with ten million retained rows against ten thousand.

Keys are scattered, in the retained rows as in the new messages: in an index with keys in order a claim would only ever
touch its last page. Before the turns the large table is analysed, vacuumed and on the disk: that work is not a claim's.

    python -m benchmarks --only table_size --rows 100000000      # by hand: 30 GB, and half an hour to fill
"""

from collections.abc import Callable, Iterator
from statistics import median
from typing import Final

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
KEY: Final = "ALTER TABLE message_idempotent ADD CONSTRAINT {name} PRIMARY KEY (consumer_group, handler, business_key)"
FILL: Final = (
    "INSERT INTO message_idempotent (consumer_group, handler, business_key, status, message_id, fingerprint, retry_times,"
    " owner, created_at, consumed_at) SELECT 'benchmark', 'reserve_stock', substr(md5(n::text), 1, 24), 1, md5(n::text),"
    " decode(md5(n::text), 'hex'), 0, 'filled', moment, moment FROM generate_series(1, {rows}) AS filled (n),"
    " LATERAL (SELECT now() - make_interval(secs => ({rows} - n) * 0.05) AS moment) AS at"
)


def measure(stage: Stage, *, quick: bool) -> Iterator[Figure]:
    """Fill two tables and measure single messages on both in turn."""
    rows = stage.rows or (MANY_QUICKLY if quick else MANY)
    rounds, each = (4, 50) if quick else (60, 100)
    with stage.database(skus=SKUS) as large, stage.database(skus=SKUS) as small:
        sizes = {"many": (large, rows), "few": (small, FEW)}
        for database, how_many in sizes.values():
            _fill(database, how_many)
        turns = {name: _turn(BY_NAME["ours"](database.url)) for name, (database, _) in sizes.items()}
        rates = take_turns(turns, rounds=rounds, each=each)
        for database, how_many in sizes.values():
            require(database.engine, (rounds + 1) * each)
            _require_claims(database, how_many + (rounds + 1) * each)
    yield Figure(
        name="table size",
        what=f"throughput with {rows:,} retained rows / with {FEW:,}",
        rounds=ratios(rates["many"], rates["few"]),
        target=TARGET,
        least=True,
        measured={f"{how_many:,} rows": f"{median(rates[name]):,.0f}/s" for name, (_, how_many) in sizes.items()},
        note="single messages",
    )


def _turn(contender: Contender) -> Callable[[int], float]:
    def turn(each: int) -> float:
        contender.take(messages(each, skus=SKUS, scattered=True), each)
        return contender.run().rate

    return turn


def _fill(database: Database, rows: int) -> None:
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        name = connection.exec_driver_sql(
            "SELECT conname FROM pg_constraint WHERE conrelid = 'message_idempotent'::regclass AND contype = 'p'"
        ).scalar_one()
        # the index made in the end, sorted: row by row, ten million scattered keys take a quarter of an hour
        connection.exec_driver_sql(f"ALTER TABLE message_idempotent DROP CONSTRAINT {name}")
        connection.exec_driver_sql(FILL.format(rows=rows))
        connection.exec_driver_sql("SET maintenance_work_mem = '512MB'")
        connection.exec_driver_sql(KEY.format(name=name))
        connection.exec_driver_sql("VACUUM (ANALYZE) message_idempotent")
        connection.exec_driver_sql("CHECKPOINT")


def _require_claims(database: Database, rows: int) -> None:
    with database.engine.connect() as connection:
        found = connection.exec_driver_sql("SELECT count(*) FROM message_idempotent").scalar_one()
    if found != rows:
        raise WrongRows(f"there are {found} claims, not {rows}")
