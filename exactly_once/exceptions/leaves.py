"""The single exceptions in an exception group, at any depth; any other exception is its own single member. Pure.

Code with tasks (`asyncio.TaskGroup`, anyio) raises the errors of its tasks as one group. Decisions by the class of an exception
are made for these single exceptions.
"""

from collections.abc import Sequence
from typing import Final

__all__ = ["leaves"]

# Taken from the base class: a class of the application may have a property of that name, which raises.
_members_of: Final = BaseExceptionGroup.__dict__["exceptions"].__get__


def leaves(error: BaseException) -> Sequence[BaseException]:
    """Return the single exceptions of a group in their order; a nested group is replaced by its members.

    Example:
        >>> leaves(ExceptionGroup("tasks", [ValueError(1), ExceptionGroup("inside", [KeyError(2)])]))
        [ValueError(1), KeyError(2)]
    """
    if not isinstance(error, BaseExceptionGroup):
        return (error,)
    found: list[BaseException] = []
    waiting: list[BaseException] = [error]
    while waiting:  # no recursion: groups may be nested deeper than Python's stack
        at = waiting.pop()
        if isinstance(at, BaseExceptionGroup):
            waiting += reversed(_members_of(at))
        else:
            found.append(at)
    return found
