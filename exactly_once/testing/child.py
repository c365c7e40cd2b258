"""Starts a server as our own child process, on loopback ports of its own, and never leaves one behind.

It never detaches, never looks for another server that is running, and never kills by name. Called by the embedded
PostgreSQL and by this project's own tests for MariaDB, RocketMQ and the container engine.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from exactly_once import fork
from exactly_once.errors import ExactlyOnceError

__all__ = ["Account", "Child", "ServerFailed", "free_ports", "wait_until"]

# The launcher runs between us and the server. It drops privileges itself, so that an unprivileged account need not be
# able to read this Python. It asks the kernel to signal the server when we die (after a SIGKILL we run no atexit and no
# finally). It compares parent ids, because we may have died before it asked. A `preexec_fn` could do the same, but
# runs Python between fork and exec, which may deadlock in a program with threads.
_LAUNCHER = """
import os, sys
parent, death, ids, *argv = sys.argv[1:]
if sys.platform == "linux":
    import ctypes  # while we may still read it
    prctl = ctypes.CDLL(None).prctl
if ids:
    uid, gid = map(int, ids.split(":"))
    os.setgroups([]); os.setgid(gid); os.setuid(uid)
if sys.platform == "linux":
    prctl(1, int(death), 0, 0, 0)  # after the change of user, which clears it
if os.getppid() != int(parent):
    os._exit(1)
