"""What the measurements run on: the embedded PostgreSQL with fsync on, and a description of the machine."""

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Engine, create_engine, text

from benchmarks.orders import SKUS
from benchmarks.shop import make_tables
from exactly_once.testing.postgres import EmbeddedPostgres

__all__ = ["Database", "Stage", "machine"]

# as in production: a commit that returned is on the disk
SETTINGS: Final = {"fsync": "on", "full_page_writes": "on", "synchronous_commit": "on", "shared_buffers": "256MB"}
PACKAGES: Final = ("sqlalchemy-exactly-once", "sqlalchemy", "psycopg", "pydantic", "rocketmq-python-client", "dbos")


@dataclass(frozen=True, slots=True)
class Database:
    """A fresh database with all tables."""

    url: str
    engine: Engine


@dataclass
class Stage:
    """The server, a folder for files, and the options of the command line.

    Args:
        server: PostgreSQL.
        folder: For logs. Deleted at the end.
        rows: How many retained rows the large table has. None: the usual number.
    """

    server: EmbeddedPostgres
    folder: Path
    rows: int | None = None
    _numbers: Any = field(default_factory=lambda: count(1))

    @contextmanager
    def database(self, *, skus: int = SKUS) -> Iterator[Database]:
        """Make a database with all tables and so many stock rows, and drop it afterwards."""
        name = f"benchmark_{next(self._numbers)}"
        url = self.server.create_database(name)
        engine = create_engine(url)
        make_tables(engine, skus=skus)
        try:
            yield Database(url, engine)
        finally:
            engine.dispose()
            self.server.drop_database(name)


def machine(stage: Stage) -> dict[str, str]:
    """Return a description of the machine."""
    told = {
        "machine": f"{_processor()}, {os.cpu_count()} cores, {_memory_gb():.0f} GB",
        "system": platform.platform(terse=True),
        "load before": " ".join(f"{load:.1f}" for load in os.getloadavg()),
        "python": platform.python_version(),
    }
    engine = create_engine(stage.server.url)
    with engine.connect() as connection:
        told["postgresql"] = str(connection.execute(text("SHOW server_version")).scalar())
        told["fsync"] = str(connection.execute(text("SHOW fsync")).scalar())
    engine.dispose()
    for package in PACKAGES:
        try:
            told[package] = version(package)
        except PackageNotFoundError:
            continue
    return told


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
