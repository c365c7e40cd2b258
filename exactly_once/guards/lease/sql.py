"""Leases in a database: a row of `message_idempotent` for each message, a row of `message_step` for each step.

The statements are SQLAlchemy's, and the same on each server; only the claim is the dialect's. `own_connection` sends a statement
alone, as a transaction of its own. Methods ending in `_in` run in the handler's transaction, and what they write stands or falls
with it. Every change names the fencing token, so a run that was taken over changes nothing. Called by `guards.lease`,
`guards.transaction` and the command line.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cached_property
from typing import Any, Final, TypeVar

from sqlalchemy import (
    Connection,
    Engine,
    Insert,
    Select,
    Table,
    Update,
    and_,
    bindparam,
    delete,
    exists,
    insert,
    literal,
    or_,
    select,
    text,
    update,
)

from exactly_once.claim import ClaimRow, LeaseAnswer, StepRow
from exactly_once.database import claim_rows
from exactly_once.database.connections.had_before import moment
from exactly_once.database.dialects.claim_refusal import is_refusal, of_nobody, raise_for_the_table, tried
from exactly_once.database.dialects.contract import (
    WAIT_MS,
    ClaimBusy,
    Dialect,
    ErrorKind,
    LeaseClaims,
    TraceState,
)
from exactly_once.database.dialects.firsthand import ready
from exactly_once.database.dialects.registry import lease_claims_for
from exactly_once.database.errors.crowded import all_taken, is_news
from exactly_once.database.errors.drivers_own import is_taken
from exactly_once.database.errors.interrupted import interrupted
from exactly_once.database.schema import (
    CONSUMED,
    CONSUMING,
    DISCARDED,
    STEP_BEGUN,
    STEP_FINISHED,
    STEP_TRACE,
    UNFINISHED,
    Tables,
    all_rows,
)
from exactly_once.database.server_clock import utcnow
from exactly_once.guards.lease.contract import HeldLease, Recorded, clock
from exactly_once.guards.lease.own_connection import OwnConnection
from exactly_once.wording.steady_log import steady

__all__ = ["SqlLeases"]

T = TypeVar("T")

_log = steady("exactly_once.leases")

AT_ONCE: Final = 5000
"""The most leases renewed by one statement: each needs three parameters, and PostgreSQL takes 65,535."""
_MOMENT: Final = timedelta(seconds=1)
_BEATS: Final = 4  # a renewal may take a quarter of the time between two renewals


class SqlLeases:
    """Leases in one database, used from threads or from one event loop. See `LeaseStore`.

    Args:
        name: The database's name.
        engine: Its engine for threads. Or the sync engine inside an AsyncEngine, to be used in greenlets only.
        dialect: The dialect of the database.
        tables: Returns our tables. May connect.
    """

    def __init__(self, name: str, engine: Engine, dialect: Dialect, tables: Callable[[], Tables]) -> None:
        self.name = name
        self._engine, self._dialect, self._tables = engine, dialect, tables
        self._own = OwnConnection(name, engine, dialect)

    # made at the first claim, when the schema of the tables is known

    @cached_property
    def _claims(self) -> LeaseClaims:
        return lease_claims_for(self._dialect)

    @cached_property
    def _t(self) -> Table:
        return self._tables().idempotent

    @cached_property
    def _steps(self) -> Table:
        return self._tables().step

    def claim(self, row: ClaimRow, token: str, lease: timedelta, *, also: bytes, steps: bool) -> LeaseAnswer:
        """See `LeaseStore.claim`."""
        since, asked = moment(), False
        while True:
            with self._own.connected() as connection:
                used = ready(self._dialect, connection, wait_ms=WAIT_MS, since=since)
                if used is None:
                    # an earlier user may have changed the connection so that a key would be stored as another key
                    connection.invalidate()
                    continue
                dbapi, info = connection.connection.dbapi_connection, connection.info
                try:
                    for last in (False, True):
                        try:
                            return self._claims.claim(
                                dbapi, info, row, token, lease=lease, also=also, wait_ms=WAIT_MS, steps=steps
                            )
                        except ClaimBusy as busy:
                            if busy.cut and used and self._dialect.limit_was_left(dbapi, info):
                                raise
                            if last or not busy.again:
                                return LeaseAnswer(False, False, row.fingerprint, 0, _MOMENT)
                except Exception as error:
                    away = self._dialect.error_kind(error) is ErrorKind.UNAVAILABLE
                    if not used and not asked and is_refusal(self._dialect, error):
                        self._tried(connection, of_nobody(row), steps=steps)
                        asked = True  # claim once more: a person may have repaired the table in between
                    elif not used or away or interrupted(error) or self._dialect.unstorable(error):
                        raise
                    # an earlier user may have left a role or a time limit in the connection: claim again on another one
                    connection.invalidate()

    def _tried(self, connection: Connection, row: ClaimRow, *, steps: bool) -> None:
        """After a claim was refused on a connection without an earlier user: send a test claim. Return if the table takes it.

        Raises:
            StoreUnavailable: The table takes no claim, or the server does not answer.
        """
        dialect = self._dialect
        dbapi, info = connection.connection.dbapi_connection, connection.info
        assert dbapi is not None
        try:
            dbapi.rollback()
            tried(dialect, dbapi, info, row, wait_ms=WAIT_MS)
            if steps:
                connection.execute(self._all(select(self._steps.c.step).where(self._of(self._steps, row))))
            named = {"b_consumer_group": row.group, "b_handler": row.handler, "b_business_key": row.key}
            dialect.in_our_name(connection, self._touching, named)  # changes no row; tries the right to UPDATE
            dbapi.rollback()
        except Exception as refusal:

            def look(statement: str) -> None:
                assert dbapi is not None
                dbapi.rollback()
                connection.exec_driver_sql(statement)

            raise_for_the_table(dialect, refusal, row, look, self._engine, store=self.name)

    def complete(self, held: HeldLease) -> bool:
        """See `LeaseStore.complete`."""
        return self._own.change(lambda connection: self.complete_in(connection, held))

    def complete_in(self, connection: Connection, held: HeldLease) -> bool:
        """The same in the handler's transaction: the last statement before its COMMIT."""
        row = held.row
        named = {"b_group": row.group, "b_handler": row.handler, "b_key": row.key, "b_token": held.token}
        return self._dialect.in_our_name(connection, self._completing, named) == 1

    @cached_property
    def _completing(self) -> Update:
        t = self._t
        identity = (t.c.consumer_group, "b_group"), (t.c.handler, "b_handler"), (t.c.business_key, "b_key")
        ours = [column == bindparam(name, type_=column.type) for column, name in (*identity, (t.c.token, "b_token"))]
        return update(t).where(*ours).values(status=CONSUMED, consumed_at=utcnow(), lease_until=None)

    def mark_in(self, connection: Connection, held: HeldLease) -> bool:
        """Write, in the handler's transaction, the mark of a lease that is kept elsewhere. False: there is a mark already.

        The mark stands or falls with the handler's effects, so it shows what the lease store cannot know: whether they stand.
        """
        row = held.row
        named = {
            "b_consumer_group": row.group,
            "b_handler": row.handler,
            "b_business_key": row.key,
            "b_message_id": row.message_id,
            "b_fingerprint": row.fingerprint,
            "b_retry_times": held.attempt - 1,
            "b_owner": row.owner,
            "b_token": held.token,
            "b_born_at": row.born_at,
        }
        in_our_name = self._dialect.in_our_name
        if claim_rows.written(lambda: in_our_name(connection, self._marking, named)):
            return True
        return in_our_name(connection, self._remarking, named) == 1

    def stands_in(self, connection: Connection, held: HeldLease) -> bool:
        """Whether another run has left its mark. Uses an UPDATE that changes nothing, sent with our role like `mark_in`."""
        row = held.row
        named = {"b_consumer_group": row.group, "b_handler": row.handler, "b_business_key": row.key}
        return self._dialect.in_our_name(connection, self._touching, named) == 1

    @cached_property
    def _touching(self) -> Update:
        t = self._t
        names = ("consumer_group", "handler", "business_key")
        named = [t.c[name] == bindparam(f"b_{name}", type_=t.c[name].type) for name in names]
        return update(t).where(*named, t.c.status != CONSUMING).values(status=t.c.status)

    @cached_property
    def _remarking(self) -> Update:
        """Writes the mark into an existing row: of a lease in this database that no run has now, or of a mark taken back."""
        t = self._t
        names = ("consumer_group", "handler", "business_key")
        named = [t.c[name] == bindparam(f"b_{name}", type_=t.c[name].type) for name in names]
        values = {
            name: bindparam(f"b_{name}", type_=t.c[name].type)
            for name in ("message_id", "fingerprint", "retry_times", "owner", "token")
        }
        free = or_(t.c.token.is_(None), t.c.lease_until <= utcnow())
        return (
            update(t)
            .where(*named, t.c.status == CONSUMING, free)
            .values(**values, status=CONSUMED, consumed_at=utcnow(), lease_until=None)
        )

    @cached_property
    def _marking(self) -> Insert:
        columns = (
            "consumer_group", "handler", "business_key", "message_id", "fingerprint", "retry_times", "owner", "token",
            "born_at",
        )  # fmt: skip
        values = {name: bindparam(f"b_{name}", type_=self._t.c[name].type) for name in columns}
        return claim_rows.writing(self._engine.dialect.name, self._t, values)

    def release(self, held: HeldLease) -> bool:
        """See `LeaseStore.release`."""
        free = update(self._t).where(self._ours(held)).values(token=None, lease_until=None)
        return self._own.change(lambda connection: _one(connection, free))

    def leave_unfinished(self, held: HeldLease) -> bool:
        """Prevent other runs of a message whose effects may be committed. Its failure row is written next.

        After a crash between the two the next claim finds it unfinished, and the message is *broken* all the same.
        """
        left = update(self._t).where(self._ours(held))
        done = left.values(status=UNFINISHED, consumed_at=utcnow(), lease_until=None)
        return self._own.change(lambda connection: _one(connection, done))

    def renew(self, held: Sequence[HeldLease]) -> Sequence[HeldLease]:
        """See `LeaseStore.renew`. A locked row is skipped: a step of the run has locked it, so the run is alive."""
        if len(held) > AT_ONCE:
            return [*self.renew(held[:AT_ONCE]), *self.renew(held[AT_ONCE:])]
        t, by_token = self._t, {each.token: each for each in held}
        lease = held[0].lease
        ours = and_(
            t.c.consumer_group == held[0].row.group,
            # the parts of the primary key use the index; the token then decides, because no token is used twice
            t.c.handler.in_(sorted({each.row.handler for each in held})),
            t.c.business_key.in_(sorted({each.row.key for each in held})),
            t.c.token.in_(sorted(by_token)),
            t.c.status == CONSUMING,
        )
        until = {"lease_until": utcnow(lease.total_seconds())}
        asked = clock()  # not when the answer comes: a process that was paused before it would think the lease fresh
        with self._own.connected() as connection, self._own.transaction(connection):
            match self._dialect.name:
                case "postgresql":
                    bound = round(lease.total_seconds() * 1000 / 3 / _BEATS)
                    connection.execute(text(f"SET LOCAL statement_timeout = {bound:d}"))
                    free = select(*t.primary_key).where(ours).with_for_update(skip_locked=True).subquery()
                    same = and_(*(column == free.c[column.name] for column in t.primary_key))
                    renewed = set(
                        connection.execute(update(t).where(same).values(until).returning(t.c.token)).scalars()
                    )
                case "sqlite":  # one writer, so no row is ever locked
                    renewed = set(
                        connection.execute(update(t).where(ours).values(until).returning(t.c.token)).scalars()
                    )
                case _:  # UPDATE cannot skip locked rows there
                    unlocked = self._all(select(t.c.token).where(ours).with_for_update(skip_locked=True))
                    renewed = set(connection.execute(unlocked).scalars())
                    if renewed:
                        connection.execute(update(t).where(ours, t.c.token.in_(sorted(renewed))).values(until))
            missing = by_token.keys() - renewed
            if missing:  # locked or lost: a read without a lock shows which
                missing -= set(connection.execute(self._all(select(t.c.token).where(ours))).scalars())
        for token in renewed:
            by_token[token].renewed = asked
        return [by_token[token] for token in missing]

    def record(self, held: HeldLease, step: StepRow, *, begun: bool = False) -> Recorded:
        """See `LeaseStore.record`."""
        self._say_if_crowded()
        if not begun:
            try:
                recorded = self._own.change(lambda connection: self.record_in(connection, held, step))
            except Exception as error:
                if not is_taken(error):
                    raise
                # the step has a row: the one sent before, whose answer was lost, or that of another run
            else:
                return recorded
        return self._own.change(lambda connection: self._finish(connection, held, step))

    def record_in(self, connection: Connection, held: HeldLease, step: StepRow, *, fenced: bool = True) -> Recorded:
        """Insert a step's row in the connection's transaction.

        Args:
            connection: The connection.
            held: The lease.
            step: The step.
            fenced: The lease is a row of this database. That row is locked, so a takeover happens either before, or after this
                and then sees the step. False: nothing is stored if the message is settled in this database.

        Raises:
            Exception: The step has a row already; `is_taken` recognises this error.
        """
        t, s = self._t, self._steps
        values: dict[str, Any] = {
            "consumer_group": held.row.group,
            "handler": held.row.handler,
            "business_key": held.row.key,
            "step": step.name,
            "ordinal": step.ordinal,
            "status": STEP_FINISHED if step.finished else STEP_BEGUN,
            "result": step.result,
            "attempt": held.attempt,
            "token": held.token,
            "created_at": utcnow(),
            "finished_at": utcnow() if step.finished else None,
        }
        columns = [
            value if hasattr(value, "compile") else literal(value, s.c[name].type).label(name)
            for name, value in values.items()
        ]
        if fenced:
            lock = t if self._is_postgresql else None
            source = select(*columns).select_from(t).where(self._ours(held)).with_for_update(of=lock)
        else:
            # a person may have discarded the message, or another run may have left its mark: the lease store does not know
            settled = exists().where(self._of(t, held.row), t.c.status != CONSUMING)
            source = select(*columns).where(~settled)
        stored = self._dialect.in_our_name(connection, insert(s).from_select(list(values), source), {})
        return Recorded.STORED if stored else Recorded.LOST

    def _finish(self, connection: Connection, held: HeldLease, step: StepRow) -> Recorded:
        """Write the result to the row that this attempt began, in one round trip. Read the row only if nothing was changed."""
        s = self._steps
        mine = and_(self._of(s, held.row), s.c.step == step.name)
        if step.finished:
            values = {"status": STEP_FINISHED, "result": step.result, "finished_at": utcnow()}
            ours = and_(mine, s.c.token == held.token, s.c.status == STEP_BEGUN)
            if _one(connection, update(s).where(ours, exists().where(self._ours(held))).values(values)):
                return Recorded.STORED
        row = connection.execute(self._all(select(s.c.token, s.c.status).where(mine))).one_or_none()
        if row is None or row.token != held.token:
            return Recorded.KNOWN
        return Recorded.STORED if (row.status == STEP_FINISHED) == step.finished else Recorded.LOST

    def finished(self, row: ClaimRow, step: str) -> bytes | None:
        """Return the result of a finished step, or None."""
        s = self._steps
        of_step = select(s.c.result).where(self._of(s, row), s.c.step == step, s.c.status == STEP_FINISHED)
        return self._own.read(lambda connection: connection.execute(self._all(of_step)).scalar_one_or_none())

    def look(self, row: ClaimRow) -> LeaseAnswer | None:
        """See `LeaseStore.look`."""
        t, s = self._t, self._steps

        def read(connection: Connection) -> LeaseAnswer | None:
            columns = (
                t.c.status, t.c.token, t.c.fingerprint, t.c.retry_times, t.c.lease_until, t.c.owner, utcnow().label("now")
            )  # fmt: skip
            found = connection.execute(self._all(select(*columns).where(self._of(t, row)))).one_or_none()
            if found is None:
                return None
            steps = select(s.c.step, s.c.ordinal, s.c.status, s.c.result, s.c.attempt).where(
                self._of(s, row), s.c.status != STEP_TRACE
            )
            running = found.token is not None and found.lease_until is not None
            return LeaseAnswer(
                won=False,
                consumed=found.status != CONSUMING,
                unfinished=found.owner or "" if found.status == UNFINISHED else None,
                settled=found.status == CONSUMED and (found.token is not None or found.owner == DISCARDED),
                fingerprint=found.fingerprint,
                attempt=found.retry_times + 1,
                remaining=found.lease_until - found.now if running else None,
                steps=tuple(
                    StepRow(name, ordinal, status == STEP_FINISHED, result, attempt)
                    for name, ordinal, status, result, attempt in connection.execute(
                        self._all(steps.order_by(s.c.ordinal))
                    )
                ),
            )

        return self._own.read(read)

    def trace_state(self, row: ClaimRow) -> TraceState:
        """See `Dialect.trace_state`."""
        return (
            self._own.run(lambda connection: self.trace_state_in(connection, row))
            if self._dialect.asks_around_calls
            else TraceState.NONE
        )

    def trace_state_in(self, connection: Connection, row: ClaimRow) -> TraceState:
        """The same, on this connection."""
        return self._dialect.trace_state(connection.connection.dbapi_connection, row)

    def handlers(self, group: str, key: str) -> Sequence[str]:
        """Return the names of the handlers that have a claim on a key."""
        t = self._t
        named = select(t.c.handler).where(t.c.consumer_group == group, t.c.business_key == key).order_by(t.c.handler)
        return self._own.read(lambda connection: connection.execute(self._all(named)).scalars().all())

    def clear_in(self, connection: Connection, row: ClaimRow) -> bool:
        """Delete a claim in the caller's transaction. False: it is consumed, or its lease still runs."""
        return _one(connection, delete(self._t).where(self._free(row)))

    def resolve(self, row: ClaimRow, step: str, result: bytes) -> bool:
        """See `LeaseStore.resolve`."""
        t, s = self._t, self._steps
        with self._own.connected() as connection, self._own.transaction(connection):
            free = self._all(select(t.c.status).where(self._free(row)).with_for_update())
            if connection.execute(free).one_or_none() is None:
                return False
            mine = and_(self._of(s, row), s.c.step == step)
            # the token of the run that began the step is removed: if that run still lives, it can change nothing any more
            done = {"status": STEP_FINISHED, "result": result, "token": None, "finished_at": utcnow()}
            if not _one(connection, update(s).where(mine).values(done)):
                last = connection.execute(
                    select(s.c.ordinal).where(self._of(s, row)).order_by(s.c.ordinal.desc()).limit(1)
                ).scalar()
                values = {"consumer_group": row.group, "handler": row.handler, "business_key": row.key, "step": step}
                at = {"ordinal": 0 if last is None else last + 1, "attempt": row.attempt, "created_at": utcnow()}
                connection.execute(insert(s).values(values | at | done))
            return True

    def _say_if_crowded(self) -> None:
        """Log at once if a step must wait for a connection: mostly its own handler's session holds another one."""
        most = all_taken(self._engine)
        if most is None or not is_news(self._engine):
            return
        _log.warning(
            "pool_exhausted store=%s connections=%d: a step needs a connection beside that of its handler's session, and all are"
            " in use. Handlers that hold one and wait for another wait for each other, as long as the pool lets them"
            " (pool_timeout, 30 s by default). Give create_engine(..., pool_size=) as many as run at once and 4 more, of a URL"
            " EXACTLY_ONCE_CONCURRENCY as many as the threads that call process(); or call it from fewer threads.",
            self.name,
            most,
        )

    # -- how statements are sent -------------------------------------------------------------------------------------

    @property
    def _is_postgresql(self) -> bool:
        return self._dialect.name == "postgresql"

    def _all(self, statement: Select[Any]) -> Select[Any]:
        return all_rows(statement, self._engine.dialect.name)

    def _of(self, t: Table, row: ClaimRow) -> Any:
        return and_(t.c.consumer_group == row.group, t.c.handler == row.handler, t.c.business_key == row.key)

    def _free(self, row: ClaimRow) -> Any:
        t = self._t
        return and_(self._of(t, row), t.c.status == CONSUMING, or_(t.c.token.is_(None), t.c.lease_until <= utcnow()))

    def _ours(self, held: HeldLease) -> Any:
        t = self._t
        return and_(self._of(t, held.row), t.c.status == CONSUMING, t.c.token == held.token)


def _one(connection: Connection, change: Any) -> bool:
    """Execute a change of at most one row, and return whether it changed one."""
    # preserve_rowcount, because after an INSERT the row count is otherwise lost, and is -1
    return connection.execute(change, execution_options={"preserve_rowcount": True}).rowcount == 1
