"""A handler's session from outside: the engine it chose, and its end, after which every use of it is refused.

Called by the watch and by whoever gives a session to user code.
"""

from contextlib import suppress
from typing import Any, Final

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import IllegalStateChangeError
from sqlalchemy.orm import Session

from exactly_once.errors import Misuse
from exactly_once.exceptions.stops import asked_from_outside
from exactly_once.wording.redaction import redacted

__all__ = ["HOME", "WATCHED", "elsewhere", "let_go", "over"]

WATCHED: Final = "exactly_once.watch"
"""The key of a watch in the `info` of its connection and of its session."""
HOME: Final = "exactly_once.home"
"""The key, in a session's `info`, of the engine of the store that made the session."""
_ELSEWHERE: Final = (
    "The session's get_bind() chose an engine of its own, {chosen}, and exactly_once was given {home}: claims, effects and"
    " failures belong in one database, and are watched on its engine. Nothing ran. Where a message decides on the database, give"
    " exactly_once all of them by name, and route= (how-to: several-databases)."
)
_OVER: Final = (
    "The session was used after what it was given for had ended: its message, or its steps.transaction. A variable, a task or a"
    " thread kept it. Nothing was sent. Use it only until the handler (or the step) returns; await the task, join the thread."
)


def over(session: Session, why: str | None = None) -> None:
    """Refuse later uses of a session, before they take a connection that nobody would return.

    Args:
        session: A handler's session.
        why: The text of the refusal, if it is not that the message has ended.
    """

    def refused(*_: object, **__: object) -> Any:
        raise Misuse(_OVER if why is None else why)

    session.get_bind = refused  # type: ignore[method-assign]


def let_go(session: Session) -> None:
    """Close a session, also if its connection is dead or was cut during a statement of ours: rolling that back may raise.

    The rollback comes first, separate from close(): an error in close() would skip the return of the connection, and the
    pool would miss it until garbage collection.
    """
    try:
        try:
            session.rollback()
        except BaseException as error:
            # The connection is lost: the pool, which rolls back once more, throws it away. Or a hook raised.
            if asked_from_outside(error):
                raise
        session.close()
    except BaseException as error:
        # A task or a thread may be inside a call of the session, which then refuses to be closed. Its connection, which was cut
        # and invalidated, is already back in the pool.
        with suppress(IllegalStateChangeError):
            session.invalidate()
        if asked_from_outside(error):  # cancelled during the rollback
            raise


def elsewhere(session: Session, connection: Connection) -> str | None:
    """Say what is wrong with a connection that get_bind() took from an engine that is not the store's.

    Failures, the pump and look-ups use the store's database; none of them would see a claim in another one. Asked for each
    message: an earlier claim on the connection may have been for an application that owns its engine.
    """
    home: Engine = session.info.get(HOME, connection.engine)
    if home.dialect is connection.engine.dialect:
        return None
    return _ELSEWHERE.format(chosen=redacted(connection.engine.url), home=redacted(home.url))
