"""Finishes work that must not be cut short by cancellation: freeing a claim, returning a connection, recording a failure.

A task may be cancelled again and again: a scope of anyio (`move_on_after`, `fail_after`, a task group) cancels each await until
the task has left the scope. So such work runs in a task of its own, which no scope knows, and the cancellation is raised after
it. If the process dies meanwhile, what it held runs out. Called for the work after a run; it sends nothing itself.
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
"""How long a task that is cancelled again waits for the work, if a store does not answer. Then the work is cut off, too."""


def finish(do: Callable[[], T], *, within_s: float | None = None) -> "tuple[T, asyncio.CancelledError | None]":
    """Do something to its end, in a thread or in SQLAlchemy's greenlet.

    Args:
        do: The work.
        within_s: The longest it may take in a greenlet, also if nothing cancels it again.

    Returns:
        Its result, and the cancellation that came meanwhile, which the caller must raise.

    Raises:
        CancelledError: It took too long; or it raised, and the task was cancelled meanwhile.
    """
    if not in_greenlet() or not _in_a_task():
        return do(), None
    from greenlet import getcurrent  # type: ignore[import-untyped]

    # The caller's context, not a copy: a hook of the application may reset a context variable that it set when the run began.
    return await_only(_in_its_own_task(do, within_s, getcurrent().gr_context))


def finished(do: Callable[[], T], *, within_s: float | None = None) -> T:
    """The same; raises a cancellation that came meanwhile."""
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
            # Raised in a task, an exit or an interrupt would end the loop, and not reach the waiting caller.
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
    """Set the context here, because not every task factory takes one; a task that starts eagerly could not enter it."""
    from greenlet import getcurrent

    getcurrent().gr_context = context
    return do()


def _raise(error: BaseException) -> NoReturn:
    raise error


def _in_a_task() -> bool:
    """False also while a coroutine that nobody awaits any more is garbage collected."""
    import asyncio

    try:
        return asyncio.current_task() is not None
    except RuntimeError:
        return False
