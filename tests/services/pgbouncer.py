"""Starts a PgBouncer in front of a PostgreSQL: transactions of many clients share few server connections.

What a session keeps (prepared statements, settings) is then another client's by the next transaction, which is what
tests are for. Our child, on loopback. Called by tests.
"""

import os
import shutil
import signal
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import psycopg
from sqlalchemy import make_url

from exactly_once.testing.child import Account, Child, ServerFailed, free_ports

__all__ = ["PgBouncer", "missing"]

PLACES = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"))


def missing() -> str | None:
    """Say why PgBouncer cannot run here, or return None."""
    if shutil.which("pgbouncer", path=PLACES) is None:
        return "there is no `pgbouncer` here (Debian: apt-get install pgbouncer)"
    return None


class PgBouncer:
    """Pooling in front of one database.

    Args:
        url: SQLAlchemy URL of the database, on TCP.
        server_connections: How many connections to the server all clients share.
        mode: For how long a client keeps one: "transaction" or "session".
        clients: How many it takes.
    """

    def __init__(self, url: str, *, server_connections: int, mode: str = "transaction", clients: int = 200) -> None:
        if reason := missing():
            raise ServerFailed(f"PgBouncer cannot run: {reason}.")
        behind = make_url(url)
        (self.port,) = free_ports()
        self._directory = Path(tempfile.mkdtemp(prefix="exactly-once-pgbouncer-"))
        account = Account.unprivileged("postgres", "nobody")
        file = self._directory / "pgbouncer.ini"
        file.write_text(
            "[databases]\n"
            f"{behind.database} = host={behind.host} port={behind.port} dbname={behind.database}"
            f" user={behind.username} {f'password={behind.password}' if behind.password else ''}\n"
            "[pgbouncer]\n"
            f"listen_addr = 127.0.0.1\nlisten_port = {self.port}\nunix_socket_dir =\nauth_type = any\n"
            f"pool_mode = {mode}\ndefault_pool_size = {server_connections}\nmax_client_conn = {clients}\n"
        )
        if account:
            for path in (self._directory, file):
                os.chown(path, account.uid, account.gid)
        program = shutil.which("pgbouncer", path=PLACES) or "pgbouncer"
        self._child = Child("PgBouncer", [program, str(file)], output=self._directory / "log", account=account)
        self.url = behind.set(host="127.0.0.1", port=self.port, password=None).render_as_string(hide_password=False)

    def __enter__(self) -> Self:
        self._child.start()
        self._child.wait_until(self._accepts, what="accepting connections", patience_s=30)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.end(signal.SIGKILL)
        shutil.rmtree(self._directory, ignore_errors=True)

    def _accepts(self) -> bool:
        try:
            psycopg.connect(self.url.replace("+psycopg", ""), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True
