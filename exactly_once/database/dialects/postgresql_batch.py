"""The claim of a batch on PostgreSQL: one INSERT of arrays, in one round trip with BEGIN and the limit, for any size.

The arrays are sorted by key, so two batches that share keys wait for each other in one order and cannot deadlock on them.
A row that INSERT does not return belongs to another attempt, and is committed by then. Such rows are read in a second round trip.
Called by the transaction guard.
"""

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from psycopg import errors
from psycopg.pq import Escaping, TransactionStatus

from exactly_once.claim import ClaimRow, ExistingClaim
from exactly_once.database.dialects.contract import Dialect
from exactly_once.database.dialects.postgresql_errors import busy_of
from exactly_once.database.dialects.postgresql_settings import (
    SessionSettings,
    limits,
    text_in_theirs,
    text_of_our_begin,
)
from exactly_once.database.dialects.postgresql_wire import driver_of, note_driver_begin, send, template

__all__ = ["CLAIM", "KNOWN", "Claims"]

CLAIM: Final = (
    "INSERT INTO {table} (consumer_group, handler, business_key, status, message_id, fingerprint, retry_times, owner,"
    " born_at, created_at, consumed_at) SELECT {group}, {handler}, claimed.key, 1, claimed.message_id,"
    " decode(claimed.fingerprint, 'hex'), claimed.retry_times, {owner},"
    " timestamptz 'epoch' + claimed.born_at * interval '1 microsecond', clock_timestamp(), clock_timestamp()"
    " FROM unnest({keys}::text[], {message_ids}::text[], {fingerprints}::text[], {retry_times}::integer[],"
    " {born_at}::bigint[]) AS claimed (key, message_id, fingerprint, retry_times, born_at)"
    " ON CONFLICT (consumer_group, handler, business_key) DO NOTHING RETURNING business_key"
)
KNOWN: Final = (
    "SELECT business_key, status, encode(fingerprint, 'hex'), owner FROM {table}"
    " WHERE consumer_group = {group} AND handler = {handler} AND business_key = ANY ({keys}::text[])"
)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)  # a time as text costs both sides four times as much
_VALUES: Final = ("group", "handler", "owner", "keys", "message_ids", "fingerprints", "retry_times", "born_at")


class Claims:
    """See `BatchClaims`."""

    def __init__(self, dialect: Dialect) -> None:
        # Made at the first claim, when the table's schema is known.
        self._dialect = dialect
        self._claim = template(CLAIM.replace("{table}", dialect.table), _VALUES)
        self._known = template(KNOWN.replace("{table}", dialect.table), ("group", "handler", "keys"))

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
        driver = driver_of(dbapi)
        seen: SessionSettings = info[self._dialect.kept_as]
        # Else a hook of the application has sent something, and the driver has begun a transaction.
        begins = driver.pgconn.transaction_status == TransactionStatus.IDLE
        quote = Escaping(driver.pgconn).escape_literal
        groups, handlers, keys, fingerprints, message_ids, attempts, _, born, _ = zip(*rows, strict=True)
        group, handler = quote(groups[0].encode()), quote(handlers[0].encode())
        values = (
            group,
            handler,
            quote(owner.encode()),
            quote(_array(keys)),
            quote(_array(message_ids)),
            quote(b"{%s}" % ",".join([each.hex() or '""' for each in fingerprints]).encode()),
            quote(_numbers([attempt - 1 for attempt in attempts])),
            quote(_numbers([None if at is None else (at - _EPOCH) // _MICROSECOND for at in born])),
        )
        try:
            bound_ms = max(1, wait_ms)  # 0 would mean for ever
            first = text_of_our_begin(driver, seen) if begins else text_in_theirs(seen)
            limit, unlimit = limits(seen, bound_ms, begins=begins)
            text = limit + self._claim % values + unlimit
            results = send(driver, first + text, meanwhile)
        except errors.Error as error:
            busy = busy_of(error)
            if busy is None:
                raise
            raise busy from error
        note_driver_begin(driver)
        seen.begins(driver, first, results)
        claimed = results[-2]
        if claimed.ntuples == len(rows):
            return {}
        won = {claimed.get_value(place, 0) for place in range(claimed.ntuples)}
        others = [row.key for row in rows if row.key.encode() not in won]
        look = self._known % (group, handler, quote(_array(others)))
        found = send(driver, look if won else look + b";ROLLBACK")[0]
        standing: dict[str, ExistingClaim | None] = dict.fromkeys(others)
        for place in range(found.ntuples):
            key, status, fingerprint, owned_by = (found.get_value(place, column) for column in range(4))
            standing[key.decode()] = ExistingClaim(
                int(status), bytes.fromhex(fingerprint.decode()), None if owned_by is None else owned_by.decode()
            )
        return standing


def _array(values: Sequence[str | None]) -> bytes:
    """Write an array as PostgreSQL reads it: each element in quotes, with a backslash before each quote and backslash."""
    texts = [each for each in values if each is not None]
    together = '","'.join(texts)
    if len(texts) == len(values) and "\\" not in together and together.count('"') == 2 * (len(texts) - 1):
        return b'{"%s"}' % together.encode()  # the usual case: nothing to escape, at a tenth of the cost
    quoted = ["NULL" if each is None else f'"{_escaped(each)}"' for each in values]
    return b"{%s}" % ",".join(quoted).encode()


def _numbers(values: list[int | None] | list[int]) -> bytes:
    """Write an array of numbers: a list's own text with other brackets."""
    return b"{%s}" % repr(values)[1:-1].replace("None", "NULL").encode()


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
