"""Runs a message for a consumer loop of the caller's: `eo.process` in its thread, `eo.aprocess` in its event loop.

Such a loop gets an outcome, and brings the message again by itself: nothing is kept in hand here, and no retry is scheduled.
Called by the facade.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from sqlalchemy.util import greenlet_spawn

from exactly_once.database.connections.one_writer import anyone_holds, refuse_inside
from exactly_once.errors import ConfigurationError
from exactly_once.executor.fanout import combine
from exactly_once.executor.loop_threads import LoopThreads
from exactly_once.message import Message
from exactly_once.outcome import Outcome, Result
from exactly_once.processing.processor import CALLERS_LOOP, Processor

__all__ = ["CallersLoop"]

# as many as asyncio's own at most: more would only wait for connections, and give up after `pool_timeout`
_MOST_THREADS: Final = 32


class CallersLoop:
    """Runs messages for whoever calls.

    Args:
        matching: Returns the handlers of a message.
    """

    def __init__(self, matching: Callable[[Message], Sequence[Processor]]) -> None:
        self._matching = matching
        self._loop_threads = LoopThreads(_MOST_THREADS)

    def run(self, message: Message) -> Outcome:
        """Run a message in this thread.

        Raises:
            ConfigurationError: A handler of it is async.
        """
        found = self._matching(message)
        for each in found:
            if each.plan.is_async:
                raise ConfigurationError(
                    f"The handler {each.plan.name!r} is async: use `await eo.aprocess(message)` instead of eo.process."
                )
        for each in found if anyone_holds() else ():
            refuse_inside(each.store.engine, "eo.process")
        return _outcome(combine([each.run(message, CALLERS_LOOP, callers_loop=True) for each in found]))

    async def arun(self, message: Message) -> Outcome:
        """The same in an event loop. Sync handlers run in threads."""
        found = self._matching(message)
        for each in found if anyone_holds() else ():
            refuse_inside(each.store.engine, "eo.aprocess")
        return _outcome(await greenlet_spawn(self._run_on_loop, found, message))

    def _run_on_loop(self, found: Sequence[Processor], message: Message) -> Result:
        """In a greenlet of the caller's loop."""

        def run(each: Processor) -> Result:
            if each.plan.is_async:
                return each.run(message, CALLERS_LOOP, callers_loop=True)
            return self._loop_threads.run(
                partial(each.run, message, CALLERS_LOOP, callers_loop=True, on_our_thread=True)
            )

        return combine([run(each) for each in found])


def _outcome(result: Result) -> Outcome:
    if result.raises is not None:
        raise result.raises
    return result.outcome
