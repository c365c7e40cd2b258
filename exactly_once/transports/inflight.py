"""Remembers which messages were in hand when a process died, for brokers that do not count such deliveries.

A message whose handler kills the process every time (SIGKILL, a crash in C code, out of memory) comes again for ever if the
broker counts only deliveries that a client reports as failed. So every process writes what it has in hand into a file of its
own, through shared memory. That costs about a microsecond for each message. Nothing is flushed, but the data survives the
process, because it belongs to the kernel. A process that finds the journal of a dead process adds one to each message in it.

Innocent messages that were in hand at the same time are counted too. Each is forgotten as soon as it is
acknowledged. A suspect is handed out alone (see `handoff`), so a second death tells the guilty message from the innocent.

It never opens a connection and never decides what happens to a suspect. Called by `handoff`. It knows one machine: a
poison message kills up to `max_attempts` processes on each machine, unless their workers share the directory.
"""

import fcntl
import json
import mmap
import os
import stat
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from time import monotonic, time
from typing import Final

from exactly_once import fork
from exactly_once.errors import ConfigurationError

__all__ = ["InFlight", "default_directory", "journal_directory", "private_directory", "why_it_goes"]

PLACE_BYTES: Final = 128  # one message in hand: the length of its name in one byte, then the name
NAME_BYTES: Final = PLACE_BYTES - 1
# Before messages are handed out, we read the peers' journals, unless we just did: about 10 microseconds for each
# peer. A broker redelivers a dead process' message within some 10 ms, and we must know of the death by then.
LOOK_EVERY_S: Final = 0.01
# Files that container engines create in a container; Kubernetes sets the variable.
CONTAINER: Final = (Path("/.dockerenv"), Path("/run/.containerenv"))
IN_CLUSTER: Final = "KUBERNETES_SERVICE_HOST"
LATELY_S: Final = 3600.0
FORGET_AFTER_S: Final = 7 * 86400.0  # after a week without deaths a suspect is gone from the broker


class InFlight:
    """The messages in hand of this process, and how often each message was in hand when a process died.

    Args:
        directory: Shared by all processes of one group on this machine. Made if missing, private to this user.
        places: How many messages can be in hand at once.

    Raises:
        ConfigurationError: The directory belongs to another user, or cannot be written.
    """

    def __init__(self, directory: Path, places: int) -> None:
        self._directory = private_directory(directory)
        self._suspects: dict[str, int] = {}
        self._known: tuple[int, int] | None = None
        self._looked = -LOOK_EVERY_S
        self._free = list(range(places))
        self._path = directory / f"{os.getpid()}-{os.urandom(4).hex()}.journal"
        try:
            # Under the directory's lock: a peer that found the file before we lock it would count us as dead.
            with self._locked():
                self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                # The lock, not the process id, says that we live. The kernel releases it however we end. Process ids are
                # reused, and containers that share a directory do not see each other's ids.
                fcntl.flock(self._file, fcntl.LOCK_EX)
                # Allocated now: writing through memory to a full disk would be a SIGBUS, not an error.
                os.posix_fallocate(self._file, 0, places * PLACE_BYTES)
            self._memory = mmap.mmap(self._file, places * PLACE_BYTES)
        except OSError as error:
            raise ConfigurationError(f"The state directory {directory} cannot be written: {error}.") from error
        fork.tell(self)
        self.look()

    def forked(self) -> None:
        """Close the journal in a forked child. Else the child would hold the journal's lock after the parent's death."""
        self._memory.close()
        os.close(self._file)

    def take(self, name: str) -> int:
        """Record that a message is in hand, and return its place. If the process dies from now on, the message is a suspect."""
        data = _as_bytes(name)
        place = self._free.pop()
        start = place * PLACE_BYTES
        # The name first, its length last: a crash between the two leaves the place empty, never half a name.
        self._memory[start + 1 : start + 1 + len(data)] = data
        self._memory[start] = len(data)
        return place

    def give(self, place: int) -> None:
        """Record that the message at a place is no longer in hand."""
        self._memory[place * PLACE_BYTES] = 0
        self._free.append(place)

    def deaths(self, name: str) -> int:
        """Return how many processes died with this message in hand, as of the last `look`."""
        return self._suspects.get(_as_text(name), 0) if self._suspects else 0

    def forget(self, name: str) -> None:
        """Clear a message of suspicion: it was acknowledged, so it does not kill."""
        if _as_text(name) not in self._suspects:
            return
        with self._locked():
            table = self._read()
            if table.pop(_as_text(name), None) is not None:
                self._write(table)
        self._refresh()

    def look(self) -> None:
        """Count what dead processes had in hand, and read what peers have counted. At most once in `LOOK_EVERY_S`."""
        now = monotonic()
        if now - self._looked < LOOK_EVERY_S:
            return
        self._looked = now
        if any(path != self._path and _is_dead(path) for path in self._directory.glob("*.journal")):
            with self._locked():
                self._count_the_dead()
        self._refresh()

    @property
    def died_lately(self) -> bool:
        """Whether a process of this group died on this machine within `LATELY_S`, in any way."""
        try:
            return (self._directory / "died").stat().st_mtime > time() - LATELY_S
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Close the journal. Messages still in hand are not suspects: this process ends in good order."""
        fork.forget(self)  # else a child would later close whatever file has our descriptor by then
        with suppress(OSError, ValueError), self._locked():
            self._path.unlink(missing_ok=True)
            self._memory.close()
            os.close(self._file)

    def _count_the_dead(self) -> None:
        table = self._read()
        for path in self._directory.glob("*.journal"):
            if path == self._path or not _is_dead(path):
                continue  # a peer may have been faster
            for name in _names(path.read_bytes()):
                table[name] = (table.get(name, (0, 0.0))[0] + 1, time())
            (self._directory / "died").touch()
            # Counted before it is removed. If we die between the two, the message is counted twice, which an acknowledgement
            # corrects; in the other order it would never be counted.
            self._write(table)
            path.unlink(missing_ok=True)

    def _refresh(self) -> None:
        try:
            found = os.stat(self._directory / "suspects")
        except FileNotFoundError:
            self._suspects, self._known = {}, None
            return
        if (seen := (found.st_ino, found.st_mtime_ns)) != self._known:
            self._suspects = {name: deaths for name, (deaths, _) in self._read().items()}
            self._known = seen

    def _read(self) -> dict[str, tuple[int, float]]:
        try:
            table = json.loads((self._directory / "suspects").read_text("utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return {name: (deaths, seen) for name, (deaths, seen) in table.items()}

    def _write(self, table: dict[str, tuple[int, float]]) -> None:
        recent = {name: entry for name, entry in table.items() if entry[1] > time() - FORGET_AFTER_S}
        aside = self._directory / f"suspects.{os.getpid()}"
        aside.write_text(json.dumps(recent), "utf-8")
        aside.replace(self._directory / "suspects")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        file = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)


def private_directory(path: Path) -> Path:
    """Make a directory that only this user can enter. Refuse one that others could have prepared.

    Raises:
        ConfigurationError: It is not a directory, not this user's, or open to others.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise ConfigurationError(f"The state directory {path} cannot be made: {error}.") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise ConfigurationError(
            f"The state directory {path} must be a directory that belongs to this user and that nobody else can enter. "
            f"Type: chmod 700 {path}; or name another one with state_dir=."
        )
    return path


