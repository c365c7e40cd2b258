"""The record of one attempt's steps: what earlier attempts finished, what this one adds, and what it must not guess.

Three things park the message for a person: a step that was begun `at_most_once` and has no result, steps that come in
another order than they were recorded in, and a result that cannot be stored. The first error stands, also where the handler
swallows it. Made by `delivery` for each attempt of a handler that asks for `Steps`.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from exactly_once.dialects import Dialect, StepRow
from exactly_once.errors import ConfigurationError, LeaseLost, StepError
from exactly_once.guards.lease import insisting
from exactly_once.guards.watch import Late
from exactly_once.keys import check_name
from exactly_once.leases import Held, LeaseStore, Recorded
from exactly_once.leases.sql import SqlLeases
from exactly_once.schema import STEP_BYTES
from exactly_once.steps import Begun, coder, step_key
from exactly_once.wording import escaped

__all__ = ["StepLedger"]

T = TypeVar("T")
_WAIT_MS = 2000


class StepLedger:
    """See `steps.Ledger`.

    Args:
        held: The lease it is under.
        late: The handler's own session.
        store: Where the lease and the steps are.
        local: The handler's database, for steps that are a transaction in it.
        fenced: `local` is that store: it has the lease's row.
        dialect: How the handler's database is spoken to.
        open_session: Makes a session for a step's transaction.
        pause: Waits so many seconds, in the handler's colour.
    """

    def __init__(
        self,
        held: Held,
        late: Late,
        store: LeaseStore,
        local: SqlLeases,
        *,
        fenced: bool,
        dialect: Dialect,
        open_session: Callable[[], tuple[Session, Any]],
        pause: Callable[[float], None],
    ) -> None:
        self._held, self._late = held, late
        self._store, self._local, self._fenced = store, local, fenced
        self._dialect, self._open, self._pause = dialect, open_session, pause
        self._finished: list[str] = []
        self._undecided: set[str] = set()
        self._running: str | None = None
        self.error: LeaseLost | StepError | None = None

    @property
    def attempt(self) -> int:
        """See `Ledger.attempt`."""
        return self._held.attempt

    def end(self) -> None:
        """After the handler: raise what stopped a step, and ask whether a recorded one was left out.

        Raises:
            LeaseLost: A step learnt it.
            StepError: A step could not go on, or is recorded and was not asked for.
        """
        if self.error is not None:
            raise self.error
        if len(self._finished) < len(self._held.steps):
            left = self._held.steps[len(self._finished)].name
            raise self._refuse(left, f"was recorded by an earlier attempt, and this run ended without it. {_RELEASE}")

    def begin(self, name: str, returns: Any, *, at_most_once: bool = False) -> Begun:
        """See `Ledger.begin`."""
        begun = self._look_up(name, returns)
        if begun.done:
            return begun
        if not at_most_once:
            return begun
        # a crash after this and before the result is stored: the next attempt finds it, and a person decides
        self._store_(begun, StepRow(begun.name, begun.ordinal, False, None))
        self._undecided.add(begun.name)
        return Begun(begun.name, begun.ordinal, begun.key, begun.coder, marked=True)

    def _look_up(self, name: str, returns: Any, *, local: bool = False) -> Begun:
        if self.error is not None:
            raise self.error
        self._check_lease()
        self._check_name(name)
        if self._fenced or local:
            self._check_writer(name)
        ordinal, recorded, row = len(self._finished), self._held.steps, self._held.row
        decide = coder(returns)
        key = step_key(row.group, row.handler, row.key, name)
        if ordinal >= len(recorded):
            self._running = name
            return Begun(name, ordinal, key, decide)
        known = recorded[ordinal]
        if known.name != name:
            raise self._refuse(
                name, f"was asked for where an earlier attempt recorded {escaped(known.name)!r}. {_RELEASE}"
            )
        if not known.finished or known.result is None:
            raise self._undecidable(name, known.attempt)
        value = self._decoded(name, known.result, decide.decode)
        self._finished.append(name)
        return Begun(name, ordinal, key, decide, done=True, value=value)

    def finish(self, begun: Begun, value: Any) -> Any:
        """See `Ledger.finish`."""
        result, read_back = self._encoded(begun, value)
        self._store_(begun, StepRow(begun.name, begun.ordinal, True, result))
        return self._has_finished(begun, read_back)

    def failed(self, begun: Begun) -> None:
        """See `Ledger.failed`."""
        self._running = None

    def transact(self, name: str, returns: Any, work: Callable[[Any], Any]) -> Any:
        """See `Ledger.transact`. A COMMIT whose answer is lost is found by the next attempt: its row stands, or does not."""
        begun = self._look_up(name, returns, local=True)
        if begun.done:
            return begun.value
        try:
            result = None if self._fenced else self._local.finished(self._held.row, name)
            if result is None:
                result = self._transacted(begun, work)
            value = self._decoded(name, result, begun.coder.decode)
            if not self._fenced:
                # so that it is in the order of the others; a crash before this: the row in the database tells
                self._store_(begun, StepRow(name, begun.ordinal, True, result))
        finally:
            self._running = None
        return self._has_finished(begun, value)

    def _transacted(self, begun: Begun, work: Callable[[Any], Any]) -> bytes:
        session, handed = self._open()
        late = Late(session, self._dialect, self._held, wait_ms=_WAIT_MS)
        try:
            value = work(handed)
            session.flush()
            result, _ = self._encoded(begun, value)
            step = StepRow(begun.name, begun.ordinal, True, result)
            connection = session.connection()
            try:
                stored = self._local.record_in(connection, self._held, step, fenced=self._fenced)
            except IntegrityError:
                late.end(session)  # committed before, by this message: these effects are rolled back, and those stand
                known = self._local.finished(self._held.row, begun.name)
                if known is None:
                    raise
                return known
            if stored is Recorded.LOST:
                raise self._lost()
            watch = late.watch
            assert watch is not None
            misuse = watch.verify(session)
            if misuse is not None or watch.lost is not None:
                raise misuse or watch.lost  # type: ignore[misc]
            watch.committing()
            session.commit()
            return result
        finally:
            late.end(session)

    # -- what is stored ----------------------------------------------------------------------------------------------

    def _store_(self, begun: Begun, step: StepRow) -> None:
        held, store = self._held, self._store
        match insisting(held, self._pause, lambda: store.record(held, step, begun=begun.marked)):
            case Recorded.LOST:
                raise self._lost()
            case Recorded.KNOWN:
                raise self._refuse(begun.name, "was recorded meanwhile, by a person or by another run. " + _REQUEUE)

    def _has_finished(self, begun: Begun, value: Any) -> Any:
        self._running = None
        self._undecided.discard(begun.name)
        self._finished.append(begun.name)
        return value

    def _encoded(self, begun: Begun, value: Any) -> tuple[bytes, Any]:
        try:
            result = begun.coder.encode(value)
            return result, begun.coder.decode(result)
        except Exception as error:  # json's and pydantic's errors have no class in common
            self._running = None
            raise self._refuse(
                begun.name,
                f"returned a {type(value).__name__}, which cannot be stored as JSON and read back"
                f" ({type(error).__name__}). It was run, and its result is not kept: give returns=, or return JSON, and"
                f" type: exactly-once steps resolve {self._named(begun.name)} --unrecorded --result JSON",
            ) from error

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
        """Before anything happens outside: a process that stood still past its lease asks first whether it still has it."""
        held = self._held
        if not held.lost and not held.may_insist() and self._store.renew([held]):
            held.lost = True
        if held.lost:
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
        if name in self._finished:
            raise self._refuse(name, "is used twice in one run: its result stands already. Give each step its own name")
        if name in self._undecided:
            raise self._undecidable(name, self._held.attempt)

    def _check_writer(self, name: str) -> None:
        if self._late.watch is not None and self._dialect.name == "sqlite":
            raise self._refuse(
                name,
                "was asked for after the handler's session was used: SQLite has one writer, and the step's record would wait"
                " for this very session. Use the session behind the last step",
            )

    def _undecidable(self, name: str, attempt: int) -> StepError:
        requeue = f"exactly-once failures requeue --key {_quoted(self._held.row.key)}"
        return self._refuse(
            name,
            f"was begun by attempt {attempt} and has no result: whether it happened is not known, and it is to happen at"
            f" most once. Look at the other side, then type: exactly-once steps resolve {self._named(name)} --result JSON,"
            f" and {requeue}",
        )

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


def _quoted(text: str) -> str:
    from shlex import quote

    return quote(escaped(text, 255))


_REQUEUE = "Look at it: exactly-once steps show KEY, then: exactly-once failures requeue"
_RELEASE = (
    "The handler's steps were changed, or depend on something that changes. Run these messages with the steps they began"
    " with, or settle them by hand: exactly-once steps show KEY, failures discard"
)
