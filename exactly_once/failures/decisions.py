"""A person's commands for failed messages: list, show, requeue, discard.

Each is a part of the caller's transaction; `in_parts` divides many rows into several. `requeue` only sets a due time: then the
pump of a running worker runs the message, under its claim like any other. `discard` also writes the claim row, or the broker's
next copy would run a message that a person settled. Neither reads a body.

The claim of a *broken* message was committed together with half of its effects. A requeued message would be taken for a duplicate
and closed without a run, so `requeue` removes that claim. Therefore it takes broken messages only if a person names them. Called
by `in_parts`, the command line and `doctor`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Row, Table, and_, func, select, update

from exactly_once.database import claim_rows
from exactly_once.database.characters import characters_of
from exactly_once.database.schema import CONSUMED, CONSUMING, DISCARDED, KEY_BYTES, UNFINISHED, Tables, all_rows
from exactly_once.database.server_clock import utcnow
from exactly_once.errors import ConfigurationError
from exactly_once.failures.states import CLOSED, OPEN, RESOLVABLE, RUNNABLE, overdue
from exactly_once.wording.text import escaped, probably, storable
from exactly_once.wording.text import listed as named

__all__ = [
    "ChangedMeanwhile",
    "Chosen",
    "Requeued",
    "count",
    "discard",
    "ids",
    "listed",
    "other_groups",
    "refuse_settled",
    "requeue",
    "shown",
]

_IDENTITY: Final = ("id", "state", "consumer_group", "handler", "business_key", "claim_owner", "last_failed_at")
_LOOKS: Final = 3  # for a claim that appears or disappears meanwhile; then the whole part is tried again
_CLAIMED: Final = (*_IDENTITY, "message_id", "fingerprint", "attempts", "born_at")


class ChangedMeanwhile(Exception):
    """A failure to be discarded has changed since it was chosen. Its claim is written already: roll back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Which failures a command is about. A field that is None does not filter.

    Raises:
        ConfigurationError: There is no such state. A misspelled state would silently match nothing.
    """

    group: str
    ids: Sequence[int] = ()
    handler: str | None = None
    error_class: str | None = None
    key: str | None = None
    overdue: bool = False
    """Only failures that the broker was to redeliver, and has not for so long that it never will."""
    states: Sequence[str] = OPEN
    part: Sequence[int] = ()
    """The ids of those that one transaction is about. Empty: all."""

    def __post_init__(self) -> None:
        for state in self.states:
            if state not in (*OPEN, *CLOSED):
                raise ConfigurationError(
                    f"There is no state '{escaped(state)}'.{probably(state, (*OPEN, *CLOSED))} There are: "
                    f"{named((*OPEN, *CLOSED))}."
                )

    def where(self, connection: Connection, t: Table) -> ColumnElement[bool]:
        """Return the condition, with texts in the database's character set: keys were recorded in it."""
        characters = characters_of(connection)
        narrow: list[ColumnElement[bool]] = [t.c.consumer_group == self.group, t.c.state.in_(self.states)]
        if self.ids:
            narrow.append(t.c.id.in_(self.ids))
        if self.part:
            narrow.append(t.c.id.in_(self.part))
        if self.handler is not None:
            narrow.append(t.c.handler == self.handler)
        if self.error_class is not None:
            narrow.append(t.c.error_class == storable(self.error_class, None, characters, limit=255))
        if self.key is not None:
            narrow.append(t.c.business_key == storable(self.key, KEY_BYTES, characters))
        if self.overdue:
            narrow.append(overdue(t))
        return and_(*narrow)


def listed(connection: Connection, tables: Tables, chosen: Chosen, *, limit: int) -> Sequence[Row[Any]]:
    """Return failures, newest first, without their bodies, each with the flag `overdue`."""
    t = tables.failure
    columns: list[Any] = [column for column in t.c if column.name not in ("body", "properties", "fingerprint")]
    columns.append(overdue(t).label("overdue"))
    return connection.execute(
        select(*columns).where(chosen.where(connection, t)).order_by(t.c.id.desc()).limit(limit)
    ).all()


