"""The driver's own error behind what came out of SQLAlchemy, whatever an application's listener made of it.

A listener of `handle_error` may put an error of the application's class in the place of each `DBAPIError`, as oslo.db does: a
deadlock stays one, and so does a key that is taken. SQLAlchemy raises that error itself, from the driver's. Told by where it was
raised: what a handler raises from a driver's error is the handler's own word, and stays that.

Called by whatever decides by an error of a database.
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
    """Return the driver's own error that this one was made of; of any other error, itself."""
    if isinstance(error, DBAPIError):
        return error if error.orig is None else error.orig
    cause = cause_of(error)
    return cause if cause is not None and is_drivers(cause) and _came_from_sqlalchemy(error) else error


def is_of_a_database(error: BaseException) -> bool:
    """Say whether SQLAlchemy raised it for an error of the driver's."""
    return isinstance(error, DBAPIError) or original(error) is not error


def is_taken(error: BaseException) -> bool:
    """Say whether a statement was refused for a row that is there: all drivers have one class of this name for it."""
    return any(cls.__name__ == "IntegrityError" for cls in type(original(error)).__mro__)


def _came_from_sqlalchemy(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code in _RAISE:
            return True
        trace = trace.tb_next
    return False
