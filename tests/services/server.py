"""One server process of a test's own: its folder, its start and its ends. A subclass says what runs and when it answers."""

import os
import shutil
import signal
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from exactly_once.testing.child import Account, Child, ServerFailed

__all__ = ["Server", "no_program", "program"]

_PLACES = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin", "/usr/libexec"))


def no_program(name: str, package: str) -> str | None:
    """Say that this program is not here, and which Debian package has it; or return None."""
    if shutil.which(name, path=_PLACES) is None:
        return f"there is no `{name}` here (Debian: apt-get install {package})"
    return None


def program(name: str) -> str:
    """Return the path of a program, also of one that only root has on its path."""
    return shutil.which(name, path=_PLACES) or name


class Server(ABC):
    """A server that ends with us.

    Args:
        reason: Why it cannot run here. None: it can.
        directory: Where its files go; kept. None: a temporary one, deleted by `close`.
        users: As which of these users it runs if we are root. None of them: as root.
    """

    name: ClassVar[str]
    """In errors."""
    start_patience_s: ClassVar[float] = 30.0
    stop_patience_s: ClassVar[float] = 10.0

    def __init__(self, reason: str | None, *, directory: Path | None = None, users: Sequence[str] = ()) -> None:
        if reason:
            raise ServerFailed(f"{self.name} cannot run: {reason}.")
        self._temporary = directory is None
        # short, and not below pytest's folders: a socket's path may have 107 characters
        self.directory = directory or Path(tempfile.mkdtemp(prefix=f"eo-{self.name.lower()}-"))
        self._account = Account.unprivileged(*users) if users else None
        self._own(self.directory)
        self._child: Child

    def _runs(self, *command: str) -> None:
        """What `start` starts."""
        self._child = Child(self.name, command, output=self.directory / "log", account=self._account)

    def _own(self, *paths: Path) -> None:
        """Give these to the user as which the server runs."""
        if self._account:
            for path in paths:
                os.chown(path, self._account.uid, self._account.gid)

    @abstractmethod
    def _answers(self) -> bool:
        """Whether it can be used."""

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
        """Start the server and wait until it answers."""
        self._child.start()
        self._child.wait_until(self._answers, what="answering", patience_s=self.start_patience_s)

    def stop(self) -> None:
        """Stop in order (SIGTERM); what is on the disk stays. Twice is once."""
        self._child.end(signal.SIGTERM, patience_s=self.stop_patience_s)

    def kill(self) -> None:
        """SIGKILL the server; `start` brings back what was on the disk."""
        self._child.end(signal.SIGKILL)

    def restart(self) -> None:
        """SIGKILL and start again, on the same port and files."""
        self.kill()
        self.start()

    def close(self) -> None:
        """End the server; delete its folder if it was temporary. Twice is once."""
        self.kill()
        if self._temporary:
            shutil.rmtree(self.directory, ignore_errors=True)
