"""Finds dead letters that conflict with a consumed key only because each copy contains the time of its sending.

By default the whole body is compared. So a producer that sends one event twice, with a new `sent_at`, sends two payloads.
Changes nothing; reads a few of each handler's newest conflicts. Called by the doctor.
"""

import re
from collections.abc import Iterator
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final

from sqlalchemy import Connection, select

from exactly_once.database.schema import Tables
from exactly_once.doctor.finding import Finding, Mark
from exactly_once.errors import PayloadConflict
from exactly_once.failures.due import message_of
from exactly_once.handlers.body import parse_json
from exactly_once.handlers.fingerprint import differing_paths
from exactly_once.handlers.plan import Plan
from exactly_once.wording.text import escaped, listed

__all__ = ["conflicts_of_times", "is_time"]

_MOST: Final = 10
_NAMED: Final = re.compile(r"time|date|stamp|_at$|At$|^ts$|_ts$|^at$|sent|created|updated|modified|when", re.IGNORECASE)
_FROM_S, _TO_S = 1_000_000_000, 4_200_000_000  # 2001 to 2103


def conflicts_of_times(
    connection: Connection, tables: Tables, group: str, plans: tuple[Plan, ...]
) -> Iterator[Finding]:
    """Yield an advice for each handler whose newest conflicts differ in times and in nothing else.

    Args:
        connection: A connection to the database.
        tables: Our tables there.
        group: The consumer group.
        plans: The handlers.
    """
    for plan in plans:
        found = list(_conflicts(connection, tables, group, plan))
        if not found or not all(differing and all(is_time(*each) for each in differing) for differing, _ in found):
            continue
        times = {name for differing, _ in found for name, _ in differing}
        members = {name for _, names in found for name in names} - {name.partition(".")[0] for name in times}
        yield Finding(
            Mark.WARN,
            f"The newest dead letters of {plan.name!r} that conflict with a consumed key ({len(found)} were read) differ from it"
            f" in times alone: {escaped(listed(times), 200)}. They look like copies of one event. Name what makes two copies"
            f" one: fingerprint={sorted(members)[:20]!r}, or None to compare nothing; then: exactly-once failures discard",
        )


def _conflicts(
    connection: Connection, tables: Tables, group: str, plan: Plan
) -> Iterator[tuple[list[tuple[str, object]], list[str]]]:
    """For each conflict, the members that differ, with their values; and the names of all members."""
    f, claims = tables.failure, tables.idempotent
    rows = connection.execute(
        select(f)
        .where(
            f.c.consumer_group == group,
            f.c.handler == plan.name,
            f.c.state == "dead",
            f.c.error_class == PayloadConflict.__name__,
        )
        .order_by(f.c.id.desc())
        .limit(_MOST)
    ).all()
    for row in rows:
        stored = connection.execute(
            select(claims.c.fingerprint).where(
                claims.c.consumer_group == group,
                claims.c.handler == plan.name,
                claims.c.business_key == row.business_key,
            )
        ).scalar_one_or_none()
        message = message_of(row)
        parsed: Any = parse_json(message.body)
        if stored is None or not isinstance(parsed, dict):
            continue
        names = differing_paths(bytes(stored), plan.fingerprint, message, parsed)
        if names is not None:
            yield [(name, _value(parsed, name)) for name in names], list(parsed)


def _value(parsed: dict[str, Any], name: str) -> object:
    outer, _, inner = name.partition(".")
    if name in parsed or not isinstance(parsed.get(outer), dict):
        return parsed.get(name)
    return parsed[outer].get(inner)


def is_time(name: str, value: object) -> bool:
    """Say whether a member of a body is a time: a text that is one, or a number that can be one and has such a name.

    Example:
        >>> is_time("sent_at", 1_700_000_000), is_time("order_no", 1_700_000_000), is_time("x", "2026-01-31T12:00:00Z")
        (True, False, True)
    """
    if isinstance(value, str) and len(value) >= len("2026-01-31"):
        for read in (datetime.fromisoformat, parsedate_to_datetime):
            try:
                read(value)
            except ValueError:
                continue
            return not value.isdigit()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not _NAMED.search(name.rpartition(".")[2]):
        return False
    return any(_FROM_S <= value / scale <= _TO_S for scale in (1, 10**3, 10**6, 10**9))
