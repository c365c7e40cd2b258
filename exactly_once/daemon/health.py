"""`/live` and `/ready` over HTTP for an orchestrator. Never asks the database or the broker, and shows no secrets.

An outage of the database must not get every worker restarted at the same moment. So live means only that the worker's threads
make progress. Ready is false during an outage, and while starting and stopping. Called by the command
line's `run`, and by the supervisor for its children.
"""

import errno
import json
import os
from collections.abc import Sequence
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET6
from threading import Thread
from typing import Final, Protocol
from urllib.parse import urlsplit

from exactly_once.daemon.heartbeat import STUCK_AFTER
from exactly_once.errors import ConfigurationError

__all__ = ["Health", "host_and_port"]

LOOPBACK: Final = "127.0.0.1"
"""The default: it serves this machine alone."""
_REQUEST_S: Final = 5.0
"""Seconds after which a silent client is disconnected, because each client holds a thread."""


class Alive(Protocol):
    """What reports its health: the worker."""

    def stuck(self, after: timedelta) -> Sequence[str]:
        """Name the threads that make no progress."""

    def unready(self) -> str | None:
        """Say why nothing is received."""


class Health:
    """A small HTTP server in a thread.

    Args:
        worker: The worker to ask.
        address: `HOST:PORT`, `:PORT` for every interface, `PORT` for loopback, `[::1]:PORT`. Port 0 takes a free one.
        stuck_after: A thread that made no progress for this long makes `/live` answer 503.

    Raises:
        ConfigurationError: The address is invalid, or cannot be listened on.

    Example:
        with Health(worker, "0.0.0.0:8080"):
            run_until_signal(worker)
    """

    def __init__(self, worker: Alive, address: str, *, stuck_after: timedelta = STUCK_AFTER) -> None:
        host, port = host_and_port(address)

        class Handler(_Handler):
            def answer(self, path: str) -> tuple[int, dict[str, object]]:
                return _answer(worker, path, stuck_after)

        try:
            self._server = (_Server6 if ":" in host else _Server)((host, port), Handler)
        except OSError as error:
            raise ConfigurationError(_why(error, address)) from error
        self._thread = Thread(target=self._server.serve_forever, args=(0.1,), daemon=True, name="health")
        self._thread.start()

    @property
    def port(self) -> int:
        """The port on which it listens."""
        return int(self._server.server_address[1])

    def close(self) -> None:
        """Stop listening. Idempotent."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def __enter__(self) -> "Health":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def host_and_port(address: str) -> tuple[str, int]:
    """Split `HOST:PORT`.

    Raises:
        ConfigurationError: It is no such address.

    Example:
        >>> host_and_port("8080"), host_and_port(":8080"), host_and_port("[::1]:8080")
        (('127.0.0.1', 8080), ('0.0.0.0', 8080), ('::1', 8080))
    """
    wrong = ConfigurationError(
        f"--health takes HOST:PORT, such as 127.0.0.1:8080 (this machine alone) or 0.0.0.0:8080, not {address!r}."
    )
    host, colon, port = address.strip().rpartition(":")
    if not (port.isascii() and port.isdigit() and int(port) < 65536):
        raise wrong
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host or "/" in host or "@" in host:
        raise wrong
    return (host or "0.0.0.0") if colon else LOOPBACK, int(port)  # noqa: S104  (":8080" asks for every interface)


def _answer(worker: Alive, path: str, stuck_after: timedelta) -> tuple[int, dict[str, object]]:
    if path == "/live":
        stuck = list(worker.stuck(stuck_after))
        return (503, {"live": False, "stuck": stuck}) if stuck else (200, {"live": True})
    if path == "/ready":
        why = worker.unready()
        return (503, {"ready": False, "reason": why}) if why else (200, {"ready": True})
    return 404, {"error": "there are /live and /ready"}


def _why(error: OSError, address: str) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return (
                f"The port of --health {address} is taken by another program, perhaps a worker that still runs. Stop"
                " it, or give another port: --health 127.0.0.1:0 takes a free one."
            )
        case errno.EACCES:
            return f"--health {address}: this user may not listen there. Take a port above 1023, such as 8080."
        case _:
            reason = error.strerror or os.strerror(error.errno or 0)
            return (
                f"--health {address} cannot be listened on ({reason}). Give an address of this machine: 127.0.0.1:8080"
                " for itself alone, 0.0.0.0:8080 for every interface."
            )


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore a client that disconnected: it is not our error, and we write no tracebacks to stderr."""


class _Server6(_Server):
    address_family = AF_INET6


class _Handler(BaseHTTPRequestHandler):
    timeout = _REQUEST_S

    def answer(self, path: str) -> tuple[int, dict[str, object]]:
        raise NotImplementedError

    def do_GET(self) -> None:
        status, said = self.answer(urlsplit(self.path).path)
        body = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815

    def version_string(self) -> str:
        return "exactly-once"

    def log_message(self, *_: object) -> None:
        """Log nothing: probes come every few seconds."""