def count(connection: Connection, tables: Tables, chosen: Chosen) -> int:
    """Return how many failures match."""
    t = tables.failure
    return connection.execute(
        all_rows(select(func.count()).select_from(t).where(chosen.where(connection, t)), connection.dialect.name)
    ).scalar_one()


def other_groups(connection: Connection, tables: Tables, group: str, *, most: int) -> Sequence[str]:
    """Return the existing consumer groups if `group` has no row: its name is misspelt, or it never ran."""
    found: set[str] = set()
    for t in (tables.idempotent, tables.failure):
        if connection.execute(select(t.c.consumer_group).where(t.c.consumer_group == group).limit(1)).first():
            return ()
        last: str | None = ""
        # one index step for each name, however many rows it has
        while len(found) < most:
            after = select(func.min(t.c.consumer_group)).where(t.c.consumer_group > last)
            if (last := connection.execute(after).scalar_one_or_none()) is None:
                break
            found.add(last)
    return sorted(found)


def ids(connection: Connection, tables: Tables, chosen: Chosen) -> Sequence[int]:
    """Return the ids of the failures that match, oldest first."""
    t = tables.failure
    found = select(t.c.id).where(chosen.where(connection, t)).order_by(t.c.id)
    return connection.execute(all_rows(found, connection.dialect.name)).scalars().all()


def shown(connection: Connection, tables: Tables, group: str, id_: int) -> Row[Any] | None:
    """Return one failure whole, in any state."""
    t = tables.failure
    one = select(t).where(t.c.consumer_group == group, t.c.id == id_)
    return connection.execute(all_rows(one, connection.dialect.name)).one_or_none()


@dataclass(frozen=True, slots=True, kw_only=True)
class Requeued:
    """The result of a requeue."""

    count: int
    """How many run again, broken messages included."""
    broken: int
    """How many of these were broken: what their handler had committed is still there."""
    left_out: int
    """How many broken failures matched, but were left out because they were not named."""


def refuse_settled(chosen: Chosen) -> None:
    """Refuse to requeue settled failures.

    Raises:
        ConfigurationError: A settled state was chosen: its claim stands, so it would not run.
    """
    if settled := [state for state in chosen.states if state in CLOSED]:
        raise ConfigurationError(
            f"What is {' or '.join(settled)} cannot be requeued: its key counts as consumed, so it would pass for a"
            " duplicate. Have the producer send it under another key."
        )


def requeue(
    connection: Connection,
    tables: Tables,
    chosen: Chosen,
    *,
    by: str,
    why: str | None,
    per_second: float | None,
    later: float = 0.0,
) -> Requeued:
    """Let the pump run these failures again, oldest first.

    Broken failures are left out unless a person names their ids, or names states that include "broken".

    Args:
        connection: In a transaction of the caller's.
        tables: Our tables.
        chosen: Which failures.
        by: Who decided.
        why: The reason.
        per_second: How many fall due in a second, by the server's clock. None: all at once.
        later: The seconds until the first of them falls due.

    Raises:
        ConfigurationError: A settled state was chosen: its claim stands, so it would not run.
    """
    refuse_settled(chosen)
    t = tables.failure
    broken_too = bool(chosen.ids) or tuple(chosen.states) != OPEN
    meant = select(*(t.c[name] for name in _IDENTITY)).where(chosen.where(connection, t)).order_by(t.c.id)
    rows = connection.execute(all_rows(meant.with_for_update(), connection.dialect.name)).all()
    wanted = [row for row in rows if broken_too or row.state != "broken"]
    broken = [row for row in wanted if row.state == "broken"]
    for row in broken:
        if row.business_key is not None:
            claim_rows.take_back(
                connection,
                tables,
                row.consumer_group,
                row.handler,
                row.business_key,
                row.claim_owner,
                until=row.last_failed_at,
            )
    decided = {"state": "requeued", **_decided(connection, by, why)}
    if per_second is None:
        _write(connection, t, [row.id for row in wanted], decided | {"next_attempt_at": utcnow()})
    else:
        for number, row in enumerate(wanted):
            _write(connection, t, [row.id], decided | {"next_attempt_at": utcnow(later + number / per_second)})
    return Requeued(count=len(wanted), broken=len(broken), left_out=len(rows) - len(wanted))


