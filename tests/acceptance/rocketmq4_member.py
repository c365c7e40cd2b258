"""A member of a group over `rocketmq4://`, as a process to be killed. Writes a line for each message it was given.

    python -m tests.acceptance.rocketmq4_member URL GROUP TOPIC LEDGER [--ordered] [--work S] [--kill BODY] [--drain]

A message whose body begins with `--kill` ends the process with SIGKILL, as a crash in a handler does. With `--drain`
SIGTERM stops it as the worker would: what is in hand is settled, then it leaves and exits with 7.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from threading import Event

from exactly_once.outcome import Ack, Redeliver
from exactly_once.transports.contract import Consumer, Delivery, Subscription, Surroundings
from exactly_once.transports.registry import transport_from

LEFT_IN_ORDER = 7


def main(arguments: Sequence[str]) -> int:
    """Receive until told to stop."""
    parser = argparse.ArgumentParser()
    for name in ("url", "group", "topic", "ledger"):
        parser.add_argument(name)
    parser.add_argument("--ordered", action="store_true")
    parser.add_argument("--work", type=float, default=0.0)
    parser.add_argument("--kill", default="\0never")
    parser.add_argument("--unsettled", action="store_true", help="leave everything unsettled")
    given = parser.parse_args(arguments)
    stopping = Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    transport = transport_from(given.url, Surroundings())
    [consumer] = transport.subscribe(given.group, [Subscription(given.topic, ordered=given.ordered)])
    ledger = os.open(given.ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    most = transport.features.max_attempts or 0

    def handle(delivery: Delivery, consumer: Consumer) -> None:
        body = (delivery.message.body or b"").decode()
        parked = delivery.message.attempt >= most
        state = "parked" if parked else "run"
        os.write(ledger, f"{os.getpid()} {state} {delivery.message.attempt} {body}\n".encode())
        if body.startswith(given.kill) and not parked:
            time.sleep(given.work)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(given.work)
        if not given.unsettled:
            os.write(ledger, f"{os.getpid()} done {delivery.message.attempt} {body}\n".encode())
            consumer.settle([(delivery, Ack())])

    held: list[Delivery] = []
    with ThreadPoolExecutor(16) as pool:
        while not stopping.is_set():
            for delivery in consumer.receive(16, timedelta(seconds=0.2)):
                held.append(delivery)
                pool.submit(handle, delivery, consumer)
        consumer.stop()
    if given.unsettled:
        consumer.settle([(delivery, Redeliver()) for delivery in held])
    consumer.close()
    return LEFT_IN_ORDER


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
