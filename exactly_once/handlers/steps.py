"""Steps: recovery points of a handler under a lease. A finished step is not repeated on the next attempt.

    hold = steps.run("lock stock", lambda key: inventory.lock(order.no, idempotency_key=key), returns=Hold)
    order_id = steps.transaction("create order", lambda session: create(session, hold))
    receipt = steps.run("charge", lambda key: bank.charge(hold.amount, key), returns=Receipt, at_most_once=True)

A step's result is stored before the next step begins. On the next attempt it is read, and the step does not run. A step always
returns the decoded stored form, so that the first attempt sees the same value as the second. The limit: a crash between a call
to the outside and its record repeats that call, with the same key. With `at_most_once` it is not repeated, and a person decides.

A handler asks for `Steps` or `AsyncSteps` by annotation. The work is done behind `Ledger` (`guards.lease.ledger`).
"""

from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from hashlib import sha256
from json import dumps, loads
from typing import Any, Final, Protocol, TypeVar

from sqlalchemy.orm import Session
from sqlalchemy.util import await_only, greenlet_spawn

from exactly_once.handlers.one_turn import let_tasks_begin
from exactly_once.handlers.step_calls import KEY, SESSION, not_awaited, not_to_be_called, nothing_to_await

__all__ = ["AsyncSteps", "Begun", "Coder", "Ledger", "Steps", "coder", "step_key"]

T = TypeVar("T")

_KEY_CHARACTERS: Final = 40


@dataclass(frozen=True, slots=True)
class Coder:
    """Encodes a step's result for storage, and decodes it."""

    encode: Callable[[Any], bytes]
    """Raises ValueError or TypeError for a value that JSON cannot hold."""
    decode: Callable[[bytes], Any]
    alike: Callable[[Any, Any], bool]
    """Whether the value read back equals the value returned."""


@dataclass(frozen=True, slots=True)
class Begun:
    """A step that the handler asks for: finished before, or to be run now."""

    name: str
    ordinal: int
    key: str
    coder: Coder
    done: bool = False
    value: Any = None
    marked: bool = False
    """Its beginning is recorded."""


