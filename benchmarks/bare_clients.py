"""The bare clients of RocketMQ, which only receive and acknowledge; and a function that measures how fast a count rises."""

from collections.abc import Callable
from threading import Event, Lock, Thread
from time import perf_counter, sleep
from typing import Any, Final

from benchmarks.measure import WrongRows

__all__ = ["THREADS", "Count", "bare4", "bare5", "rate_of"]

THREADS: Final = 16
PATIENCE_S: Final = 120.0
FIRST_SHARE: Final = 0.1  # of a turn's messages, not counted: joining the group is not measured


def rate_of(done: Callable[[], int], each: int) -> float:
    """Return how many are done in a second, from the end of the first share to the end of all."""
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


def bare5(endpoint: str, topic: str, group: str, each: int) -> float:
    """RocketMQ 5's own SimpleConsumer: each thread receives up to 16 messages and acknowledges them one after the other."""
    from exactly_once.transports.rocketmq5 import wall

    wall.build()  # so that the client's import does not close every log handler
    from rocketmq import ClientConfiguration, Credentials, FilterExpression, SimpleConsumer

    consumer = SimpleConsumer(ClientConfiguration(endpoint, Credentials()), group, {topic: FilterExpression()}, 2)
    consumer.startup()
    count = Count()
    stopped = Event()

    def turn() -> None:
        while not stopped.is_set():
            try:
                received = consumer.receive(16, 30)
            except Exception:  # the group's settings arrive after a moment
                sleep(0.1)
                continue
            for message in received or ():
                consumer.ack(message)
                count.add()

    threads = [Thread(target=turn, daemon=True) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    rate = rate_of(lambda: count.value, each)
    stopped.set()
    for thread in threads:
        thread.join(10)
    consumer.shutdown()
    return rate


_kept: list[Any] = []


def bare4(name_servers: str, topic: str, group: str, each: int) -> float:
    """The older client's push consumer: a callback that looks at the body and answers success."""
    from exactly_once.transports.rocketmq4.library import load

    client = load().client
    count = Count()

    def callback(message: Any) -> Any:
        len(message.body)
        count.add()
        return client.ConsumeStatus.CONSUME_SUCCESS

    consumer = client.PushConsumer(group)
    _kept.append(consumer)  # if it were garbage collected while its threads run, the process would end
    consumer.set_name_server_address(name_servers)
    consumer.set_thread_count(THREADS)
    consumer.set_instance_name(f"bare-{topic}")
    consumer.subscribe(topic, callback)
    consumer.start()
    rate = rate_of(lambda: count.value, each)
    consumer.shutdown()
    return rate


class Count:
    """Counts from several threads."""

    def __init__(self) -> None:
        self.value = 0
        self._lock = Lock()

    def add(self, more: int = 1) -> None:
        with self._lock:
            self.value += more
