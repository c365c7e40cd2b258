"""Leases in Redis: one hash for each message, changed by scripts alone. `scripts` describes the hash.

The handler's database is not part of these changes: `complete` follows the commit, and after a crash between the two the message
runs again when the lease ends. A failover to an asynchronous replica can lose the last changes, so that a message runs again.
If that is not acceptable, keep leases in SQL. A majority of several Redis masters does not help: their locks are not fenced.
Called by `guards.lease`.
"""

import json
import re
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Final
from uuid import uuid4

from exactly_once.claim import ClaimRow, LeaseAnswer, StepRow
from exactly_once.guards.lease import scripts
from exactly_once.guards.lease.contract import HeldLease, Recorded, clock

__all__ = ["RedisLeases", "key_of"]

PREFIX: Final = "exactly_once:"
AT_ONCE: Final = 500
"""The most leases renewed by one script. Redis does nothing else meanwhile; so many take about two milliseconds."""
_RESOLVING: Final = timedelta(seconds=10)
_RECORDED: Final = (Recorded.LOST, Recorded.STORED, Recorded.KNOWN)
_STEP: Final = b"step:"

Script = Callable[[Sequence[str], Sequence[Any]], Any]
"""Run one script with these keys and arguments."""


def key_of(row: ClaimRow) -> str:
    """Return the name of a message's hash. No two identities share a name, whatever characters they contain."""
    return PREFIX + json.dumps([row.group, row.handler, row.key], ensure_ascii=False)


class RedisLeases:
    """Leases in one Redis, used from threads or from one event loop. See `LeaseStore`.

    Args:
        name: The name of the Redis for people: its URL without a password.
        script: Prepares a script to be run.
        retention: How long a message is remembered after its last change.
    """

    def __init__(self, name: str, script: Callable[[str], Script], retention: timedelta) -> None:
        self.name = name
        self._retention = _ms(retention)
        self._claim, self._complete = script(scripts.CLAIM), script(scripts.COMPLETE)
        self._release, self._renew = script(scripts.RELEASE), script(scripts.RENEW)
        self._step, self._look = script(scripts.STEP), script(scripts.LOOK)
        self._rename = script(scripts.RENAME)

    def claim(self, row: ClaimRow, token: str, lease: timedelta, *, also: bytes, steps: bool) -> LeaseAnswer:
        """See `LeaseStore.claim`."""
        now, found = self._claim([key_of(row)], [token, _ms(lease), self._retention, row.fingerprint, also])
        return _leased(now, found, token)

    def complete(self, held: HeldLease) -> bool:
        """See `LeaseStore.complete`."""
        return bool(self._complete([key_of(held.row)], [held.token, self._retention]))

    def release(self, held: HeldLease) -> bool:
        """See `LeaseStore.release`."""
        return bool(self._release([key_of(held.row)], [held.token, self._retention]))

    def renew(self, held: Sequence[HeldLease]) -> Sequence[HeldLease]:
        """See `LeaseStore.renew`."""
        lost: list[HeldLease] = []
        for first in range(0, len(held), AT_ONCE):
            some = held[first : first + AT_ONCE]
            now = clock()
            numbers = self._renew(
                [key_of(each.row) for each in some],
                [_ms(some[0].lease), self._retention, *(each.token for each in some)],
            )
            gone = [some[number - 1] for number in numbers]
            lost += gone
            for each in some:
                if each not in gone:
                    each.renewed = now
        return lost

    def record(self, held: HeldLease, step: StepRow, *, begun: bool = False) -> Recorded:
        """See `LeaseStore.record`."""
        return self._write(held.row, held.token, step, held.attempt, over="0")

    def look(self, row: ClaimRow) -> LeaseAnswer | None:
        """See `LeaseStore.look`."""
        now, found = self._look([key_of(row)], [])
        return _leased(now, found, "") if found else None

    def resolve(self, row: ClaimRow, step: str, result: bytes) -> bool:
        """See `LeaseStore.resolve`. It claims the key itself, so that no run can begin meanwhile."""
        seen = self.look(row)
        if seen is None or seen.consumed:
            return False
        token = uuid4().hex
        now, found = self._claim([key_of(row)], [token, _ms(_RESOLVING), self._retention, *(seen.fingerprint,) * 2])
        if not _leased(now, found, token).won:
            return False
        known = next((each for each in seen.steps if each.name == step), None)
        ordinal = known.ordinal if known else max((each.ordinal for each in seen.steps), default=-1) + 1
        made = StepRow(step, ordinal, True, result)
        written = self._write(row, token, made, seen.attempt, over="1")
        self._release([key_of(row)], [token, self._retention])
        return written is Recorded.STORED

    def rename(self, group: str, old: str, new: str) -> tuple[int, int]:
        """Rename all hashes of a handler to its new name. After an error, a second call continues.

        Returns:
            How many were renamed, and how many were left because the new name has such a hash already.
        """
        was, now = (PREFIX + json.dumps([group, name], ensure_ascii=False)[:-1] + ", " for name in (old, new))
        pattern = re.sub(r"([\\*?\[\]^-])", r"\\\1", was) + "*"
        at, moved, left = b"0", 0, 0
        while True:
            at, some, others = self._rename([], [at, pattern, was, now])
            moved, left = moved + some, left + others
            if at == b"0":
                return moved, left

    def _write(self, row: ClaimRow, token: str, step: StepRow, attempt: int, *, over: str) -> Recorded:
        head = f"{step.ordinal} {step.finished:d} {attempt} {token}\n".encode()
        value = head + (step.result or b"")
        field = _STEP + step.name.encode()
        answer: int = self._step([key_of(row)], [token, self._retention, field, value, over])
        return _RECORDED[answer]


def _leased(now: int, found: Sequence[bytes], token: str) -> LeaseAnswer:
    fields = dict(zip(found[::2], found[1::2], strict=True))
    standing, until = fields.get(b"token", b""), fields.get(b"until")
    consumed = fields[b"status"] == b"1"
    return LeaseAnswer(
        won=standing == token.encode() and not consumed and bool(standing),
        consumed=consumed,
        fingerprint=fields[b"fingerprint"],
        attempt=int(fields[b"attempt"]),
        remaining=timedelta(milliseconds=int(until) - now) if standing and until is not None else None,
        steps=tuple(
            sorted(
                (_step(name, value) for name, value in fields.items() if name.startswith(_STEP)),
                key=lambda step: step.ordinal,
            )
        ),
    )


def _step(field: bytes, value: bytes) -> StepRow:
    head, _, result = value.partition(b"\n")
    ordinal, finished, attempt, _token = head.decode().split(" ")
    done = finished == "1"
    return StepRow(field[len(_STEP) :].decode(), int(ordinal), done, result if done else None, int(attempt))


def _ms(span: timedelta) -> int:
    return max(1, span // timedelta(milliseconds=1))
