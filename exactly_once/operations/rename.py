"""Renames a handler in its claims, steps, failures and leases. Otherwise every message that it has processed would be new.

Called by the command line, while no worker of the handler runs.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from sqlalchemy import Connection, Table, and_, exists, func, select, update

from exactly_once.database.schema import Tables, all_rows
from exactly_once.errors import ConfigurationError
from exactly_once.guards.lease.stores import LeaseStores
from exactly_once.wording.text import escaped

__all__ = ["rename_leases", "rename_rows"]

_NAMED: Final = 5  # keys named in an error; the rest is counted


def rename_rows(connection: Connection, tables: Tables, group: str, old: str, new: str) -> Mapping[str, int]:
    """Rename a handler in all its rows, in the caller's transaction. Returns how many rows, by table.

    Raises:
        ConfigurationError: Both names have claims on one key: it cannot be known which of the two to keep.
    """
    moved: dict[str, int] = {}
    for table in (tables.idempotent, tables.step, tables.failure):
        other = table.alias("other")
        names = [c.name for c in table.primary_key if c.name != "handler"]
        if table is tables.failure:
            names = ["consumer_group", "failure_key", "fingerprint"]
        both = exists().where(*(other.c[name] == table.c[name] for name in names), other.c.handler == new)
        mine = and_(table.c.consumer_group == group, table.c.handler == old)
        doubled = select(func.count()).select_from(table).where(mine, both)
        twice = connection.execute(all_rows(doubled, connection.dialect.name)).scalar_one()
        if twice:
            key = table.c.failure_key if table is tables.failure else table.c.business_key
            some = select(key).where(mine, both).distinct().order_by(key).limit(_NAMED)
            raise ConfigurationError(
                _twice(connection, table, group, old, new, twice, connection.execute(some).scalars().all())
            )
        moved[table.name] = connection.execute(update(table).where(mine).values(handler=new)).rowcount
    return moved


def _twice(
    connection: Connection, table: Table, group: str, old: str, new: str, number: int, keys: Sequence[str]
) -> str:
    """Return the text that says which keys have rows of both names, and which rows to delete."""
    more = f" and {number - len(keys)} more" if number > len(keys) else ""
    column = "failure_key" if "failure_key" in table.c else "business_key"
    named_rows = {"consumer_group": group, "handler": old}
    deletes = [
        f"DELETE FROM {table.fullname} WHERE "  # noqa: S608  (for a person to read and type)
        + " AND ".join(
            f"{name} = {_quoted(value, connection.dialect.name)}"
            for name, value in (named_rows | {column: key}).items()
        )
        for key in keys
        if key.isprintable()  # control characters must not reach a terminal
    ]
    return (
        f"{number} key(s) have rows of both {old!r} and {new!r} in {table.name}: {', '.join(map(escaped, keys))}{more}. Each was"
        " run twice, once under either name, and nothing was renamed. Undo what one of the two runs did. Then delete the row of"
        " the old name, and type the command again; the row of the new name keeps the key from running:\n"
        + "\n".join(deletes)
    )


def _quoted(value: str, server: str) -> str:
    if server in ("mysql", "mariadb"):
        value = value.replace("\\", "\\\\")
    return "'" + value.replace("'", "''") + "'"


def rename_leases(leases: LeaseStores, group: str, old: str, new: str) -> Iterator[tuple[str, int]]:
    """Rename a handler in lease stores outside the application's databases. Yields how many were renamed, by store.

    Raises:
        ConfigurationError: Both names have claims on one key.
    """
    for redis in leases.in_redis():
        moved, left = redis.rename(group, old, new)
        if left:
            raise ConfigurationError(
                f"Both {old!r} and {new!r} have {left} key(s) in {redis.name}; those were left as they are, {moved} others"
                " were renamed. They were run under both names: look at those keys."
            )
        yield redis.name, moved
    for store in leases.databases():
        with store.engine.begin() as connection:
            yield store.name, sum(rename_rows(connection, store.tables, group, old, new).values())
