"""The exceptions that a group of them is made of, however deep; of one that is no group, itself. Pure.

Code with tasks (`asyncio.TaskGroup`, anyio) raises what failed in them as one group. What is decided by the class of an exception
is decided of these.
"""

from collections.abc import Sequence
from typing import Final

__all__ = ["leaves"]

# asked of the base class, for a class of the application may have a property of that name, which raises
_members_of: Final = BaseExceptionGroup.__dict__["exceptions"].__get__


def leaves(error: BaseException) -> Sequence[BaseException]:
    """Return the exceptions of a group in their order, those of groups inside it in their place.

    Example:
        >>> leaves(ExceptionGroup("tasks", [ValueError(1), ExceptionGroup("inside", [KeyError(2)])]))
        [ValueError(1), KeyError(2)]
    """
    if not isinstance(error, BaseExceptionGroup):
        return (error,)
    found: list[BaseException] = []
    waiting: list[BaseException] = [error]
    while waiting:  # no recursion: a group may be deeper than Python's stack
        at = waiting.pop()
        if isinstance(at, BaseExceptionGroup):
            waiting += reversed(_members_of(at))
        else:
            found.append(at)
    return found
