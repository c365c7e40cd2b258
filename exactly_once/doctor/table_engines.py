"""Finds tables of MySQL and MariaDB without transactions: what a handler writes there stays, even if the handler fails.

MyISAM and Aria have no transactions, and report that only in a warning that nobody reads. The claim is rolled back, the write is
not, and the next run writes again. Looks in the database of the connection; our own tables use InnoDB. Changes nothing.
Called by the doctor.
"""

from collections.abc import Iterator
from typing import Any, Final

from sqlalchemy import text

from exactly_once.database.store import Store
from exactly_once.doctor.finding import Finding, Mark
from exactly_once.wording.text import escaped, listed

__all__ = ["findings_for_table_engines"]

_SHOWN: Final = 5
_FOUND: Final = text(
    "SELECT t.table_name, t.engine FROM information_schema.tables t JOIN information_schema.engines e ON e.engine = t.engine"
    " WHERE t.table_schema = DATABASE() AND t.table_type = 'BASE TABLE' AND e.transactions <> 'YES'"
)


def findings_for_table_engines(store: Store) -> Iterator[Finding]:
    """Yield a warning that names these tables; nothing if there are none.

    Args:
        store: A database that answers.
    """
    if store.engine.dialect.name not in ("mysql", "mariadb"):
        return
    with store.engine.connect() as connection:
        found: list[Any] = list(connection.execute(_FOUND))
    if not found:
        return
    names = listed((f"{escaped(str(name))} ({escaped(str(engine))})" for name, engine in found), most=_SHOWN)
    first = escaped(str(min(name for name, _ in found)))
    yield Finding(
        Mark.WARN,
        f"database {store.name!r}: no transaction rolls these tables back: {names}. What a handler writes there stays when it"
        f" fails, and is written again by the next run. If handlers write them: ALTER TABLE {first} ENGINE=InnoDB",
    )
