"""Starts a Redis of our own from the installed program: its own files, its own port on loopback, our child.

It never touches the system's server. Called by tests and benchmarks.
"""

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from exactly_once.testing.child import ServerFailed, free_ports
from tests.services.server import Server, no_program, program

__all__ = ["Redis", "missing"]

SETTINGS = {
    "bind": "127.0.0.1",
    "daemonize": "no",
    "enable-debug-command": "local",  # DEBUG RELOAD and the like, which tests use
}
KEPT = {"appendonly": "yes", "appendfsync": "always", "save": ""}
FORGOTTEN = {"appendonly": "no", "save": ""}


def missing() -> str | None:
    """Say why Redis cannot run here, or return None."""
    return no_program("redis-server", "redis-server")


class Redis(Server):
    """One Redis server, reachable on loopback only; with a password only where `settings` name one.

    Args:
        persistent: Every write is on the disk before it is answered, so that a killed server forgets nothing. False:
            nothing is ever written, and a restart begins empty.
        settings: Options of redis-server on top of ours, such as `{"maxmemory": "2mb"}`.
    """

    name = "Redis"

    def __init__(self, *, persistent: bool = False, settings: Mapping[str, str] | None = None) -> None:
        super().__init__(missing(), users=("redis", "nobody"))
        (self.port,) = free_ports()
        options = {**SETTINGS, **(KEPT if persistent else FORGOTTEN), **(settings or {})}
        options |= {"dir": str(self.directory), "port": str(self.port)}
        password = quote(options.get("requirepass", ""), safe="")
        self.url = f"redis://{f':{password}@' if password else ''}127.0.0.1:{self.port}/0"
        words = [word for name, value in options.items() for word in (f"--{name}", *(value.split() or [""]))]
        self._runs(program("redis-server"), *words)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the process for the block (SIGSTOP): connections stay, and nothing is answered."""
        pid = self.pid
        if pid is None:
            raise ServerFailed("Redis does not run, so it cannot be paused.")
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def client(self) -> Any:
        """Return a client of the test's own, to look and to set up; close it after use."""
        once = Retry(NoBackoff(), 0)  # what is tried again is the test's business
        return redis.Redis.from_url(self.url, protocol=2, socket_timeout=60, retry=once)

    def tell(self, *command: str | int) -> Any:
        """Send one command, as an administrator would."""
        with self.client() as client:
            return client.execute_command(*command)

    def _answers(self) -> bool:
        try:
            self.tell("PING")
        except redis.ConnectionError:  # also while it loads
            return False
        return True
