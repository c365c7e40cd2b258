"""Runs deliveries: sync handlers on threads, async ones on one loop, both behind one call that gives a future at once.

Every handler that wants a message gets it, each with its own claim; the delivery is acknowledged when each has finished or is
parked. One that must be asked again does not stop the others, and those that have finished are duplicates then. A message
has a transaction of its own, or shares one with others of its handler (`batching`). Decides nothing about a single handler:
`processor` does. The worker calls `run`.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from datetime import timedelta
from functools import lru_cache, partial
from queue import SimpleQueue
from threading import BoundedSemaphore, Lock, Thread
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy.util import greenlet_spawn

from exactly_once import fork
from exactly_once.exceptions.words import trace_of
from exactly_once.executor.batching import Batching, Queued
from exactly_once.executor.fanout import Part, Parts, combine
from exactly_once.executor.future import SmallFuture
from exactly_once.message import Message
from exactly_once.outcome import Outcome, RunFuture, Verdict, WaitForKey
from exactly_once.processing.batch import BatchProcessor, stay
from exactly_once.processing.processor import Processor, Result
from exactly_once.transports.contract import Delivery, Features
from exactly_once.wording.steady_log import steady

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Coroutine

__all__ = ["Executor", "Find", "arun_all", "combine", "run_all"]

Find = Callable[[Delivery], Sequence[Processor]]
"""Which handlers a delivery is for."""

_One = tuple[Delivery, Features, Sequence[Processor], SmallFuture]

_log = steady("exactly_once.worker")
_LOOK_S: Final = 0.001
_NO_LIMIT: Final[Any] = nullcontext()


@lru_cache(maxsize=16)
def _each_by_itself(features: Features) -> Features:
    """Of several handlers those that fail are stored with their own times, for the pump to run each alone.

    A redelivery is for all of them: the most impatient one would spend the others' attempts, and a parked one would run.
    """
    return replace(features, redelivers=False)


def run_all(
    found: Sequence[Processor], message: Message, features: Features, *, pumped: bool = False, foreign: bool = False
) -> Result:
    """Run all handlers of a message in this thread, one after the other."""
    if len(found) == 1:
        return found[0].run(message, features, pumped=pumped, foreign=foreign)
    return combine([each.run(message, features, pumped=pumped, foreign=foreign) for each in found])


async def arun_all(
    found: Sequence[Processor], message: Message, features: Features, *, pumped: bool = False, foreign: bool = False
) -> Result:
    """The same in a loop: async handlers in SQLAlchemy's greenlet, sync ones in a thread beside the loop."""
    import asyncio

    told: list[Result] = []
    for each in found:
        if each.plan.is_async:
            told.append(await greenlet_spawn(each.run, message, features, pumped=pumped, foreign=foreign))
        else:
            told.append(await asyncio.to_thread(_beside, each, message, features, pumped, foreign))
    return combine(told)


def _beside(each: Processor, message: Message, features: Features, pumped: bool, foreign: bool) -> Result:
    """Run it in a thread beside the loop."""
    process = fork.here
    try:
        return each.run(message, features, pumped=pumped, foreign=foreign, beside=True)
    finally:
        if process is not fork.here:
            fork.end(fork.inside())  # this copy of the thread would wait for work that nobody brings


