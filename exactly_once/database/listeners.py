"""Adds a listener to an engine or a pool that is in use. A thread that is running its listeners keeps the list it began with.

SQLAlchemy keeps the listeners of an event in a deque and iterates over it without a lock. This package adds
listeners when it first sees an engine. Without this module, another thread that is connecting or returning a connection would
then raise `deque mutated during iteration`, and the pool would lose that connection.
"""

from collections.abc import Callable, Iterable
from threading import RLock
from typing import Any, Final

from sqlalchemy import Engine, event
from sqlalchemy.event.registry import _EventKey

from exactly_once import fork

__all__ = ["listen"]


class _Turns:
    """One thread at a time changes listeners."""

    def __init__(self) -> None:
        self.forked()
        fork.tell(self)

    def forked(self) -> None:
        """In a forked child: a thread of the parent's may have held the lock."""
        self.lock = RLock()


_turns: Final = _Turns()


class _Kept(tuple[Any, ...]):
    """The methods of a deque that SQLAlchemy uses. A change puts another tuple in its place.

    A tuple, so that Python iterates over it without a call of ours: SQLAlchemy does so for each statement. SQLAlchemy reads the
    tuple some lines before it changes it, and another thread may have put a newer one there. So a change begins with the newest.
    """

    owner: Any
    """SQLAlchemy's collection, which has the tuple as its `listeners`."""

    def append(self, listener: Any) -> None:
        _change(self.owner, lambda now: (*now, listener))

    def appendleft(self, listener: Any) -> None:
        _change(self.owner, lambda now: (listener, *now))

    def extend(self, listeners: Iterable[Any]) -> None:
        _change(self.owner, lambda now: (*now, *listeners))

    def remove(self, listener: Any) -> None:
        def without(now: Iterable[Any]) -> Iterable[Any]:
            left = list(now)
            left.remove(listener)
            return left

        _change(self.owner, without)

    def clear(self) -> None:
        _change(self.owner, lambda now: ())


def _change(owner: Any, to: Callable[[Iterable[Any]], Iterable[Any]]) -> None:
    with _turns.lock:
        kept = _Kept(to(owner.listeners))
        kept.owner = owner
        owner.listeners = kept


def listen(engine: Engine, name: str, do: Callable[..., Any], *, insert: bool = False) -> None:
    """Listen to an event of an engine, its pool or its dialect. Otherwise the same as `sqlalchemy.event.listen`.

    Args:
        engine: The engine. Other threads may be using it.
        name: The event.
        do: The listener.
        insert: Put the listener before the existing ones.
    """
    from sqlalchemy.event.api import _event_key

    key: _EventKey[Any] = _event_key(engine, name, do)
    dispatch: Any = key.dispatch_target.dispatch
    with _turns.lock:
        listeners = getattr(dispatch, name).for_modify(dispatch)
        if not isinstance(listeners.listeners, _Kept):
            _change(listeners, tuple)
        event.listen(engine, name, do, insert=insert)
