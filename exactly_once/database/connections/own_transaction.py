"""A transaction of our own on a connection from the pool, for work that its caller repeats after a failure.

Called by the pump and the sweeps. Never repeats the work itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, Engine

from exactly_once.database.connections.beginning import begin_ours
from exactly_once.database.connections.had_before import kept_firsthand

__all__ = ["own_transaction"]


@contextmanager
def own_transaction(engine: Engine) -> Iterator[Connection]:
    """Begin a transaction, and commit it at the end. After an error the connection is closed.

    A handler may have left the connection changed: a role, a time limit, another text factory. Work that fails on such a
    connection is repeated on another one, at the caller's next call.

    Args:
        engine: The engine of the database.
    """
    with engine.connect() as connection, connection.begin():
        kept_firsthand(connection)
        begin_ours(connection)
        try:
            yield connection
        except Exception:
            connection.invalidate()  # before the rollback: else a pooler keeps the server's connection as it is
            raise
