"""A transaction of ours on a connection of the pool's, for work that is done again by itself where it fails."""

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, Engine

from exactly_once.database.connections.had_before import kept_firsthand
from exactly_once.database.connections.pooler import begin_bounded

__all__ = ["own_transaction"]


@contextmanager
def own_transaction(engine: Engine) -> Iterator[Connection]:
    """Begin a transaction, and commit it in the end; a connection on which something fails is closed.

    A handler may have left the connection changed: a role, a time limit, another text factory. What fails on such a
    connection is done again on another one, the next time that the caller comes.

    Args:
        engine: The database.
    """
    with engine.connect() as connection, connection.begin():
        kept_firsthand(connection)
        begin_bounded(connection)
        try:
            yield connection
        except Exception:
            connection.invalidate()  # before it is rolled back: else a pooler keeps the server's as it is
            raise
