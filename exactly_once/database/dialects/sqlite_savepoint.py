"""On SQLite, keeps a savepoint's RELEASE from committing a claim while the caller's transaction goes on.

Python's driver sends BEGIN before the first INSERT, UPDATE or DELETE, and not before a SAVEPOINT. If a SAVEPOINT
opened the transaction, the RELEASE of that savepoint is its COMMIT. SQLAlchemy and the caller believe that the
transaction goes on. If they roll back after that, the claim would stand without its work, and the message would be lost.

Nothing tells whether BEGIN or SAVEPOINT opened an existing transaction. So after a claim in such a transaction no RELEASE
is sent until the transaction ends. Then a savepoint's work stands or falls with the transaction, which is what RELEASE means
on every other server. Called by `guards.claiming`.
"""

from collections.abc import Callable
from typing import Any, Final
from weakref import WeakSet, ref

from sqlalchemy import Connection

from exactly_once.database.dialects.keywords import reader
from exactly_once.database.dialects.statements import SQLITE

__all__ = ["hold"]

_HELD: Final = "exactly_once.held"
"""The key in a connection's `info` of the transaction in which no RELEASE is sent."""
_INSTALLED: "WeakSet[Any]" = WeakSet()
_read: Final = reader(SQLITE)


def hold(connection: Connection) -> None:
    """Send no RELEASE from here to the end of this connection's transaction."""
    dialect = connection.dialect
    if dialect not in _INSTALLED:
        _INSTALLED.add(dialect)
        # On this instance, once: there is no event for a RELEASE that is written as text.
        for name in ("do_execute", "do_execute_no_params"):
            setattr(dialect, name, _holding(getattr(dialect, name)))
    root = connection.get_transaction()
    # A weak reference: a connection that nobody closes returns to the pool when nothing refers to it.
    connection.info[_HELD] = None if root is None else ref(root)


def _holding(send: Callable[..., None]) -> Callable[..., None]:
    def execute(cursor: Any, statement: str, *values_and_context: Any) -> None:
        context = values_and_context[-1] if values_and_context else None
        if _is_held(context) and _read(statement).first == "RELEASE":
            return
        send(cursor, statement, *values_and_context)

    return execute


def _is_held(context: Any) -> bool:
    connection = getattr(context, "root_connection", None)
    if connection is None:  # the engine's first query to its server
        return False
    held = connection.info.get(_HELD)
    return held is not None and held() is connection.get_transaction()
