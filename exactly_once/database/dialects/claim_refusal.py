"""Whose fault it is that a claim failed: the store's, which is away or has no table; the table's; or the message's.

To tell the last two apart, a test claim is tried, and rolled back. A revoked right, an added column that takes no NULL, a CHECK,
a trigger that raises: each refuses every claim. Then no handler ever runs. If we counted that, each message would become a dead
letter. The server's error is the same for one bad value of a message, and such a message must be counted. So the same claim is
tried with a random key and no value of the message.
That is done after a refusal only, on a trusted connection. Called by the guards, by the deferred watch and by `store`.
"""

from collections.abc import Callable, MutableMapping
from typing import Any
from uuid import uuid4

from sqlalchemy import Engine
from sqlalchemy.exc import TimeoutError as PoolTimeout

from exactly_once.claim import ClaimRow
from exactly_once.database.dialects.contract import ClaimBusy, Dialect, ErrorKind
from exactly_once.database.errors.crowded import none_free
from exactly_once.database.errors.drivers_own import original
from exactly_once.database.errors.interrupted import interrupted
from exactly_once.database.errors.not_made import not_made
from exactly_once.database.errors.unreached import unreached
from exactly_once.database.owner import new_owner
from exactly_once.errors import BadKey, SchemaError, StoreUnavailable
from exactly_once.exceptions.drivers import is_drivers
from exactly_once.exceptions.words import words_of

__all__ = ["is_refusal", "of_nobody", "raise_for_the_store", "raise_for_the_table", "tried"]


def is_refusal(dialect: Dialect, error: BaseException) -> bool:
    """Say whether a claim was refused for a reason that may lie in the message or in the table."""
    refused = is_drivers(original(error)) and dialect.error_kind(error) in (ErrorKind.REFUSED, ErrorKind.UNKNOWN)
    return refused and not interrupted(error) and not dialect.unstorable(error)


def of_nobody(row: ClaimRow) -> ClaimRow:
    """Return a test claim: like this one, by the same handler, without any value of the message."""
    key = uuid4().hex
    return ClaimRow(row.group, row.handler, key, bytes(len(row.fingerprint)), message_id=key, owner=new_owner())


def tried(dialect: Dialect, dbapi: Any, info: MutableMapping[Any, Any], row: ClaimRow, *, wait_ms: int) -> None:
    """Make a test claim, read it, and roll both back. Raises the server's error.

    Args:
        dialect: The dialect of that database.
        dbapi: The driver's connection, in no transaction.
        info: What `prepare` remembered of it.
        row: See `of_nobody`.
        wait_ms: The longest to wait for a transaction that has locked the table.
    """
    try:
        dialect.claim(dbapi, info, row, wait_ms=wait_ms, savepoint=False)
        dialect.read_claim(dbapi, row, end=True)
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
    """Raise an error that says that the table takes no claims of any message. Return if there is no such table.

    Args:
        dialect: The dialect of that database.
        refusal: The error of the test claim.
        row: The test claim.
        engine: The engine of the connection.
        look: Executes a statement outside a transaction; raises the server's error.
        store: The database's name, if it is not the handler's own.

    Raises:
        StoreUnavailable: The table exists, and takes no claim; or the server does not answer now.
        Exception: An error that is not the server's.
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
        # Else a table of the application is missing, which a trigger on our table uses.
    said = refusal.__cause__ or refusal if isinstance(refusal, ClaimBusy) else refusal  # the table is locked
    unavailable = StoreUnavailable(
        f"The table {dialect.table} takes no claims ({first_words(said)}): one of no message's was"
        " refused, too. Nothing ran, and nothing is counted. Look at the rights, columns, constraints and triggers of this table;"
        " exactly-once doctor says the same until it is mended.",
        store=store,
    )
    unavailable.claim = row
    raise unavailable from refusal


def raise_for_the_store(dialect: Dialect, error: BaseException, engine: Engine, store: str | None = None) -> None:
    """Raise what an error of a claim or a look-up says about the store. Return if it says nothing: then the error itself counts.

    Args:
        dialect: The dialect of that database.
        error: What was raised.
        engine: The engine of the connection, or of the connection that could not be made.
        store: The database's name, if it is not the handler's own.

    Raises:
        StoreUnavailable: The server does not answer, or no connection to it could be made.
        SchemaError: There is no table of claims: no message is to blame, and none is to be counted.
        BadKey: The key has characters that the database lacks; no retry repairs that.
    """
    if isinstance(error, StoreUnavailable):  # raised while the connection was being made
        raise StoreUnavailable(f"{error}; nothing ran.", store=store) from error
    if isinstance(error, PoolTimeout):
        raise StoreUnavailable(none_free(engine), store=store) from error
    if dialect.error_kind(error) is ErrorKind.UNAVAILABLE:
        raise StoreUnavailable(
            f"The database does not answer ({type(error).__name__}: {first_words(error)}); nothing ran.", store=store
        ) from error
    if unreached(error, (engine,)):
        unavailable = StoreUnavailable(
            f"No connection to the database was given: {type(error).__name__} was raised as one was made or taken, by a listener"
            " of the engine's, by its creator=, or by the driver; nothing ran.",
            store=store,
        )
        unavailable.by_application = True
        raise unavailable from error
    if dialect.no_table(error):
        schema = dialect.table.rpartition(".")[0].strip('"`') or None
        raise SchemaError(not_made(engine, schema=schema, ran="nothing ran")) from error
    if isinstance(error, UnicodeEncodeError) or dialect.unstorable(error):
        raise BadKey(
            "The business key (or the name of a step) has characters that the database's character set lacks; nothing ran."
            " Use a database in UTF8, or a key in ASCII. Type: exactly-once doctor"
        ) from error


def first_words(error: BaseException) -> str:
    """Return the first line of a server's or driver's error text."""
    words = words_of(original(error)).strip()
    return words.splitlines()[0] if words else "no text"
