"""Recognises a handler on SQLite that waited for its own transaction, through another connection to the same file.

SQLite has one writer for a whole file, and a run is that writer. Another session or engine of the handler waits its `timeout`,
fails with "database is locked", and would fail at each run. Recognised by the connection that raised the error: on the handler's
given session it is the lock of a reader, which ends. Looks at errors alone, and sends nothing. Called by `attempt`.
"""

import os
from typing import Final

from sqlalchemy import Connection, Engine

from exactly_once.database.errors.contended import is_contended
from exactly_once.errors import Misuse
from exactly_once.exceptions.leaves import leaves

__all__ = ["locked_out"]


def locked_out(error: BaseException, held: Connection) -> Misuse | None:
    """Return the error to report if a handler waited for itself. None for any other error.

    Args:
        error: What the handler raised. In an exception group, one such error is enough.
        held: The connection of the handler's transaction, on SQLite.
    """
    file = _file_of(held.engine)
    if file is None or not any(_met_elsewhere(each, held, file) for each in leaves(error)):
        return None
    told = Misuse(_TEXT.format(file=file)).with_traceback(error.__traceback__)
    told.__cause__, told.at_each_run = error, True
    return told


def _met_elsewhere(error: BaseException, held: Connection, file: str) -> bool:
    if not is_contended(error):
        return False
    trace = error.__traceback__
    while trace is not None:
        user = trace.tb_frame.f_locals.get("self")
        if isinstance(user, Connection) and user is not held and _file_of(user.engine) == file:
            return True
        trace = trace.tb_next
    return False


def _file_of(engine: Engine) -> str | None:
    named = engine.url.database if engine.dialect.name == "sqlite" else None
    return os.path.abspath(named) if named else None


_TEXT: Final = (
    "The handler used another connection to {file} (a session, or an engine, of its own), and waited there for its own"
    " transaction, which holds the file: SQLite has one writer. Nothing was committed. Use the session that the handler is given"
)