def journal_directory(*names: str) -> Path:
    """Return the default place for the journals of one group, which must survive a restart.

    That is the directory of systemd's StateDirectory=, else the user's directory for program state. The temporary
    directory is the last resort: a service with PrivateTmp= gets another one at each restart.
    """
    for root in _lasting():
        try:
            found = private_directory(root / "exactly-once")
        except ConfigurationError:
            continue  # no home directory, or not writable for us
        if os.access(found, os.W_OK | os.X_OK):
            return found / _digest(names)
    return default_directory(*names)


def default_directory(*names: str) -> Path:
    """Return a directory under the user's temporary directory."""
    return private_directory(_temporary()) / _digest(names)


def why_it_goes(directory: Path, *, markers: tuple[Path, ...] = CONTAINER, system: Path = Path("/")) -> str | None:
    """Say why a directory, and the journals in it, may be gone after a restart. None if there is no sign of that.

    Args:
        directory: The directory of the journals.
        markers: One of these files exists in a container.
        system: Where the container's own file system is.
    """
    if _temporary() in (directory, *directory.parents):
        return "it is in the temporary folder, which may be another one after a restart"
    contained = IN_CLUSTER in os.environ or any(marker.exists() for marker in markers)
    there = next(path for path in (directory, *directory.parents) if path.exists())
    if contained and there.stat().st_dev == system.stat().st_dev:
        return "it goes with this container"
    return None


def _temporary() -> Path:
    return Path(tempfile.gettempdir()) / f"exactly-once-{os.geteuid()}"


def _lasting() -> Iterator[Path]:
    if given := os.environ.get("STATE_DIRECTORY"):
        yield Path(given.partition(":")[0])
    if named := os.environ.get("XDG_STATE_HOME"):
        yield Path(named)
    else:
        with suppress(RuntimeError):  # a user without a home directory
            yield Path.home() / ".local" / "state"


def _digest(names: tuple[str, ...]) -> str:
    return blake2b("\0".join(names).encode(), digest_size=12).hexdigest()


def _is_dead(path: Path) -> bool:
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(file)
    return True


def _names(journal: bytes) -> Iterator[str]:
    for start in range(0, len(journal), PLACE_BYTES):
        length = struct.unpack_from("B", journal, start)[0]
        if length:
            yield journal[start + 1 : start + 1 + length].decode("utf-8", "replace")


def _as_bytes(name: str) -> bytes:
    data = name.encode("utf-8", "replace")
    return data if 0 < len(data) <= NAME_BYTES else blake2b(data, digest_size=24).hexdigest().encode()


def _as_text(name: str) -> str:
    return name if 0 < len(name) <= NAME_BYTES and name.isascii() else _as_bytes(name).decode("utf-8", "replace")
