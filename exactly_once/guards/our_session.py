"""Reads and writes in a session of our own, beside any handler. Repeats on another connection if others changed this one.

Called by `processing` for the order of messages and for failures, and wherever a claim is looked up.
"""

from collections.abc import Callable
from typing import Any, Final, TypeVar

from sqlalchemy.orm import Session

from exactly_once.database.connections.had_before import is_firsthand, kept_firsthand, moment
from exactly_once.database.dialects.contract import Dialect, ErrorKind
from exactly_once.database.dialects.firsthand import is_changed
from exactly_once.database.errors.interrupted import interrupted
from exactly_once.database.in_memory import in_memory
from exactly_once.database.watched.session import let_go

__all__ = ["in_our_session"]

T = TypeVar("T")
# a server that is away, or a deadlock, is not the fault of this connection: the caller decides
_PASSED_ON: Final = (ErrorKind.UNAVAILABLE, ErrorKind.TRANSIENT)


def in_our_session(open_ours: Callable[[], tuple[Session, Any]], dialect: Dialect, do: Callable[[Session], T]) -> T:
    """Call `do` with a session of our own, and end the session.

    An earlier user of the connection may have left a role, a time limit or a character set in it. So after an error `do` is
    called again with another connection, until a connection without an earlier user gives an error, too.

    Args:
        open_ours: Makes the session.
        dialect: The dialect of its database.
        do: Gets the session, whose transaction has sent nothing yet. May be called again from the start, so if it commits, it
            commits last.

    Raises:
        Exception: What `do` raised on a connection without an earlier user. At once: if the server is away, after a deadlock,
            and what a signal handler raised.
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
