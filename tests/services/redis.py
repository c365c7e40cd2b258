"""Starts a Redis of our own from the installed program: its own files, its own port on loopback, our child.

It never touches the system's server. Called by tests and benchmarks.
"""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from exactly_once.testing.child import Account, Child, ServerFailed, free_ports

__all__ = ["Redis", "missing"]

PLACES = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"))
SETTINGS = {
    "bind": "127.0.0.1",
    "daemonize": "no",
    "enable-debug-command": "local",  # DEBUG RELOAD and the like, which tests use
}
KEPT = {"appendonly": "yes", "appendfsync": "always", "save": ""}
FORGOTTEN = {"appendonly": "no", "save": ""}


def missing() -> str | None:
    """Say why Redis cannot run here, or return None."""
    if shutil.which("redis-server", path=PLACES) is None:
        return "there is no `redis-server` here (Debian: apt-get install redis-server)"
    return None


class Redis:
    """One Redis server, reachable on loopback only; with a password only where `settings` name one.

    Args:
        persistent: Every write is on the disk before it is answered, so that a killed server forgets nothing. False:
            nothing is ever written, and a restart begins empty.
        settings: Options of redis-server on top of ours, such as `{"maxmemory": "2mb"}`.
    """

    def __init__(self, *, persistent: bool = False, settings: Mapping[str, str] | None = None) -> None:
        if reason := missing():
            raise ServerFailed(f"Redis cannot run: {reason}.")
        self.directory = Path(tempfile.mkdtemp(prefix="exactly-once-redis-"))
        account = Account.unprivileged("redis", "nobody")
        if account:
            os.chown(self.directory, account.uid, account.gid)
        (self.port,) = free_ports()
        options = {**SETTINGS, **(KEPT if persistent else FORGOTTEN), **(settings or {})}
        options |= {"dir": str(self.directory), "port": str(self.port)}
        password = quote(options.get("requirepass", ""), safe="")
        self.url = f"redis://{f':{password}@' if password else ''}127.0.0.1:{self.port}/0"
        words = [word for name, value in options.items() for word in (f"--{name}", *(value.split() or [""]))]
        self._child = Child(
            "Redis",
            [shutil.which("redis-server", path=PLACES) or "redis-server", *words],
            output=self.directory / "log",
            account=account,
        )

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The server's process id, or None while it does not run."""
        return self._child.pid

    def start(self) -> None:
        """Start the server and wait until it has read its files and answers."""
        self._child.start()
        self._child.wait_until(self._answers, what="answering", patience_s=30)

    def stop(self) -> None:
        """Stop in order (SIGTERM); what is persistent stays. Twice is once."""
        self._child.end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL the server; `start` brings back what was on the disk."""
        self._child.end(signal.SIGKILL)

    def restart(self) -> None:
        """SIGKILL and start again, on the same port and directory."""
        self.kill()
        self.start()

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

    def close(self) -> None:
        """End the server and delete its directory. Twice is once."""
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _answers(self) -> bool:
        try:
            self.tell("PING")
        except redis.ConnectionError:  # also while it loads
            return False
        return True
