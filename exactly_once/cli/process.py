"""`exactly-once process`: runs recorded messages through the handlers, each claimed as if a broker had delivered it.

Bounded: at most twice as many messages are in hand as run at once. For the topic of an ordered handler, the messages of one
ordering key run one after the other, in the order of the file. It stops if a database does not answer.
"""

from collections import deque
from functools import partial
from threading import BoundedSemaphore, Lock
from typing import Annotated, Final

import typer

from exactly_once.app import ExactlyOnce
from exactly_once.cli.recorded import BadLine, Progressing, messages, open_input, size_of
from exactly_once.cli.reference import AppOption, application, usable
from exactly_once.events.run_ended import OutcomeCounts, RunEnded
from exactly_once.exceptions.words import words_of
from exactly_once.message import Message
from exactly_once.outcome import Ack, Outcome, RunFuture, WaitForStore
from exactly_once.transports.contract import Delivery, Features
from exactly_once.wording.text import escaped, probably, taken

__all__ = ["command"]

FILE: Final = Features(redelivers=False, counts_attempts=False, ordered=True)
"""A file redelivers nothing: a failure is recorded with its next attempt, and a running worker's pump tries it then."""
SHOWN: Final = 20
"""At most so many failed lines are named; the rest is counted, because a file may have millions."""

_Lane = tuple[str, str]


class _Feeding:
    """The messages of one file on their way through the handlers."""

    def __init__(self, eo: ExactlyOnce, concurrency: int) -> None:
        self.ended = self.left = 0
        self._wanted = {wanted.topic: wanted.tags for wanted in eo.subscriptions()}
        self.named: list[str] = []
        self.away = False
        self._executor = eo.executor(concurrency)
        self._outcomes = OutcomeCounts()
        self._ordered = {wanted.topic for wanted in eo.subscriptions() if wanted.ordered}
        self._most = 2 * concurrency
        self._places = BoundedSemaphore(self._most)
        self._lock = Lock()
        self._lanes: dict[_Lane, deque[tuple[int, Message]]] = {}

    @property
    def counts(self) -> dict[Outcome, int]:
        """The number of messages for each outcome."""
        return {Outcome(name): count for name, count in self._outcomes.outcomes.items() if count}

    def feed(self, line: int, message: Message) -> None:
        """Run a message as soon as there is capacity."""
        self._places.acquire()
        if (what := self._not_taken(message)) is not None:
            take = ", ".join(taken(topic, tags) for topic, tags in sorted(self._wanted.items()))
            self.leave(line, f"no handler takes {what} It was passed over. Handlers take: {escaped(take, 1000)}.")
        lane = None
        if message.topic in self._ordered and message.ordering_key is not None:
            lane = (message.topic, message.ordering_key)
            with self._lock:
                if lane in self._lanes:
                    self._lanes[lane].append((line, message))
                    return
                self._lanes[lane] = deque()
        self._run(line, message, lane)

    def _not_taken(self, message: Message) -> str | None:
        """Say what in a message looks like a mistake. None for another group's tag, which a recorded topic may often have."""
        topic = f"topic {escaped(message.topic, 200)}"
        if message.topic not in self._wanted:
            return f"{topic}.{probably(message.topic, self._wanted)}"
        tags = self._wanted[message.topic]
        if not tags or message.tag in tags:
            return None
        if message.tag is None:
            return f"{topic} without a tag."
        meant = probably(message.tag, tags)
        return f"{topic} with the tag {escaped(message.tag, 200)}.{meant}" if meant else None

    def leave(self, line: int, why: str) -> None:
        """Note a line that was not processed."""
        with self._lock:
            self.left += 1
            if len(self.named) < SHOWN:
                self.named.append(f"line {line}: {why}")

    def wait(self) -> None:
        """Wait until the last message has ended."""
        for _ in range(self._most):
            self._places.acquire()

    def stop(self) -> None:
        """End the threads."""
        self._executor.stop()

    def _run(self, line: int, message: Message, lane: _Lane | None) -> None:
        self._executor.submit(Delivery(message, None), FILE).add_done_callback(
            partial(self._finished, line, message.topic, lane)
        )

    def _finished(self, line: int, topic: str, lane: _Lane | None, future: RunFuture) -> None:
        if (error := future.exception()) is not None:
            self.leave(line, f"{type(error).__name__}: {escaped(words_of(error), 300)}")
        else:
            result = future.result()
            self._outcomes.add(RunEnded(topic, result))
            if isinstance(result.verdict, WaitForStore):
                self.away = True
                self.leave(line, "the database does not answer")
            elif not isinstance(result.verdict, Ack):
                self.leave(line, "not finished; feed it again later")
        following = None
        with self._lock:
            self.ended += 1
            if lane is not None:
                if self._lanes[lane]:
                    following = self._lanes[lane].popleft()
                else:
                    del self._lanes[lane]
        if following is not None:
            self._run(*following, lane)
        self._places.release()


def command(
    file: Annotated[str, typer.Argument(metavar="FILE.jsonl", help="One message a line as JSON; - is standard input.")],
    app: AppOption,
    topic: Annotated[str | None, typer.Option("--topic", help="For lines that name none.")] = None,
    concurrency: Annotated[int | None, typer.Option("--concurrency", "-c", min=1, help="Messages at once.")] = None,
) -> None:
    """Feed recorded messages from a file through the handlers: what was processed before is a duplicate.

    A line: {"topic": "orders", "body": {"order_no": "A-1"}, "tag": "created", "key": "A-1", "properties": {}}; a body of
    any bytes is "body_base64". Messages run side by side; those of an ordered handler keep the order of their ordering
    key. Exits 1 if a line was no message, no handler takes its topic, its tag is missing or misspelled, or its message failed.
    """
    eo = application(app)
    for store in eo.stores.values():
        usable(store)
    with open_input(file) as stream:
        feeding = _Feeding(eo, concurrency or eo.config.concurrency.value)
        try:
            with Progressing(size_of(file), "process") as progress:
                read = 0
                for line, read, message in messages(stream, topic, file=file, verb="process", done="processed"):
                    if isinstance(message, BadLine):
                        feeding.leave(line, str(message))
                        continue
                    feeding.feed(line, message)
                    progress.show(read, feeding.ended)
                    if feeding.away:
                        break
                feeding.wait()
                progress.show(read, feeding.ended)
        finally:
            feeding.stop()
    _say(feeding)


def _say(feeding: _Feeding) -> None:
    counts = feeding.counts
    typer.echo(", ".join(f"{count} {outcome.value}" for outcome, count in counts.items()) or "no messages")
    if any(not outcome.acknowledge for outcome in counts):
        typer.echo(
            "What is not done is kept with the time of its next try; a running worker makes it: exactly-once failures list"
        )
    if counts.get(Outcome.DEAD):
        typer.echo("What is dead is kept until a person decides: exactly-once failures list")
    for each in feeding.named:
        typer.echo(each, err=True)
    if feeding.left > SHOWN:
        typer.echo(f"... and {feeding.left - SHOWN} more", err=True)
    if feeding.away:
        typer.echo(
            "Stopped there. When the database answers again, feed the same file: what was processed is a duplicate.",
            err=True,
        )
    if feeding.left or any(not outcome.acknowledge or outcome is Outcome.DEAD for outcome in counts):
        raise SystemExit(1)
