"""Apache's clients for Java listen: what our producers send, and what a group is that both sides share. Called by tests."""

import json
import os
import signal
import tempfile
from base64 import b64decode
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from exactly_once.testing.child import Child
from tests.services.java_producer import fetch_jars
from tests.services.rocketmq import RocketMQ

__all__ = ["Heard", "JavaListener", "JavaTaker"]

CONSUMER = Path(__file__).with_name("Consumer.java")
TAKER = Path(__file__).with_name("Taker.java")


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """A message as Java's client hands it out."""

    id: str
    topic: str
    tags: str | None = None
    keys: str | None = None
    body: bytes
    properties: dict[str, str]
    """Its sender's and the broker's."""
    queue: int
    born: int
    """In milliseconds, by its sender's clock."""
    heard: int
    """In milliseconds, by the listener's."""
    again: int
    claimed: bool | None = None
    """It was the listener's to do; None where it claims nothing."""


class _Java:
    """A listener in a process of its own; killed at the end of the block, for an orderly end takes seconds."""

    def __init__(self, server: RocketMQ, program: Path, *arguments: str) -> None:
        handle, name = tempfile.mkstemp(prefix="java-", dir=server.directory)
        os.close(handle)
        java = ["java", "-Xmx128m", "-XX:TieredStopAtLevel=1", f"-Duser.home={server.directory}"]
        command = [*java, "-cp", f"{fetch_jars()}/*", str(program), *arguments]
        self._child = Child(f"Java's {program.stem}", command, output=Path(name))

    def __enter__(self) -> Self:
        self._child.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.end(signal.SIGKILL)

    def _lines(self, start: str) -> list[str]:
        lines = self._child.printed().splitlines(keepends=True)
        return [line.rstrip() for line in lines if line.startswith(start) and line.endswith("\n")]


class JavaListener(_Java):
    """A DefaultMQPushConsumer, which speaks to the broker.

    Args:
        server: Where it listens.
        group: Its consumer group.
        topics: All of them, each from its first message on.
        database: Where it claims and writes to a table `effect`, as JDBC's URL; None: it only listens.
        claim: The statement that claims, with a `?` for the key.
    """

    def __init__(
        self, server: RocketMQ, group: str, *topics: str, database: str | None = None, claim: str = ""
    ) -> None:
        claiming = [] if database is None else [database, claim]
        super().__init__(server, CONSUMER, server.name_server, group, ",".join(topics), *claiming)

    def heard(self) -> list[Heard]:
        """Return what it was handed until now, and has done."""
        return [_heard(json.loads(line)) for line in self._lines("{")]

    def wait_for(self, wanted: int) -> list[Heard]:
        """Wait until it was handed so many messages, and return them."""
        self._child.wait_until(lambda: len(self.heard()) >= wanted, what=f"hearing {wanted} messages", patience_s=120)
        return self.heard()


class JavaTaker(_Java):
    """A SimpleConsumer of rocketmq-client-java, which speaks to the proxy as the worker does; it acknowledges what it takes."""

    def __init__(self, server: RocketMQ, group: str, topic: str) -> None:
        super().__init__(server, TAKER, server.grpc, group, topic)

    def wait_for(self, wanted: int) -> list[bytes]:
        """Wait until it has taken so many messages, and return their bodies."""
        self._child.wait_until(lambda: len(self._took()) >= wanted, what=f"taking {wanted} messages", patience_s=120)
        return self._took()

    def _took(self) -> list[bytes]:
        return [line.removeprefix("took ").encode() for line in self._lines("took ")]


def _heard(told: dict[str, Any]) -> Heard:
    return Heard(**told | {"body": b64decode(told["body"])})
