"""What is read or written in a session of our own, beside any handler: on another connection where others changed this one.

Called by `processor` for the order of messages and for what failed, and wherever a claim is looked up.
"""

from collections.abc import Callable
from typing import Any, Final, TypeVar

from sqlalchemy.orm import Session

from exactly_once.database.dialects.contract import Dialect, ErrorKind
from exactly_once.database.dialects.firsthand import is_changed, is_firsthand, kept_firsthand, moment
from exactly_once.database.errors.interrupted import interrupted
from exactly_once.database.in_memory import in_memory
from exactly_once.database.watched.watch import let_go

__all__ = ["in_our_session"]

T = TypeVar("T")
# a server that is away, or a deadlock, is no matter of this connection: the caller decides
_PASSED_ON: Final = (ErrorKind.UNAVAILABLE, ErrorKind.TRANSIENT)


def in_our_session(open_ours: Callable[[], tuple[Session, Any]], dialect: Dialect, do: Callable[[Session], T]) -> T:
    """Do something in a session of ours, and end it.

    Whoever had the connection before may have left a role, a time limit or a character set in it. So what fails there is done
    again on another connection, until one that nobody had refuses it, too.

    Args:
        open_ours: Makes the session.
        dialect: How its database is spoken to.
        do: Given the session, whose transaction has sent nothing yet; done again from the start, so it commits last, if at all.

    Raises:
        Exception: What `do` raised on a connection that is believed; at once where the server is away, of a deadlock, or
            what a signal's handler raised.
    """
    since = moment()
    while True:
        session, _ = open_ours()
        believed = True
        try:
            connection = session.connection()
            believed = is_firsthand(connection, since)
            kept_firsthand(connection)
            if not is_changed(dialect, connection, since):
                return do(session)
            session.invalidate()
        except Exception as error:
            if not in_memory(session.get_bind().engine):
                session.invalidate()
            if believed or dialect.error_kind(error) in _PASSED_ON or interrupted(error):
                raise
        finally:
            let_go(session)
