"""Checks one database: whether it answers, what a crash loses, and whether the driver's duplicate-key error is recognised.

Changes nothing: its test claims are rolled back. Called by the doctor.
"""

from collections.abc import Callable, Iterator
from typing import Any, Final

from sqlalchemy import Engine, select, text
from sqlalchemy.util import greenlet_spawn

from exactly_once.alembic import ready
from exactly_once.database.connections.beginning import begin_ours
from exactly_once.database.connections.pooler import LINK, Link
from exactly_once.database.errors.unusable import read_only
from exactly_once.database.probe import claims_twice, lacking_characters
from exactly_once.database.renamed import claimed_names
from exactly_once.database.server_clock import utcnow
from exactly_once.database.store import Store
from exactly_once.doctor.conflicts import conflicts_of_times
from exactly_once.doctor.finding import Finding, Mark
from exactly_once.doctor.spellings import former_spellings
from exactly_once.doctor.standbys import findings_for_standbys
from exactly_once.errors import ExactlyOnceError
from exactly_once.exceptions.words import words_of
from exactly_once.failures import decisions
from exactly_once.handlers.plan import Lease, Plan
from exactly_once.wording.redaction import redacted
from exactly_once.wording.text import escaped, probably, stopped

__all__ = ["findings_for_database"]

# RocketMQ's largest body is 4 MiB, the driver may escape each byte to two, and the error is stored with it.
_PACKET_BYTES: Final = 16 * 2**20
_SKEW_S: Final = 5.0  # seconds; nothing depends on the worker's clock, but a wrong one makes log lines misleading


def findings_for_database(store: Store, group: str, plans: tuple[Plan, ...], concurrency: int) -> Iterator[Finding]:
    """Yield the findings about one database, in the order in which to repair them.

    Args:
        store: The database.
        group: The consumer group whose claims are examined.
        plans: The handlers.
        concurrency: How many messages run at once in a process.
    """
    where = f"database {store.name!r}"
    try:
        problem = ready.problem(store)
    except ExactlyOnceError as error:
        yield Finding(Mark.FAIL, str(error))
        return
    if problem is not None:
        yield Finding(Mark.FAIL, f"{stopped(problem)} Start it, or mend EXACTLY_ONCE_DATABASE.")
        return
    yield Finding(Mark.OK, f"{where}: {redacted(store.engine.url)} answers, schema at head")
    if store.lacking is not None:
        yield Finding(Mark.WARN, lacking_characters(store.name, store.lacking))
    if not store.answers():
        yield Finding(Mark.FAIL, f"{where}: {read_only(store.engine.url)}")
        return
    try:
        yield _self_check(where, store, lambda: claims_twice(store.dialect, store.open, group), "sync")
        if any(plan.is_async for plan in plans):
            yield _self_check(where, store, lambda: _claims_twice_async(store, group), "async")
    except _DeniedError as denied:
        yield Finding(Mark.FAIL, str(denied))
        return  # no other check would work either
    with store.engine.connect() as connection:
        if store.dialect.name == "postgresql":
            yield _pooler(where, connection, said=store.pooler)
        yield from {"postgresql": _postgresql, "sqlite": _sqlite}.get(store.dialect.name, _mysql)(where, connection)
        yield from findings_for_standbys(where, connection)
        skew = abs((connection.execute(select(utcnow())).scalar_one() - _now()).total_seconds())
        if skew > _SKEW_S:
            yield Finding(
                Mark.WARN, f"{where}: its clock and this machine's differ by {skew:.0f} s; only log times mislead"
            )
        yield from _unknown_handlers(connection, store, group, plans)
        yield from former_spellings(connection, store, group, plans)
        yield from conflicts_of_times(connection, store.tables, group, plans)
        yield from _overdue(where, store, connection, group)
        yield from _isolation(where, store, connection, plans)
    yield _pool(where, store.engine, concurrency, steps=any(plan.takes_steps for plan in plans))


def _now() -> Any:
    from datetime import UTC, datetime

    return datetime.now(UTC)


class _DeniedError(Exception):
    """The user lacks a right; the text is the statement that grants it."""


def _self_check(where: str, store: Store, claims: Callable[[], tuple[bool, bool]], kind: str) -> Finding:
    try:
        seen = claims()
    except Exception as error:
        if (refused := ready.refusal(store, error)) is not None:
            raise _DeniedError(refused) from error
        told = escaped(words_of(error), 300)
        return Finding(Mark.FAIL, f"{where}: a claim through the {kind} driver fails ({type(error).__name__}: {told})")
    if seen == (True, False):
        return Finding(Mark.OK, f"{where}: through the {kind} driver a key claimed twice is won, then known")
    return Finding(
        Mark.FAIL, f"{where}: through the {kind} driver a key claimed twice is seen as {seen}: duplicates would run"
    )


