"""The demonstration from the first server to the last number.

It starts one PostgreSQL (fsync on), with one schema for each shop. Both shops receive the same stream of messages, each in its
own consumer group and with two processes. While the stream is sent, each process is killed with SIGKILL several times, spread
over the run, and each time in the middle of a transaction. Then both ledgers are read.
"""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from typing import Final

from sqlalchemy import Connection, Engine, create_engine, insert, text

import exactly_once.alembic
from exactly_once.testing.child import ServerFailed, wait_until
from exactly_once.testing.postgres import EmbeddedPostgres
from exactly_once.transports.contract import Surroundings
from exactly_once.transports.producer import Producer
from exactly_once.transports.registry import transport_from
from examples.demo import naive, report, shop
from examples.demo.broker import Broker, broker
from examples.demo.ledger import Ledger, Sample
from examples.demo.naive import THREADS
from examples.demo.orders import PRODUCTS, STOCK, Stream
from examples.demo.picture import Picture
from examples.demo.workers import Worker, worker_name

__all__ = ["Demo"]

OURS: Final = "exactly_once_shop"
NAIVE: Final = "naive_shop"
PROCESSES: Final = (1, 2)
TICK_S: Final = 0.05
SAMPLE_EVERY_S: Final = 0.25
JOIN_PATIENCE_S: Final = 60.0
PATIENCE_S: Final = 60.0
BATCH: Final = 50  # messages sent at once
MOST_BEHIND: Final = 300  # the most orders sent that the slower shop has not handled
# as in production: a crash of the machine loses nothing either
SETTINGS: Final = {"fsync": "on", "full_page_writes": "on", "synchronous_commit": "on"}