class Executor:
    """Threads and, if any handler is async, a loop of their own.

    Args:
        find: Which handlers a delivery is for.
        threads: How many deliveries run at once on threads, and as many on the loop.
        needs_loop: There are async handlers.
        limits: Of each handler with `concurrency=`, how many of it run at once.
        handlers: Their names, for the counts of those that have run nothing yet.
    """

    def __init__(
        self,
        find: Find,
        *,
        threads: int,
        needs_loop: bool,
        limits: Mapping[str, int],
        handlers: Sequence[str] = (),
    ) -> None:
        self._find = find
        self._work: SimpleQueue[_One | Batching | None] = SimpleQueue()
        self._batchings: dict[BatchProcessor, Batching] = {}
        self._limits = {name: BoundedSemaphore(most) for name, most in limits.items()}
        self._counts = _no_counts()
        self._of_handlers: defaultdict[str, dict[Outcome, int]] = defaultdict(
            _no_counts, {name: _no_counts() for name in handlers}
        )
        self._counting = Lock()
        self._stopping = False
        self._process = fork.here
        self._threads = [Thread(target=self._turn, name=f"handler {n}", daemon=True) for n in range(1, threads + 1)]
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_ends = False
        self._loop_thread: Thread | None = None
        if needs_loop:
            self._start_loop(threads, limits)
        for thread in self._threads:
            thread.start()
        fork.tell(self)

    def forked(self) -> None:
        """In a process just forked, perhaps inside a handler: there are no threads, and the loop's wake-ups are the parent's."""
        self._stopping, self._threads, self._counting = True, [], Lock()
        if self._loop is not None:
            self._end_loop()  # a copy of it, if it is the one that forked, turns no further

    def submit(self, delivery: Delivery, features: Features) -> RunFuture:
        """Begin a delivery and return at once; the result of what is returned is the verdict."""
        found = self._find(delivery)
        future = SmallFuture()
        if len(found) == 1:
            (one,) = found
            if isinstance(one, BatchProcessor) and delivery.handler is None:
                self._wait_for_batch(one, delivery, features, future)
                return future
        elif found:
            features = _each_by_itself(features)
            if delivery.handler is None and any(isinstance(each, BatchProcessor) for each in found):
                self._run_apart(delivery, features, found, future)
                return future
        return self._run_alone(delivery, features, found, future)

    def _run_alone(
        self, delivery: Delivery, features: Features, found: Sequence[Processor], future: SmallFuture
    ) -> RunFuture:
        if self._loop is not None and any(each.plan.is_async for each in found):
            if isinstance(future, Part):
                return self._on_loop(self._atold(delivery, features, found, noted=True))
            return self._on_loop(self._arun(delivery, features, found))
        self._work.put((delivery, features, found, future))
        return future

    def observe(self) -> Mapping[str, int]:
        """How many deliveries ended how, since the start; one that is kept has not ended, however often it is looked at."""
        return _by_name(self._counts)

    def observe_handlers(self) -> Mapping[str, Mapping[str, int]]:
        """The same for each handler by itself: what became of each delivery that it wanted."""
        return {name: _by_name(counts) for name, counts in self._of_handlers.copy().items()}

    def stop(self) -> None:
        """End the threads and the loop; what still runs is cancelled (async) or left to end unheard (threads)."""
        self._stopping = True
        for _ in self._threads:
            self._work.put(None)
        if self._loop is not None and self._loop_thread is not None and self._loop_thread.is_alive():
            self._loop.call_soon_threadsafe(self._end_loop)
            self._loop_thread.join(5)

    def dead(self) -> Sequence[str]:
        """Name what ended without being told to: what is handed to it would wait for ever."""
        thread = self._loop_thread
        return () if self._stopping or thread is None or thread.is_alive() else (thread.name,)

    def _turn(self) -> None:
        while (work := self._work.get()) is not None:
            if isinstance(work, Batching):
                self._turn_batch(work)
                continue
            delivery, features, found, future = work
            if not future.set_running_or_notify_cancel():
                continue
            try:
                told = self._limited(delivery, features, found)
            except BaseException as error:  # the worker takes it for "bring it again"; a thread never dies
                self._same_process()
                future.set_exception(error)
            else:
                self._end(future, told, found[0].plan.name if len(found) == 1 else None)
            del work, delivery, found, future

    def _end(self, future: SmallFuture, told: Result, handler: str | None = None) -> None:
        """End a delivery; or its part, of one handler."""
        if isinstance(future, Part):
            if handler is not None:
                self._note(handler, told)
            future.set_result(told)
            return
        self._count(told, handler)
        future.set_result(told.verdict)

    def _count(self, told: Result, handler: str | None) -> None:
        """Count a delivery; where it is for one handler, for that one, too."""
        if not isinstance(told.verdict, WaitForKey):
            with self._counting:
                self._counts[told.outcome] += 1
                if handler is not None:
                    self._of_handlers[handler][told.outcome] += 1

    def _note(self, handler: str, told: Result) -> None:
        """Count for one of several handlers."""
        if not isinstance(told.verdict, WaitForKey):
            with self._counting:
                self._of_handlers[handler][told.outcome] += 1

    def _limited(self, delivery: Delivery, features: Features, found: Sequence[Processor]) -> Result:
        pumped = delivery.handler is not None
        if len(found) == 1 and not self._limits:  # what nearly every message is
            return found[0].run(delivery.message, features, pumped=pumped)
        told: list[Result] = []
        for each in found:
            with self._limits.get(each.plan.name, _NO_LIMIT):
                told.append(each.run(delivery.message, features, pumped=pumped))
            if len(found) > 1:
                self._note(each.plan.name, told[-1])
        return combine(told)

    # -- groups ------------------------------------------------------------------------------------------------------

    def _run_apart(
        self, delivery: Delivery, features: Features, found: Sequence[Processor], future: SmallFuture
    ) -> None:
        """Let a delivery wait for the groups of those handlers that have them; the others run it at once."""
        future.set_running_or_notify_cancel()
        parts = Parts(len(found), partial(self._end, future), future.set_exception)
        for each in found:
            part = Part()
            part_ends: RunFuture = part
            if isinstance(each, BatchProcessor):
                self._wait_for_batch(each, delivery, features, part)
            else:
                part_ends = self._run_alone(delivery, features, (each,), part)
            part_ends.add_done_callback(parts.ended)

    def _wait_for_batch(
        self, handler: BatchProcessor, delivery: Delivery, features: Features, future: SmallFuture
    ) -> None:
        batching = self._batchings.get(handler)
        if batching is None:
            with self._counting:
                batching = self._batchings.setdefault(handler, Batching(handler))
        if batching.add(delivery.message, features, future):
            self._begin_batches(batching)

    def _begin_batches(self, batching: Batching) -> None:
        if self._loop is not None and batching.handler.plan.is_async:
            self._on_loop(self._aturn_batches(batching))
        else:
            self._work.put(batching)

    def _turn_batch(self, batching: Batching) -> None:
        """Run one group; the next one queues behind what other handlers have waiting."""
        while (pause := batching.pause_s()) > 0:
            sleep(min(pause, _LOOK_S))
        if group := batching.take():
            with self._limits.get(batching.handler.plan.name, _NO_LIMIT):
                self._run_batch(batching, group)
            self._work.put(batching)

    async def _aturn_batches(self, batching: Batching) -> None:
        import asyncio

        limit = self._async_limits.get(batching.handler.plan.name, _NO_LIMIT)
        while True:
            while (pause := batching.pause_s()) > 0:
                await asyncio.sleep(min(pause, _LOOK_S))
            if not (group := batching.take()):
                return
            async with self._places, limit:
                await greenlet_spawn(self._run_batch, batching, group)

    def _run_batch(self, batching: Batching, group: Sequence[Queued]) -> None:
        """Run a group and end each of its deliveries; in a greenlet, awaits. Raises only what ends the loop."""
        began = monotonic()
        leave = self._leave if batching.handler.plan.is_async else stay
        try:
            found = batching.handler.run_batch(batching.members(group), leave=leave, meanwhile=batching.read_ahead())
            batching.size.ended(len(group), timedelta(seconds=monotonic() - began), deadlocked=found.deadlocked)
            for one, told in zip(group, found.told, strict=True):
                if isinstance(told, BaseException):
                    one.future.set_exception(told)
                else:
                    self._end(one.future, told, batching.handler.plan.name)
        except BaseException as error:  # the worker takes it for "bring it again"; neither thread nor loop ends of it
            self._same_process()
            for one in group:
                if not one.future.done():
                    one.future.set_exception(error)
            if self._stopping and not isinstance(error, Exception):
                raise  # cancelled with the loop

    def _same_process(self) -> None:
        """End the copy of this thread in a child that a handler forked: it would wait for work that nobody brings."""
        if self._process is not fork.here:
            fork.end(fork.inside())

    def _leave(self, error: BaseException) -> None:
        """Raise on what ends the loop; but a handler that cancels itself, or awaits what was cancelled, goes no further."""
        import asyncio

        if self._stopping:
            raise error
        task = asyncio.current_task()
        while task is not None and task.uncancel():
            pass

    # -- the loop ----------------------------------------------------------------------------------------------------

    def _start_loop(self, most: int, limits: Mapping[str, int]) -> None:
        import asyncio

        loop = self._loop = asyncio.new_event_loop()
        self._places = asyncio.Semaphore(most)  # more are in hand than the pool has connections for
        self._async_limits = {name: asyncio.Semaphore(most) for name, most in limits.items()}
        self._loop_thread = Thread(target=self._turn_loop, args=(loop,), name="handlers' loop", daemon=True)
        self._loop_thread.start()

    def _turn_loop(self, loop: "asyncio.AbstractEventLoop") -> None:
        import asyncio

        asyncio.set_event_loop(loop)
        try:
            while not self._loop_ends:
                self._go_on(loop)
        finally:
            self._same_process()
            tasks = asyncio.all_tasks(loop)
            for task in tasks:
                task.cancel()
            # cancelled handlers roll back before the loop ends, so that no key stays locked behind us
            ended = asyncio.gather(*tasks, return_exceptions=True)
            while not ended.done():
                with suppress(SystemExit, KeyboardInterrupt, RuntimeError):  # as in `_go_on`
                    loop.run_until_complete(ended)
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    def _go_on(self, loop: "asyncio.AbstractEventLoop") -> None:
        """Turn the loop until it is told to stop, or something in it exits.

        asyncio lets SystemExit and KeyboardInterrupt of any task or callback end the whole loop, and a handler can stop it:
        then every message would hang. Nothing of the loop is lost by it, and the task has the exception for its result: a
        handler that awaits the task fails with it. A person's Ctrl-C is raised in the main thread, and never here.
        """
        ends = "Something called stop() of the running loop."
        try:
            loop.run_forever()
        except (SystemExit, KeyboardInterrupt) as error:
            ends = trace_of(error)
        self._same_process()
        if not self._stopping:
            _log.error(
                "handlers_loop_ended: a task or a callback that a handler started ended the event loop of all handlers. The"
                " loop goes on, and no message is blamed. Raise an Exception there, and await the task in its handler: then"
                " it is a failure of that message.\n%s",
                ends,
            )

    def _end_loop(self) -> None:
        self._loop_ends = True
        assert self._loop is not None
        self._loop.stop()

    def _on_loop(self, coroutine: "Coroutine[Any, Any, Any]") -> RunFuture:
        import asyncio

        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _arun(self, delivery: Delivery, features: Features, found: Sequence[Processor]) -> Verdict:
        alone = len(found) == 1
        one = await self._atold(delivery, features, found, noted=not alone)
        self._count(one, found[0].plan.name if alone else None)
        return one.verdict

    async def _atold(
        self, delivery: Delivery, features: Features, found: Sequence[Processor], *, noted: bool
    ) -> Result:
        pumped = delivery.handler is not None
        told: list[Result] = []
        async with self._places:
            for each in found:
                limit = self._async_limits.get(each.plan.name)
                try:
                    if limit is None:
                        told.append(await arun_all((each,), delivery.message, features, pumped=pumped))
                    else:
                        async with limit:
                            told.append(await arun_all((each,), delivery.message, features, pumped=pumped))
                finally:
                    self._same_process()
                if noted:
                    self._note(each.plan.name, told[-1])
        return combine(told)


def _no_counts() -> dict[Outcome, int]:
    return dict.fromkeys(Outcome, 0)


def _by_name(counts: Mapping[Outcome, int]) -> Mapping[str, int]:
    return {outcome.value: count for outcome, count in counts.items()}
