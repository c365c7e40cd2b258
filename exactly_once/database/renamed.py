"""Finds claims of handlers that are not registered. If a handler was renamed, its messages would take effect again.

Asked by `doctor`, and by a worker before it receives. Costs one index lookup for each name, however many rows it has.
"""

from collections.abc import Iterator, Sequence
from typing import Final

from sqlalchemy import Connection, Table, func, select

from exactly_once.wording.text import escaped, listed, probably

__all__ = ["claimed_names", "told_of_renamed"]


def claimed_names(connection: Connection, claims: Table, group: str) -> Iterator[str]:
    """Yield the handlers of which this group has claims, each once, in the order of the index."""
    last: str | None = ""
    while last is not None:
        last = connection.execute(
            select(func.min(claims.c.handler)).where(claims.c.consumer_group == group, claims.c.handler > last)
        ).scalar_one()
        if last is not None:
            yield last


def told_of_renamed(claimed: Sequence[str], registered: Sequence[str]) -> str | None:
    """Say, at a start, that a handler seems to have a new name. None where nothing looks like that.

    It looks like that if one registered handler has no claim, and there are claims of a handler that is not
    registered. Once the new name has claims, duplicates have already run, and `doctor` alone reports it. Names that `eo.claim`
    alone uses look the same.
    """
    gone = [name for name in claimed if name not in registered]
    new = [name for name in registered if name not in claimed]
    if not gone or not new:
        return None
    old = gone[0]
    to = new[0] if len(new) == 1 else "NEW"
    close = probably(old, new) if len(new) > 1 else ""
    return _TOLD.format(
        gone=listed(gone, most=3), new=listed(new, most=3), old=escaped(old), to=escaped(to), close=close
    )


_TOLD: Final = (
    "There are claims of {gone} (not registered), and none of {new} (registered). If one was renamed, messages that come again"
    " take effect a second time: stop this worker, and type: exactly-once handlers rename {old} {to} --app MODULE:NAME.{close}"
)
