"""`python -m benchmarks`: measure, print, write. 0: measured, whatever the figures are. 1: rows were wrong. 2: usage."""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Final

from rich.console import Console

from benchmarks import (
    duplicates,
    groups,
    imports,
    leases,
    mariadb,
    memory,
    one_message,
    peers,
    processes,
    report,
    rocketmq,
    sets,
    table_size,
)
from benchmarks.measure import Figure, WrongRows
from benchmarks.stage import SETTINGS, Stage, machine
from exactly_once.errors import ExactlyOnceError
from exactly_once.testing.postgres import EmbeddedPostgres

MEASUREMENTS: Final[dict[str, Callable[..., Iterator[Figure]]]] = {
    "imports": imports.measure,
    "one_message": one_message.measure,
    "duplicates": duplicates.measure,
    "groups": groups.measure,
    "sets": sets.measure,
    "processes": processes.measure,
    "table_size": table_size.measure,
    "peers": peers.measure,
    "leases": leases.measure,
    "mariadb": mariadb.measure,
    "rocketmq": rocketmq.measure,
    "memory": memory.measure,
}


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="What it costs, as ratios measured in turn."
    )
    parser.add_argument("--quick", action="store_true", help="under two minutes, fewer rounds: to see that it runs")
    parser.add_argument(
        "--only", action="append", choices=list(MEASUREMENTS), metavar="NAME", help=", ".join(MEASUREMENTS)
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here too")
    parser.add_argument("--rows", type=int, metavar="N", help="retained rows of the large table in table_size")
    given = parser.parse_args()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    figures: list[Figure] = []
    with (
        tempfile.TemporaryDirectory(prefix="exactly-once-bench-") as folder,
        EmbeddedPostgres(settings=SETTINGS) as server,
    ):
        stage = Stage(server, Path(folder), given.rows)
        about = machine(stage)
        for name in given.only or MEASUREMENTS:
            began = perf_counter()
            try:
                with console.status(f"measuring {name}"):
                    for figure in MEASUREMENTS[name](stage, quick=given.quick):
                        figures.append(figure)
                        said = figure.skipped or f"{figure.ratio:.2f}"
                        console.print(f"{name}: {figure.name}, {figure.what}: {said}")
            except (WrongRows, ExactlyOnceError, RuntimeError) as error:
                console.print(f"[bold red]{name} could not be measured:[/] {error}", markup=True)
                return 1
            console.print(f"[dim]{name} took {perf_counter() - began:.0f} s[/]")
    if given.quick:
        about["quick"] = "fewer rounds and messages: see that it runs, do not quote it"
    report.print_figures(console, figures, about)
    for file in report.write(figures, about, file=given.json, quick=given.quick):
        console.print(f"[dim]written: {file}[/]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
