"""On SQLite, keeps a savepoint's RELEASE from committing a claim while the caller's transaction goes on.

Python's driver sends BEGIN before the first INSERT, UPDATE or DELETE, and not before a SAVEPOINT. A transaction that a SAVEPOINT
opened ends where that savepoint is released: RELEASE is its COMMIT. SQLAlchemy, and with it the caller, believes that the
transaction goes on; where they roll back after that, the claim would stand without its work, and the message would be lost.

Nothing tells whether a transaction that is open already was opened by BEGIN or by SAVEPOINT. So behind a claim in one no RELEASE
is sent until the transaction ends: what a savepoint holds stands or falls with the transaction then, which is what RELEASE means
everywhere else. Called by `guards.claiming`.
"""

from collections.abc import Callable
from typing import Any, Final
from weakref import WeakSet, ref

from sqlalchemy import Connection

from exactly_once.database.dialects.keywords import reader
from exactly_once.database.dialects.statements import SQLITE

__all__ = ["hold"]

_HELD: Final = "exactly_once.held"
"""Where the transaction that is held together stands in the `info` of its connection."""
_INSTALLED: "WeakSet[Any]" = WeakSet()
_read: Final = reader(SQLITE)


def hold(connection: Connection) -> None:
    """From here to the end of the transaction that this connection is in, send no RELEASE."""
    dialect = connection.dialect
    if dialect not in _INSTALLED:
        _INSTALLED.add(dialect)
        # on this instance, once: no event is told of a RELEASE that is written as text
        for name in ("do_execute", "do_execute_no_params"):
            setattr(dialect, name, _holding(getattr(dialect, name)))
    root = connection.get_transaction()
    # weak: a connection that nobody closes is given back when nobody refers to it
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
    if connection is None:  # the engine's first look at its server
        return False
    held = connection.info.get(_HELD)
    return held is not None and held() is connection.get_transaction()
