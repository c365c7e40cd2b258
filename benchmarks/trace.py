"""`make trace`: which files of the package one delivery goes through, for six trips. Prints the table; measures no time.

A profiler hook records the file of each call into the package, in every thread, from the receive of one message to the end of its
settlement, over `memory://` and a SQLite file. Another message of the same trip goes first, so that work done once in a process
is not counted.
"""

import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any, Final

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

import exactly_once
from exactly_once import ExactlyOnce, Lease, Message, Reject, Steps
from exactly_once.alembic import upgrade

PACKAGE: Final = str(Path(exactly_once.__file__).parent)
MOST: Final = timedelta(seconds=20)


@dataclass
class Way:
    """The files of one trip."""

    calls: dict[int, list[str]] = field(default_factory=dict)
    """The files by thread, in the order entered."""

    under_way: int = 0
    """How many of its messages were received and are not settled."""

    def note(self, frame: FrameType, event: str, _: Any) -> None:
        """The profiler hook. What threads do before the receive and after the settlement is not part of the trip."""
        code = frame.f_code
        if not code.co_filename.startswith(PACKAGE) or "Pump" in threading.current_thread().name:
            return
        if event == "call" and code.co_qualname == "Lane.take":
            self.under_way += len(frame.f_locals["deliveries"])
        if event == "return" and code.co_qualname == "Lane._settle":
            self.under_way -= len(frame.f_locals["batch"])
        if event == "call" and self.under_way > 0 and not code.co_name.startswith("<"):
            self.calls.setdefault(threading.get_ident(), []).append(code.co_filename[len(PACKAGE) + 1 : -3])

    @property
    def files(self) -> Sequence[str]:
        """Each file once, in the order entered."""
        return list(dict.fromkeys(name for names in self.calls.values() for name in names))

    @property
    def changes(self) -> int:
        """How often a call leads from one file into another."""
        return sum(a != b for names in self.calls.values() for a, b in pairwise(names))


def _message(number: int) -> Message:
    return Message("orders", b'{"no": %d}' % number, message_id=str(number))


def _sync(eo: ExactlyOnce) -> None:
    @eo.handler("orders", key="no")
    def handle(session: Session, body: dict[str, Any]) -> None: ...


def _async(eo: ExactlyOnce) -> None:
    @eo.handler("orders", key="no")
    async def handle(session: AsyncSession, body: dict[str, Any]) -> None: ...


def _batch(eo: ExactlyOnce) -> None:
    @eo.handler("orders", key="no", batch=3)
    def handle(session: Session, body: dict[str, Any]) -> None: ...


def _parked(eo: ExactlyOnce) -> None:
    @eo.handler("orders", key="no")
    def handle(session: Session, body: dict[str, Any]) -> None:
        raise Reject("no stock")


def _lease(eo: ExactlyOnce) -> None:
    @eo.handler("orders", key="no", guard=Lease(timedelta(minutes=1)))
    def handle(session: Session, steps: Steps, body: dict[str, Any]) -> None:
        steps.run("charge", lambda key: 1)


TRIPS: Final[dict[str, tuple[Callable[[ExactlyOnce], None], Sequence[int], Sequence[int]]]] = {
    "one message, sync": (_sync, [1], [2]),
    "async": (_async, [1], [2]),
    "batch of 3": (_batch, [1, 2, 3], [4, 5, 6]),
    "failure, parked": (_parked, [1], [2]),
    "duplicate": (_sync, [1, 1], [1]),
    "lease and one step": (_lease, [1], [2]),
}
"""For each trip: the handler, the messages that go first, the messages of the trip."""


def travel(register: Callable[[ExactlyOnce], None], before: Sequence[int], numbers: Sequence[int], folder: Path) -> Way:
    """Send messages through a worker, and record the way of the last ones."""
    way, url = Way(), f"sqlite:///{folder}/trace.db"
    upgrade(url)
    eo = ExactlyOnce(url, group="trace")
    register(eo)
    threading.setprofile(way.note)
    try:
        with eo.worker("memory://trace", concurrency=1) as worker, eo.producer("memory://trace") as producer:
            producer.send_all([_message(number) for number in before])
            worker.drain(MOST)
            way.calls.clear()
            producer.send_all([_message(number) for number in numbers])
            worker.drain(MOST)
    finally:
        threading.setprofile(None)
    return way


def main() -> None:
    """Print the table, or with a trip's name its files in the order entered."""
    print("| trip | files entered | changes of file |\n|---|---|---|")
    for name, (register, before, numbers) in TRIPS.items():
        with TemporaryDirectory() as folder:
            way = travel(register, before, numbers, Path(folder))
        print(f"| {name} | {len(way.files)} | {way.changes} |")
        if name in sys.argv[1:]:
            print(*way.files, sep="\n")


if __name__ == "__main__":
    main()
