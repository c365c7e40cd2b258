"""What is reported of a handler's exception: the exception itself, or a sentence that names the line to change. Pure.

Three kinds are not reported as they are. `sys.exit` would end the worker for every message. SQLAlchemy refuses a second begin()
before anything is sent, but its text speaks of a session and not of the handler; the error is recognised by where it was
raised, and on which session. `Reject` and `RetryLater` that a type of the application's raises (`TypeDecorator`) reach us
inside SQLAlchemy's StatementError. Called by `processor` and `batch`.
"""

from typing import Final

from sqlalchemy.exc import InvalidRequestError, StatementError
from sqlalchemy.orm import Session

from exactly_once.database.watched.session import HOME
from exactly_once.errors import Misuse, Reject, RetryLater
from exactly_once.exceptions.leaves import leaves
from exactly_once.exceptions.stops import exit_in

__all__ = ["reported"]

_TEXT: Final = (
    "The handler called begin() on the session that it was given: its transaction is begun already, and exactly_once commits it"
    " after the handler. Take the line with session.begin() away; for a savepoint write session.begin_nested()"
)


_EXITED: Final = (
    "The handler called sys.exit({code!r}), which would end the worker for every message; it was rolled back. Raise an"
    " exception to have it retried, Reject to park it."
)


def reported(error: BaseException, *, exits: bool = True) -> BaseException:
    """Return the error to report for what a handler raised; an error that needs no other words is returned as it is.

    Args:
        error: What the handler raised. In an exception group, one second begin() is enough.
        exits: A SystemExit is the handler's. Not in a thread of the caller's, which a signal may have asked to end.
    """
    if exits and (left := exit_in(error)) is not None:
        misuse = Misuse(_EXITED.format(code=left.code)).with_traceback(error.__traceback__)
        misuse.__cause__ = error
        return misuse
    if isinstance(error, StatementError) and isinstance(error.orig, (Reject, RetryLater)):
        return error.orig
    return _begun_already(error) or error


def _begun_already(error: BaseException) -> Misuse | None:
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
