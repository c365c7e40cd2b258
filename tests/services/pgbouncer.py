"""Starts a PgBouncer in front of a PostgreSQL: transactions of many clients share few server connections.

What a session keeps (prepared statements, settings) is then another client's by the next transaction, which is what
tests are for. Our child, on loopback. Called by tests.
"""

import psycopg
from sqlalchemy import make_url

from exactly_once.testing.child import free_ports
from tests.services.server import Server, no_program, program

__all__ = ["PgBouncer", "missing"]


def missing() -> str | None:
    """Say why PgBouncer cannot run here, or return None."""
    return no_program("pgbouncer", "pgbouncer")


class PgBouncer(Server):
    """Pooling in front of one database.

    Args:
        url: SQLAlchemy URL of the database, on TCP.
        server_connections: How many connections to the server all clients share.
        mode: For how long a client keeps one: "transaction" or "session".
        clients: How many it takes.
    """

    name = "PgBouncer"

    def __init__(self, url: str, *, server_connections: int, mode: str = "transaction", clients: int = 200) -> None:
        super().__init__(missing(), users=("postgres", "nobody"))
        behind = make_url(url)
        (self.port,) = free_ports()
        file = self.directory / "pgbouncer.ini"
        file.write_text(
            "[databases]\n"
            f"{behind.database} = host={behind.host} port={behind.port} dbname={behind.database}"
            f" user={behind.username} {f'password={behind.password}' if behind.password else ''}\n"
            "[pgbouncer]\n"
            f"listen_addr = 127.0.0.1\nlisten_port = {self.port}\nunix_socket_dir =\nauth_type = any\n"
            f"pool_mode = {mode}\ndefault_pool_size = {server_connections}\nmax_client_conn = {clients}\n"
        )
        self._own(file)
        self._runs(program("pgbouncer"), str(file))
        self.url = behind.set(host="127.0.0.1", port=self.port, password=None).render_as_string(hide_password=False)

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.url.replace("+psycopg", ""), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True
