"""RocketMQ end to end: receive, transaction, acknowledge. Our worker against what its parts can do alone.

These rates are measured in turn, each over a topic that was filled before, one message at a time with the same number of threads:

* `worker`: our worker over the broker, with the one-insert-one-update handler;
* `client`: the bare client, which only receives and acknowledges;
* `memory`: the same worker and handler, fed from `memory://`;
* `sets`, and `sets, memory`: the same with a handler that takes lists;
* `acks`: our consumer of that broker alone, which acknowledges a whole receive in one call if the broker can.

The first figure is worker / min(client, memory). Both halves share one interpreter, as in a worker: if the processor limits both,
the worker cannot come near the smaller of the two.

Each client needs an environment of its own, so each is measured in a process of its own: `python -m benchmarks.rocketmq`.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from statistics import median
from threading import Event, Thread
from typing import Final

from benchmarks.bare_clients import THREADS, Count, bare4, bare5, rate_of
from benchmarks.contenders import SET
from benchmarks.measure import Figure, ratios, take_turns
from benchmarks.orders import messages
from benchmarks.shop import application, clear, require
from benchmarks.stage import Stage
from exactly_once.outcome import Ack
from exactly_once.testing.child import wait_until
from exactly_once.transports.contract import Consumer, Subscription, Surroundings
from exactly_once.transports.registry import transport_from

__all__ = ["measure"]

ROOT: Final = Path(__file__).parents[1]
SHARE: Final = 0.85
SETS_SHARE: Final = 0.80
ACKS: Final = 1.5
UPDATE_CONSUMER_OFFSET: Final = 15
USUAL: Final = 16
ENDLESS: Final = 2147483647  # the old client loses messages that were sent back more often than this
QUEUES: Final = 8
SETS_TIMES: Final = 5
"""Messages in sets for each single message, so that turns have about the same length."""
SECOND_PYTHON: Final = "EXACTLY_ONCE_ROCKETMQ4_PYTHON"


def measure(stage: Stage, *, quick: bool) -> Iterator[Figure]:
    """Measure both clients, each in its own environment."""
    from tests.services import rocketmq

    missing = rocketmq.missing()
    rounds, each = (1, 300) if quick else (3, 2000)
    for client, python in (("rocketmq", Path(sys.executable)), ("rocketmq4", _second_python())):
        name, what = f"{client}://", "worker / min(bare client, fed from memory)"
        reason = missing or ("" if python.exists() else f"there is no {python}; `make test` makes it")
        if reason:
            yield Figure(name=name, what=what, target=SHARE, least=True, skipped=reason)
            continue
        with rocketmq.RocketMQ() as server, stage.database() as database:
            place = f"{client}://{server.grpc if client == 'rocketmq' else server.name_server}"
            command = [str(python), "-m", "benchmarks.rocketmq", place, server.broker]
            ran = subprocess.run(
                [*command, server.name_server, str(rounds), str(each)],
                input=database.url,  # other users could see its password among the arguments
                capture_output=True,
                text=True,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
        if ran.returncode != 0:
            raise RuntimeError(f"the measurement of {client} failed:\n{(ran.stdout + ran.stderr)[-3000:]}")
        yield from _figures(name, what, json.loads(ran.stdout.splitlines()[-1]), quick=quick)


def _figures(name: str, what: str, rates: dict[str, list[float]], *, quick: bool) -> Iterator[Figure]:
    hurried = ", one short round (--quick)" if quick else ""

    def figure(what: str, ours: str, *others: str, target: float, note: str) -> Figure:
        least = [min(each) for each in zip(*(rates[other] for other in others), strict=True)]
        return Figure(
            name=name,
            what=what,
            rounds=ratios(rates[ours], least),
            target=target,
            least=True,
            measured={kind: f"{median(rates[kind]):,.0f}/s" for kind in (ours, *others)},
            note=note + hurried,
        )

    yield figure(what, "worker", "client", "memory", target=SHARE, note=f"{THREADS} threads")
    if name == "rocketmq4://":
        what = "worker with sets / min(bare client, sets fed from memory)"
        yield figure(what, "sets", "client", "sets, memory", target=SETS_SHARE, note=f"batch={SET}")
    else:
        what = "our consumer, acknowledging in groups / bare client, one by one"
        yield figure(what, "acks", "client", target=ACKS, note="no handler")
        yield figure("worker with sets / bare client, one by one", "sets", "client", target=ACKS, note=f"batch={SET}")


def _second_python() -> Path:
    return Path(os.environ.get(SECOND_PYTHON) or ROOT / ".venv-rocketmq4" / "bin" / "python")


# -- in the client's own environment -------------------------------------------------------------------------------------


class _Turns:
    """One client's turns, against one broker and one database."""

    def __init__(self, url: str, database: str, broker: str, name_server: str) -> None:
        from sqlalchemy import create_engine

        self._url, self._database, self._broker, self._name_server = url, database, broker, name_server
        self._engine = create_engine(database)
        self._number = 0

    def worker(self, each: int) -> float:
        """Run our worker over the broker."""
        topic, group = self._filled(each)
        return self._worked(self._url, topic, group, each)

    def memory(self, each: int, *, in_sets: bool = False) -> float:
        """Run our worker over a broker in this process."""
        self._number += 1
        topic, group = f"benchmark-{self._number}", f"benchmark-group-{self._number}"
        url = f"memory://{topic}"
        with application(self._database, topic=topic, group=group).producer(url) as producer:
            producer.send_all(messages(each, topic=topic))
        return self._worked(url, topic, group, each, in_sets=in_sets)

    def sets(self, each: int) -> float:
        """Run our worker over the broker, with a handler that takes lists."""
        topic, group = self._filled(SETS_TIMES * each)
        return self._worked(self._url, topic, group, SETS_TIMES * each, in_sets=True)

    def sets_memory(self, each: int) -> float:
        """The same over a broker in this process."""
        return self.memory(SETS_TIMES * each, in_sets=True)

    def acks(self, each: int) -> float:
        """Run our consumer alone: receive, and acknowledge all messages of a receive together."""
        topic, group = self._filled(SETS_TIMES * each)
        transport = transport_from(self._url, Surroundings())
        count = Count()
        stopped = Event()
        consumers = transport.subscribe(group, [Subscription(topic, largest_batch=SET)])

        def turn(consumer: Consumer) -> None:
            while not stopped.is_set():
                received = consumer.receive(SET, timedelta(seconds=1))
                consumer.settle([(delivery, Ack()) for delivery in received])
                count.add(len(received))

        threads = [Thread(target=turn, args=(consumer,), daemon=True) for consumer in consumers]
        for thread in threads:
            thread.start()
        rate = rate_of(lambda: count.value, SETS_TIMES * each)
        stopped.set()
        for thread in threads:
            thread.join(10)
        for consumer in consumers:
            consumer.stop()
            consumer.close()
        return rate

    def client(self, each: int) -> float:
        """Run the bare client: receive and acknowledge."""
        topic, group = self._filled(each)
        bare = bare5 if self._url.startswith("rocketmq:") else bare4
        return bare(self._url.partition("://")[2], topic, group, each)

    def _filled(self, each: int) -> tuple[str, str]:
        """Make a topic, make a group that starts at the beginning of the topic, and send."""
        from tests.services.rocketmq_admin import Admin

        self._number += 1
        topic, group = f"benchmark-{self._number}", f"benchmark-group-{self._number}"
        with Admin(self._broker) as broker:
            broker.create_topic(topic, queues=QUEUES)
            broker.create_group(group, retries=ENDLESS if self._url.startswith("rocketmq4:") else USUAL)
            with Admin(self._name_server) as names:
                wait_until(lambda: names.has_route(topic), what="the topic has a route", patience_s=30)
            if self._url.startswith(
                "rocketmq4:"
            ):  # this client starts after the last message of a topic that is new to its group
                for queue in range(QUEUES):
                    place = {"consumerGroup": group, "topic": topic, "queueId": queue, "commitOffset": 0}
                    broker.demand(UPDATE_CONSUMER_OFFSET, place)
        with application(self._database, topic=topic, group=group).producer(self._url) as producer:
            fresh = messages(each, topic=topic)
            for start in range(0, each, 200):
                producer.send_all(fresh[start : start + 200])
        return topic, group

    def _worked(self, url: str, topic: str, group: str, each: int, *, in_sets: bool = False) -> float:
        clear(self._engine)
        eo = application(self._database, topic=topic, group=group, batch=SET if in_sets else None, in_sets=in_sets)
        with eo.worker(url, concurrency=THREADS) as worker:
            rate = rate_of(lambda: worker.counts.acked, each)
        require(self._engine, each)
        return rate


def main(arguments: Sequence[str] | None = None) -> None:
    """Take the turns, and print the rates as one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rocketmq")
    for name in ("url", "broker", "name_server"):
        parser.add_argument(name)
    parser.add_argument("rounds", type=int)
    parser.add_argument("each", type=int)
    given = parser.parse_args(arguments)
    turns = _Turns(given.url, sys.stdin.read(), given.broker, given.name_server)
    rates = take_turns(
        {
            "worker": turns.worker,
            "client": turns.client,
            "memory": turns.memory,
            "sets": turns.sets,
            "sets, memory": turns.sets_memory,
            "acks": turns.acks,
        },
        rounds=given.rounds,
        each=given.each,
        warm_up=False,  # each turn does not count its own beginning
    )
    print(json.dumps(rates), flush=True)
    os._exit(0)  # the native clients of both kinds have crashed while the interpreter ended


if __name__ == "__main__":
    main()
