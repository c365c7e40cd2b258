"""Apache's client for Java sends a message: what it does on the wire no client of Python does. Called by tests.

Its jars come from Maven Central, once, into `.servers/rocketmq-client`, with what else `java_consumer` needs. It is of
another version than the server.
"""

import shutil
import subprocess
from pathlib import Path

from tests.services.rocketmq import ROOT, RocketMQ, fetched

__all__ = ["fetch_jars", "missing", "send"]

POM = Path(__file__).with_name("client-pom.xml")
PROGRAM = Path(__file__).with_name("Producer.java")
LIB = ROOT / ".servers" / "rocketmq-client"
SIGN = "postgresql-*.jar"  # there, all are: the client's alone may be of an earlier checkout


def missing() -> str | None:
    """Say why Java's client cannot send here, or return None."""
    if shutil.which("javac") is None:
        return "Java's client needs a JDK of 17 or newer, and there is none here (apt-get install default-jdk-headless)"
    if not list(LIB.glob(SIGN)) and shutil.which("mvn") is None:
        return (
            f"the jars of Java's client are not in {LIB}, and there is no `mvn` to fetch them (apt-get install maven)"
        )
    return None


def fetch_jars() -> Path:
    """Bring the client's jars from Maven Central unless they are here, and return their folder."""
    return fetched(POM, LIB, SIGN)


def send(
    server: RocketMQ, topic: str, *, keys: str = "", tag: str = "", size: int = 0, compression: str | None = None
) -> tuple[str, bytes]:
    """Send one message, and return its id and its body.

    Args:
        server: Where to.
        topic: Where to.
        keys: With blanks between them.
        tag: The tag.
        size: So long the body is at least; one of more than 4 KiB is packed.
        compression: How: LZ4, ZSTD or ZLIB, which is the client's own choice.
    """
    options = [f"-Drocketmq.message.compressType={compression}"] if compression else []
    arguments = [server.name_server, topic, tag, keys, str(size)]
    home = f"-Duser.home={server.directory}"  # where it writes its logs
    java = ["java", home, *options, "-cp", f"{fetch_jars()}/*", str(PROGRAM), *arguments]
    ended = subprocess.run(java, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (id_,) = [line.removeprefix("sent ") for line in ended.stdout.splitlines() if line.startswith("sent ")]
    body = f'{{"no":"{keys}","filling":"'
    while len(body) < size:
        body += "filling "
    return id_, (body + '"}').encode()