@dataclass
class Demo:
    """One run.

    Args:
        transport: sql, rocketmq or rocketmq4.
        orders: How many orders.
        send_s: The time over which they are sent.
        kills: How often each process is killed.
        picture: The SVG to write.
        logs: The folder for the workers' logs. None: they are deleted.
    """

    transport: str
    orders: int
    send_s: float
    kills: int
    picture: Path
    logs: Path | None = None
    samples: list[Sample] = field(default_factory=list)
    killed_at: list[tuple[float, str]] = field(default_factory=list)
    """The time of each kill, and the shop of the worker."""

    def run(self) -> int:
        """Run everything, and return the exit code: 0 if every number of our ledger is right, else 1."""
        stream = Stream.of(self.orders)
        report.opening(stream, self.transport)
        with ExitStack() as stack:
            directory = self.logs or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="exactly-once-demo-")))
            directory.mkdir(parents=True, exist_ok=True)
            server = stack.enter_context(EmbeddedPostgres(settings=SETTINGS))
            engine = create_engine(server.create_database("shop"))
            stack.callback(engine.dispose)
            _make_tables(engine)
            carrier = stack.enter_context(broker(self.transport, engine, [shop.GROUP, naive.GROUP]))
            workers = self._workers(engine, carrier.url, directory)
            stack.callback(_kill_all, workers)
            began = monotonic()
            self._play(stream, engine, carrier, workers)
            for worker in workers:
                worker.stop()
            with engine.connect() as connection:
                self._look(connection, monotonic() - began, stream, len(stream.messages))
                ours, theirs = self.samples[-1].ours, self.samples[-1].naive
                claims, failures = _claims(connection)
        picture = Picture(
            stream,
            carried_by=report.NAMES[self.transport],
            samples=self.samples,
            kills=self.killed_at,
            ours=OURS,
        )
        self.picture.write_text(picture.svg(), encoding="utf-8")
        right = ours.right(stream.truth) and claims == self.orders and not failures
        report.closing(stream, ours, theirs, kills=len(self.killed_at), picture=self.picture, right=right)
        return 0 if right else 1

    # -- servers -----------------------------------------------------------------------------------------------------

    def _workers(self, engine: Engine, url: str, directory: Path) -> list[Worker]:
        def made(side: str, arguments: Sequence[str], number: int) -> Worker:
            settings = {
                "database": _url(engine, side, worker_name(side, number)),
                "transport": url,
                "concurrency": str(THREADS),
            }
            return Worker(side, number, arguments, settings, directory)

        ours = ["-m", "exactly_once", "run", "examples.demo.shop:eo"]
        return [
            made(side, arguments, number)
            for number in PROCESSES
            for side, arguments in ((OURS, ours), (NAIVE, ["-m", "examples.demo.naive"]))
        ]

    # -- the run -----------------------------------------------------------------------------------------------------

    def _play(self, stream: Stream, engine: Engine, carrier: Broker, workers: Sequence[Worker]) -> None:
        for worker in workers:
            worker.start()

        def joined() -> bool:
            for worker in workers:
                worker.require_alive()
            return carrier.joined([shop.GROUP, naive.GROUP])

        wait_until(joined, what="both shops have joined", patience_s=JOIN_PATIENCE_S)
        transport = transport_from(carrier.url, Surroundings(lambda: engine))
        total = len(stream.messages)
        victims = self._victims(workers)
        began = monotonic()
        with (
            Producer(transport.producer(), carrier.url) as producer,
            engine.connect().execution_options(isolation_level="AUTOCOMMIT") as look,
            report.Progress(stream, len(victims) * 2) as progress,
        ):
            sent = 0
            due: list[Worker] = []
            while True:
                now = monotonic() - began
                more = self._sendable(stream, sent, now)
                if more > sent:
                    producer.send_all(stream.messages[sent:more])
                    sent = more
                # spread over the sending: none at its very start, none after its end
                if victims and sent >= total * (1 - len(victims) / (len(PROCESSES) * self.kills + 1)):
                    due += victims.pop(0)
                for victim in [victim for victim in due if _at_work(look, victim)]:
                    victim.kill_and_start()
                    due.remove(victim)
                    self.killed_at.append((monotonic() - began, victim.side))
                if not self.samples or now - self.samples[-1].at_s >= SAMPLE_EVERY_S:
                    for worker in workers:
                        worker.require_alive()
                    self._look(look, now, stream, sent)
                    progress.show(sent, self.samples[-1], len(self.killed_at))
                    if sent == total and not due and self._finished(carrier, stream, now):
                        return
                if now - self._changed_at() > PATIENCE_S:
                    raise ServerFailed(
                        f"Neither shop has done anything for {PATIENCE_S:.0f} s, and there is work left."
                    )
                sleep(TICK_S)

    def _sendable(self, stream: Stream, sent: int, now: float) -> int:
        """Return how many messages may have been sent by now.

        Not faster than planned, and never far ahead of the slower shop. Otherwise, on a slow machine, everything would be sent
        and every kill would be over before much was handled.
        """
        planned = min(len(stream.messages), int(len(stream.messages) * now / self.send_s))
        if not self.samples or not sent:
            return min(planned, BATCH)
        behind = stream.orders_by[sent - 1] - min(self.samples[-1].ours.orders, self.samples[-1].naive.orders)
        return sent if behind > MOST_BEHIND else min(planned, sent + BATCH)

    def _victims(self, workers: Sequence[Worker]) -> list[Sequence[Worker]]:
        """Return which workers are killed in each turn: the first process of both shops, then the second of both."""
        return [workers[0:2] if turn % 2 == 0 else workers[2:4] for turn in range(len(PROCESSES) * self.kills)]

    def _look(self, connection: Connection, at_s: float, stream: Stream, sent: int) -> None:
        orders = stream.orders_by[sent - 1] if sent else 0
        self.samples.append(Sample(at_s, orders, Ledger.read(connection, OURS), Ledger.read(connection, NAIVE)))

    def _changed_at(self) -> float:
        """Return the latest time when a ledger differed from its present state."""
        last = self.samples[-1]
        return next((s.at_s for s in reversed(self.samples) if (s.ours, s.naive) != (last.ours, last.naive)), 0.0)

    def _finished(self, carrier: Broker, stream: Stream, now: float) -> bool:
        """Whether every order is in both ledgers, every message is finished, and nothing has changed for a while."""
        last = self.samples[-1]
        if min(last.ours.orders, last.naive.orders) < stream.truth.orders:
            return False
        if now - self._changed_at() < carrier.quiet_s:
            return False
        return carrier.left(shop.GROUP) == 0 and carrier.left(naive.GROUP) == 0


def _make_tables(engine: Engine) -> None:
    exactly_once.alembic.upgrade(engine)
    with engine.begin() as connection:
        for schema in (OURS, NAIVE):
            connection.execute(text(f"CREATE SCHEMA {schema}"))
            inside = connection.execution_options(schema_translate_map={None: schema})
            shop.Base.metadata.create_all(inside)
            inside.execute(insert(shop.Stock), [{"sku": sku, "left": STOCK} for sku in PRODUCTS])


def _url(engine: Engine, schema: str, name: str) -> str:
    """Return a worker's database URL, with a search path: first the tables of exactly_once, then those of its shop."""
    url = engine.url.update_query_dict({"options": f"-csearch_path=public,{schema}", "application_name": name})
    return url.render_as_string(hide_password=False)


def _at_work(connection: Connection, worker: Worker) -> bool:
    """Whether one of the worker's connections is inside a transaction. A process that just started needs a second for that."""
    query = text("SELECT count(*) FROM pg_stat_activity WHERE application_name = :name AND xact_start IS NOT NULL")
    return bool(connection.execute(query, {"name": worker.name}).scalar_one())


def _claims(connection: Connection) -> tuple[int, int]:
    """Return the number of claims of exactly_once, and of messages in its failure store."""
    claims, failures = connection.execute(
        text("SELECT (SELECT count(*) FROM message_idempotent), (SELECT count(*) FROM message_failure)")
    ).one()
    return claims, failures


def _kill_all(workers: Sequence[Worker]) -> None:
    for worker in workers:
        worker.kill()
