"""RocketMQ end to end: receive, transaction, acknowledge; ours against what the parts can do alone.

Three rates, in turn, with the same number of threads, each over a topic that was filled before:

* `worker`: our worker over the broker, with the one-insert-one-update handler;
* `client`: the bare client, receiving and acknowledging only;
* `memory`: the same worker and handler fed from `memory://`.

The figure is worker / min(client, memory). Both halves share one interpreter here, as they do in a worker: where both are
bound by the processor, one cannot come near the smaller of the two.

Each client needs an environment of its own, so a client's part is a process of its own: `python -m benchmarks.rocketmq`.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Event, Lock, Thread
from time import perf_counter, sleep
from typing import Any, Final

from benchmarks.measure import Figure, WrongRows, take_turns
from benchmarks.orders import messages
from benchmarks.shop import application, clear, require
from benchmarks.stage import Stage
from exactly_once.testing.child import wait_until

__all__ = ["measure"]

ROOT: Final = Path(__file__).parents[1]
SHARE: Final = 0.85
THREADS: Final = 16
PATIENCE_S: Final = 120.0
FIRST_SHARE: Final = 0.1  # of a turn's messages, not counted: joining the group is not what is measured
UPDATE_CONSUMER_OFFSET: Final = 15
USUAL: Final = 16
ENDLESS: Final = 2147483647  # the old client loses what was sent back more often than that
QUEUES: Final = 8
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
            command = [str(python), "-m", "benchmarks.rocketmq", place, database.url, server.broker]
            ran = subprocess.run(
                [*command, server.name_server, str(rounds), str(each)],
                capture_output=True,
                text=True,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
        if ran.returncode != 0:
            raise RuntimeError(f"the measurement of {client} failed:\n{(ran.stdout + ran.stderr)[-3000:]}")
        yield _figure(name, what, json.loads(ran.stdout.splitlines()[-1]), quick=quick)


def _figure(name: str, what: str, rates: dict[str, list[float]], *, quick: bool) -> Figure:
    rounds = [
        worker / min(client, memory)
        for worker, client, memory in zip(rates["worker"], rates["client"], rates["memory"], strict=True)
    ]
    middle = {kind: sorted(values)[len(values) // 2] for kind, values in rates.items()}
    return Figure(
        name=name,
        what=what,
        rounds=rounds,
        target=SHARE,
        least=True,
        measured={kind: f"{rate:,.0f}/s" for kind, rate in middle.items()},
        note=f"{THREADS} threads" + (", one short round (--quick)" if quick else ""),
    )


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

    def memory(self, each: int) -> float:
        """Run our worker over a broker in this process."""
        self._number += 1
        topic, group = f"benchmark-{self._number}", f"benchmark-group-{self._number}"
        url = f"memory://{topic}"
        with application(self._database, topic=topic, group=group).producer(url) as producer:
            producer.send_all(messages(each, topic=topic))
        return self._worked(url, topic, group, each)

    def client(self, each: int) -> float:
        """Run the bare client: receive and acknowledge."""
        topic, group = self._filled(each)
        bare = _bare5 if self._url.startswith("rocketmq:") else _bare4
        return bare(self._url.partition("://")[2], topic, group, each)

    def _filled(self, each: int) -> tuple[str, str]:
        """Make a topic and a group that starts at its beginning, and send."""
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
            ):  # this client starts behind the last message of a topic new to its group
                for queue in range(QUEUES):
                    place = {"consumerGroup": group, "topic": topic, "queueId": queue, "commitOffset": 0}
                    broker.demand(UPDATE_CONSUMER_OFFSET, place)
        with application(self._database, topic=topic, group=group).producer(self._url) as producer:
            fresh = messages(each, topic=topic)
            for start in range(0, each, 200):
                producer.send_all(fresh[start : start + 200])
        return topic, group

    def _worked(self, url: str, topic: str, group: str, each: int) -> float:
        clear(self._engine)
        eo = application(self._database, topic=topic, group=group)
        with eo.worker(url, concurrency=THREADS) as worker:
            rate = _rate(lambda: worker.counts.acked, each)
        require(self._engine, each)
        return rate


def _rate(done: Callable[[], int], each: int) -> float:
    """Return how many a second, from when the first share is done until all are."""
    began_at = perf_counter()
    start = 0
    began = 0.0
    while True:
        now, count = perf_counter(), done()
        if not start and count >= each * FIRST_SHARE:
            start, began = count, now
        if count >= each:
            return (count - start) / (now - began)
        if now - began_at > PATIENCE_S:
            raise WrongRows(f"{count} of {each} messages were finished after {PATIENCE_S:.0f} s")
        sleep(0.002)


def _bare5(endpoint: str, topic: str, group: str, each: int) -> float:
    """RocketMQ 5's own SimpleConsumer: each thread receives up to 16 and acknowledges one after the other."""
    from exactly_once.transports.rocketmq5 import wall

    wall.build()  # keeps the client's import from closing every log handler
    from rocketmq import ClientConfiguration, Credentials, FilterExpression, SimpleConsumer

    consumer = SimpleConsumer(ClientConfiguration(endpoint, Credentials()), group, {topic: FilterExpression()}, 2)
    consumer.startup()
    count = _Count()
    stopped = Event()

    def turn() -> None:
        while not stopped.is_set():
            try:
                received = consumer.receive(16, 30)
            except Exception:  # the group's settings take a moment to arrive
                sleep(0.1)
                continue
            for message in received or ():
                consumer.ack(message)
                count.add()

    threads = [Thread(target=turn, daemon=True) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    rate = _rate(lambda: count.value, each)
    stopped.set()
    for thread in threads:
        thread.join(10)
    consumer.shutdown()
    return rate


_kept: list[Any] = []


def _bare4(name_servers: str, topic: str, group: str, each: int) -> float:
    """The older client's push consumer: a callback that looks at the body and answers success."""
    from exactly_once.transports.rocketmq4.library import load

    client = load().client
    count = _Count()

    def callback(message: Any) -> Any:
        len(message.body)
        count.add()
        return client.ConsumeStatus.CONSUME_SUCCESS

    consumer = client.PushConsumer(group)
    _kept.append(consumer)  # collected while its threads run, it would end the process
    consumer.set_name_server_address(name_servers)
    consumer.set_thread_count(THREADS)
    consumer.set_instance_name(f"bare-{topic}")
    consumer.subscribe(topic, callback)
    consumer.start()
    rate = _rate(lambda: count.value, each)
    consumer.shutdown()
    return rate


class _Count:
    """Counts from several threads."""

    def __init__(self) -> None:
        self.value = 0
        self._lock = Lock()

    def add(self) -> None:
        with self._lock:
            self.value += 1


def main(arguments: Sequence[str] | None = None) -> None:
    """Take the turns, and print the rates as one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rocketmq")
    for name in ("url", "database", "broker", "name_server"):
        parser.add_argument(name)
    parser.add_argument("rounds", type=int)
    parser.add_argument("each", type=int)
    given = parser.parse_args(arguments)
    turns = _Turns(given.url, given.database, given.broker, given.name_server)
    rates = take_turns(
        {"worker": turns.worker, "client": turns.client, "memory": turns.memory},
        rounds=given.rounds,
        each=given.each,
        warm_up=False,  # each turn leaves its own beginning out
    )
    print(json.dumps(rates), flush=True)
    os._exit(0)  # native clients of both kinds have been seen to crash while the interpreter is torn down


if __name__ == "__main__":
    main()
