"""Threads beside an event loop, in which sync handlers of the loop's deliveries run. Ours alone.

The loop's own threads (`asyncio.to_thread`) are few, and handlers and name look-ups need them: a sync handler that waits there
for a row which an async handler has locked would keep that one from its thread, and neither would end.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

from sqlalchemy.util import await_only

from exactly_once import fork

__all__ = ["LoopThreads"]

T = TypeVar("T")


class LoopThreads:
    """Threads, made when they are needed.

    Args:
        most: How many there are at most. With fewer than messages that run at once, handlers that wait for the row
            of another one could hold all threads, and that one would never run.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._pool: ThreadPoolExecutor | None = None
        fork.tell(self)

    def forked(self) -> None:
        """In a process just forked: the threads are the parent's."""
        if self._pool is not None:
            fork.pin(self._pool)
        self._pool = None

    def run(self, run: Callable[[], T], ended: Callable[[], None] | None = None) -> T:
        """Run it in a thread, in the context of the task; called in a greenlet of the loop, which goes on meanwhile.

        Args:
            run: What runs. Its thread goes on when the task is cancelled.
            ended: Called when that thread has really ended it, or will never begin it.
        """
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._most, "beside the handlers' loop")
        future = self._pool.submit(copy_context().run, _unless_forked, run)
        if ended is not None:
            future.add_done_callback(lambda _: ended())
        found: T = await_only(asyncio.wrap_future(future))
        return found

    def close(self) -> None:
        """Let idle threads end; one that runs a handler ends with it, unheard."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


def _unless_forked(run: Callable[[], T]) -> T:
    process = fork.here
    try:
        return run()
    finally:
        if process is not fork.here:
            fork.end(fork.inside())  # this copy of the thread would wait for work that nobody brings
