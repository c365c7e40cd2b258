"""Explains the error of a handler that calls begin() on the session it was given, with the line to write. Pure.

SQLAlchemy refuses the call in `Session.begin`, before anything is sent, but its text speaks of a session and not of the handler.
The error is recognised by where it was raised, and on which session. Another session of the handler's own is left alone. Called
by `processor`.
"""

from typing import Final

from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import Session

from exactly_once.database.watched.watch import HOME
from exactly_once.errors import Misuse
from exactly_once.exceptions.leaves import leaves

__all__ = ["begun_already"]

_TEXT: Final = (
    "The handler called begin() on the session that it was given: its transaction is begun already, and exactly_once commits it"
    " after the handler. Take the line with session.begin() away; for a savepoint write session.begin_nested()"
)


def begun_already(error: BaseException) -> Misuse | None:
    """Return the error to report for SQLAlchemy's error of a second begin(). None for any other error.

    Args:
        error: What a handler raised. In an exception group, one such error is enough.
    """
    if not any(_begins(each) for each in leaves(error)):
        return None
    told = Misuse(_TEXT).with_traceback(error.__traceback__)
    told.__cause__, told.at_each_run = error, True
    return told


def _begins(error: BaseException) -> bool:
    trace = error.__traceback__
    if not isinstance(error, InvalidRequestError) or trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    session = trace.tb_frame.f_locals.get("self")
    return trace.tb_frame.f_code is Session.begin.__code__ and isinstance(session, Session) and HOME in session.info
