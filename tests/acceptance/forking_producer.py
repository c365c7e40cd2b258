"""Sends before a fork, in children, and after: `python forking_producer.py URL TOPIC`, for each of RocketMQ's clients.

Prints what became of each send; a child ends as programs do, through the interpreter's exit.
"""

import os
import signal
import sys
from collections.abc import Callable

from exactly_once import ExactlyOnce, Message, SendFailed
from exactly_once.errors import ForkedProcess

DEADLINE_S = 20


def child(do: Callable[[], object]) -> str:
    """Say how a child ended that did it."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        signal.alarm(DEADLINE_S)
        try:
            do()
        except SendFailed as error:
            sys.exit(7 if isinstance(error.__cause__, ForkedProcess) else 8)
        except ForkedProcess:
            sys.exit(6)
        sys.exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return {0: "sent", 6: "refused", 7: "refused", 8: "failed", -signal.SIGALRM: "hung"}.get(code, str(code))


def main(url: str, topic: str) -> None:
    eo = ExactlyOnce("sqlite:///nothing.db", group="forking")

    @eo.handler(topic, key="no")
    def handler(order: dict[str, str]) -> None: ...

    def again() -> None:
        with eo.producer(url) as another:
            another.send(Message(topic, b"child, its own"))

    with eo.producer(url) as producer:
        print("before:", child(lambda: producer.send(Message(topic, b"child, before"))))
        producer.send(Message(topic, b"parent"))
        print("after:", child(lambda: producer.send(Message(topic, b"child, after"))))
        print("its own:", child(again))
        print("a consumer:", child(lambda: eo.transport(url).subscribe("forking", eo.subscriptions())))
        print("closed:", child(producer.close))
        print("parent:", producer.send(Message(topic, b"parent")).topic == topic)


if __name__ == "__main__":
    main(*sys.argv[1:])
