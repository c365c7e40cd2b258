"""Fetches the MySQL server that Debian's unstable has, beside the machine's own programs: nothing is installed.

MariaDB is what Debian's stable releases bring, and what the tests run on; MySQL shares our dialect and not its behaviour (no
compound statements, other counters, another lock wait). Its package and the libraries it needs, the C library included, are
unpacked into one folder, and the server is started through the loader that stands there. `python -m tests.services.mysql_debian
COMMAND ...` runs a command whose MariaDB is that MySQL: `make on-mysql`.
"""

import os
import subprocess
import sys
from pathlib import Path

from exactly_once.testing.child import ServerFailed

__all__ = ["fetched", "main"]

PACKAGE = "mysql-server-core"
FOLDER = Path(__file__).parents[2] / "build" / "mysql"
LIBRARIES = "usr/lib/x86_64-linux-gnu"


def fetched(folder: Path = FOLDER) -> Path:
    """Return the program that starts the server; fetched (about 60 MB) unless it is there.

    Args:
        folder: Where it is kept.

    Raises:
        ServerFailed: There is no `apt-get` or `dpkg`, or what it needs cannot be fetched.
    """
    program = folder / "mysqld"
    if program.exists():
        return program
    _download(folder)
    root = folder / "root"
    for package in sorted((folder / "cache" / "archives").glob("*.deb")):
        _run("dpkg", "-x", str(package), str(root))
    loader = root / LIBRARIES / "ld-linux-x86-64.so.2"
    share = root / "usr/share/mysql"
    made = program.with_suffix(".new")
    made.write_text(
        "#!/bin/sh\n"
        f'exec {loader} --library-path {root / LIBRARIES} {root}/usr/sbin/mysqld "$@" --secure-file-priv=NULL'
        f" --lc-messages-dir={share} --character-sets-dir={share}/charsets\n"
    )
    made.chmod(0o755)
    made.rename(program)
    return program


def _download(folder: Path) -> None:
    """By an apt of its own, to which nothing is installed: so it fetches every library that is needed."""
    for name in ("lists/partial", "cache/archives/partial", "etc/apt.conf.d", "etc/preferences.d"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "status").touch()
    keys = "/usr/share/keyrings/debian-archive-keyring.gpg"
    known = _run("apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Label: Debian")
    if not known:
        raise ServerFailed("MySQL cannot be fetched: this machine's apt knows no mirror of Debian.")
    (folder / "sources.list").write_text(f"deb [signed-by={keys}] {known.split()[0]} sid main\n")
    (folder / "apt.conf").write_text(
        f'Dir::State "{folder}";\nDir::State::lists "{folder}/lists";\nDir::State::status "{folder}/status";\n'
        f'Dir::Cache "{folder}/cache";\nDir::Etc "{folder}/etc";\nDir::Etc::sourcelist "{folder}/sources.list";\n'
        # a mirror that is some weeks old is as good, for nothing of it is installed
        'Acquire::Check-Valid-Until "false";\nAPT::Install-Recommends "false";\nAPT::Sandbox::User "root";\n'
        'APT::Architecture "amd64";\nDebug::NoLocking "true";\n'
    )
    environ = os.environ | {"APT_CONFIG": str(folder / "apt.conf")}
    _run("apt-get", "update", "-qq", environ=environ)
    _run("apt-get", "install", "-qq", "-y", "--download-only", PACKAGE, environ=environ)


def _run(*command: str, environ: dict[str, str] | None = None) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=600, check=False)
    except FileNotFoundError:
        raise ServerFailed(f"MySQL cannot be fetched: there is no `{command[0]}` here.") from None
    if done.returncode != 0:
        raise ServerFailed(f"MySQL cannot be fetched, {' '.join(command)}:\n{(done.stdout + done.stderr)[-2000:]}")
    return done.stdout


def main(command: list[str]) -> int:
    """Run a command whose MariaDB is MySQL, and return its exit code."""
    environ = os.environ | {"EXACTLY_ONCE_TEST_MYSQLD": str(fetched())}
    return subprocess.run(command, env=environ, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