def _claims_twice_async(store: Store, group: str) -> tuple[bool, bool]:
    import asyncio

    async def both() -> tuple[bool, bool]:
        try:
            return await greenlet_spawn(claims_twice, store.dialect, store.open_async, group)
        finally:
            await store.async_engine.dispose()

    return asyncio.run(both())


_WEAKER: Final = {
    "local": "it stays so. This server keeps what was acknowledged when it stops; a standby that takes over may lack it",
    "remote_write": "it stays so. What was acknowledged may be lost if this server and the standby's machine stop at once",
}


def _postgresql(where: str, connection: Any) -> Iterator[Finding]:
    for name, mend in (
        ("synchronous_commit", "it is raised for our transactions; set it on for what else matters"),
        ("fsync", "a crash of the server loses committed effects. ALTER SYSTEM SET fsync = on"),
        ("full_page_writes", "a crash of the server may corrupt tables. ALTER SYSTEM SET full_page_writes = on"),
    ):
        value = connection.execute(text(f"SHOW {name}")).scalar_one()
        weak = value in _WEAKER
        told = f": {_WEAKER[value]}" if weak else f": {mend}" if value == "off" else ""
        yield Finding(Mark.WARN if weak or value == "off" else Mark.OK, f"{where}: {name} is {value}{told}")
    unlogged = text("SELECT relname FROM pg_class WHERE relname LIKE 'message\\_%' AND relpersistence = 'u' ORDER BY 1")
    for table in connection.execute(unlogged).scalars():
        yield Finding(
            Mark.FAIL,
            f"{where}: {table} is UNLOGGED: PostgreSQL empties it after a crash, with all that is in it. ALTER TABLE {table}"
            " SET LOGGED",
        )
    # The value inside a transaction of ours: behind a pooler it is set with BEGIN.
    connection.rollback()
    begin_ours(connection)
    idle = connection.execute(text("SHOW idle_in_transaction_session_timeout")).scalar_one()
    if idle == "0":
        yield Finding(
            Mark.WARN,
            f"{where}: idle_in_transaction_session_timeout is 0: a worker that vanishes keeps its keys locked for hours."
            " ALTER ROLE ... SET idle_in_transaction_session_timeout = '10min', or give a URL in place of an engine",
        )
    said = connection.connection.dbapi_connection.info.get_parameters()
    # A connection through a socket file has no network that can fail.
    if not {"keepalives_idle", "tcp_user_timeout"} & said.keys() and not said.get("host", "/").startswith("/"):
        yield Finding(
            Mark.WARN,
            f"{where}: this engine notices a dead network after two hours, the kernel's default, and a worker hangs that"
            " long. create_engine(..., connect_args={'keepalives_idle': 30, 'tcp_user_timeout': 60000}), or give a URL in"
            " place of an engine",
        )


def _pooler(where: str, connection: Any, *, said: bool) -> Finding:
    link: Link = connection.info[LINK]
    if link.pooled:
        why = "EXACTLY_ONCE_POOLER says that a pooler is" if said else "a pooler is"
        return Finding(
            Mark.OK,
            f"{where}: {why} before the server: no statement is prepared, and settings go with each transaction",
        )
    return Finding(
        Mark.OK, f"{where}: no pooler is seen before the server. Is there one? export EXACTLY_ONCE_POOLER=true"
    )


def _mysql(where: str, connection: Any) -> Iterator[Finding]:
    flush, logs, binlog, modes, packet = connection.execute(
        text("SELECT @@innodb_flush_log_at_trx_commit, @@log_bin, @@sync_binlog, @@sql_mode, @@max_allowed_packet")
    ).one()
    for name, value, wanted, mend in (
        ("innodb_flush_log_at_trx_commit", int(flush), True, "a crash loses acknowledged commits"),
        # Without a binary log nothing can be lost with it.
        ("sync_binlog", int(binlog), bool(logs), "a crash of the machine loses commits from the binary log"),
    ):
        weak = wanted and value != 1
        yield Finding(
            Mark.WARN if weak else Mark.OK,
            f"{where}: {name} is {value}" + (f": {mend}. SET GLOBAL {name} = 1" if weak else ""),
        )
    yield Finding(Mark.OK, f"{where}: sql_mode is {modes}")
    # The session's value. By SHOW, because a later MySQL may no longer have the variable.
    shown = connection.execute(text("SHOW VARIABLES LIKE 'binlog_format'")).one_or_none()
    if logs and shown is not None and shown[1] == "STATEMENT":
        yield Finding(
            Mark.WARN,
            f"{where}: binlog_format is STATEMENT: the server refuses to write under READ COMMITTED (errno 1665), which upgrades"
            " of our tables, sql:// and handlers of that isolation do. SET GLOBAL binlog_format = 'ROW' (or 'MIXED')",
        )
    small = int(packet) < _PACKET_BYTES
    yield Finding(
        Mark.WARN if small else Mark.OK,
        f"{where}: max_allowed_packet is {packet}"
        + (
            f": a large body that failed cannot be kept. SET GLOBAL max_allowed_packet = {_PACKET_BYTES}"
            if small
            else ""
        ),
    )


