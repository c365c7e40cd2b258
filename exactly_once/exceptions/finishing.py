"""What must come to its end although its task is cancelled: a claim let go of, a connection given back, a failure written down.

A task may be cancelled again and again: a scope of anyio (`move_on_after`, `fail_after`, a task group) cancels each await until
the task has left it. So such work is done in a task of its own, which no scope knows, and the cancellation is raised when it
is done. A process that dies meanwhile leaves what it held to run out. Called for what follows a run; it sends nothing itself.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

from sqlalchemy.util import await_only, greenlet_spawn
from sqlalchemy.util.concurrency import in_greenlet

from exactly_once.exceptions.stops import INSTEAD_OF

if TYPE_CHECKING:
    import asyncio

__all__ = ["finish", "finished"]

T = TypeVar("T")

LONGEST_S: Final = 5.0
"""So long a task that is cancelled again waits for it, where a store does not answer; then it is cut off, too."""


def finish(do: Callable[[], T], *, within_s: float | None = None) -> "tuple[T, asyncio.CancelledError | None]":
    """Do something to its end, in a thread or in SQLAlchemy's greenlet.

    Args:
        do: What.
        within_s: The longest it may take in a greenlet, also where nothing cancels it again.

    Returns:
        What it returned, and the cancellation that came meanwhile: the caller is to raise it.

    Raises:
        CancelledError: It took too long; or it raised, and the task was cancelled meanwhile.
    """
    if not in_greenlet() or not _in_a_task():
        return do(), None
    from greenlet import getcurrent  # type: ignore[import-untyped]

    # the caller's context and no copy: a hook of the application's may set back what it set as the run began
    return await_only(_in_its_own_task(do, within_s, getcurrent().gr_context))


def finished(do: Callable[[], T], *, within_s: float | None = None) -> T:
    """The same; a cancellation that came meanwhile is raised here."""
    value, cancellation = finish(do, within_s=within_s)
    if cancellation is not None:
        raise cancellation
    return value


async def _in_its_own_task(
    do: Callable[[], T], within_s: float | None, context: Any
) -> "tuple[T, asyncio.CancelledError | None]":
    import asyncio

    asking = asyncio.current_task()
    assert asking is not None

    async def done() -> Callable[[], T]:
        task = asyncio.current_task()
        assert task is not None
        INSTEAD_OF[task] = INSTEAD_OF.get(asking, asking)
        try:
            value = await greenlet_spawn(_in_context, context, do)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            # out of a task, an exit or an interrupt would end the loop, past whoever waits here
            return partial(_raise, error)
        return lambda: value

    loop = asyncio.get_running_loop()
    task = loop.create_task(done())
    cancellation: asyncio.CancelledError | None = None
    until = None if within_s is None else loop.time() + within_s
    while not task.done():
        try:
            await asyncio.wait((task,), timeout=None if until is None else until - loop.time())
        except asyncio.CancelledError as error:
            if cancellation is None:
                cancellation = error
                until = until or loop.time() + LONGEST_S
        if until is not None and loop.time() >= until:
            until = None
            task.cancel()
    if cancellation is None:
        return task.result()(), None
    if task.cancelled():
        raise cancellation
    try:
        return task.result()(), cancellation
    except BaseException as raised:
        raise cancellation from raised


def _in_context(context: Any, do: Callable[[], T]) -> T:
    """Not the task's own context, which not every factory of tasks takes; one that starts at once could not enter it."""
    from greenlet import getcurrent

    getcurrent().gr_context = context
    return do()


def _raise(error: BaseException) -> NoReturn:
    raise error


def _in_a_task() -> bool:
    """Not where a coroutine is collected that nobody awaits any more."""
    import asyncio

    try:
        return asyncio.current_task() is not None
    except RuntimeError:
        return False
