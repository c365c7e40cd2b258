"""Steps: recovery points of a handler under a lease, whose finished parts are not repeated on the next attempt.

    hold = steps.run("lock stock", lambda key: inventory.lock(order.no, idempotency_key=key), returns=Hold)
    order_id = steps.transaction("create order", lambda session: create(session, hold))
    receipt = steps.run("charge", lambda key: bank.charge(hold.amount, key), returns=Receipt, at_most_once=True)

A step's result is stored before the next step begins; on the next attempt it is read, not run. What is returned is always
the decoded stored form, so that the first attempt sees what the second would. Where it ends: a crash between an outside
call and its record repeats that call, with the same key, unless it is `at_most_once`: then a person decides.

`Steps` and `AsyncSteps` are what a handler may ask for by annotation; the work is behind `Ledger` (`guards.step_ledger`).
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
    """How a step's result becomes what is stored, and back."""

    encode: Callable[[Any], bytes]
    """Raises ValueError or TypeError for what is no JSON."""
    decode: Callable[[bytes], Any]
    alike: Callable[[Any, Any], bool]
    """Whether what is read back is what was returned."""


@dataclass(frozen=True, slots=True)
class Begun:
    """A step as it is asked for: finished before, or to be run now."""

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
        """Which claim of the message this is, from 1."""

    def begin(self, name: str, returns: Any, *, at_most_once: bool = False) -> Begun:
        """Look the step up, and record its beginning where it must not be run twice."""

    def finish(self, begun: Begun, value: Any) -> Any:
        """Store what the step returned, and return it as it is stored."""

    def failed(self, begun: Begun) -> None:
        """Note that the step raised."""

    def transact(self, name: str, returns: Any, work: Callable[[Any], Any]) -> Any:
        """Run work(session) and store its result in one transaction."""

    def refuse(self, name: str, why: str) -> Exception:
        """Return what is raised where a step cannot begin; the message is kept for a person."""

    def misfit(self, begun: Begun, why: str, *, ran: bool) -> Exception:
        """Return what is raised where a step's call gave back what is no result: of one that ran, or of which nothing did."""

    def undone(self, name: str, why: str) -> Exception:
        """Return what is raised where the work of a transaction gave back what is no result; it is rolled back."""

    def asked(self, name: str, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Note what is to be awaited before the handler returns."""


class Steps:
    """Recovery points of a plain handler under `guard=Lease(...)`; ask for them with a parameter `steps: Steps`."""

    __slots__ = ("_ledger",)

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    @property
    def attempt(self) -> int:
        """Which claim of this message this is, from 1: send it along, and a service can refuse a run that was taken over."""
        return self._ledger.attempt

    def run(self, name: str, call: Callable[[str], T], *, returns: Any = None, at_most_once: bool = False) -> T:
        """Run a step, or return what it returned on an earlier attempt.

        Args:
            name: Its name, used once in a run: at most 64 bytes. Steps must come in the same order on every attempt.
            call: Called with an idempotency key that is the same on every attempt, to be handed to the service.
            returns: What the result is read back as: a pydantic model, a dataclass, a type. None: plain JSON.
            at_most_once: Record the beginning first. If it is found without a result on the next attempt, the message is
                kept for a person, who looks and says: `exactly-once steps resolve KEY STEP --result JSON`.

        Returns:
            The result, decoded from what is stored.

        Raises:
            LeaseLost: Another run has the message; stop.
            StepError: It cannot go on by itself; the message is kept for a person.
            StoreUnavailable: The store stays away; nothing is acknowledged.

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
            work: Gets a session of its own in the handler's database; it may not commit.
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
    """The same for an `async def` handler; ask for them with a parameter `steps: AsyncSteps`."""

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
        """See `Steps.run`; `call` is awaited. To be awaited itself before the handler returns, or the message fails.

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
        """See `Steps.transaction`; `work` gets an AsyncSession and is awaited. To be awaited itself, as `run`."""
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
    """Return the idempotency key of a step: the same on every attempt, another for every other step of any message.

    Example:
        >>> len(step_key("shop", "checkout", "A-1", "charge"))
        40
    """
    return sha256(dumps([group, handler, key, step]).encode()).hexdigest()[:_KEY_CHARACTERS]


def coder(returns: Any) -> Coder:
    """Decide how results are stored that are to be read back as `returns`; None is plain JSON."""
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
    """Refuse what JSON would rename: `{1: "a", "1": "b"}` would be read back with one of the two."""
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
        # strictly what it says: a result of another kind would be stored, and read back as something else
        encoded = adapter.dump_json(value, warnings="error")
        loads(encoded, object_pairs_hook=_once_each)
        return encoded

    def alike(value: Any, read_back: Any) -> bool:
        if isinstance(value, BaseModel):
            # all that it shows; what it has for itself, a client or a cache, is no result
            return isinstance(read_back, BaseModel) and alike(dict(value), dict(read_back))
        if isinstance(value, dict) and isinstance(read_back, dict):
            return value.keys() == read_back.keys() and all(alike(each, read_back[key]) for key, each in value.items())
        if isinstance(value, (list, tuple)) and isinstance(read_back, (list, tuple)):
            return len(value) == len(read_back) and all(map(alike, value, read_back))
        if is_dataclass(value) and type(value) is type(read_back):
            return all(alike(getattr(value, each.name), getattr(read_back, each.name)) for each in fields(value))
        compares: object = type(value).__eq__
        if compares is object.__eq__:
            return True  # nobody can say
        try:
            return bool(value == read_back)
        except Exception:  # of the value's own class: an array compares item by item
            return True

    return Coder(encode, adapter.validate_json, alike)
