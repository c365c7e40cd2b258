"""The claim of a batch on SQLite: one INSERT for each key after one BEGIN IMMEDIATE; a round trip is a function call here.

Called by the transaction guard.
"""

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

from exactly_once.claim import ClaimRow, ExistingClaim
from exactly_once.database.dialects.sqlite import SQLite

__all__ = ["Claims"]


class Claims:
    """See `BatchClaims`."""

    def __init__(self, dialect: SQLite) -> None:
        self._dialect = dialect

    def claim(
        self,
        dbapi: Any,
        info: MutableMapping[Any, Any],
        rows: Sequence[ClaimRow],
        *,
        owner: str,
        wait_ms: int,
        meanwhile: Iterable[object] = (),
    ) -> Mapping[str, ExistingClaim | None]:
        """See `BatchClaims.claim`. A crash before the COMMIT of the handlers' work leaves nothing of it."""
        one = self._dialect
        owned = [row._replace(owner=owner) for row in rows]
        first, *rest = owned
        others = [] if one.claim(dbapi, info, first, wait_ms=wait_ms, savepoint=False) else [first]
        others += [row for row in rest if not one.insert(dbapi, row)]
        return {row.key: one.read_claim(dbapi, row, end=False) for row in others}
