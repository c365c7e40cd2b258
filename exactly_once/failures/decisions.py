"""A person's decision about many failures: in parts, each a transaction of its own, one after the other.

All at once would hold thousands of rows and claims for minutes, and a copy of one of those messages would wait in its handler's
transaction for as long. A crash between two parts leaves the earlier ones decided and the later ones as they were; the same
command goes on from there. What a part does is in `triage`. Called by the command line.

A worker may be running one of them. A discard takes the claim first and the failure row after it, as that run does, so it waits
for the run's end and finds what became of it. Where a deadlock or a wait ends a part, the part is tried again, then each of its
rows alone, so that one message that is being run keeps no other from being decided.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from time import monotonic
from typing import Final

from sqlalchemy import Connection, text

from exactly_once.database.schema import Tables
from exactly_once.failures import triage
from exactly_once.failures.triage import Chosen

__all__ = ["Database", "Part", "discard", "requeue"]

_ROWS: Final = 200  # of a part: a copy of one of these messages waits for less than a second
_TRIES: Final = 2  # of a part, and then of each of its rows: the victim of a deadlock succeeds at its second one
_WAIT_S: Final = 5  # for a message that is being run; it is left, and named, rather than that its run is waited for


@dataclass(frozen=True, slots=True)
class Database:
    """Where the failures are."""

    begin: Callable[[], AbstractContextManager[Connection]]
    """Begins a transaction, which is committed at the end of the block."""
    tables: Tables
    passes: Callable[[BaseException], bool]
    """Whether an error may pass: a deadlock, a wait that took too long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What became of some of the chosen."""

    count: int = 0
    """How many were decided as the person wanted."""
    broken: int = 0
    """How many of these were broken: what their handler committed before is still there."""
    left_out: int = 0
    """Broken ones that would have matched, and were not named."""
    settled: int = 0
    """No longer as they were chosen when their turn came: processed meanwhile, or decided by somebody else."""
    running: tuple[int, ...] = ()
    """Left as they are, by id: a worker was running each of them."""

    def __add__(self, other: "Part") -> "Part":
        return Part(
            count=self.count + other.count,
            broken=self.broken + other.broken,
            left_out=self.left_out + other.left_out,
            settled=self.settled + other.settled,
            running=self.running + other.running,
        )


def requeue(
    database: Database, chosen: Chosen, ids: Sequence[int], *, by: str, why: str | None, per_second: float | None
) -> Iterator[Part]:
    """Let the pump run these again, oldest first; yields after each transaction.

    Args:
        database: Where they are.
        chosen: Which.
        ids: Of `triage.ids`: what was chosen as the command began. What fails after that is not meant.
        by: Who decided.
        why: For what reason.
        per_second: At most so many a second fall due, by the server's clock; None is all at once.

    Raises:
        ConfigurationError: A settled state was chosen.
    """
    triage.refuse_settled(chosen)
    began, before = monotonic(), 0

    def decide(connection: Connection, part: Chosen) -> Part:
        # each time counts from when the first of all fell due
        later = 0.0 if per_second is None else before / per_second - (monotonic() - began)
        done = triage.requeue(
            connection, database.tables, part, by=by, why=why, per_second=per_second, later=max(0.0, later)
        )
        return Part(count=done.count, broken=done.broken, left_out=done.left_out)

    for rows in _parts(ids):
        for done in _decided(database, chosen, rows, decide):
            yield done
            before += done.count


def discard(database: Database, chosen: Chosen, ids: Sequence[int], *, by: str, why: str | None) -> Iterator[Part]:
    """Settle these for good: they do not run again, and neither does another copy of them; yields after each transaction.

    Args:
        database: Where they are.
        chosen: Which.
        ids: Of `triage.ids`.
        by: Who decided.
        why: For what reason.
    """

    def decide(connection: Connection, part: Chosen) -> Part:
        return Part(count=triage.discard(connection, database.tables, part, by=by, why=why))

    for rows in _parts(ids):
        yield from _decided(database, chosen, rows, decide)


def _parts(ids: Sequence[int]) -> Iterator[Sequence[int]]:
    for at in range(0, len(ids), _ROWS):
        yield ids[at : at + _ROWS]


def _decided(
    database: Database, chosen: Chosen, ids: Sequence[int], decide: Callable[[Connection, Chosen], Part]
) -> Iterator[Part]:
    """Decide on these in one transaction; where that does not succeed, on each in one of its own."""
    part = replace(chosen, part=ids)
    for _ in range(_TRIES):
        try:
            with database.begin() as connection:
                _wait_a_little(connection)
                done = decide(connection, part)
        except triage.ChangedMeanwhile:
            if len(ids) == 1:
                yield Part(settled=1)
                return
        except Exception as error:
            if not database.passes(error):
                raise
        else:
            yield replace(done, settled=len(ids) - done.count - done.left_out)
            return
    if len(ids) == 1:
        yield Part(running=tuple(ids))
        return
    for id_ in ids:
        yield from _decided(database, chosen, (id_,), decide)


def _wait_a_little(connection: Connection) -> None:
    """Bound the waits of this transaction. SQLite waits for its only writer, as its URL says."""
    match connection.dialect.name:
        case "postgresql":
            connection.execute(text(f"SET LOCAL lock_timeout = '{_WAIT_S}s'"))
        case "mysql" | "mariadb":  # there is none for a transaction alone; the session is the command's own
            connection.execute(text(f"SET innodb_lock_wait_timeout = {_WAIT_S}"))
