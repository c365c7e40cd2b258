"""Which exceptions are stops: they ask for the end of something larger than the code that raised them. Re-raised, never counted.

The only place that decides this. Called wherever we call code of the application.
"""

import sys
from collections.abc import MutableMapping
from threading import current_thread, main_thread
from typing import Any, Final
from weakref import WeakKeyDictionary

from exactly_once.exceptions.leaves import leaves

__all__ = ["INSTEAD_OF", "asked_from_outside", "exit_in", "is_the_callers", "stops"]

INSTEAD_OF: Final[MutableMapping[Any, Any]] = WeakKeyDictionary()
"""For a task that finishes another task's work, that other task, which is the one that gets cancelled."""


def stops(error: BaseException, *, exits: bool = True) -> bool:
    """Say whether an exception is a stop. A group is a stop if one of its members is.

    Args:
        error: What was raised.
        exits: SystemExit counts as a stop. Not in a thread of ours: there it is a mistake of the code that raised it.
    """
    if isinstance(error, Exception):
        return False
    if isinstance(error, BaseExceptionGroup):
        return any(stops(each, exits=exits) for each in leaves(error))
    if isinstance(error, SystemExit):
        return exits
    if isinstance(error, (KeyboardInterrupt, GeneratorExit)):
        return True
    greenlet, asyncio = sys.modules.get("greenlet"), sys.modules.get("asyncio")
    if greenlet is not None and isinstance(error, greenlet.GreenletExit):
        return True
    if asyncio is None or not isinstance(error, asyncio.CancelledError):
        return False
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no loop in this thread: nothing was cancelled
        return False
    return task is not None and (task.cancelling() > 0 or INSTEAD_OF.get(task, task).cancelling() > 0)


def exit_in(error: BaseException) -> SystemExit | None:
    """Return the SystemExit of an exception, or of a group in which nothing else is a stop."""
    if isinstance(error, SystemExit):
        return error
    if not isinstance(error, BaseExceptionGroup) or stops(error, exits=False):
        return None
    return next((each for each in leaves(error) if isinstance(each, SystemExit)), None)


def asked_from_outside(error: BaseException) -> bool:
    """The same for a small function of the application, such as `key=` or `alert=`, in any thread.

    Such a function has no reason to exit. A signal handler that interrupts it may; signal handlers run in the main thread alone.
    """
    return stops(error, exits=current_thread() is main_thread())


def is_the_callers(error: BaseException) -> bool:
    """Say whether a counted exception is also raised in the caller's loop: everything that is not an `Exception`.

    It may be for code around the call, such as gevent's Timeout. The exception is a CancelledError without
    a cancellation: with it, the caller's own task would look cancelled. A group is raised if one of its members is.
    """
    if isinstance(error, Exception):
        return False
    asyncio = sys.modules.get("asyncio")
    own = Exception if asyncio is None else (Exception, asyncio.CancelledError)
    return any(not isinstance(each, own) for each in leaves(error))
