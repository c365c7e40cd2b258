"""Writes, finishes and takes back claims outside of an attempt, as statements in the caller's transaction.

Three cases: an operator discards a message; a broken message is recorded; a lease that is stored elsewhere leaves its mark in the
handler's own transaction. Called by `failures.store`, `failures.decisions` and `guards.lease.sql`.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

from sqlalchemy import Connection, Insert, Table, and_, delete, insert, update
from sqlalchemy.dialects import postgresql, sqlite

from exactly_once.database.errors.drivers_own import is_taken, original
from exactly_once.database.schema import CONSUMED, CONSUMING, STEP_TRACE, UNFINISHED, Tables
from exactly_once.database.server_clock import utcnow

__all__ = ["of", "take_back", "write", "writing", "written"]

_DUPLICATE_ENTRY: Final = 1062  # MySQL's and MariaDB's errno


def of(table: Table, group: str, handler: str, key: str) -> Any:
    """Return the condition that names one claim, or its steps."""
    return and_(table.c.consumer_group == group, table.c.handler == handler, table.c.business_key == key)


def writing(server: str, claims: Table, values: Mapping[str, Any]) -> Insert:
    """Return the statement that inserts a consumed claim unless the key has a claim.

    Args:
        server: SQLAlchemy's name of the dialect.
        claims: Our table of claims.
        values: Values of its columns.
    """
    row = {"status": CONSUMED, "created_at": utcnow(), "consumed_at": utcnow(), **values}
    match server:
        case "postgresql":
            return postgresql.insert(claims).values(row).on_conflict_do_nothing()
        case "sqlite":
            # No savepoint: the driver begins no transaction for a savepoint, so its release would commit the claim alone.
            return sqlite.insert(claims).values(row).on_conflict_do_nothing()
        case _:
            return insert(claims).values(row)


def written(insertion: Callable[[], int]) -> bool:
    """Execute such a statement, and say whether it inserted a row. MySQL and MariaDB raise an error if the key has a claim."""
    try:
        return insertion() == 1
    except Exception as error:  # the error undoes that statement alone
        if not is_taken(error) or original(error).args[:1] != (_DUPLICATE_ENTRY,):
            raise
        return False


def write(connection: Connection, claims: Table, values: Mapping[str, Any]) -> bool:
    """Insert a consumed claim unless the key has one; say whether it was inserted."""
    statement = writing(connection.dialect.name, claims, values)
    # preserve_rowcount: without it the driver forgets the row count of an INSERT.
    return written(lambda: connection.execute(statement, execution_options={"preserve_rowcount": True}).rowcount)


def take_back(
    connection: Connection, tables: Tables, group: str, handler: str, key: str, owner: str | None, *, until: Any
) -> None:
    """Take back the claim of a broken attempt. A claim of any other owner stays: another copy of the message was processed.

    A failure row of an earlier release has no owner. Then a claim that was made before the failure (`until`) is taken back.
    A claim with a lease is freed and keeps its attempt number, which services compare. A claim without a lease
    is deleted. The trace row, which says that somebody else committed a transaction under a lease, is deleted too.
    """
    claims, steps = tables.idempotent, tables.step
    meant = claims.c.owner == owner if owner is not None else claims.c.consumed_at <= until
    broken = and_(of(claims, group, handler, key), meant, claims.c.status.in_((CONSUMED, UNFINISHED)))
    free = {"status": CONSUMING, "token": None, "lease_until": None, "consumed_at": None}
    connection.execute(update(claims).where(broken, claims.c.token.is_not(None)).values(free))
    connection.execute(delete(claims).where(broken, claims.c.token.is_(None)))
    connection.execute(delete(steps).where(of(steps, group, handler, key), steps.c.status == STEP_TRACE))
