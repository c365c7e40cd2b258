"""Adds a listener to an engine or a pool that is in use. A thread that is running its listeners keeps the list it began with.

SQLAlchemy keeps the listeners of an event in a deque and iterates over it without a lock. This package adds
listeners when it first sees an engine. Without this module, another thread that is connecting or returning a connection would
then raise `deque mutated during iteration`, and the pool would lose that connection.
"""

from collections.abc import Callable, Iterable
from threading import Lock
from typing import Any

from sqlalchemy import Engine, event
from sqlalchemy.event.registry import _EventKey

__all__ = ["listen"]

_lock = Lock()


class _Kept(tuple[Any, ...]):
    """The methods of a deque that SQLAlchemy uses. A change puts another tuple in its place.

    A tuple, so that Python iterates over it without a call of ours: SQLAlchemy does so for each statement.
    """

    owner: Any
    """SQLAlchemy's collection, which has the tuple as its `listeners`."""

    def append(self, listener: Any) -> None:
        _keep(self.owner, (*self, listener))

    def appendleft(self, listener: Any) -> None:
        _keep(self.owner, (listener, *self))

    def extend(self, listeners: Iterable[Any]) -> None:
        _keep(self.owner, (*self, *listeners))

    def remove(self, listener: Any) -> None:
        left = list(self)
        left.remove(listener)
        _keep(self.owner, left)

    def clear(self) -> None:
        _keep(self.owner, ())


def _keep(owner: Any, listeners: Iterable[Any]) -> None:
    kept = _Kept(listeners)
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
    with _lock:
        listeners = getattr(dispatch, name).for_modify(dispatch)
        if not isinstance(listeners.listeners, _Kept):
            _keep(listeners, listeners.listeners)
        event.listen(engine, name, do, insert=insert)
