"""Before a statement of ours, reads the rest of the application's last answer, so that its error is raised as the application's.

A procedure can send rows and then fail; PyMySQL and asyncmy read the error with the next statement. If that is
a statement of ours, a duplicate key in the procedure would look like a recorded step, or an existing claim.

Called by `watch` and `guards.claiming`. It sends nothing.
"""

from typing import Any, NoReturn

from sqlalchemy import Connection

from exactly_once.database.dialects.contract import Dialect

__all__ = ["raise_as_sqlalchemy_does", "read_out"]


def read_out(connection: Connection, dialect: Dialect, dbapi: Any) -> bool:
    """Read the last statement's answer to its end. Free if it was read already. See `Dialect.read_out`.

    Raises:
        DBAPIError: The rest of the answer was an error.
    """
    try:
        return dialect.read_out(dbapi)
    except BaseException as error:
        raise_as_sqlalchemy_does(connection, error)


def raise_as_sqlalchemy_does(connection: Connection, error: BaseException, statement: str | None = None) -> NoReturn:
    """Raise the driver's error as an execution through SQLAlchemy does: as SQLAlchemy's class, after calling its listeners."""
    connection._handle_dbapi_exception(error, statement, None, None, None)  # noqa: SLF001
