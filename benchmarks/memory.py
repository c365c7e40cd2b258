"""A worker's resident memory early and late: does it keep something of every message?

The worker is in a process of its own, over `memory://` with PostgreSQL. Its handler does nothing, in batches of a hundred, so
that a million messages take a few minutes. The server runs with fsync off, because it is not measured here.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks import contenders
from benchmarks.measure import Figure, WrongRows
from benchmarks.orders import messages
from benchmarks.shop import application, make_tables
from benchmarks.stage import Stage
from exactly_once.service.worker_service import WorkerService
from exactly_once.testing.child import wait_until
from exactly_once.testing.postgres import EmbeddedPostgres

__all__ = ["measure"]

ROOT: Final = Path(__file__).parents[1]
GROWTH: Final = 1.05
EARLY, LATE = 10_000, 1_000_000
EARLY_QUICKLY, LATE_QUICKLY = 1_000, 10_000
BATCH: Final = 1000
THREADS: Final = 8


def measure(stage: Stage, *, quick: bool) -> Iterator[Figure]:
    """Measure it."""
    early, late = (EARLY_QUICKLY, LATE_QUICKLY) if quick else (EARLY, LATE)
    with EmbeddedPostgres() as server:
        from sqlalchemy import create_engine

        url = server.create_database("memory")
        engine = create_engine(url)
        make_tables(engine)
        command = [sys.executable, "-m", "benchmarks.memory", str(early), str(late)]
        # the URL goes to the input: other users could see its password among the arguments
        ran = subprocess.run(command, input=url, capture_output=True, text=True, cwd=ROOT)
        if ran.returncode != 0:
            raise RuntimeError(f"the worker whose memory is measured failed:\n{ran.stderr[-2000:]}")
        told = json.loads(ran.stdout.splitlines()[-1])
        with engine.connect() as connection:
            claims = connection.exec_driver_sql("SELECT count(*) FROM message_idempotent").scalar()
        engine.dispose()
    if claims != late or told["processed"] != late:
        raise WrongRows(f"{late} messages were sent, {told['processed']} processed, {claims} are claimed")
    yield Figure(
        name="memory",
        what=f"resident after {late:,} / after {early:,} messages",
        rounds=[told["late"] / told["early"]],
        target=GROWTH,
        measured={
            f"after {early:,}": f"{told['early'] / 2**20:.1f} MB",
            f"after {late:,}": f"{told['late'] / 2**20:.1f} MB",
        },
        note=f"scaled down from {LATE:,} and {EARLY:,} by --quick" if quick else "",
    )


def _resident() -> int:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _acknowledged(worker: WorkerService, count: int) -> bool:
    return worker.counts.acked >= count


def _work(url: str, early: int, late: int) -> dict[str, Any]:
    """Run the worker, and read its memory twice."""
    eo = application(url, cheap=True, batch=contenders.GROUP)
    found: dict[str, Any] = {}
    with (
        eo.worker("memory://benchmark", concurrency=THREADS) as worker,
        eo.producer("memory://benchmark") as producer,
    ):
        for sent in range(BATCH, late + 1, BATCH):
            producer.send_all(messages(BATCH))
            # not `drain`, which also waits for an empty receive: this is done many times
            wait_until(partial(_acknowledged, worker, sent), what=f"{sent} messages are finished", patience_s=60)
            if sent == early:
                found["early"] = _resident()
        found["late"] = _resident()
        found["processed"] = worker.counts.outcomes["processed"]
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("early", type=int)
    parser.add_argument("late", type=int)
    given = parser.parse_args()
    print(json.dumps(_work(sys.stdin.read(), given.early, given.late)))
