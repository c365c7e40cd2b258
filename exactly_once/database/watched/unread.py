"""Before a statement of ours behind one of the application's: what that one has left to say is told as its own.

A procedure can send rows and then fail; PyMySQL and asyncmy read the error with the next statement. Where that one is ours, a key
that is taken there would be a step that is recorded, or a claim that stands.

Called by `watch` and by what claims. It sends nothing.
"""

from typing import Any, NoReturn

from sqlalchemy import Connection

from exactly_once.database.dialects.contract import Dialect

__all__ = ["raise_as_sqlalchemy_does", "read_out"]


def read_out(connection: Connection, dialect: Dialect, dbapi: Any) -> bool:
    """Read the last statement's answer to its end; free where it was. See `Dialect.read_out`.

    Raises:
        DBAPIError: It was an error.
    """
    try:
        return dialect.read_out(dbapi)
    except BaseException as error:
        raise_as_sqlalchemy_does(connection, error)


def raise_as_sqlalchemy_does(connection: Connection, error: BaseException, statement: str | None = None) -> NoReturn:
    """Raise the driver's error as an execution through SQLAlchemy does: in its classes, and told to all who listen there."""
    connection._handle_dbapi_exception(error, statement, None, None, None)  # noqa: SLF001
