"""Whose fault it is that a claim was refused, its message's or the table's: a claim of nobody's is tried, and rolled back.

A right that was taken away, a column of somebody's that takes no NULL, a CHECK, a trigger that raises: they refuse every claim.
No handler ever runs; counted, each message would be kept as dead for it. The server's word is the same for one message's value,
and such a message must be counted. So the same claim is tried with a made-up key and no value of a message's. Asked after a
refusal only, on a connection that is believed. Called by the guards, by `leases.sql` and by `store`.
"""

from collections.abc import Callable, MutableMapping
from typing import Any
from uuid import uuid4

from sqlalchemy import Engine

from exactly_once.claim import ClaimRow
from exactly_once.database.dialects.contract import ClaimBusy, Dialect, ErrorKind, first_words, raise_for_the_store
from exactly_once.database.errors.drivers_own import original
from exactly_once.database.errors.interrupted import interrupted
from exactly_once.database.owner import new_owner
from exactly_once.errors import StoreUnavailable
from exactly_once.exceptions.drivers import is_drivers

__all__ = ["is_refusal", "of_nobody", "raise_for_the_table", "tried"]


def is_refusal(dialect: Dialect, error: BaseException) -> bool:
    """Say whether a statement of a claim was refused for a reason that may be the message's or the table's."""
    refused = is_drivers(original(error)) and dialect.error_kind(error) in (ErrorKind.REFUSED, ErrorKind.UNKNOWN)
    return refused and not interrupted(error) and not dialect.unstorable(error)


def of_nobody(row: ClaimRow) -> ClaimRow:
    """Return a claim like this one, by the same handler, with no value of a message's."""
    key = uuid4().hex
    return ClaimRow(row.group, row.handler, key, bytes(len(row.fingerprint)), message_id=key, owner=new_owner())


def tried(dialect: Dialect, dbapi: Any, info: MutableMapping[Any, Any], row: ClaimRow, *, wait_ms: int) -> None:
    """Make a claim of nobody's, read it, and roll both back; raise what the server says.

    Args:
        dialect: How that database is spoken to.
        dbapi: The driver's connection, in no transaction.
        info: What `prepare` remembered of it.
        row: See `of_nobody`.
        wait_ms: The longest to wait for whoever has locked the table.
    """
    try:
        dialect.claim(dbapi, info, row, wait_ms=wait_ms, savepoint=False)
        dialect.known(dbapi, row, end=True)
    finally:
        dbapi.rollback()


def raise_for_the_table(
    dialect: Dialect,
    refusal: Exception,
    row: ClaimRow,
    look: Callable[[str], object],
    engine: Engine,
    *,
    store: str | None = None,
) -> None:
    """Raise that the table takes no claims, whatever the message; return where there is no such table.

    Args:
        dialect: How that database is spoken to.
        refusal: What the claim of nobody's was answered with.
        row: That claim.
        engine: Whose connection it was.
        look: Carries out a statement in no transaction; raises what the server says.
        store: The database's name, where it is not the handler's own.

    Raises:
        StoreUnavailable: It is there, and takes none; or the server does not answer now.
        Exception: What is none of the server's.
    """
    if not is_refusal(dialect, refusal) and not isinstance(refusal, ClaimBusy):
        raise_for_the_store(dialect, refusal, engine, store)
        if not is_drivers(original(refusal)) or interrupted(refusal):
            raise refusal
    if dialect.no_table(refusal):
        try:
            look(f"SELECT 1 FROM {dialect.table} WHERE 1 = 0")  # noqa: S608  (our own name of it)
        except Exception as error:
            if dialect.no_table(original(error)):
                return
        # else it is a table of somebody's, which a trigger on ours wants
    said = refusal.__cause__ or refusal if isinstance(refusal, ClaimBusy) else refusal  # somebody has locked it
    told = StoreUnavailable(
        f"The table {dialect.table} takes no claims ({first_words(said)}): one of no message's was"
        " refused, too. Nothing ran, and nothing is counted. Look at the rights, columns, constraints and triggers of this table;"
        " exactly-once doctor says the same until it is mended.",
        store=store,
    )
    told.claim = row
    raise told from refusal
