"""Finds the driver's own error behind an error of SQLAlchemy, whatever a listener of the application made of it.

A listener of `handle_error` may replace each `DBAPIError` by an error class of the application, as oslo.db does. A
deadlock is still a deadlock then, and a duplicate key still a duplicate key. SQLAlchemy itself raises the new error, from the
driver's. We recognise it by the place where it was raised: an error that a handler raises from a driver's error is the handler's.

Called wherever a decision depends on a database error.
"""

from typing import Any, Final

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from exactly_once.exceptions.drivers import cause_of, is_drivers

__all__ = ["is_of_a_database", "is_taken", "original"]

_RAISE: Final = frozenset(
    method.__code__
    for method in (Connection._handle_dbapi_exception, Connection._handle_dbapi_exception_noconnection)  # noqa: SLF001
)


def original(error: BaseException) -> Any:
    """Return the driver's own error behind this error; return any other error as it is."""
    if isinstance(error, DBAPIError):
        return error if error.orig is None else error.orig
    cause = cause_of(error)
    return cause if cause is not None and is_drivers(cause) and _came_from_sqlalchemy(error) else error


def is_of_a_database(error: BaseException) -> bool:
    """Say whether SQLAlchemy raised it because of a driver's error."""
    return isinstance(error, DBAPIError) or original(error) is not error


def is_taken(error: BaseException) -> bool:
    """Say whether a statement failed because the row exists: all drivers name that class IntegrityError."""
    return any(cls.__name__ == "IntegrityError" for cls in type(original(error)).__mro__)


def _came_from_sqlalchemy(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code in _RAISE:
            return True
        trace = trace.tb_next
    return False
