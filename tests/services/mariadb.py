"""Starts a MariaDB of our own from the installed programs: its own files, its own port on loopback, our child.

It never touches the system's server. Called by tests and benchmarks. Where EXACTLY_ONCE_TEST_MYSQLD names a `mysqld` of MySQL,
that server stands in MariaDB's place (`mysql_debian` fetches one).
"""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pymysql

from exactly_once.testing.child import ServerFailed, free_ports
from tests.services.server import Server, no_program, program

__all__ = ["MariaDB", "missing"]

SETTINGS = {
    "bind-address": "127.0.0.1",
    "skip-name-resolve": "1",
    "innodb-buffer-pool-size": "128M",
    "max-connections": "300",
    # 1, the default and what we ask of production: a commit is in the log when it returns. A killed process loses
    # nothing with 2 either, but `doctor` would rightly complain
    "innodb-flush-log-at-trx-commit": "1",
    # of one of the two servers only
    "loose-innodb-log-file-size": "64M",
    "loose-log-warnings": "1",
    "loose-mysqlx": "OFF",
}
MYSQLD = os.environ.get("EXACTLY_ONCE_TEST_MYSQLD")


def missing() -> str | None:
    """Say why MariaDB cannot run here, or return None."""
    if MYSQLD:
        return None if shutil.which(MYSQLD) else f"EXACTLY_ONCE_TEST_MYSQLD names no program: {MYSQLD}"
    return no_program("mariadbd", "mariadb-server") or no_program("mariadb-install-db", "mariadb-server")


class MariaDB(Server):
    """One MariaDB server; `root` without a password, reachable on loopback only.

    Args:
        directory: Where its files go; kept. None: a temporary one, deleted by `close`.
        settings: Options of mariadbd on top of ours, such as `{"innodb-lock-wait-timeout": "5"}`.
    """

    name = "MariaDB"
    start_patience_s = 60.0
    stop_patience_s = 30.0

    def __init__(self, directory: Path | None = None, *, settings: Mapping[str, str] | None = None) -> None:
        super().__init__(missing(), directory=directory, users=("mysql", "nobody"))
        self._data = self.directory / "data"
        (self.port,) = free_ports()
        if not self._data.exists():
            self._initialise()
        options = {**SETTINGS, **(settings or {})}
        options |= {"datadir": str(self._data), "port": str(self.port), "socket": str(self.directory / "socket")}
        options |= {"pid-file": str(self.directory / "pid"), "tmpdir": str(self.directory)}
        if MYSQLD:
            options["tls-version"] = ""  # PyMySQL would take the TLS it offers, and a proxy between them reads nothing
        given = (f"--{name}={value}" for name, value in options.items())
        self._runs(MYSQLD or program("mariadbd"), "--no-defaults", *given)

    @property
    def url(self) -> str:
        """The SQLAlchemy URL of the server, without a database; sync, by PyMySQL."""
        return f"mysql+pymysql://root@127.0.0.1:{self.port}"

    def create_database(self, name: str) -> str:
        """Create a database and return its SQLAlchemy URL."""
        self._execute(f"CREATE DATABASE `{name}` CHARACTER SET utf8mb4")
        return f"{self.url}/{name}"

    def drop_database(self, name: str) -> None:
        """Drop a database; a transaction that still holds its tables is waited for."""
        self._execute(f"DROP DATABASE IF EXISTS `{name}`")

    def _execute(self, statement: str) -> None:
        connection = pymysql.connect(host="127.0.0.1", port=self.port, user="root", connect_timeout=5)
        try:
            with connection.cursor() as cursor:
                cursor.execute(statement)
        finally:
            connection.close()

    def _answers(self) -> bool:
        try:
            pymysql.connect(host="127.0.0.1", port=self.port, user="root", connect_timeout=5).close()
        except pymysql.err.OperationalError:
            return False
        return True

    def _initialise(self) -> None:
        self._data.mkdir(parents=True)
        # a server that starts deletes the temporary tables it finds there, also those of another that is being made
        command = [
            MYSQLD or program("mariadb-install-db"),
            "--no-defaults",
            f"--datadir={self._data}",
            f"--tmpdir={self.directory}",
        ]
        if MYSQLD:
            accounts = self.directory / "accounts.sql"  # root is at localhost alone there, which is a name
            accounts.write_text(
                "CREATE USER root@'127.0.0.1';\nGRANT ALL ON *.* TO root@'127.0.0.1' WITH GRANT OPTION;\n"
            )
            command += ["--initialize-insecure", f"--init-file={accounts}"]
        else:
            command += ["--auth-root-authentication-method=normal", "--skip-test-db", "--skip-log-bin"]
        self._own(self.directory, self._data)
        if self._account:
            command.append("--user=mysql")
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode != 0:
            raise ServerFailed(f"MariaDB could not make its files:\n{(made.stdout + made.stderr)[-2000:]}")
