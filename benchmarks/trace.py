"""`make trace`: which files of the package one delivery goes through, for six trips. Prints the table; measures no time.

A profiler hook records the file of each call into the package, in every thread, from the receive of one message to the end of its
settlement, over `memory://` and a SQLite file. Another message of the same trip goes first, so that work done once in a process
is not counted; and of several trips the shortest counts, for the pump may have taken the connection that was used before.
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


TRIPS: Final[dict[str, tuple[Callable[[ExactlyOnce], None], int, bool]]] = {
    "one message, sync": (_sync, 1, True),
    "async": (_async, 1, True),
    "batch of 3": (_batch, 3, True),
    "failure, parked": (_parked, 1, True),
    "duplicate": (_sync, 1, False),
    "lease and one step": (_lease, 1, True),
}
"""For each trip: the handler, how many messages go together, and whether they are new."""
_TIMES: Final = 4


def travel(register: Callable[[ExactlyOnce], None], together: int, new: bool, folder: Path) -> Way:
    """Send messages through a worker, and record the shortest way."""
    way, url, ways = Way(), f"sqlite:///{folder}/trace.db", list[Way]()
    upgrade(url)
    eo = ExactlyOnce(url, group="trace")
    register(eo)
    threading.setprofile(way.note)
    try:
        with eo.worker("memory://trace", concurrency=1) as worker, eo.producer("memory://trace") as producer:
            for turn in range(_TIMES + 1):
                way.calls = {}
                producer.send_all([_message(number + turn * together * new) for number in range(together)])
                worker.drain(MOST)
                ways.append(Way(way.calls))
    finally:
        threading.setprofile(None)
    return min(ways[1:], key=lambda way: way.changes)


def main() -> None:
    """Print the table, or with a trip's name its files in the order entered."""
    print("| trip | files entered | changes of file |\n|---|---|---|")
    for name, (register, together, new) in TRIPS.items():
        with TemporaryDirectory() as folder:
            way = travel(register, together, new, Path(folder))
        print(f"| {name} | {len(way.files)} | {way.changes} |")
        if name in sys.argv[1:]:
            print(*way.files, sep="\n")


if __name__ == "__main__":
    main()
