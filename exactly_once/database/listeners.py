"""Adds a listener to an engine or a pool that is in use: whoever is in the midst of its listeners goes on with those there were.

SQLAlchemy keeps the listeners of an event in a deque, and walks it without a lock. A listener that is added meanwhile, as this
package does when it first sees an engine, ends that walk with `deque mutated during iteration`: in another thread of the program,
which is connecting, or is giving a connection back, and then the pool has lost it.
"""

from collections.abc import Callable, Iterable, Iterator
from threading import Lock
from typing import Any

from sqlalchemy import Engine, event
from sqlalchemy.event.registry import _EventKey

__all__ = ["listen"]

_lock = Lock()


class _Kept:
    """What SQLAlchemy asks of that deque; a walk goes over what there was when it began."""

    __slots__ = ("_listeners",)

    def __init__(self, listeners: Iterable[Any]) -> None:
        self._listeners = tuple(listeners)

    def append(self, listener: Any) -> None:
        self._listeners = (*self._listeners, listener)

    def appendleft(self, listener: Any) -> None:
        self._listeners = (listener, *self._listeners)

    def extend(self, listeners: Iterable[Any]) -> None:
        self._listeners = (*self._listeners, *listeners)

    def remove(self, listener: Any) -> None:
        left = list(self._listeners)
        left.remove(listener)
        self._listeners = tuple(left)

    def clear(self) -> None:
        self._listeners = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._listeners)

    def __len__(self) -> int:
        return len(self._listeners)


def listen(engine: Engine, name: str, do: Callable[..., Any], *, insert: bool = False) -> None:
    """Listen to an event of an engine, its pool or its dialect; otherwise as `sqlalchemy.event.listen`.

    Args:
        engine: Which may be in use by other threads.
        name: Of the event.
        do: The listener.
        insert: Before those that are there.
    """
    from sqlalchemy.event.api import _event_key

    key: _EventKey[Any] = _event_key(engine, name, do)
    dispatch: Any = key.dispatch_target.dispatch
    with _lock:
        listeners = getattr(dispatch, name).for_modify(dispatch)
        if not isinstance(listeners.listeners, _Kept):
            listeners.listeners = _Kept(listeners.listeners)
        event.listen(engine, name, do, insert=insert)
