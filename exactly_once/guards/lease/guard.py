"""The lease guard, for handlers that call other services or run for minutes: their claim is committed before they run.

The claim is a round trip of its own, and no transaction is open until the handler uses its session. If the leases are in the
handler's own database, `complete` is the last statement of the handler's transaction: if another run has taken the message over,
it changes no row, and nothing is committed. If the leases are elsewhere, `complete` follows the COMMIT. A crash between the two
leaves the mark that the session wrote, which the next claim finds. A run that used no session leaves no mark, and runs again.
Called by `attempt`.
"""

from asyncio import CancelledError
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from time import monotonic
from typing import Final, TypeVar
from uuid import uuid4

from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from exactly_once.claim import ClaimRow
from exactly_once.database.dialects.contract import Dialect, TraceState
from exactly_once.database.watched.deferred_watch import DeferredWatch
from exactly_once.errors import StoreUnavailable
from exactly_once.exceptions.finishing import finished
from exactly_once.exceptions.words import words_of
from exactly_once.guards.contract import Busy, Claim, Conflict, Consumed, OpenOurs, Unfinished, Won
from exactly_once.guards.lease.contract import HeldLease, LeaseState, LeaseStore, clock, judge
from exactly_once.guards.lease.renewal import Renewal
from exactly_once.guards.lease.sql import SqlLeases
from exactly_once.wording.steady_log import steady
from exactly_once.wording.text import escaped

__all__ = ["LeaseGuard", "insisting", "still_ours"]

T = TypeVar("T")

_LOCKED_S: Final = 0.05
_PAUSE_S: Final = (0.1, 2.0)
_LET_GO_S: Final = 1.0

_log = steady("exactly_once.leases")


