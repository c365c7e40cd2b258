"""Carries out a person's decision about many failures in parts, one after the other, each in a transaction of its own.

A single transaction would lock thousands of rows and claims for minutes, and a copy of one of these messages would wait as long
in its handler's transaction. After a crash between two parts, the earlier parts are decided and the later are unchanged: the same
command continues. `decisions` does the work of a part. Called by the command line.

A worker may be running one of these messages. A discard locks the claim first and the failure row second, in the order of a run:
so it waits for the run's end, and finds its result. If a deadlock or a timeout ends a part, the part is tried again, and then
each row alone. So one message that is being run does not keep the others from being decided.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from time import monotonic
from typing import Final

from sqlalchemy import Connection, text

from exactly_once.database.schema import Tables
from exactly_once.failures import decisions
from exactly_once.failures.decisions import Chosen

__all__ = ["Database", "Part", "discard", "requeue"]

_ROWS: Final = 200  # rows of a part: a copy of one of these messages waits for less than a second
_TRIES: Final = 2  # for a part, and then for each of its rows: the victim of a deadlock succeeds at its second try
_WAIT_S: Final = 5  # for a message that is being run; after that it is left as it is, and its id is reported


@dataclass(frozen=True, slots=True)
class Database:
    """The database of the failures."""

    begin: Callable[[], AbstractContextManager[Connection]]
    """Begins a transaction, which is committed at the end of the block."""
    tables: Tables
    passes: Callable[[BaseException], bool]
    """Whether an error is temporary: a deadlock, or a wait that took too long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The result for some of the chosen failures."""

    count: int = 0
    """How many were decided as the person wanted."""
    broken: int = 0
    """How many of these were broken: what their handler had committed is still there."""
    left_out: int = 0
    """How many broken failures matched, but were left out because they were not named."""
    settled: int = 0
    """How many had changed since they were chosen: processed meanwhile, or decided by another person."""
    running: tuple[int, ...] = ()
    """The ids of failures left as they are: a worker was running each of them."""

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
    """Let the pump run these failures again, oldest first. Yields after each transaction.

    Args:
        database: Their database.
        chosen: Which failures.
        ids: The result of `decisions.ids` when the command began. Later failures are not meant.
        by: Who decided.
        why: The reason.
        per_second: How many fall due in a second, by the server's clock. None: all at once.

    Raises:
        ConfigurationError: A settled state was chosen.
    """
    decisions.refuse_settled(chosen)
    began, before = monotonic(), 0

    def decide(connection: Connection, part: Chosen) -> Part:
        # due times are counted from the time when the very first fell due
        later = 0.0 if per_second is None else before / per_second - (monotonic() - began)
        done = decisions.requeue(
            connection, database.tables, part, by=by, why=why, per_second=per_second, later=max(0.0, later)
        )
        return Part(count=done.count, broken=done.broken, left_out=done.left_out)

    for rows in _parts(ids):
        for done in _decided(database, chosen, rows, decide):
            yield done
            before += done.count


def discard(database: Database, chosen: Chosen, ids: Sequence[int], *, by: str, why: str | None) -> Iterator[Part]:
    """Settle these failures for good: neither they nor other copies run again. Yields after each transaction.

    Args:
        database: Their database.
        chosen: Which failures.
        ids: The result of `decisions.ids`.
        by: Who decided.
        why: The reason.
    """

    def decide(connection: Connection, part: Chosen) -> Part:
        return Part(count=decisions.discard(connection, database.tables, part, by=by, why=why))

    for rows in _parts(ids):
        yield from _decided(database, chosen, rows, decide)


def _parts(ids: Sequence[int]) -> Iterator[Sequence[int]]:
    for at in range(0, len(ids), _ROWS):
        yield ids[at : at + _ROWS]


def _decided(
    database: Database, chosen: Chosen, ids: Sequence[int], decide: Callable[[Connection, Chosen], Part]
) -> Iterator[Part]:
    """Decide these in one transaction. If that does not succeed, decide each in a transaction of its own."""
    part = replace(chosen, part=ids)
    for _ in range(_TRIES):
        try:
            with database.begin() as connection:
                _wait_a_little(connection)
                done = decide(connection, part)
        except decisions.ChangedMeanwhile:
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
    """Limit the waits of this transaction. On SQLite the URL says how long it waits for the other writer."""
    match connection.dialect.name:
        case "postgresql":
            connection.execute(text(f"SET LOCAL lock_timeout = '{_WAIT_S}s'"))
        case "mysql" | "mariadb":  # only per session there; this session is the command's own
            connection.execute(text(f"SET innodb_lock_wait_timeout = {_WAIT_S}"))
