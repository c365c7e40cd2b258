"""How each database is spoken to: the text of our statements, and what its errors mean. Guards hold no SQL of their own.

A claim goes below SQLAlchemy, as fixed text on the driver's connection, because a round trip is the unit of cost and a
driver's own error is exact. Everything here is synchronous: on an async engine it runs in SQLAlchemy's greenlet, where
the adapted driver connection awaits by itself.

Errors are told apart by SQLSTATE or errno, never by their text: servers speak other languages.
"""

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Any, Protocol

from sqlalchemy import Engine

from exactly_once.errors import ConfigurationError

__all__ = ["ClaimBusy", "ClaimRow", "Dialect", "Known", "State", "Trouble", "dialect_for"]


@dataclass(frozen=True, slots=True)
class ClaimRow:
    """What is written when a key is claimed, and by which it is found again."""

    group: str
    handler: str
    key: str
    fingerprint: bytes
    message_id: str | None = None
    attempt: int = 1
    owner: str = ""
    born_at: datetime | None = None
    content: bytes | None = None


@dataclass(frozen=True, slots=True)
class Known:
    """A row that stands under the key already."""

    status: int
    fingerprint: bytes
    owner: str | None


class State(Enum):
    """The driver's own word on the transaction; what SQLAlchemy believes proves nothing."""

    IDLE = "no transaction"
    OPEN = "in a transaction"
    ABORTED = "in a transaction that can only be rolled back"


class Trouble(Enum):
    """What a database error means for the attempt it struck."""

    TRANSIENT = "deadlock, serialization or lock timeout: a fresh transaction may succeed at once"
    UNAVAILABLE = "the server does not answer, or cannot write now"
    REFUSED = "the server said no and rolled back: nothing of this was committed"
    UNKNOWN = "none of these"


class ClaimBusy(Exception):
    """Another transaction holds the key, and `claim_wait` is over. `again`: worth one more try at once."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.again = again


class Dialect(Protocol):
    """One database server through one driver. `dbapi` is SQLAlchemy's `dbapi_connection`, adapted where it is async."""

    name: str
    table: str
    """Where claims are kept, as it stands in statements."""

    def prepare(self, dbapi: Any, info: MutableMapping[Any, Any], *, wait_ms: int) -> None:
        """Look once at a connection we have not seen: refuse autocommit, remember what later statements need."""

    def claim(
        self, dbapi: Any, info: MutableMapping[Any, Any], row: ClaimRow, *, wait_ms: int, savepoint: bool
    ) -> bool:
        """Insert `row`, first thing in its transaction, and say whether it is ours (False: it stands there already).

        With `savepoint`, earlier work of an open transaction survives a refusal. Raises `ClaimBusy`, else the driver's error.
        """

    def known(self, dbapi: Any, row: ClaimRow, *, end: bool) -> Known | None:
        """Read what stands under the key; `end` rolls the transaction back in the same breath."""

    def state(self, dbapi: Any) -> State:
        """Read the driver's own transaction state: free, no round trip."""

    def trouble(self, error: BaseException) -> Trouble:
        """Say what a driver's error means."""

    def no_table(self, error: BaseException) -> bool:
        """Did the claim find no table to stand in?"""

    def hopeless(self, error: BaseException) -> bool:
        """Did connecting fail for a reason that waiting does not mend: no such user, password or database?"""

    def lost(self, dbapi: Any, info: MutableMapping[Any, Any], error: BaseException) -> bool:
        """Did this error throw the whole transaction away, so that later statements would commit without the claim?"""

    def refuses(self, statement: str) -> str | None:
        """Name the keyword if handlers may not send this statement, judged by its first words; None if they may."""


_KNOWN: dict[tuple[str, str], str] = {
    ("postgresql", "psycopg"): "exactly_once.dialects.postgresql:PostgreSQL",
    ("mysql", "pymysql"): "exactly_once.dialects.mysql:MySQL",
    ("mysql", "asyncmy"): "exactly_once.dialects.mysql:MySQL",
    ("mariadb", "pymysql"): "exactly_once.dialects.mysql:MySQL",
    ("mariadb", "asyncmy"): "exactly_once.dialects.mysql:MySQL",
    ("sqlite", "pysqlite"): "exactly_once.dialects.sqlite:SQLite",
    ("sqlite", "aiosqlite"): "exactly_once.dialects.sqlite:SQLite",
}


def dialect_for(engine: Engine, schema: str | None) -> Dialect:
    """Return the dialect that speaks to `engine`'s server through its driver.

    Raises:
        ConfigurationError: The driver was never tried; a claim through it might not be recognised as a duplicate.
    """
    name, driver = engine.dialect.name, engine.dialect.driver.removesuffix("_async")
    found = _KNOWN.get((name, driver))
    if found is None:
        ways = ", ".join(sorted(f"{n}+{d}" for n, d in _KNOWN))
        raise ConfigurationError(
            f"The database driver {name}+{driver} is not one this package knows how to claim with. Use one of: {ways}."
        )
    from importlib import import_module

    module, _, attribute = found.partition(":")
    make: Callable[[str], Dialect] = getattr(import_module(module), attribute)
    table = (
        engine.dialect.identifier_preparer.quote_schema(schema) + ".message_idempotent"
        if schema
        else "message_idempotent"
    )
    return make(table)
