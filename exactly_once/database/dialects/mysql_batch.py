"""The claim of a batch on MySQL and MariaDB: one INSERT that leaves existing rows as they are, then one look at the owners.

A plain INSERT of several rows inserts none if one key exists, and does not say which. INSERT IGNORE deadlocks with another
one even if both are sorted. ON DUPLICATE KEY UPDATE that changes nothing does neither. Its row count means nothing if the driver
counts found rows, so the rows are told apart by their owner, which is this attempt's alone. Rows that existed before
stay locked until the batch's transaction ends. Called by the transaction guard.
"""

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from datetime import UTC
from typing import Any, Final

from exactly_once.claim import ClaimRow, ExistingClaim
from exactly_once.database.dialects.contract import Dialect
from exactly_once.database.dialects.mysql import KEY
from exactly_once.database.dialects.mysql_errors import busy_of
from exactly_once.database.dialects.mysql_wire import (
    SessionSettings,
    bound,
    digits,
    identity,
    refuse_autocommit,
    together,
)
from exactly_once.database.owner import savepoint_of

__all__ = ["CLAIM", "KNOWN", "ROW", "Claims"]

CLAIM: Final = (
    "INSERT INTO {table} (consumer_group, handler, business_key, status, message_id, fingerprint, retry_times, owner,"
    " born_at, created_at, consumed_at) VALUES {rows} ON DUPLICATE KEY UPDATE consumer_group = consumer_group"
)
ROW: Final = (
    "(UNHEX(%s), UNHEX(%s), UNHEX(%s), 2, CONVERT(UNHEX(%s) USING utf8mb4), UNHEX(%s), %s, %s, %s,"
    " UTC_TIMESTAMP(6), UTC_TIMESTAMP(6))"
)
# Looks up each key on the whole primary key: with IN the server may read, and wait for, all rows of the handler.
KNOWN: Final = (
    "SELECT known.business_key, known.status, known.fingerprint, CAST(known.owner AS BINARY) FROM ({keys}) AS wanted"
    " STRAIGHT_JOIN {table} AS known FORCE INDEX (PRIMARY) ON known.consumer_group = UNHEX(%s) AND known.handler = UNHEX(%s)"
    " AND known.business_key = wanted.business_key LIMIT 18446744073709551615 LOCK IN SHARE MODE"
)


class Claims:
    """See `BatchClaims`."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._claim, self._known = CLAIM.replace("{table}", dialect.table), KNOWN.replace("{table}", dialect.table)

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
        refuse_autocommit(dbapi)
        # In whole seconds. If only the session can be limited, its limit applies here too.
        seen: SessionSettings = info[self._dialect.kept_as]
        bounded = bound(seen, wait_ms)
        group, handler, _ = identity(rows[0])
        keys = [row.key.encode().hex() for row in rows]
        values: list[Any] = []
        for row, key in zip(rows, keys, strict=True):
            born = None if row.born_at is None else row.born_at.astimezone(UTC).replace(tzinfo=None)
            values += (group, handler, key, digits(row.message_id), row.fingerprint.hex(), row.attempt - 1, owner, born)
        cursor = dbapi.cursor()
        try:
            insert = bounded + self._claim.replace("{rows}", ",".join([ROW] * len(rows)))
            together(cursor, seen, *seen.right, insert, f"SAVEPOINT {savepoint_of(owner)}", values=values)
            wanted = " UNION ALL ".join([KEY] * len(keys))
            cursor.execute(bounded + self._known.replace("{keys}", wanted), (*keys, group, handler))
            found = cursor.fetchall()
        except Exception as error:
            if (busy := busy_of(error)) is not None:
                raise busy from error
            raise
        finally:
            cursor.close()
        standing: dict[str, ExistingClaim | None] = dict.fromkeys(row.key for row in rows)
        for key, status, fingerprint, named in found:
            owned_by = None if named is None else named.decode()
            if owned_by == owner:
                del standing[key.decode()]
            else:
                standing[key.decode()] = ExistingClaim(int(status), bytes(fingerprint), owned_by)
        return standing
