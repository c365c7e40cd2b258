"""Worker processes that begin together. Measures how many messages they handle in a second, all together.

    python -m benchmarks.crew CONTENDER SKUS MAKER

Each process has one contender and lives through all rounds, so that its connections, plans and caches are warm. It reads the
database's URL from its input, because other users could see a password among the arguments. Then it reads how many messages to
take, answers when it has them, and runs at the next line. The time is from the first begin to the last end.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from benchmarks.measure import Span, WrongRows
from benchmarks.orders import SKUS, messages
from benchmarks.stage import Database, Stage

__all__ = ["Crew", "crews"]

ROOT: Final = Path(__file__).parents[1]
READY: Final = "ready"
WRONG: Final = "wrong"
PATIENCE_S: Final = 5.0

_makers = count(1)


class Crew:
    """Several processes of one contender.

    Args:
        contender: Its name.
        url: The database.
        log: The file for their standard error.
        size: How many processes.
        skus: How many stock rows their orders use.
    """

    def __init__(self, contender: str, url: str, log: Path, *, size: int = 1, skus: int = SKUS) -> None:
        self._contender, self._url, self._log = contender, url, log
        self._size, self._skus = size, skus
        self._processes: list[subprocess.Popen[str]] = []
        self.handled = 0

    def __enter__(self) -> Self:
        with self._log.open("a") as log:
            for _ in range(self._size):
                command = [sys.executable, "-m", "benchmarks.crew", self._contender, str(self._skus)]
                process = subprocess.Popen(
                    [*command, f"W{next(_makers)}"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    cwd=ROOT,
                )
                self._processes.append(process)
                self._say(process, self._url)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()  # the end of its work
        for process in self._processes:
            try:
                process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def rate(self, each: int, *, workers: int | None = None) -> float:
        """Let the first `workers` processes (None: all) handle `each` messages together. Returns messages a second."""
        at_work = self._processes[: workers or self._size]
        share = each // len(at_work)
        for process in at_work:
            self._say(process, str(share))
        for process in at_work:
            self._hear(process, READY)
        for process in at_work:
            self._say(process, "go")
        spans = [Span(*self._hear(process)) for process in at_work]
        self.handled += share * len(at_work)
        handled = sum(span.handled for span in spans)
        return handled / (max(span.ended for span in spans) - min(span.began for span in spans))

    def _say(self, process: "subprocess.Popen[str]", word: str) -> None:
        assert process.stdin is not None
        try:
            process.stdin.write(word + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            self._hear(process)

    def _hear(self, process: "subprocess.Popen[str]", expected: str | None = None) -> tuple[int, float, float]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ({self._contender}) ended:\n{self._log.read_text()[-2000:]}")
        told = json.loads(line)
        if isinstance(told, dict):
            raise WrongRows(f"{self._contender}: {told[WRONG]}")
        if expected is not None:
            assert told == expected
            return 0, 0.0, 0.0
        handled, began, ended = told
        return handled, began, ended


@contextmanager
def crews(
    stage: Stage, database: Database, *contenders: str, size: int = 1, skus: int = SKUS
) -> Iterator[dict[str, Crew]]:
    """Start a crew of each contender on one database. All end together."""
    found: dict[str, Crew] = {}
    try:
        for contender in contenders:
            log = stage.folder / f"{contender}.log"
            found[contender] = Crew(contender, database.url, log, size=size, skus=skus).__enter__()
        yield found
    finally:
        for crew in found.values():
            crew.__exit__(None, None, None)


# -- in each process -------------------------------------------------------------------------------------------------------


def main() -> None:
    """Take messages and run, until the input ends."""
    from benchmarks.contenders import BY_NAME

    parser = argparse.ArgumentParser(prog="python -m benchmarks.crew")
    parser.add_argument("contender", choices=list(BY_NAME))
    parser.add_argument("skus", type=int)
    parser.add_argument("maker")
    given = parser.parse_args()
    # what a library prints must not mix with the answers
    answers, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    os.dup2(2, 1)

    def answer(told: object) -> None:
        print(json.dumps(told), file=answers, flush=True)

    wait: Callable[[], str] = sys.stdin.readline
    contender = BY_NAME[given.contender](wait().strip())
    while line := wait():
        how_many = int(line)
        contender.take(messages(how_many, skus=given.skus, maker=given.maker), how_many)
        gc.collect()
        gc.freeze()  # the garbage collector must not walk over the messages that wait in memory
        answer(READY)
        if not wait():
            break
        try:
            answer(astuple(contender.run()))
        except WrongRows as error:
            answer({WRONG: str(error)})
    os._exit(0)  # do not wait for threads that a contender has left


if __name__ == "__main__":
    main()