def _sqlite(where: str, connection: Any) -> Iterator[Finding]:
    synchronous = connection.execute(text("PRAGMA synchronous")).scalar_one()
    mode = connection.execute(text("PRAGMA journal_mode")).scalar_one()
    weak = synchronous == 0 or (synchronous == 1 and mode == "wal")
    mend = ": a power loss loses acknowledged commits. PRAGMA synchronous = FULL" if weak else ""
    yield Finding(Mark.WARN if weak else Mark.OK, f"{where}: synchronous is {synchronous}, journal {mode}{mend}")


def _unknown_handlers(connection: Any, store: Store, group: str, plans: tuple[Plan, ...]) -> Iterator[Finding]:
    """Find handlers that were renamed: under the new name every message looks new; claims under the old name show it."""
    t = store.tables.idempotent
    known = [plan.name for plan in plans]
    # One index lookup for each name, however many rows each has.
    for name in claimed_names(connection, t, group):
        if name not in known:
            yield Finding(
                Mark.WARN,
                f"There are claims of a handler {escaped(name)!r}, which is not registered.{probably(name, known)} If it"
                f" was renamed: exactly-once handlers rename {escaped(name)} NEW",
            )


def _overdue(where: str, store: Store, connection: Any, group: str) -> Iterator[Finding]:
    late = decisions.count(connection, store.tables, decisions.Chosen(group=group, overdue=True))
    if late:
        yield Finding(
            Mark.WARN,
            f"{where}: {late} failed message(s) were to be brought again by the broker, and were not for 13 hours or longer:"
            " another program of the group did them, or no worker ran, or the broker gave up. Of an ordered handler they hold"
            " up all that follow. Look: exactly-once failures list --overdue",
        )


def _isolation(where: str, store: Store, connection: Any, plans: tuple[Plan, ...]) -> Iterator[Finding]:
    """With snapshot isolation, a transaction that outlives a renewal of its own lease cannot complete: the row was changed."""
    level = connection.get_isolation_level()
    leased = [plan.name for plan in plans if isinstance(plan.guard, Lease) and plan.guard.store is None]
    strict = level in ("REPEATABLE READ", "SERIALIZABLE")
    if store.dialect.name == "mysql" and strict:
        # MariaDB alone has it, on by default from 11.6: then its REPEATABLE READ is a snapshot like PostgreSQL's.
        shown = connection.execute(text("SHOW VARIABLES LIKE 'innodb_snapshot_isolation'")).one_or_none()
        strict = shown is not None and shown[1] == "ON"
        level = f"{level} with innodb_snapshot_isolation" if strict else level
    if leased and strict and store.dialect.name != "sqlite":
        yield Finding(
            Mark.WARN,
            f"{where}: isolation is {level}, and {', '.join(leased)} keep their leases here: a transaction that is open for"
            " longer than a third of the lease fails when it completes, and runs again. Use READ COMMITTED for them, or do"
            " the long part before the session's first statement",
        )
    else:
        yield Finding(Mark.OK, f"{where}: isolation is {level}")


def _pool(where: str, engine: Engine, concurrency: int, *, steps: bool) -> Finding:
    size = getattr(engine.pool, "size", lambda: None)()
    overflow = getattr(engine.pool, "_max_overflow", 0)
    most = None if size is None or overflow < 0 else size + overflow  # below zero: no limit
    if most is not None and steps and most <= concurrency:
        return Finding(
            Mark.WARN,
            f"{where}: the pool holds {most} connections, {concurrency} messages run at once, and a step is recorded through"
            f" a connection of its own: they wait for each other. create_engine(..., pool_size={concurrency + 4})",
        )
    if most is not None and most < concurrency:
        return Finding(
            Mark.WARN,
            f"{where}: the pool holds {most} connections and {concurrency} messages run at once: they wait for each other."
            f" create_engine(..., pool_size={concurrency + 4})",
        )
    return Finding(Mark.OK, f"{where}: the pool is large enough for {concurrency} messages at once")
