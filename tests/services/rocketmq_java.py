"""Sends with Java's own client, out of the jars that the server came with. It starts a JVM for each call (2 s)."""

import subprocess
from pathlib import Path

from tests.services.rocketmq import RocketMQ, fetch_jars

__all__ = ["java_sends"]

PROGRAM = Path(__file__).with_name("Sends.java")


def java_sends(server: RocketMQ, topic: str, transactions: str | None = None) -> None:
    """Send one message with the ordering key "A" to `topic`, and one in a transaction to a topic of type TRANSACTION.

    Each has the properties city ("Köln"), blank (one blank) and empty (an empty text). Behind a transaction a thread of this
    server's (TransactionalOpBatchService of 5.5.0) takes a whole processor until the server ends.
    """
    command = ["java", "-Xmx128m", "-XX:TieredStopAtLevel=1", "-Dfile.encoding=UTF-8", "-cp", f"{fetch_jars()}/*"]
    done = subprocess.run(
        [*command, str(PROGRAM), server.name_server, topic, *([] if transactions is None else [transactions])],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
