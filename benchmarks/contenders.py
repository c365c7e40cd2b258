"""The contenders, by name: each takes a number of messages and reports how long it took to handle them.

A contender is made in the process in which it runs: this one, or a process of a `crew`. `take` does what is not measured (making
the messages, filling the broker, connecting), before `run`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from time import perf_counter, sleep
from typing import Final, Protocol
from uuid import uuid4

from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker

from benchmarks import raw
from benchmarks.measure import Span, WrongRows
from benchmarks.shop import HandWritten, application, reserve
from exactly_once import ExactlyOnce, Message, Outcome

__all__ = ["BY_NAME", "GROUP", "SET", "Contender"]

GROUP: Final = 100
SET: Final = 500
THREADS: Final = 8
PATIENCE_S: Final = 120.0
POLL_S: Final = 0.01  # each look takes the interpreter away from the worker
FIRST_SHARE: Final = 0.1  # of a turn's messages, not counted: a worker's start and its checks are not measured


class Contender(Protocol):
    """One way to handle messages."""

    def take(self, given: Sequence[Message], new: int) -> None:
        """Take the messages of the next turn. `new`: how many of them were never seen before."""

    def run(self) -> Span:
        """Handle all messages.

        Raises:
            WrongRows: The number of handled messages is not that of the new messages.
        """


class OneByOne:
    """Hands each message to a function in turn."""

    def __init__(self, process: Callable[[Message], bool]) -> None:
        self._process = process
        self._given: Sequence[Message] = ()
        self._new = 0

    def take(self, given: Sequence[Message], new: int) -> None:
        self._given, self._new = given, new

    def run(self) -> Span:
        process = self._process
        began = perf_counter()
        handled = sum([process(message) for message in self._given])
        ended = perf_counter()
        if handled != self._new:
            raise WrongRows(f"{handled} messages were handled as new, not {self._new}")
        return Span(len(self._given), began, ended)


class Fed:
    """Our worker, fed by a broker in this process that was filled before.

    Args:
        eo: The application. Its engine is kept from turn to turn; the worker is new in each turn.
        threads: How many messages, or batches, run at once.
    """

    def __init__(self, eo: ExactlyOnce, threads: int = 1) -> None:
        self._eo, self._threads = eo, threads
        self._url = f"memory://{uuid4().hex}"
        self._given = self._new = 0

    def take(self, given: Sequence[Message], new: int) -> None:
        self._given, self._new = len(given), new
        with self._eo.producer(self._url) as producer:
            producer.send_all(given)

    def run(self) -> Span:
        entered = perf_counter()
        start, began = 0, 0.0
        with self._eo.worker(self._url, concurrency=self._threads, drain_timeout=timedelta(seconds=5)) as worker:
            while (done := worker.counts.acked) < self._given:
                now = perf_counter()
                if not start and done >= self._given * FIRST_SHARE:
                    start, began = done, now
                if now - entered > PATIENCE_S:
                    raise WrongRows(f"{done} of {self._given} messages were finished after {PATIENCE_S:.0f} s")
                sleep(POLL_S)
            ended = perf_counter()
            handled = worker.counts.outcomes["processed"]
        if handled != self._new:
            raise WrongRows(f"{handled} messages were handled as new, not {self._new}")
        if not start:  # a few messages, all done between two looks
            began = entered
        return Span(self._given - start, began, ended)


class HandlersAlone:
    """The handler's calls in batches of one commit, without deduplication: no batch with such calls can be faster."""

    def __init__(self, url: str) -> None:
        self._sessions = sessionmaker(create_engine(url), expire_on_commit=False)
        self._given: Sequence[Message] = ()

    def take(self, given: Sequence[Message], new: int) -> None:
        self._given = given

    def run(self) -> Span:
        began = perf_counter()
        for start in range(0, len(self._given), GROUP):
            with self._sessions.begin() as session:
                for message in self._given[start : start + GROUP]:
                    reserve(session, json.loads(message.body or b""))
        return Span(len(self._given), began, perf_counter())


def _ours(url: str) -> Contender:
    process = application(url).process
    return OneByOne(lambda message: process(message) is Outcome.PROCESSED)


def _by_hand(url: str) -> Contender:
    return OneByOne(HandWritten(create_engine(url)).process)


def _dbos(url: str) -> Contender:
    from benchmarks.dbos_workflow import Workflows

    return Workflows(url)


def _dbos_in_background(url: str) -> Contender:
    from benchmarks.dbos_workflow import InBackground

    return InBackground(url)


BY_NAME: Final[Mapping[str, Callable[[str], Contender]]] = {
    "ours": _ours,
    "ours, in 8 threads": lambda url: Fed(application(url), THREADS),
    "by hand": _by_hand,
    "groups": lambda url: Fed(application(url, batch=GROUP)),
    "sorted groups": lambda url: Fed(application(url, batch=GROUP, batch_order="sku")),
    "handlers alone": HandlersAlone,
    "in sets": lambda url: Fed(application(url, batch=SET, in_sets=True)),
    "raw": raw.OneByOne,
    "raw, pipelined": raw.Pipelined,
    "raw, grouped": lambda url: raw.Grouped(url, GROUP),
    "raw, in sets": lambda url: raw.InSets(url, SET),
    "DBOS": _dbos,
    "DBOS, 8 in the background": _dbos_in_background,
}
"""The contenders. Each is made with the URL of a database that has all tables."""
