"""Runs and records the steps of one attempt: returns the results of earlier attempts, adds new ones, and never guesses.

Three things park the message for a person: a step that was begun `at_most_once` and has no result, steps in another order than
the recorded one, and a result that cannot be stored. The first error counts, even if the handler catches it. Made by `processor`
for each attempt of a handler that asks for `Steps`.
"""

from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from sqlalchemy.orm import Session

from exactly_once import fork
from exactly_once.claim import StepRow
from exactly_once.database.dialects.contract import Dialect
from exactly_once.database.errors.drivers_own import is_of_a_database, is_taken, original
from exactly_once.database.schema import STEP_BYTES
from exactly_once.database.watched.deferred_watch import DeferredWatch
from exactly_once.database.watched.misuse_texts import DOUBTFUL
from exactly_once.database.watched.transaction_end import BrokenTransaction, TransactionEnd
from exactly_once.database.watched.watch import Watch, flush
from exactly_once.errors import ConfigurationError, LeaseLost, Misuse, StepError
from exactly_once.exceptions.finishing import finished
from exactly_once.exceptions.leaves import leaves
from exactly_once.exceptions.stops import stops
from exactly_once.guards.lease.contract import HeldLease, LeaseStore, Recorded
from exactly_once.guards.lease.guard import insisting, still_ours
from exactly_once.guards.lease.order import StepOrder
from exactly_once.guards.lease.sql import SqlLeases
from exactly_once.handlers.step_calls import never_awaited
from exactly_once.handlers.steps import Begun, coder, step_key
from exactly_once.keys import check_name
from exactly_once.wording.text import escaped

__all__ = ["StepLedger"]

T = TypeVar("T")
RESULT_BYTES = 2**20
"""The largest result of a step. A result is a recovery point, not a place to store documents."""
_LOCK_WAIT_S = 5
_LOCK_WAIT = f"SELECT set_config('lock_timeout', '{_LOCK_WAIT_S}s', true) WHERE current_setting('lock_timeout') = '0'"
_LOCK_TIMEOUT = "55P03"


