"""Begins a transaction of our own, without a claim: of a sweep, the pump, the queue, a lease or the doctor."""

from sqlalchemy import Connection
from sqlalchemy.exc import OperationalError

from exactly_once.database.connections.pooler import LINK, Link
from exactly_once.database.mysql_session import put_right

__all__ = ["begin_ours"]


def begin_ours(connection: Connection) -> None:
    """Begin the transaction of a connection that has sent nothing yet: durable, with the settings that its session cannot keep.

    It replaces the driver's own BEGIN: no extra round trip. On a connection that was never examined, and on
    servers other than PostgreSQL, the driver begins by itself. On MySQL and MariaDB the session's clock is checked, because
    such a transaction writes times.

    Raises:
        OperationalError: The connection is dead; it is thrown away.
    """
    if connection.dialect.name in ("mysql", "mariadb"):
        put_right(connection)
        return
    link: Link | None = connection.info.get(LINK)
    if link is None:
        return
    try:
        link.begin(connection.connection.dbapi_connection)
    except connection.dialect.loaded_dbapi.Error as error:
        connection.invalidate(error)  # the raw error did not pass SQLAlchemy, which would reuse the connection
        raise OperationalError("BEGIN", None, error, connection_invalidated=True) from error
