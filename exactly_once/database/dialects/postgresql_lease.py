"""Claims with a lease on PostgreSQL: an INSERT, then an UPDATE that takes a free claim, both in one round trip.

`ON CONFLICT DO UPDATE ... WHERE` would lock the row of a running lease at each delivery of a copy, and a locked row cannot be
renewed: many copies would let the lease run out. This UPDATE locks only the row that it takes. If another transaction is changing
that row, it waits and looks again. The wait is limited, and a row that stays locked counts as in progress. READ COMMITTED on
purpose, whatever the engine's isolation level: under a stricter one that second look would be an error. Called by
`guards.lease.sql`.
"""

from collections.abc import MutableMapping
from datetime import timedelta
from typing import Any, Final

from psycopg import errors
from psycopg.pq import Escaping

from exactly_once.claim import ClaimRow, LeaseAnswer, StepRow
from exactly_once.database.dialects.contract import ClaimBusy, steps_of
from exactly_once.database.dialects.postgresql import PostgreSQL
from exactly_once.database.dialects.postgresql_errors import busy_of
from exactly_once.database.dialects.postgresql_settings import SessionSettings
from exactly_once.database.dialects.postgresql_wire import driver_of, send, template
from exactly_once.database.schema import UNFINISHED

__all__ = ["CLAIM", "LOOK", "STEPS", "TAKE", "Claims"]

BEGIN: Final = "BEGIN ISOLATION LEVEL READ COMMITTED;SET LOCAL lock_timeout = {wait_ms};"
CLAIM: Final = (
    "INSERT INTO {table} (consumer_group, handler, business_key, status, message_id, fingerprint, retry_times,"
    " owner, token, lease_until, born_at, created_at) VALUES"
    " ({group}, {handler}, {key}, 0, {message_id}, {fingerprint}, 0, {owner}, {token},"
    " clock_timestamp() + {lease}, {born_at}, clock_timestamp())"
    " ON CONFLICT (consumer_group, handler, business_key) DO NOTHING;"
)
TAKE: Final = (
    "UPDATE {table} SET message_id = {message_id}, fingerprint = {fingerprint}, retry_times = retry_times + 1,"
    " owner = {owner}, token = {token}, lease_until = clock_timestamp() + {lease}"
    " WHERE consumer_group = {group} AND handler = {handler} AND business_key = {key}"
    " AND status = 0 AND (token IS NULL OR lease_until <= clock_timestamp())"
    " AND fingerprint IN ({fingerprint_same}, {also});"
)
LOOK: Final = (
    "SELECT status, token, encode(fingerprint, 'hex'), retry_times,"
    " (extract(epoch FROM lease_until - clock_timestamp()) * 1000)::bigint, owner FROM {table}"
    " WHERE consumer_group = {group} AND handler = {handler} AND business_key = {key};"
)
STEPS: Final = (
    "SELECT step, ordinal, status, encode(result, 'hex'), attempt FROM {steps}"
    " WHERE consumer_group = {group} AND handler = {handler} AND business_key = {key} ORDER BY ordinal;"
)

_IDENTITY: Final = ("group", "handler", "key")
_CLAIMED: Final = (*_IDENTITY, "message_id", "fingerprint", "owner", "token", "lease", "born_at")
_TAKEN: Final = ("message_id", "fingerprint", "owner", "token", "lease", *_IDENTITY, "fingerprint_same", "also")


class Claims:
    """See `LeaseClaims`."""

    def __init__(self, dialect: PostgreSQL) -> None:
        table = dialect.table
        self._dialect = dialect
        steps = steps_of(table)
        self._claim = template(CLAIM.replace("{table}", table), _CLAIMED)
        self._take = template(TAKE.replace("{table}", table), _TAKEN)
        self._look = template(LOOK.replace("{table}", table), _IDENTITY)
        self._steps = template(STEPS.replace("{steps}", steps), _IDENTITY)

    def claim(
        self,
        dbapi: Any,
        info: MutableMapping[Any, Any],
        row: ClaimRow,
        token: str,
        *,
        lease: timedelta,
        also: bytes,
        wait_ms: int,
        steps: bool,
    ) -> LeaseAnswer:
        """See `LeaseClaims.claim`.

        A crash here leaves the claim or none. If the answer is lost, the claim stays until its lease ends.
        """
        driver = driver_of(dbapi)
        quote = Escaping(driver.pgconn).escape_literal
        identity = (quote(row.group.encode()), quote(row.handler.encode()), quote(row.key.encode()))
        run = (
            b"NULL" if row.message_id is None else quote(row.message_id.encode()),
            _bytea(row.fingerprint),
            quote(row.owner.encode()),
            quote(token.encode()),
            b"interval '%d milliseconds'" % round(lease.total_seconds() * 1000),
        )
        born_at = b"NULL" if row.born_at is None else b"timestamptz " + quote(row.born_at.isoformat().encode())
        claim = self._claim % (*identity, *run, born_at)
        take = self._take % (*run, *identity, _bytea(row.fingerprint), _bytea(also))
        seen: SessionSettings = info[self._dialect.kept_as]
        read = self._look % identity + (self._steps % identity if steps else b"")
        text = _BEGIN % wait_ms + self._dialect.durable + seen.settings + claim + take + read + b"COMMIT"
        try:
            try:
                results = send(driver, text)
            except errors.ActiveSqlTransaction:
                # A listener of the application has begun a transaction at checkout, and its isolation level is another one.
                send(driver, b"ROLLBACK")
                results = send(driver, text)
        except errors.Error as error:
            busy = busy_of(error)
            if busy is None:
                raise  # in the open transaction: then the connection is thrown away, and a pooler throws its own away, too
            send(driver, b"ROLLBACK")
            raise busy from error
        found, recorded = (results[-3], results[-2]) if steps else (results[-2], None)
        if not found.ntuples:
            raise ClaimBusy(again=True)  # deleted between the two statements: the next try may insert it
        status, standing, fingerprint, retry_times, remaining, owner = (found.get_value(0, n) for n in range(6))
        return LeaseAnswer(
            won=standing == token.encode() and status == b"0",
            consumed=status != b"0",
            unfinished=(owner or b"").decode() if int(status) == UNFINISHED else None,
            fingerprint=bytes.fromhex(fingerprint.decode()),
            attempt=int(retry_times) + 1,
            remaining=None if remaining is None or standing is None else timedelta(milliseconds=int(remaining)),
            steps=() if recorded is None else tuple(_step(recorded, n) for n in range(recorded.ntuples)),
        )


def _bytea(value: bytes) -> bytes:
    return b"decode('%s', 'hex')" % value.hex().encode()


def _step(result: Any, line: int) -> StepRow:
    name, ordinal, status, value, attempt = (result.get_value(line, n) for n in range(5))
    return StepRow(
        name.decode(),
        int(ordinal),
        status == b"1",
        None if value is None else bytes.fromhex(value.decode()),
        int(attempt),
    )


_BEGIN: Final = BEGIN.replace("{wait_ms}", "%d").encode()
