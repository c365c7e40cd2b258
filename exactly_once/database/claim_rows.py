"""Claims written, finished and taken back by somebody else than their attempt, as statements in the caller's transaction.

A person discards a message; a broken one is written down; a lease that is kept elsewhere leaves its mark in the handler's own
transaction. Called by `failures`, by `failures.triage` and by `leases.sql`.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

from sqlalchemy import Connection, Insert, Table, and_, delete, insert, update
from sqlalchemy.dialects import postgresql, sqlite

from exactly_once.database.errors.drivers_own import is_taken, original
from exactly_once.database.schema import CONSUMED, CONSUMING, STEP_TRACE, UNFINISHED, Tables, utcnow

__all__ = ["of", "take_back", "write", "writing", "written"]

_DUPLICATE_ENTRY: Final = 1062  # MySQL's and MariaDB's errno


def of(table: Table, group: str, handler: str, key: str) -> Any:
    """Return the condition that names one claim, or its steps."""
    return and_(table.c.consumer_group == group, table.c.handler == handler, table.c.business_key == key)


def writing(server: str, claims: Table, values: Mapping[str, Any]) -> Insert:
    """Return what inserts a consumed claim unless the key has one.

    Args:
        server: SQLAlchemy's name of its dialect.
        claims: Our table.
        values: Of its columns.
    """
    row = {"status": CONSUMED, "created_at": utcnow(), "consumed_at": utcnow(), **values}
    match server:
        case "postgresql":
            return postgresql.insert(claims).values(row).on_conflict_do_nothing()
        case "sqlite":
            # not in a savepoint: its driver begins no transaction for one, so its release would commit the claim alone
            return sqlite.insert(claims).values(row).on_conflict_do_nothing()
        case _:
            return insert(claims).values(row)


def written(insertion: Callable[[], int]) -> bool:
    """Carry such a statement out, and say whether it made a row; MySQL and MariaDB raise where the key has one."""
    try:
        return insertion() == 1
    except Exception as error:  # it undoes that statement alone
        if not is_taken(error) or original(error).args[:1] != (_DUPLICATE_ENTRY,):
            raise
        return False


def write(connection: Connection, claims: Table, values: Mapping[str, Any]) -> bool:
    """Insert a consumed claim unless the key has one; say whether it was inserted."""
    statement = writing(connection.dialect.name, claims, values)
    # asked to keep it: of an INSERT the driver forgets how many rows it made
    return written(lambda: connection.execute(statement, execution_options={"preserve_rowcount": True}).rowcount)


def take_back(
    connection: Connection, tables: Tables, group: str, handler: str, key: str, owner: str | None, *, until: Any
) -> None:
    """Take back the claim of a broken attempt; one of any other owner is another copy's, and that was processed whole.

    Where nobody wrote down the owner, in a row of an earlier release, a claim that was made before the failure is meant
    (`until`). A lease is let go of and keeps the number of its attempt, which services compare; another claim is deleted.
    What says that a transaction under a lease was committed behind our back is deleted with it.
    """
    claims, steps = tables.idempotent, tables.step
    meant = claims.c.owner == owner if owner is not None else claims.c.consumed_at <= until
    broken = and_(of(claims, group, handler, key), meant, claims.c.status.in_((CONSUMED, UNFINISHED)))
    free = {"status": CONSUMING, "token": None, "lease_until": None, "consumed_at": None}
    connection.execute(update(claims).where(broken, claims.c.token.is_not(None)).values(free))
    connection.execute(delete(claims).where(broken, claims.c.token.is_(None)))
    connection.execute(delete(steps).where(of(steps, group, handler, key), steps.c.status == STEP_TRACE))
