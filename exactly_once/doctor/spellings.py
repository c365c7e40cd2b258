"""Counts claims whose key is spelled as in the previous release. Changes nothing; called by `databases`."""

from collections.abc import Iterator
from typing import Any, Final

from sqlalchemy import or_, select

from exactly_once.database.store import Store
from exactly_once.doctor.finding import Finding, Mark
from exactly_once.handlers.plan import Plan
from exactly_once.keys import Path, is_former
from exactly_once.wording.text import escaped

__all__ = ["former_spellings"]

_LOOKED_AT: Final = 100_000
"""For each handler, at most so many keys with a blank, or with a replacement character, are read; few handlers have any."""


def former_spellings(connection: Any, store: Store, group: str, plans: tuple[Plan, ...]) -> Iterator[Finding]:
    """Yield a finding for each handler that has such claims."""
    t = store.tables.idempotent
    signs = [" "] if store.lacking is not None else [" ", "\ufffd"]
    for plan in plans:
        if all(isinstance(part, Path) for part in plan.key.parts):
            continue  # read from the body, whose spelling has not changed
        suspect = or_(*(t.c.business_key.like(f"%{sign}%") for sign in signs))
        wanted = select(t.c.business_key).where(t.c.consumer_group == group, t.c.handler == plan.name, suspect)
        keys = connection.execute(wanted.limit(_LOOKED_AT)).scalars().all()
        count = sum(is_former(plan.key, key) for key in keys)
        if count:
            least = "at least " if len(keys) == _LOOKED_AT else ""
            yield Finding(
                Mark.WARN,
                f"{least}{count} claims of the handler {escaped(plan.name)!r} have a message key spelled as in the release"
                " before: several keys in the order of their sender, or bytes that are no UTF-8. A copy of such a message is a"
                " duplicate if its message id is the same, in this release only. Before the next one, wait until no copy can come"
                " any more",
            )
