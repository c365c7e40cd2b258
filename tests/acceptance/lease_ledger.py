"""An outside service that leases' handlers call, and its clients: a real HTTP server in a process of its own on loopback.

    python -m tests.acceptance.lease_ledger PORT WORK_S

It knows nothing of the package. It writes down every call as it came (idempotency key, attempt, message, step, who, and
when it began and ended) and gives the list when asked. A call whose attempt is lower than one it has seen of the same
message is refused with 409, and written down as refused: that is what a service can do with the number it is sent.

Times are CLOCK_MONOTONIC, which is one clock for all processes of a machine, and goes on while a process is stopped.
"""

import json
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from exactly_once.testing.child import Child, free_ports

ROOT = Path(__file__).parents[2]


class Refused(Exception):
    """The service has seen a later attempt of this message."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call, as the service saw it."""

    key: str
    attempt: int
    message: str
    step: str
    pid: int
    """The caller's."""
    asked: float
    """When the caller began the step, by its own word: before it spoke to anybody."""
    began: float
    ended: float
    refused: bool


class Ledger:
    """The service, as its callers see it: a connection that is kept for each thread."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._mine = threading.local()

    def call(self, key: str, attempt: int, message: str, step: str, pid: int, asked: float) -> dict[str, Any]:
        """Do what the service does; returns its receipt, which is the same for the same key."""
        told = {"key": key, "attempt": attempt, "message": message, "step": step, "pid": pid, "asked": asked}
        status, answer = self._ask("POST", "/calls", json.dumps(told).encode())
        if status == 409:
            raise Refused(f"attempt {attempt} of {message}: a later one was here")
        assert status == 200, (status, answer)
        return dict(answer)

    def calls(self) -> list[Call]:
        """Every call so far, in the order they began."""
        _, answer = self._ask("GET", "/calls")
        return [Call(**each) for each in answer]

    def progress(self) -> tuple[int, dict[int, int]]:
        """How many steps were called, and how many calls each process made."""
        _, answer = self._ask("GET", "/progress")
        return answer["steps"], {int(pid): count for pid, count in answer["pids"].items()}

    def answers(self) -> bool:
        """Say whether it runs."""
        try:
            self.progress()
        except OSError:
            return False
        return True

    def _ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
        connection: HTTPConnection | None = getattr(self._mine, "connection", None)
        if connection is None:
            connection = self._mine.connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            # never sent twice: a call that was made is a call
            connection.request(method, path, body)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        except BaseException:
            connection.close()
            self._mine.connection = None
            raise


@contextmanager
def ledger(directory: Path, *, work_s: float = 0.0) -> Iterator[Ledger]:
    """Run the service for the block.

    Args:
        directory: Where its output goes.
        work_s: How long a call takes there.
    """
    (port,) = free_ports()
    command = [sys.executable, "-m", "tests.acceptance.lease_ledger", str(port), str(work_s)]
    child = Child("the ledger", command, output=directory / "ledger.log", environ={"PYTHONPATH": str(ROOT)})
    child.start()
    made = Ledger(port)
    try:
        child.wait_until(made.answers, what="answering", patience_s=30)
        yield made
    finally:
        child.end(signal.SIGKILL)


class _Book:
    """What the service remembers; its methods are called by one thread for each connection."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: list[Call] = []
        self._receipts: dict[str, int] = {}
        self._attempts: dict[str, int] = {}
        self._pids: dict[int, int] = {}
        self._steps: set[tuple[str, str]] = set()

    def enter(self, told: dict[str, Any], work_s: float) -> dict[str, Any] | None:
        began = time.monotonic()
        with self._lock:
            latest = self._attempts.get(told["message"], 0)
            refused = told["attempt"] < latest
            self._attempts[told["message"]] = max(latest, told["attempt"])
            self._pids[told["pid"]] = self._pids.get(told["pid"], 0) + 1
            self._steps.add((told["message"], told["step"]))
            if not refused:
                receipt = self._receipts.setdefault(told["key"], len(self._receipts) + 1)
        if not refused:
            time.sleep(work_s)
        call = Call(**told, began=began, ended=time.monotonic(), refused=refused)
        with self._lock:
            self._calls.append(call)
        return None if refused else {"receipt": receipt}

    def calls(self) -> Sequence[dict[str, Any]]:
        with self._lock:
            return [asdict(call) for call in sorted(self._calls, key=lambda call: call.began)]

    def progress(self) -> dict[str, Any]:
        with self._lock:
            return {"steps": len(self._steps), "pids": dict(self._pids)}


def serve(port: int, work_s: float) -> None:
    book = _Book()

    class Answering(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1  # head and body in one packet

        def do_POST(self) -> None:
            told = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = book.enter(told, work_s)
            self._answer(409 if answer is None else 200, answer)

        def do_GET(self) -> None:
            self._answer(200, book.calls() if self.path == "/calls" else book.progress())

        def _answer(self, status: int, answer: object) -> None:
            body = json.dumps(answer).encode()
            self.send_response_only(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    class Server(ThreadingHTTPServer):
        request_queue_size = 128

        def handle_error(self, request: object, client_address: object) -> None:
            """A caller that was killed; its call is written down."""

    Server(("127.0.0.1", port), Answering).serve_forever()


if __name__ == "__main__":
    serve(int(sys.argv[1]), float(sys.argv[2]))
