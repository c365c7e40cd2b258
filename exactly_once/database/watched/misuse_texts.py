"""The texts of the errors for a handler that left its transaction: what happened, what is kept, what to change."""

from typing import Final

__all__ = [
    "AFTER",
    "ANEW",
    "CLOSED",
    "CUT_OFF",
    "DOUBTFUL",
    "ENDED",
    "GONE",
    "LEFT",
    "MEANWHILE",
    "SAVEPOINT_ENDED",
    "STILL_USED",
    "SWALLOWED",
    "TOO_LATE",
    "UNCOMMITTED",
]

UNCOMMITTED: Final = (
    "session.commit() came back, and nothing was committed: the class of the session overrides commit(), or the handler replaced"
    " it, and that one swallowed an error or sent no COMMIT. Nothing of this run is kept. Let commit() raise what it met, or give"
    " exactly_once a plain sessionmaker."
)
LEFT: Final = (
    "The handler left the transaction it was given: session.rollback(), session.close(), `with session:` or close() of its"
    " pooled connection ends it, and the claim with it. Delete that line; raise an exception to roll back, use"
    " session.begin_nested() for a part."
)
SWALLOWED: Final = (
    "The handler swallowed a database error that aborted the transaction: COMMIT would keep nothing. Let the error out,"
    " or put the statement that may fail into `with session.begin_nested():`."
)
CUT_OFF: Final = (
    "The connection ended in the midst of the handler, and the handler went on: a statement was given up before its answer came"
    " (asyncio.timeout, wait_for, a cancelled task), the server ended the connection, two threads or tasks used it at once, or"
    " invalidate() was called. What was written before is rolled back. Let the error out of the handler, and use the session in"
    " one thread or task; to go on without one statement, have the server limit it (statement_timeout, max_statement_time)"
    " inside `with session.begin_nested():`."
)
DOUBTFUL: Final = (
    "A procedure was called, and then its transaction was lost before anybody could ask whether the procedure had committed it"
    " (the connection ended, or was rolled back). Look what is there of its work. Take COMMIT, START TRANSACTION and DDL out of"
    " the procedure."
)
ENDED: Final = (
    "A statement of the handler ended the transaction behind SQLAlchemy's back (a COMMIT inside a procedure or a"
    " multi-statement text, a call on the driver, or DDL that commits by itself). What came before it may be committed."
    " Take it out of the handler."
)
ANEW: Final = (
    "The driver connected anew while the handler ran: ping(reconnect=True) or connect() was called on its own connection. The"
    " transaction ended with the session before, and nobody can say what that one, or the new one, has committed. Take the call"
    " out: where a connection is lost, let the error out of the handler, and the message runs again."
)
CLOSED: Final = (
    "The handler closed the driver's own connection (close(), or psycopg's `with connection:`, which commits and closes): its"
    " transaction ended there. Delete that line; the connection is given back for you."
)
GONE: Final = (
    "The transaction that the claim was written in ended behind SQLAlchemy's back, and another one is open in its place:"
    " commit() or rollback() was called on the driver's own connection; or a procedure committed, began a transaction of its"
    " own, or swallowed the deadlock that threw it away. Take that out: an error must leave a procedure, and COMMIT, ROLLBACK,"
    " START TRANSACTION and DDL do not belong in it."
)
AFTER: Final = (
    "A hook committed the handler's transaction itself (connection().commit() in before_commit), and then something more was"
    " sent: what came before is committed, and this is not. Take the commit out of the hook."
)
STILL_USED: Final = (
    "The handler has returned, and something still uses its session: a task, a thread, or rows that are still read. What it"
    " writes now would be committed in part, or not at all; nothing was committed. Await the task, join the thread, or read"
    " the rows to their end before the handler returns."
)
SAVEPOINT_ENDED: Final = (
    "The handler has returned, and then something ended a savepoint that it had left open: a task, or an async generator that"
    " the handler left by break or return, which the event loop closes later. What was written in the savepoint may be gone, so"
    " nothing was committed. End the savepoint before the handler returns; of a generator with contextlib.aclosing."
)
TOO_LATE: Final = (
    "The session was used while the COMMIT of its message, or of its steps.transaction, was under way: the handler had returned,"
    " and a task or a thread went on. Nothing of this was sent. Await the task, join the thread, before the handler returns."
)
MEANWHILE: Final = (
    "The handler had returned, and a task or a thread of it used its session while COMMIT was under way. What the handler had"
    " written until then is committed, and what that one wanted to do is not. Look what is missing. Await the task, join the"
    " thread, before the handler returns."
)