class LeaseGuard:
    """Leases of one handler.

    Args:
        store: Where they are kept. Called from threads or from the event loop, as the handler is.
        local: The handler's own database, called in the same way.
        own: Both are the same database: then the handler's transaction is fenced.
        renewal: Renews them.
        dialect: The dialect of the handler's database.
        lease: The length of a lease.
        max_run: How long a lease is renewed. None: as long as the handler runs.
        steps: Whether the handler asks for steps.
        pause: Waits so many seconds: blocks for a sync handler, awaits for an async one.
    """

    def __init__(
        self,
        store: LeaseStore,
        local: SqlLeases,
        renewal: Renewal,
        dialect: Dialect,
        *,
        own: bool,
        lease: timedelta,
        max_run: timedelta | None,
        steps: bool,
        pause: Callable[[float], None],
    ) -> None:
        self._store, self._local, self._own, self._renewal, self._dialect = store, local, own, renewal, dialect
        self._lease, self._max_run, self._steps, self._pause = lease, max_run, steps, pause

    def claim(self, session: Session, row: ClaimRow) -> Claim:
        """See `Guard.claim`. After a crash the lease runs out, and the next claim takes the message over."""
        token = uuid4().hex
        began, asked = monotonic(), clock()
        try:
            seen = self._store.claim(row, token, self._lease, also=row.fingerprint, steps=self._steps)
            standing = judge(seen, row.fingerprint)
            if standing is LeaseState.FREE:  # the handler's fingerprint= was changed: claim with the stored fingerprint
                seen = self._store.claim(row, token, self._lease, also=seen.fingerprint, steps=self._steps)
                standing = judge(seen, row.fingerprint)
        except CancelledError:  # the claim may have succeeded all the same, and nobody else would release it
            self._let_go(HeldLease(row, token, 0, self._lease))
            raise
        match standing:
            case LeaseState.WON:
                held = HeldLease(
                    row, token, seen.attempt, self._lease, seen.steps, self._max_run, began=began, renewed=asked
                )
                if not self._own and (settled := self._settled(held)) is not None:
                    return settled
                self._renewal.add(held)
                return Won(deferred_watch=DeferredWatch(session, self._dialect, held), held=held)
            case LeaseState.CONSUMED:
                return Consumed()
            case LeaseState.UNFINISHED:
                return Unfinished(seen.unfinished or "")
            case LeaseState.CONFLICT:
                return Conflict(seen.fingerprint)
            case _:
                over = seen.remaining is None or seen.remaining <= timedelta(0)
                return Busy(again=over, remaining=seen.remaining)

    def _settled(self, held: HeldLease) -> Consumed | Conflict | Busy | Unfinished | None:
        """Ask the handler's own database whether the message is settled there.

        That is so if a run committed its mark and the lease store was never updated, or if a person discarded the message. The
        lease of a broken message is released, not completed: `requeue` removes the mark alone.
        """
        row = held.row
        try:
            known = self._local.look(row)
            # the trace of an earlier run, whose claim does not show what it had committed
            trace_state = TraceState.NONE if known is not None and known.consumed else self._local.trace_state(row)
        except BaseException:
            self._let_go(held)
            raise
        if trace_state is not TraceState.NONE:
            self._store.release(held)
            return Unfinished(row.owner) if trace_state is TraceState.COMMITTED else Busy()
        if known is None or not known.consumed:
            return None
        if known.settled:
            self._store.complete(held)
        else:
            self._store.release(held)
        match judge(known, row.fingerprint):
            case LeaseState.CONFLICT:
                return Conflict(known.fingerprint)
            case LeaseState.UNFINISHED:
                return Unfinished(known.unfinished or "")
            case _:
                return Consumed()

    def _let_go(self, held: HeldLease) -> None:
        """Try to release the lease after an interrupted claim. Errors are dropped: the first error counts, and a lease runs out.

        Limited to a second: whatever the claim waited for may still block the release.
        """
        with suppress(BaseException):
            finished(partial(self._store.release, held), within_s=_LET_GO_S)

    def complete(self, session: Session, won: Won) -> Consumed | None:
        """See `Guard.complete`."""
        held = _held(won)
        held.check()
        if not self._own and not still_ours(held, self._store, self._pause):
            raise held.error()  # not fenced, but a process that was paused before this line commits nothing
        if won.watch is None:
            return None
        won.watch.check(session)
        if not self._own:
            # after a crash behind the COMMIT, or if the store is away then, the next claim finds the mark and runs nothing
            if self._local.mark_in(session.connection(), held):
                return None
            # on the same connection, because the pool may have no other
            if self._local.stands_in(session.connection(), held):
                return Consumed()
            held.lost = True  # another run has the message, under a lease in this database
            raise held.error()
        held.ending = True
        if not self._local.complete_in(session.connection(), held):
            held.lost = True
            raise held.error()
        return None

    def consume(self, won: Won) -> None:
        """See `Guard.consume`. A store that is away is asked again until the lease may belong to another run."""
        held = _held(won)
        if not self._own or won.watch is None:
            held.ending = True
            if not insisting(held, self._pause, lambda: self._store.complete(held)):
                held.lost = True
                raise held.error()

    def end(self, won: Won) -> None:
        """See `Guard.end`."""
        self._renewal.drop(_held(won))

    def release(self, won: Won, *, broken: bool = False) -> bool:
        """See `Guard.release`."""
        held = _held(won)
        held.ending = True
        if held.lost:
            return False
        try:
            if broken and self._own:
                # its effects may be committed: no other copy may run. `requeue` takes this claim back
                return self._local.leave_unfinished(held)
            return self._store.release(held)
        except Exception as error:  # the lease runs out by itself; recording the failure is more important now
            _log.warning(
                "lease_not_released store=%s handler=%s key=%s ends_within=%s error=%s",
                self._store.name,
                held.row.handler,
                escaped(held.row.key),
                held.lease,
                escaped(words_of(error), 200),
            )
            return True

    def look(self, open_ours: OpenOurs, row: ClaimRow) -> Consumed | Unfinished | None:
        """See `Guard.look`."""
        seen = self._local.look(row)
        if not self._own and (seen is None or not seen.consumed):
            seen = self._store.look(row)
        if (seen is None or not seen.consumed) and self._local.trace_state(row) is TraceState.COMMITTED:
            return Unfinished(row.owner)
        standing = None if seen is None else judge(seen, row.fingerprint)
        if standing is LeaseState.UNFINISHED and seen is not None:
            return Unfinished(seen.unfinished or "")
        return Consumed() if standing is LeaseState.CONSUMED else None


def still_ours(held: HeldLease, store: LeaseStore, pause: Callable[[float], None]) -> bool:
    """Whether a lease is ours, by this process' clock. If by that clock it may have ended, ask the store.

    Asking also renews the lease, because another run could take it over a moment later. A run past its `max_run` only looks,
    because it must lose its lease.
    """
    until = clock() + held.lease.total_seconds()
    while not held.lost and not held.may_insist():
        if held.overran:
            seen = store.look(held.row)
            held.lost = seen is None or seen.consumed or seen.attempt != held.attempt
            break
        held.lost = bool(store.renew([held])) or clock() > until
        if not held.lost and not held.may_insist():
            pause(_LOCKED_S)  # neither renewed nor lost: another transaction is changing the row, and will end soon
    return not held.lost


def insisting(held: HeldLease, pause: Callable[[float], None], do: Callable[[], T]) -> T:
    """Call `do`, and repeat it while the store does not answer, for one lease at most: what was done outside cannot be undone.

    Raises:
        StoreUnavailable: The store did not answer in that time, and another run may have the lease. Or the pool has no free
            connection: the callers that wait for one may hold them all.
    """
    wait, until = _PAUSE_S[0], clock() + held.lease.total_seconds()
    while True:
        try:
            return do()
        except StoreUnavailable as error:
            if held.lost or clock() > until or isinstance(error.__cause__, PoolTimeout):
                raise
        pause(wait)
        wait = min(2 * wait, _PAUSE_S[1])


def _held(won: Won) -> HeldLease:
    assert won.held is not None
    return won.held