os.execvp(argv[0], argv)
"""


class ServerFailed(ExactlyOnceError):
    """A server did not start, or did not answer in time; the text has the last lines it printed."""


@dataclass(frozen=True, slots=True)
class Account:
    """The unprivileged user as which a server runs if we are root; servers refuse to run as root."""

    uid: int
    gid: int

    @classmethod
    def unprivileged(cls, *names: str) -> "Account | None":
        """If we are root, return the first of these users that exists; else None.

        Raises:
            ServerFailed: We are root and none of the users exists.
        """
        if os.geteuid() != 0:
            return None
        import pwd

        for name in names:
            try:
                entry = pwd.getpwnam(name)
            except KeyError:
                continue
            return cls(entry.pw_uid, entry.pw_gid)
        raise ServerFailed(f"The server refuses to run as root, and there is no user named {' or '.join(names)} here.")


class Child:
    """One server process, from start to end; it can be started again after it ended.

    The thread that starts the process lives exactly as long as the process: Linux sends the parent-death signal when the
    *thread* that forked ends. A server that a short-lived thread started would die with that thread.

    Args:
        name: Its name in errors.
        argv: The command and its arguments.
        output: The file to which its standard output and standard error are appended.
        account: Run as this user.
        environ: Set these on top of our own environment.
        death_signal: The signal that the kernel sends it when we die.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        output: Path,
        account: Account | None = None,
        environ: Mapping[str, str] | None = None,
        death_signal: signal.Signals = signal.SIGKILL,
    ) -> None:
        self.name = name
        self.argv = list(argv)
        self.output = output
        self._account = account
        self._environ = dict(environ or {})
        self._death_signal = death_signal
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at_byte = 0

    def start(self) -> None:
        """Start the process. It may not be ready yet when this returns."""
        if self.running:
            raise ServerFailed(f"{self.name} is running already, as process {self.pid}.")
        self._started_at_byte = self.output.stat().st_size if self.output.exists() else 0
        started = threading.Event()
        failed: list[OSError] = []

        def parent() -> None:
            try:
                self._process = self._spawn()
            except OSError as error:
                failed.append(error)
                return
            finally:
                started.set()
            self._process.wait()

        threading.Thread(target=parent, name=f"parent of {self.name}", daemon=True).start()
        started.wait()
        if failed:
            raise ServerFailed(f"{self.name} could not be started: {failed[0]}") from failed[0]

    def _spawn(self) -> subprocess.Popen[bytes]:
        ids = f"{self._account.uid}:{self._account.gid}" if self._account else ""
        # -I -S: without our caller's site packages and PYTHON* settings; it also starts in 10 ms.
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), str(int(self._death_signal)), ids]
        with self.output.open("ab") as out:
            return subprocess.Popen(  # noqa: S603  (our own argument list, no shell)
                launcher + self.argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._environ},
                cwd="/",
                start_new_session=True,  # Ctrl-C in a terminal is for us; we then stop the server ourselves
            )

    @property
    def pid(self) -> int | None:
        """The process id, or None if it does not run."""
        return self._process.pid if self._process is not None and self.running else None

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self._process is not None and self._process.poll() is None

    def end(self, signal_: signal.Signals, *, patience_s: float = 10.0) -> None:
        """Send `signal_` and wait for the end; SIGKILL after `patience_s`. A process that has ended is no error."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal_)
        try:
            self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def printed(self) -> str:
        """Return what the process printed since it was last started."""
        if not self.output.exists():
            return ""
        with self.output.open("rb") as out:
            out.seek(self._started_at_byte)
            return out.read().decode(errors="replace")

    def failure(self, what: str) -> ServerFailed:
        """Return an error that says `what` and shows the last lines printed."""
        tail = "\n".join(self.printed().splitlines()[-20:])
        return ServerFailed(f"{self.name}: {what}. It printed, last:\n{tail}")

    def wait_until(self, condition: Callable[[], bool], *, what: str, patience_s: float) -> None:
        """Wait until `condition` holds. Raise if the process ends first or `patience_s` have passed."""

        def holds() -> bool:
            if condition():
                return True
            if not self.running:
                raise self.failure(f"ended before {what}")
            return False

        try:
            wait_until(holds, what=what, patience_s=patience_s)
        except TimeoutError:
            raise self.failure(f"not {what} after {patience_s:.0f} s") from None


def wait_until(condition: Callable[[], bool], *, what: str, patience_s: float, pause_s: float = 0.01) -> None:
    """Wait until `condition` holds.

    Raises:
        TimeoutError: It did not hold within `patience_s` seconds.
    """
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {patience_s:g} s, and still not: {what}")
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.2, 0.2)


def free_ports(count: int = 1, *, around: Sequence[int] = (0,)) -> list[int]:
    """Return `count` free ports; for each, the neighbours at the offsets `around` are free, too.

    No port is given twice, by this process or by another one that runs: a server binds its port seconds after it was
    found free, and two servers that start together would be given the same one.

    Raises:
        ServerFailed: Every port has been given, or somebody listens on it.
    """
    return _PORTS.given(count, around)


class _Ports:
    """The ports that this process gives.

    They are below the kernel's range for outgoing connections: else a client's socket could take the port of a server that
    restarts. They are shared out in blocks. A process that gives ports of a block holds, as long as it lives, the UDP port of
    the block's first number.
    """

    every: Final = range(20_000, 32_000)
    block: Final = 100

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[range, socket.socket] = {}
        self._given: set[int] = set()
        fork.tell(self)

    def forked(self) -> None:
        """Runs in a forked child: the blocks are the parent's, which gives the rest of their ports."""
        for mark in self._held.values():
            mark.close()
        self._lock, self._held, self._given = threading.Lock(), {}, set()

    def given(self, count: int, around: Sequence[int]) -> list[int]:
        """See `free_ports`."""
        found: list[int] = []
        with self._lock:
            for block in self._blocks():
                for port in block:
                    wanted = {port + offset for offset in around}
                    if len(found) < count and all(p in block and p not in self._given and _is_free(p) for p in wanted):
                        self._given.update(wanted)
                        found.append(port)
                if len(found) == count:
                    return found
        raise ServerFailed(f"No free port is left between {self.every.start} and {self.every.stop}.")

    def _blocks(self) -> Iterator[range]:
        yield from tuple(self._held)
        for first in random.sample(self.every[:: self.block], len(self.every) // self.block):
            mark = socket.socket(type=socket.SOCK_DGRAM)
            try:
                mark.bind(("127.0.0.1", first))
            except OSError:
                mark.close()
                continue
            block = range(first, first + self.block)
            self._held[block] = mark
            yield block


_PORTS: Final = _Ports()


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
