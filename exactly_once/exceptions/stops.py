"""Which exceptions ask for the end of something larger than the code that raised them: raised on, and never counted.

The one place where that is decided. Called wherever code of the application's is.
"""

import sys
from collections.abc import MutableMapping
from threading import current_thread, main_thread
from typing import Any, Final
from weakref import WeakKeyDictionary

from exactly_once.exceptions.leaves import leaves

__all__ = ["INSTEAD_OF", "asked_from_outside", "exit_in", "is_the_callers", "stops"]

INSTEAD_OF: Final[MutableMapping[Any, Any]] = WeakKeyDictionary()
"""Of a task that finishes the work of another one, that one: it is what was asked to end."""


def stops(error: BaseException, *, exits: bool = True) -> bool:
    """Say whether an exception asks for the end of something larger; a group does if one of its members does.

    Args:
        error: What was raised.
        exits: SystemExit is such a one. Not in a thread of ours: there it is a mistake of whatever raised it.
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
    except RuntimeError:  # no loop in this thread: nobody was asked to cancel anything
        return False
    return task is not None and (task.cancelling() > 0 or INSTEAD_OF.get(task, task).cancelling() > 0)


def exit_in(error: BaseException) -> SystemExit | None:
    """Return the SystemExit of an exception, or of a group of them, in which nothing else asks for the end."""
    if isinstance(error, SystemExit):
        return error
    if not isinstance(error, BaseExceptionGroup) or stops(error, exits=False):
        return None
    return next((each for each in leaves(error) if isinstance(each, SystemExit)), None)


def asked_from_outside(error: BaseException) -> bool:
    """The same of a small function of the application's, such as `key=` or `alert=`, in whichever thread.

    It has no reason to exit. A signal's handler may, in the middle of it; those run in the main thread alone.
    """
    return stops(error, exits=current_thread() is main_thread())


def is_the_callers(error: BaseException) -> bool:
    """Say whether an exception that was counted is raised on in a loop of the caller's: what is no `Exception`.

    It may be for code around the call, such as gevent's Timeout. A CancelledError that nobody asked for is not: the caller's own
    task would pass for cancelled. A group is if one of its members is.
    """
    if isinstance(error, Exception):
        return False
    asyncio = sys.modules.get("asyncio")
    own = Exception if asyncio is None else (Exception, asyncio.CancelledError)
    return any(not isinstance(each, own) for each in leaves(error))
