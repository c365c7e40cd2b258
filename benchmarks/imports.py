"""What it costs to import the package and to ask the command line for help, against importing SQLAlchemy's ORM.

New processes in turn. Processor time is measured: an import needs nothing else, and a busy neighbour does not change it. The
package is compiled before, as an installer does it. The garbage collector is off in all of them: SQLAlchemy's import ends just
before the first collection of all objects (30 ms), and whatever is imported next would pay for SQLAlchemy's.
"""

import compileall
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Final

import exactly_once
from benchmarks.measure import Figure, ratios
from benchmarks.stage import Stage

__all__ = ["measure"]

IMPORT: Final = 1.15
HELP: Final = 2.0
_TIMED: Final = "import gc, time; gc.disable(); began = time.process_time(); {}; print(time.process_time() - began)"
SQLALCHEMY: Final = "import sqlalchemy.orm"


def measure(stage: Stage, *, quick: bool) -> Iterator[Figure]:
    """Measure it."""
    compileall.compile_dir(Path(exactly_once.__file__).parent, quiet=1)
    rounds = 3 if quick else 21
    statements = (SQLALCHEMY, "import exactly_once", "from exactly_once import ExactlyOnce")
    inside: dict[str, list[float]] = {statement: [] for statement in statements}
    whole: dict[str, list[float]] = {"help": [], "sqlalchemy": []}
    for turn in range(rounds + 1):
        took = {statement: _inside(statement) for statement in statements}
        took_whole = {
            "help": _whole(["-m", "exactly_once", "--help"]),
            "sqlalchemy": _whole(["-c", SQLALCHEMY]),
        }
        if turn:  # the first turn fills the file cache
            for statement, value in took.items():
                inside[statement].append(value)
            for what, value in took_whole.items():
                whole[what].append(value)
    for statement in statements[1:]:
        yield Figure(
            name=statement,
            what="/ import sqlalchemy.orm",
            rounds=ratios(inside[statement], inside[SQLALCHEMY]),
            target=IMPORT,
            measured={what: f"{median(inside[what]) * 1000:.0f} ms" for what in (statement, SQLALCHEMY)},
        )
    yield Figure(
        name="exactly-once --help",
        what="/ python -c 'import sqlalchemy.orm'",
        rounds=ratios(whole["help"], whole["sqlalchemy"]),
        target=HELP,
        measured={what: f"{median(values) * 1000:.0f} ms" for what, values in whole.items()},
        note="whole processes",
    )


def _inside(statement: str) -> float:
    ran = subprocess.run([sys.executable, "-c", _TIMED.format(statement)], capture_output=True, text=True, check=True)
    return float(ran.stdout)


def _whole(arguments: Sequence[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