class Ledger(Protocol):
    """Keeps the record of one attempt's steps. Synchronous: called in a thread, or in a greenlet."""

    @property
    def attempt(self) -> int:
        """The number of this claim of the message, from 1."""

    def begin(self, name: str, returns: Any, *, at_most_once: bool = False) -> Begun:
        """Look the step up, and record its beginning if it must not run twice."""

    def finish(self, begun: Begun, value: Any) -> Any:
        """Store what the step returned, and return the stored form, decoded."""

    def failed(self, begun: Begun) -> None:
        """Record in memory that the step raised."""

    def transact(self, name: str, returns: Any, work: Callable[[Any], Any]) -> Any:
        """Run work(session) and store its result in one transaction."""

    def refuse(self, name: str, why: str) -> Exception:
        """Return the error to raise if a step cannot begin. The message is kept for a person."""

    def misfit(self, begun: Begun, why: str, *, ran: bool) -> Exception:
        """Return the error to raise if a step's call did not return a result. `ran`: whether the call ran."""

    def undone(self, name: str, why: str) -> Exception:
        """Return the error to raise if a transaction's work did not return a result. The transaction is rolled back."""

    def asked(self, name: str, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Remember a coroutine that the handler must await before it returns."""


class Steps:
    """Recovery points of a sync handler under `guard=Lease(...)`. Ask for them with a parameter `steps: Steps`."""

    __slots__ = ("_ledger",)

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    @property
    def attempt(self) -> int:
        """The number of this claim of the message, from 1. A service that gets it can refuse a run that was taken over."""
        return self._ledger.attempt

    def run(self, name: str, call: Callable[[str], T], *, returns: Any = None, at_most_once: bool = False) -> T:
        """Run a step, or return what it returned on an earlier attempt.

        Args:
            name: The name of the step, used once in a run; at most 64 bytes. Steps must have the same order on every attempt.
            call: Called with an idempotency key that is the same on every attempt. Pass it to the service.
            returns: The type of the result when it is read back: a pydantic model, a dataclass, any type. None: plain JSON.
            at_most_once: Record the beginning first. If the next attempt finds it without a result, the message is kept for a
                person, who looks and types: `exactly-once steps resolve KEY STEP --result JSON`.

        Returns:
            The result, decoded from its stored form.

        Raises:
            LeaseLost: Another run has the message: stop.
            StepError: The run cannot go on by itself; the message is kept for a person.
            StoreUnavailable: The store does not answer; nothing is acknowledged.

        Example:
            hold = steps.run("lock stock", lambda key: inventory.lock(order.no, idempotency_key=key), returns=Hold)
        """
        if (wrong := not_to_be_called(name, call, KEY, awaited=False)) is not None:
            raise self._ledger.refuse(name, wrong)
        begun = self._ledger.begin(name, returns, at_most_once=at_most_once)
        if begun.done:
            value: T = begun.value
            return value
        try:
            result = call(begun.key)  # a crash from here to the end of `finish` repeats this call, with the same key
        except BaseException:
            self._ledger.failed(begun)
            raise
        if (wrong := not_awaited(result)) is not None:
            raise self._ledger.misfit(begun, wrong, ran=False)
        stored: T = self._ledger.finish(begun, result)
        return stored

    def transaction(self, name: str, work: Callable[[Session], T], *, returns: Any = None) -> T:
        """Run work(session) and store its result in the same transaction: this step's effects happen exactly once.

        Args:
            name: As for `run`.
            work: Called with a session of its own in the handler's database. It must not commit.
            returns: As for `run`.

        Example:
            order_id = steps.transaction("create order", lambda session: create(session, order))
        """
        if (wrong := not_to_be_called(name, work, SESSION, awaited=False)) is not None:
            raise self._ledger.refuse(name, wrong)

        def worked(session: Session) -> T:
            result = work(session)
            if (wrong := not_awaited(result)) is not None:
                raise self._ledger.undone(name, wrong)
            return result

        value: T = self._ledger.transact(name, returns, worked)
        return value


class AsyncSteps:
    """Recovery points of an `async def` handler under `guard=Lease(...)`. Ask for them with a parameter `steps: AsyncSteps`."""

    __slots__ = ("_ledger",)

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    @property
    def attempt(self) -> int:
        """See `Steps.attempt`."""
        return self._ledger.attempt

    def run(
        self, name: str, call: Callable[[str], Awaitable[T]], *, returns: Any = None, at_most_once: bool = False
    ) -> Coroutine[Any, Any, T]:
        """See `Steps.run`. `call` is awaited. Await `run` itself before the handler returns, or the message fails.

        Example:
            hold = await steps.run("lock stock", lambda key: inventory.lock(order.no, key), returns=Hold)
        """
        coroutine = self._run(name, call, returns, at_most_once)
        self._ledger.asked(name, coroutine)
        return coroutine

    async def _run(self, name: str, call: Callable[[str], Awaitable[T]], returns: Any, at_most_once: bool) -> T:
        if (wrong := not_to_be_called(name, call, KEY, awaited=True)) is not None:
            raise self._ledger.refuse(name, wrong)
        begun = await greenlet_spawn(self._ledger.begin, name, returns, at_most_once=at_most_once)
        if begun.done:
            value: T = begun.value
            return value
        try:
            awaitable = call(begun.key)
            if (wrong := nothing_to_await(awaitable)) is None:
                result = await awaitable
        except BaseException:
            self._ledger.failed(begun)
            raise
        if wrong is not None:
            raise self._ledger.misfit(begun, wrong, ran=True)
        stored: T = await greenlet_spawn(self._ledger.finish, begun, result)
        return stored

    def transaction(
        self, name: str, work: Callable[[Any], Awaitable[T]], *, returns: Any = None
    ) -> Coroutine[Any, Any, T]:
        """See `Steps.transaction`. `work` gets an AsyncSession and is awaited. Await `transaction` itself, like `run`."""
        coroutine = self._transaction(name, work, returns)
        self._ledger.asked(name, coroutine)
        return coroutine

    async def _transaction(self, name: str, work: Callable[[Any], Awaitable[T]], returns: Any) -> T:
        if (wrong := not_to_be_called(name, work, SESSION, awaited=True)) is not None:
            raise self._ledger.refuse(name, wrong)

        def worked(session: Any) -> T:
            awaitable = work(session)
            if (wrong := nothing_to_await(awaitable)) is not None:
                raise self._ledger.undone(name, wrong)
            result = await_only(awaitable)
            let_tasks_begin()
            return result

        value: T = await greenlet_spawn(self._ledger.transact, name, returns, worked)
        return value


def step_key(group: str, handler: str, key: str, step: str) -> str:
    """Return the idempotency key of a step: the same on every attempt, and different for every other step of any message.

    Example:
        >>> len(step_key("shop", "checkout", "A-1", "charge"))
        40
    """
    return sha256(dumps([group, handler, key, step]).encode()).hexdigest()[:_KEY_CHARACTERS]


def coder(returns: Any) -> Coder:
    """Return how results are stored and read back as `returns`. None: plain JSON."""
    if returns is None:
        return _PLAIN
    try:
        return _typed(returns)
    except TypeError:  # not hashable: an annotation built with a list, say
        return _typed.__wrapped__(returns)


def _encode(value: Any) -> bytes:
    encoded = dumps(value, allow_nan=False, separators=(",", ":")).encode()
    _check_names(value)
    return encoded


def _check_names(value: Any) -> None:
    """Refuse keys that JSON would change: `{1: "a", "1": "b"}` would be read back with only one of the two."""
    if isinstance(value, dict):
        for name in value:
            if not isinstance(name, str):
                raise TypeError(f"a key is a {type(name).__name__}; JSON has texts only. Give returns=dict[int, ...]")
        if len({str.__str__(name) for name in value}) < len(value):
            raise ValueError("two keys have one text")
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return
    for each in value:
        _check_names(each)


def _once_each(members: list[tuple[str, Any]]) -> None:
    if len({name for name, _ in members}) < len(members):
        raise ValueError("two keys have one text in JSON")


_PLAIN: Final = Coder(_encode, loads, lambda value, read_back: True)  # a tuple comes back as a list, as the page says


@lru_cache(maxsize=256)
def _typed(returns: Any) -> Coder:
    from pydantic import BaseModel, TypeAdapter

    adapter: TypeAdapter[Any] = TypeAdapter(returns)

    def encode(value: Any) -> bytes:
        # strict: a result of another type would be stored, and read back as another value
        encoded = adapter.dump_json(value, warnings="error")
        loads(encoded, object_pairs_hook=_once_each)
        return encoded

    def alike(value: Any, read_back: Any) -> bool:
        if isinstance(value, BaseModel):
            # compare public fields only: private ones, such as a client or a cache, are no result
            return isinstance(read_back, BaseModel) and alike(dict(value), dict(read_back))
        if isinstance(value, dict) and isinstance(read_back, dict):
            return value.keys() == read_back.keys() and all(alike(each, read_back[key]) for key, each in value.items())
        if isinstance(value, (list, tuple)) and isinstance(read_back, (list, tuple)):
            return len(value) == len(read_back) and all(map(alike, value, read_back))
        if is_dataclass(value) and type(value) is type(read_back):
            return all(alike(getattr(value, each.name), getattr(read_back, each.name)) for each in fields(value))
        compares: object = type(value).__eq__
        if compares is object.__eq__:
            return True  # the class defines no comparison
        try:
            return bool(value == read_back)
        except Exception:  # raised by the value's own class: an array compares item by item
            return True

    return Coder(encode, adapter.validate_json, alike)