class StepLedger:
    """See `steps.Ledger`.

    Args:
        held: The attempt's lease.
        late: The watch over the handler's own session.
        store: Where the lease and the steps are kept.
        local: The handler's database, for steps that are a transaction in it.
        fenced: `local` is that store: it has the lease's row.
        dialect: The dialect of the handler's database.
        open_session: Makes a session for a step's transaction.
        pause: Waits so many seconds: blocks for a sync handler, awaits for an async one.
    """

    def __init__(
        self,
        held: HeldLease,
        late: DeferredWatch,
        store: LeaseStore,
        local: SqlLeases,
        *,
        fenced: bool,
        dialect: Dialect,
        open_session: Callable[[], tuple[Session, Any]],
        pause: Callable[[float], None],
    ) -> None:
        self._held, self._late, self._process = held, late, fork.here
        self._store, self._local, self._fenced = store, local, fenced
        self._dialect, self._open, self._pause = dialect, open_session, pause
        self._order = StepOrder(held.steps)
        self._unsure: set[str] = set()
        self._undecided: set[str] = set()
        self._running: str | None = None
        self._over = False
        self._asked: list[tuple[str, Coroutine[Any, Any, Any]]] = []
        self.error: LeaseLost | StepError | BrokenTransaction | None = None
        self.why: BaseException | None = None
        """What ended the last step's transaction, if that says more than the exception raised. None once a step is finished."""
        self.sent = False
        """The COMMIT of a step was sent and failed: so there was a connection to the database."""

    @property
    def attempt(self) -> int:
        """See `Ledger.attempt`."""
        return self._held.attempt

    def end(self) -> None:
        """After the handler: raise what stopped a step, and check that no recorded step was left out.

        Raises:
            LeaseLost: A step found the lease lost.
            StepError: A step could not go on, or the handler did not ask for a recorded step.
            BrokenTransaction: Something other than our COMMIT committed the transaction of a step.
        """
        self.close()
        if self.error is not None:
            raise self.error
        if self._running is not None:
            raise self._refuse(
                self._running,
                "still runs, and the handler has returned: what becomes of it would never be known. Await it",
            )
        if self._unsure:
            self._learn()
        left = self._order.left_out()
        if left is not None and left not in self._undecided:
            raise self._refuse(left, f"was recorded by an earlier attempt, and this run ended without it. {_RELEASE}")

    def returned(self) -> None:
        """After an async handler, before the event loop runs its tasks: a step that was not awaited must not begin there.

        Raises:
            StepError: The handler asked for a step and did not await it.
        """
        unread = never_awaited(self._asked)
        if unread is not None:
            raise self.refuse(
                unread,
                "was asked for without `await`: nothing of it ran. Nothing of this run is committed; steps that it finished"
                " are kept. Write `await` in front of it",
            )

    def close(self) -> None:
        """The handler has ended: refuse steps from now on. Only a thread or a task that it left behind can ask for one."""
        self._over = True

    def begin(self, name: str, returns: Any, *, at_most_once: bool = False) -> Begun:
        """See `Ledger.begin`."""
        begun = self._look_up(name, returns)
        if begun.done:
            return begun
        self._running = name
        if not at_most_once:
            self._late.close_for(_SHUT)
            return begun
        # before the record, because a record whose answer is lost may stand. After a crash the next attempt parks the message
        self._undecided.add(name)
        try:
            self._store_(begun, StepRow(name, begun.ordinal, False, None))
        except BaseException:
            self._running = None
            raise
        self._late.close_for(_SHUT)
        return replace(begun, marked=True)

    def _look_up(self, name: str, returns: Any, *, local: bool = False) -> Begun:
        if self._over:
            raise StepError(f"The step {escaped(str(name))!r} {_BEHIND}", str(name))
        if self.error is not None:
            raise self.error
        self._check_process()
        self._check_lease()
        self._check_name(name)
        if self._fenced or local:
            self._check_writer(name, _ASKED)
        if self._unsure:
            self._learn()
        order, row = self._order, self._held.row
        place = order.place(name)
        begun = Begun(name, place, step_key(row.group, row.handler, row.key, name), coder(returns))
        if (wrong := order.conflict(name, place)) is not None:
            raise self._refuse(name, f"{wrong}. {_RELEASE}")
        known = order.recorded(place)
        if known is None:
            return begun
        if not known.finished or known.result is None:
            raise self._undecidable(name, known.attempt)
        value = self._decoded(name, known.result, begun.coder.decode)
        order.finish(name)
        return replace(begun, done=True, value=value)

    def _check_process(self) -> None:
        """Refuse a step in a forked child: its record would mix with the parent's steps, without the parent's knowledge."""
        if self._process is not fork.here:
            raise fork.inside()

    def _learn(self) -> None:
        """Read the recorded steps again: a timeout of the handler, or a store that went away, interrupted a record."""
        seen = self._store.look(self._held.row)
        if seen is None or seen.attempt != self._held.attempt:
            raise self._lost()
        self._order.learn(seen.steps)
        self._unsure.clear()

    def finish(self, begun: Begun, value: Any) -> Any:
        """See `Ledger.finish`."""
        try:
            if self._late.reopen():
                raise self._refuse(begun.name, f"{_USED}. {_SHUT}")
            result, read_back = self._encoded(begun, value, rolls_back=False)
            self._store_(begun, StepRow(begun.name, begun.ordinal, True, result))
        finally:
            self._running = None
        return self._has_finished(begun, read_back)

    def failed(self, begun: Begun) -> None:
        """See `Ledger.failed`."""
        self._running = None
        if self._late.reopen():  # the step used the handler's session, and would do so again: do not retry it
            self._refuse(begun.name, f"{_USED}. {_SHUT}")

    def asked(self, name: str, coroutine: Coroutine[Any, Any, Any]) -> None:
        """See `Ledger.asked`."""
        self._asked.append((name, coroutine))

    def refuse(self, name: str, why: str) -> StepError:
        """See `Ledger.refuse`."""
        return self._refuse(name, f"{why}, then type: {self._requeue()}")

    def misfit(self, begun: Begun, why: str, *, ran: bool) -> StepError:
        """See `Ledger.misfit`."""
        self.failed(begun)
        if ran:
            return self._refuse(begun.name, f"{why}. {self._unkept(begun.name, 'make it `async def`')}")
        if begun.marked:
            resolve = f"exactly-once steps resolve {self._named(begun.name)} --result JSON"
            return self._refuse(
                begun.name,
                f"{why}. That it began is recorded, and it is to happen at most once: do it by hand, and type: {resolve},"
                f" and {self._requeue()}",
            )
        return self.refuse(begun.name, why)

    def undone(self, name: str, why: str) -> StepError:
        """See `Ledger.undone`."""
        return self._refuse(name, f"{why}. {self._undone(name, 'mend it')}")

    def transact(self, name: str, returns: Any, work: Callable[[Any], Any]) -> Any:
        """See `Ledger.transact`. After a COMMIT without an answer, the next attempt looks whether the step's row stands."""
        begun = self._look_up(name, returns, local=True)
        if begun.done:
            return begun.value
        self._running = name
        try:
            result = None if self._fenced else self._local.finished(self._held.row, name)
            if result is None:
                result = self._transacted(begun, work)
            value = self._decoded(name, result, begun.coder.decode)
            if not self._fenced:
                # recorded there too, so that it has its place among the steps. After a crash before this, the row in the
                # database shows that it is done
                self._store_(begun, StepRow(name, begun.ordinal, True, result))
        finally:
            self._running = None
        return self._has_finished(begun, value)

    def _transacted(self, begun: Begun, work: Callable[[Any], Any]) -> bytes:
        self.why = None
        session, handed = self._open()
        late = DeferredWatch(session, self._dialect, self._held)
        result = b""
        try:
            if self._late.watch is not None and self._dialect.name == "postgresql":
                # the handler's own session may have locked a row: the server cannot see that we wait for ourselves
                session.connection().exec_driver_sql(_LOCK_WAIT)
            late.begin()
            value = self._worked(work, handed, session)
            if late.watch is not None:
                late.watch.returned(session)
            late.check()
            if late.watch is not None:
                late.watch.check(session)
            result, _ = self._encoded(begun, value, rolls_back=True)
            step = StepRow(begun.name, begun.ordinal, True, result)
            connection = session.connection()
            try:
                stored = self._local.record_in(connection, self._held, step, fenced=self._fenced)
            except Exception as error:
                if not is_taken(error):
                    raise
                late.end(session)  # an earlier attempt committed this step: roll back these effects, those stand
                known = self._local.finished(self._held.row, begun.name)
                if known is None:
                    raise
                return known
            if stored is Recorded.LOST:
                raise self._lost() if self._fenced else self._settled(begun.name)  # noqa: TRY301
            watch = late.watch
            assert watch is not None
            watch.check(session)
            watch.committing()
            type(session).commit(session)  # a handler may have replaced `session.commit`, for a library that commits
            watch.confirm()
        except BaseException as error:
            if not finished(partial(self._left, late, session, error)):
                raise  # else COMMIT succeeded, and a hook of the user's raised after it
        finally:
            late.end(session)
        return result

    def _left(self, late: DeferredWatch, session: Session, error: BaseException) -> bool:
        try:
            return late.watch is not None and self._is_committed(late.watch, error)
        finally:
            late.end(session)

    def _is_committed(self, watch: Watch, error: BaseException) -> bool:
        """Whether the step's transaction was committed. `Watch.why` says what its error means, as for an attempt.

        Raises:
            BrokenTransaction: Something other than our COMMIT committed it: the step is done in part, and a person decides.
        """
        if watch.committed and watch.left is not TransactionEnd.BROKEN:
            return isinstance(error, Exception)
        self.sent = watch.sent
        if not watch.sent:
            watch.ask()
        if watch.left is TransactionEnd.BROKEN or watch.doubtful:
            self.error = BrokenTransaction(f"In a steps.transaction: {watch.error or DOUBTFUL}")
            raise self.error from error
        why = watch.why(error)
        if why is not error and not stops(error):
            # reported if the handler fails. Until then the handler may catch the error, and run the step again or go on without
            self.why = why
        return False

    def _worked(self, work: Callable[[Any], Any], handed: Any, session: Session) -> Any:
        self._late.close_for(_SHUT)
        try:
            value = work(handed)
            flush(session)
        except Exception as error:
            states = {getattr(original(each), "sqlstate", None) for each in leaves(error) if is_of_a_database(each)}
            if self._late.watch is not None and _LOCK_TIMEOUT in states:
                raise Misuse(
                    f"A steps.transaction waited {_LOCK_WAIT_S} s for a row that is locked, probably by the handler's own"
                    " session: they are two transactions. Use the session for that row behind the last step, or only there."
                ) from error
            raise
        finally:
            used = self._late.reopen()
        if used:
            raise Misuse(_SHUT)
        return value

    # -- what is stored ----------------------------------------------------------------------------------------------

    def _store_(self, begun: Begun, step: StepRow) -> None:
        self._check_process()
        held, store = self._held, self._store
        self._unsure.add(step.name)
        stored = insisting(held, self._pause, lambda: store.record(held, step, begun=begun.marked))
        self._unsure.discard(step.name)
        match stored:
            case Recorded.LOST:
                raise self._lost()
            case Recorded.KNOWN:
                raise self._refuse(begun.name, "was recorded meanwhile, by a person or by another run. " + _REQUEUE)

    def _has_finished(self, begun: Begun, value: Any) -> Any:
        self.why = None
        self._undecided.discard(begun.name)
        self._order.finish(begun.name)
        return value

    def _encoded(self, begun: Begun, value: Any, *, rolls_back: bool) -> tuple[bytes, Any]:
        unkept = self._undone if rolls_back else self._unkept
        try:
            result = begun.coder.encode(value)
            read_back = begun.coder.decode(result)
        except Exception as error:  # the errors of json and pydantic have no common class
            raise self._refuse(
                begun.name,
                f"returned a {type(value).__name__}, which cannot be stored as JSON and read back"
                f" ({type(error).__name__}). {unkept(begun.name, 'give returns=, or return JSON')}",
            ) from error
        if not begun.coder.alike(value, read_back):
            raise self._refuse(
                begun.name,
                f"returned a {type(value).__name__} that comes back from JSON as another value: a field that is left out or"
                " hidden there (exclude=True, SecretStr), or one that the type in returns= does not have."
                f" {unkept(begun.name, 'give a returns= that keeps it, or return less')}",
            )
        if len(result) > RESULT_BYTES:
            # a server may cut the connection because of a larger value, which looks like an outage
            raise self._refuse(
                begun.name,
                f"returned {len(result):,} bytes of JSON, and at most {RESULT_BYTES:,} are kept."
                f" {unkept(begun.name, 'store it elsewhere, and return where')}",
            )
        return result, read_back

    def _undone(self, step: str, mend: str) -> str:
        return f"Its transaction was rolled back: {mend}, and type: {self._requeue()}"

    def _unkept(self, step: str, mend: str) -> str:
        return (
            f"It was run, and its result is not kept: {mend}, and type: exactly-once steps resolve {self._named(step)}"
            " --unrecorded --result JSON"
        )

    def _decoded(self, name: str, result: bytes, decode: Callable[[bytes], T]) -> T:
        try:
            return decode(result)
        except Exception as error:
            raise self._refuse(
                name,
                f"has a stored result that cannot be read back as its returns= says ({type(error).__name__}). Mend"
                f" returns=, or write another result: exactly-once steps resolve {self._named(name)} --result JSON. {_RELEASE}",
            ) from error

    # -- what is refused ---------------------------------------------------------------------------------------------

    def _check_lease(self) -> None:
        """Check the lease before anything happens outside."""
        if not still_ours(self._held, self._store, self._pause):
            raise self._lost()

    def _check_name(self, name: str) -> None:
        try:
            check_name(name, STEP_BYTES, "step")
        except ConfigurationError as error:
            raise self._refuse(str(name), f"cannot be used: {error}") from error
        if self._running is not None:
            raise self._refuse(
                name,
                f"began while {escaped(self._running)!r} runs: one step at a time, so that their order is known. Put what"
                " may run at once into one step",
            )
        if self._order.is_finished(name):
            raise self._refuse(name, "is used twice in one run: its result stands already. Give each step its own name")
        if name in self._undecided:
            raise self._undecidable(name, self._held.attempt)

    def _check_writer(self, name: str, when: str) -> None:
        if self._late.watch is not None and self._dialect.name == "sqlite":
            raise self._refuse(
                name,
                f"{when}: SQLite has one writer, and the step's record would wait for this very session. Use the session"
                " behind the last step",
            )

    def _undecidable(self, name: str, attempt: int) -> StepError:
        return self._refuse(
            name,
            f"was begun by attempt {attempt} and has no result: whether it happened is not known, and it is to happen at"
            f" most once. Look at the other side, then type: exactly-once steps resolve {self._named(name)} --result JSON,"
            f" and {self._requeue()}",
        )

    def _requeue(self) -> str:
        return f"exactly-once failures requeue --key {_quoted(self._held.row.key)}"

    def _named(self, step: str) -> str:
        row = self._held.row
        return f"{_quoted(row.key)} {_quoted(step)} --handler {_quoted(row.handler)}"

    def _refuse(self, step: str, why: str) -> StepError:
        error = StepError(f"The step {escaped(str(step))!r} {why}", str(step))
        self.error = self.error or error
        return error

    def _lost(self) -> LeaseLost:
        self._held.lost = True
        error = self._held.error()
        self.error = error
        return error

    def _settled(self, step: str) -> LeaseLost:
        """The error of a settled message. Its lease is still ours, and is released: the next copy is a duplicate at once."""
        row = self._held.row
        error = LeaseLost(
            f"The message {escaped(row.key)!r} of {row.handler!r} was settled while it ran: a person discarded it, or another run"
            f" has finished it. The step {escaped(step)!r} is rolled back, and nothing of this run is recorded from here on."
        )
        self.error = error
        return error


def _quoted(text: str) -> str:
    from shlex import quote

    return quote(escaped(text, 255))


_BEHIND = (
    "was asked for after its handler had ended: nothing of it ran, and nobody asks for it again. Await the task, join the thread,"
    " before the handler returns."
)
_ASKED = "was asked for after the handler's session was used"
_USED = "used the handler's session, and was run: its result is not kept"
_SHUT = (
    "Inside a step the handler's own session cannot be used: the step's record would stand, and what the session wrote be gone"
    " if the handler fails later. Use the session behind the last step, or write in steps.transaction(name, work)."
)
_REQUEUE = "Look at it: exactly-once steps show KEY, then: exactly-once failures requeue"
_RELEASE = (
    "The handler's steps were changed, or depend on something that changes. Run these messages with the steps they began"
    " with, or settle them by hand: exactly-once steps show KEY, failures discard"
)
