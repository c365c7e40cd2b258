"""Stands between a client and its database or Redis: adds latency, stalls, cuts the connection at a COMMIT, counts round trips.

It never changes a byte. Called by tests and benchmarks. `cut_before_commit` loses the request: the server rolls back.
`cut_after_commit` loses the answer: the server has committed, and the client cannot know. Both look alike to the client.
"""

import argparse
import contextlib
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Literal, Self

from sqlalchemy import make_url

from exactly_once.testing.child import Child, wait_until
from tests.services.wire import Speech, speech_for

__all__ = ["Proxy", "far_away", "through"]

COMMIT = re.compile(rb"(?:^|;)\s*(?:commit|end(?!\s+if))\b", re.IGNORECASE)

Direction = Literal["requests", "replies"]


class _Cut:
    """One cut to make: at the n-th statement that matches, before it is forwarded or after it was carried out."""

    def __init__(self, when: Literal["before", "after"], nth: int, pattern: re.Pattern[bytes]) -> None:
        self.when, self.pattern = when, pattern
        self._left = nth
        self._lock = threading.Lock()

    def now(self, statement: bytes) -> bool:
        if not self.pattern.search(statement):
            return False
        with self._lock:
            self._left -= 1
            return self._left == 0


class Proxy:
    """A proxy on a loopback port of its own, for one database server or Redis.

    Args:
        url: The server's SQLAlchemy URL, or that of a Redis; it says the address and which protocol is spoken.
        delay: Added to each direction, so that a round trip takes twice as much longer.

    Example:
        with Proxy(url) as proxy:
            engine = create_engine(proxy.url)
            proxy.cut_after_commit()
    """

    def __init__(self, url: str, *, delay: timedelta = timedelta(0)) -> None:
        target = make_url(url)
        self._backend = target.get_backend_name()
        self._target = (
            target.host or "127.0.0.1",
            target.port or {"postgresql": 5432, "redis": 6379}.get(self._backend, 3306),
        )
        self._delay_s = delay.total_seconds()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = through(url, self.port)
        """The server's URL, by way of this proxy."""
        self.commits = 0
        """COMMITs that clients have sent, also those that were cut."""
        self.cuts = 0
        """Connections cut by `cut_before_commit`, `cut_after_commit` and `cut_at`."""
        self.round_trips = 0
        """How often a client spoke after it had been answered, handshakes included: what a network charges for."""
        self._lock = threading.Lock()
        self._cut: _Cut | None = None
        self._flowing: dict[Direction, threading.Event] = {"requests": threading.Event(), "replies": threading.Event()}
        self._open: set[_Line] = set()
        self._down = False
        self.resume()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Accept connections from now on."""
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    def close(self) -> None:
        """Cut everything and accept no more."""
        # accept() in its thread is woken by shutdown, not by close
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.resume()
        self.cut_all()

    def lead_to(self, url: str) -> None:
        """Lead new connections to another server, as the address of a planned switchover does; the others stay."""
        target = make_url(url)
        self._target = (target.host or "127.0.0.1", target.port or 0)

    def cut_before_commit(self, nth: int = 1) -> None:
        """Cut the connection that sends the nth COMMIT from now, instead of forwarding it."""
        self.cut_at(COMMIT, "before", nth)

    def cut_after_commit(self, nth: int = 1) -> None:
        """Cut the connection that sends the nth COMMIT from now, when the server has answered, without that answer."""
        self.cut_at(COMMIT, "after", nth)

    def cut_at(self, pattern: re.Pattern[bytes], when: Literal["before", "after"], nth: int = 1) -> None:
        """The same at any statement; only the latest order holds."""
        self._cut = _Cut(when, nth, pattern)

    def cut_all(self) -> None:
        """Cut every connection there is; new ones are accepted."""
        with self._lock:
            lines = list(self._open)
        for line in lines:
            line.cut()

    def go_down(self) -> None:
        """Cut every connection and refuse new ones, as a server that is away."""
        self._down = True
        self.cut_all()

    def come_up(self) -> None:
        """Accept connections again."""
        self._down = False

    def stall(self, direction: Direction) -> None:
        """Hold back what flows in one direction, as a network that swallows packets; `resume` lets it through."""
        self._flowing[direction].clear()

    def resume(self) -> None:
        """Let both directions flow."""
        for event in self._flowing.values():
            event.set()

    def wait_for_cut(self, count: int = 1, *, patience_s: float = 30) -> None:
        """Wait until `count` connections were cut at a statement."""
        wait_until(lambda: self.cuts >= count, what=f"{count} connections were cut", patience_s=patience_s)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._down:
                client.close()
                continue
            try:
                server = socket.create_connection(self._target, timeout=10)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            line = _Line(self, client, server, speech_for(self._backend))
            with self._lock:
                self._open.add(line)
            line.start()

    # what a line tells its proxy

    def _closed(self, line: "_Line") -> None:
        with self._lock:
            self._open.discard(line)

    def _turned(self) -> None:
        with self._lock:
            self.round_trips += 1

    def _sees(self, statement: bytes) -> Literal["before", "after"] | None:
        if COMMIT.search(statement):
            with self._lock:
                self.commits += 1
        cut = self._cut
        return cut.when if cut is not None and cut.now(statement) else None

    def _was_cut(self) -> None:
        with self._lock:
            self.cuts += 1


class _Line:
    """One client's connection: a reader and a writer thread each way, so that latency does not add up over packets."""

    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket, speech: Speech) -> None:
        self._proxy, self._client, self._server, self._speech = proxy, client, server, speech
        self._requests: SimpleQueue[tuple[float, bytes]] = SimpleQueue()
        self._replies: SimpleQueue[tuple[float, bytes]] = SimpleQueue()
        self._cut_once_answered: int | None = None
        self._client_spoke_last = False
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def start(self) -> None:
        for work in (self._read_requests, self._read_replies):
            threading.Thread(target=work, daemon=True).start()
        for source, sink, direction in (
            (self._requests, self._server, "requests"),
            (self._replies, self._client, "replies"),
        ):
            threading.Thread(target=self._write, args=(source, sink, direction), daemon=True).start()

    def cut(self) -> None:
        """End both connections at once; what is on its way is lost."""
        for end in (self._client, self._server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        for queue in (self._requests, self._replies):
            queue.put((0.0, b""))
        self._proxy._closed(self)

    def _read_requests(self) -> None:
        while data := _received(self._client):
            if not self._client_spoke_last:
                self._client_spoke_last = True
                self._proxy._turned()
            for request in self._speech.from_client(data):
                when = self._proxy._sees(request.statement) if request.statement else None
                if when == "before":
                    self._proxy._was_cut()
                    self.cut()
                    return
                if when == "after":
                    # before it is forwarded, or its answer could slip through
                    self._cut_once_answered = request.answered_as
                self._requests.put((time.monotonic() + self._proxy._delay_s, request.frame))
        self._requests.put((time.monotonic() + self._proxy._delay_s, b""))

    def _read_replies(self) -> None:
        while data := _received(self._server):
            self._client_spoke_last = False
            answered = self._speech.from_server(data)
            if self._cut_once_answered is None:
                self._replies.put((time.monotonic() + self._proxy._delay_s, data))
            elif answered >= self._cut_once_answered:
                self._proxy._was_cut()
                self.cut()
                return
        self._replies.put((time.monotonic() + self._proxy._delay_s, b""))

    def _write(self, source: SimpleQueue[tuple[float, bytes]], sink: socket.socket, direction: Direction) -> None:
        while True:
            due, data = source.get()
            if (left := due - time.monotonic()) > 0:
                time.sleep(left)
            self._proxy._flowing[direction].wait()
            if not data:  # one side has left: so does the other, after all that came before
                self.cut()
                return
            try:
                sink.sendall(data)
            except OSError:
                self.cut()
                return


def _received(end: socket.socket) -> bytes:
    try:
        return end.recv(65_536)
    except OSError:
        return b""


def through(url: str, port: int) -> str:
    """Return the same URL by way of a loopback port."""
    return make_url(url).set(host="127.0.0.1", port=port).render_as_string(hide_password=False)


@contextlib.contextmanager
def far_away(url: str, delay: timedelta, folder: Path) -> Iterator[str]:
    """Give the URL of a proxy that only adds latency, in a process of its own, so that it takes no time of ours."""
    bare = make_url(url).set(password=None).render_as_string()
    output = folder / f"proxy-{make_url(url).port}.out"
    command = [sys.executable, "-m", "tests.services.proxy", bare, str(delay.total_seconds() * 1000)]
    root = str(Path(__file__).parents[2])
    child = Child("the proxy", command, output=output, environ={"PYTHONPATH": root})
    child.start()
    try:
        child.wait_until(lambda: child.printed().endswith("\n"), what="listening", patience_s=20)
        yield through(url, int(child.printed()))
    finally:
        child.end(signal.SIGKILL)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Add latency to a database connection.")
    parser.add_argument("url")
    parser.add_argument("delay_ms", type=float, help="added each way")
    arguments = parser.parse_args()
    with Proxy(arguments.url, delay=timedelta(milliseconds=arguments.delay_ms)) as started:
        print(started.port, flush=True)
        threading.Event().wait()