def discard(connection: Connection, tables: Tables, chosen: Chosen, *, by: str, why: str | None) -> int:
    """Settle these failures for good, and return how many. Neither they nor other copies run again.

    A message that took effect meanwhile (another run or another copy has its claim) is closed as processed, and not counted.

    Claims are written first and failures second, in the order of a run of the message: in the other order each would wait for
    the other.

    Raises:
        ChangedMeanwhile: A message was processed, or decided by another person, while this waited for its claim.
    """
    t = tables.failure
    meant = select(*(t.c[name] for name in _CLAIMED)).where(chosen.where(connection, t))
    rows = connection.execute(all_rows(meant, connection.dialect.name)).all()
    # sorted by key, the order in which batches claim
    known = sorted((row for row in rows if row.business_key is not None), key=lambda row: row.business_key.encode())
    done = [row.id for row in known if not _claim(connection, tables.idempotent, row)]
    found = [row.id for row in rows]
    if not found:
        return 0
    still = select(t.c.id).where(t.c.id.in_(found), chosen.where(connection, t)).order_by(t.c.id).with_for_update()
    if len(connection.execute(all_rows(still, connection.dialect.name)).all()) != len(found):
        raise ChangedMeanwhile
    _write(connection, t, done, {"state": "resolved", "next_attempt_at": None})
    left = [id_ for id_ in found if id_ not in done]
    _write(connection, t, left, {"state": "discarded", "next_attempt_at": None, **_decided(connection, by, why)})
    return len(left)


def _write(connection: Connection, t: Table, ids_: Sequence[int], values: Mapping[str, Any]) -> None:
    if ids_:
        connection.execute(update(t).where(t.c.id.in_(ids_)).values(values))


def _claim(connection: Connection, claims: Table, row: Row[Any]) -> bool:
    """Write the claim unless the key has one. Return whether to discard the message; False: it took effect.

    A lease on the key is ended by this, and taken from a run that still has it. A lease that begins between the look and the
    write is found at the second look. It cannot be released then, because its row is locked.
    """
    settled = {"status": CONSUMED, "owner": DISCARDED, "token": None, "lease_until": None, "consumed_at": utcnow()}
    stands = claim_rows.of(claims, row.consumer_group, row.handler, row.business_key)
    begun = and_(stands, claims.c.status.in_((CONSUMING, UNFINISHED)))
    values = {
        "consumer_group": row.consumer_group,
        "handler": row.handler,
        "business_key": row.business_key,
        "message_id": row.message_id,
        "fingerprint": row.fingerprint,
        "retry_times": row.attempts,
        "owner": DISCARDED,
        "born_at": row.born_at,
    }
    for _ in range(_LOOKS):
        if connection.execute(update(claims).where(begun).values(settled)).rowcount:
            return True
        if claim_rows.write(connection, claims, values):
            return True
        # a locking read: a plain read may show what was there when this transaction began
        there = select(claims.c.status, claims.c.fingerprint, claims.c.owner).where(stands).with_for_update(read=True)
        claim = connection.execute(all_rows(there, connection.dialect.name)).one_or_none()
        if claim is not None and claim.status == CONSUMED:
            return claim.owner == DISCARDED or not _took_effect(row, claim.fingerprint)
    raise ChangedMeanwhile


def _took_effect(row: Row[Any], fingerprint: bytes) -> bool:
    """Whether a consumed claim is that of this failure's message, by the rule of `DueFailures.sweep`."""
    if row.state not in RESOLVABLE:
        return False  # broken: the claim stands with half of its effects
    return fingerprint == row.fingerprint or (not fingerprint and row.state in RUNNABLE)


def _decided(connection: Connection, by: str, why: str | None) -> dict[str, Any]:
    characters = characters_of(connection)
    return {
        "decided_by": storable(by, None, characters, limit=255),
        "decided_at": utcnow(),
        "decided_why": storable(why, None, characters),
    }
