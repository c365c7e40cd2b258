"""Runs deliveries: sync handlers on threads, async handlers on one event loop. `submit` returns a future at once for both.

Every handler that wants a message gets it, each with its own claim. The delivery is acknowledged when each handler has finished
or parked the message. A handler that must run again does not stop the others: on redelivery the message is a duplicate for those
that have finished. A message has a transaction of its own, or shares one with others of its handler (`batching`). Never decides
about a single handler: `processor` does. The worker calls `submit`.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from contextlib import nullcontext, suppress
from dataclasses import replace
from datetime import timedelta
from functools import lru_cache, partial
from queue import SimpleQueue
from threading import Lock, Thread
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy.util import greenlet_spawn

from exactly_once import fork
from exactly_once.exceptions.words import trace_of
from exactly_once.executor.background import Background, Job
from exactly_once.executor.batching import Batching, Queued
from exactly_once.executor.fanout import Parts, combine
from exactly_once.executor.future import SmallFuture
from exactly_once.executor.limit import Limit
from exactly_once.executor.loop_threads import LoopThreads
from exactly_once.handlers.plan import Plan
from exactly_once.outcome import Result, RunFuture
from exactly_once.processing.batch import BatchProcessor, stay
from exactly_once.processing.processor import Processor
from exactly_once.transports.contract import Delivery, Features
from exactly_once.wording.steady_log import steady

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Coroutine

__all__ = ["Executor", "Find"]

Find = Callable[[Delivery], Sequence[Processor]]
"""Return the handlers that a delivery is for."""

_One = tuple[Delivery, Features, Sequence[Processor], SmallFuture]

_log = steady("exactly_once.worker")
_LOOK_S: Final = 0.001


@lru_cache(maxsize=16)
def _each_by_itself(features: Features) -> Features:
    """The features for a message of several handlers: each failure is stored with its own time, and the pump runs it alone.

    A redelivery by the broker would run all of them: the shortest delay would spend the attempts of the others, and a handler
    that has parked the message would run again.
    """
    return replace(features, redelivers=False)


class Executor:
    """Threads and, if any handler is async, one event loop in a thread of its own.

    Args:
        find: Returns the handlers that a delivery is for.
        plans: The handlers.
        threads: How many deliveries run at once on threads, and as many on the loop.
    """

    def __init__(self, find: Find, plans: Sequence[Plan], *, threads: int) -> None:
        self._find = find
        self._work: SimpleQueue[_One | Batching | None] = SimpleQueue()
        self._batchings: dict[BatchProcessor, Batching] = {}
        self._batchings_lock = Lock()
        self._limits = {plan.name: Limit(plan.concurrency) for plan in plans if plan.concurrency is not None}
        # a delivery on the loop has one sync handler at a time
        self._loop_threads = LoopThreads(threads)
        self._stopping = False
        self._process = fork.here
        self._background = Background(())
        self._threads = [Thread(target=self._turn, name=f"handler {n}", daemon=True) for n in range(1, threads + 1)]
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_ends = False
        self._loop_thread: Thread | None = None
        if any(plan.is_async for plan in plans):
            self._start_loop(threads)
        for thread in self._threads:
            thread.start()
        fork.tell(self)

    def forked(self) -> None:
        """Called in a process just forked, perhaps inside a handler: it has no threads, and only the parent may wake the loop."""
        self._stopping, self._threads, self._batchings_lock = True, [], Lock()
        self._background = Background(())
        if self._loop is not None:
            self._end_loop()  # if the loop's thread forked, the copy of the loop must not run on

    def submit(self, delivery: Delivery, features: Features) -> RunFuture:
        """Begin a delivery and return at once, with the future of its `Result`."""
        found = self._find(delivery)
        if len(found) == 1:
            return self._begin(delivery, features, found[0])
        features = _each_by_itself(features)
        if delivery.handler is None and any(isinstance(each, BatchProcessor) for each in found):
            return self._begin_apart(delivery, features, found)
        return self._begin_alone(delivery, features, found)

    def _begin(self, delivery: Delivery, features: Features, one: Processor) -> RunFuture:
        # a message that failed before runs alone: a batch would have to be repeated because of it
        if isinstance(one, BatchProcessor) and delivery.handler is None:
            return self._begin_in_batch(delivery, features, one)
        return self._begin_alone(delivery, features, (one,))

    def _begin_alone(self, delivery: Delivery, features: Features, found: Sequence[Processor]) -> RunFuture:
        if self._loop is not None and any(each.plan.is_async for each in found):
            return self._on_loop(self._arun(delivery, features, found))
        future = SmallFuture()
        self._work.put((delivery, features, found, future))
        return future

    def _begin_apart(self, delivery: Delivery, features: Features, found: Sequence[Processor]) -> RunFuture:
        """Queue a delivery for each handler with batches, and run it at once for the other handlers."""
        future = SmallFuture()
        future.set_running_or_notify_cancel()
        parts = Parts(len(found), future.set_result, future.set_exception)
        for each in found:
            self._begin(delivery, features, each).add_done_callback(parts.ended)
        return future

    def keep(self, jobs: Sequence[Job]) -> None:
        """Run jobs by the clock, beside the deliveries, until `stop`.

        Args:
            jobs: The jobs, which belong to no handler.
        """
        self._background = Background(jobs)

    def stop(self) -> None:
        """End the threads and the loop. Runs under way are cancelled (async), or end by themselves unnoticed (threads)."""
        self._stopping = True
        self._background.stop()
        for _ in self._threads:
            self._work.put(None)
        if self._loop is not None and self._loop_thread is not None and self._loop_thread.is_alive():
            self._loop.call_soon_threadsafe(self._end_loop)
            self._loop_thread.join(5)
        self._loop_threads.close()

    def dead(self) -> Sequence[str]:
        """Return the names of threads that ended although nobody stopped them: work for them would wait for ever."""
        if self._stopping:
            return ()
        thread = self._loop_thread
        ended = () if thread is None or thread.is_alive() else (thread.name,)
        return [*ended, *self._background.dead()]

    def _turn(self) -> None:
        while (work := self._work.get()) is not None:
            if isinstance(work, Batching):
                self._turn_batch(work)
                continue
            delivery, features, found, future = work
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = self._run(delivery, features, found, future)
            except BaseException as error:  # the worker takes it for "bring it again"; a thread never dies
                self._same_process()
                future.set_exception(error)
            else:
                future.set_result(result)
            del work, delivery, found, future

    def _run(
        self, delivery: Delivery, features: Features, found: Sequence[Processor], future: SmallFuture | None = None
    ) -> Result:
        """Run a delivery for each of its handlers, one after the other. No `future` is given in a greenlet of the loop."""
        if len(found) == 1 and not self._limits:  # what nearly every message is
            return found[0].run(delivery.message, features, pumped=delivery.handler is not None)
        return combine([self._run_one(delivery, features, each, future) for each in found])

    def _run_one(self, delivery: Delivery, features: Features, one: Processor, future: SmallFuture | None) -> Result:
        run = partial(one.run, delivery.message, features, pumped=delivery.handler is not None)
        limit = self._limits.get(one.plan.name)
        if future is None and not one.plan.is_async:
            if limit is None:
                return self._loop_threads.run(run)
            # the thread gives the place back: cancelled, the task ends before its handler does
            if limit.acquire(on_loop=True) and self._stopping:
                limit.release()
                raise CancelledError
            return self._loop_threads.run(run, limit.release)
        if limit is None:
            return run()
        with limit.place(on_loop=future is None) as waited:
            if waited and (self._stopping or (future is not None and future.given_back)):
                raise CancelledError  # whoever brought it has it again; what the handler needs may be closed by now
            return run()

    # -- batches -----------------------------------------------------------------------------------------------------

    def _begin_in_batch(self, delivery: Delivery, features: Features, handler: BatchProcessor) -> RunFuture:
        batching = self._batchings.get(handler)
        if batching is None:
            with self._batchings_lock:
                batching = self._batchings.setdefault(handler, Batching(handler))
        future = SmallFuture()
        if batching.add(delivery.message, features, future):
            self._begin_batches(batching)
        return future

    def _begin_batches(self, batching: Batching) -> None:
        if self._loop is not None and batching.handler.plan.is_async:
            self._on_loop(self._aturn_batches(batching))
        else:
            self._work.put(batching)

    def _turn_batch(self, batching: Batching) -> None:
        """Run one batch. The next batch queues behind the waiting work of other handlers."""
        while (pause := batching.pause_s()) > 0:
            sleep(min(pause, _LOOK_S))
        if batch := batching.take():
            self._run_batch(batching, batch)
            self._work.put(batching)

    async def _aturn_batches(self, batching: Batching) -> None:
        import asyncio

        while True:
            while (pause := batching.pause_s()) > 0:
                await asyncio.sleep(min(pause, _LOOK_S))
            if not (batch := batching.take()):
                return
            async with self._running_at_once:
                await greenlet_spawn(self._run_batch, batching, batch)

    def _run_batch(self, batching: Batching, batch: Sequence[Queued]) -> None:
        """Run a batch and complete the future of each delivery. In a greenlet: awaits. Raises only what ends the loop."""
        handler = batching.handler
        leave = self._leave if handler.plan.is_async else stay
        limit = self._limits.get(handler.plan.name)
        try:
            with nullcontext() if limit is None else limit.place(on_loop=handler.plan.is_async):
                going = [one for one in batch if not (self._stopping or one.future.given_back)]
                if len(going) < len(batch):  # while it was waited for a place
                    for one in set(batch) - set(going):
                        one.future.set_exception(CancelledError())
                if going:
                    self._run_going(batching, going, leave)
        except BaseException as error:  # the worker takes it for "bring it again"; neither thread nor loop ends of it
            self._same_process()
            for one in batch:
                if not one.future.done():
                    one.future.set_exception(error)
            if self._stopping and not isinstance(error, Exception):
                raise  # cancelled with the loop

    def _run_going(self, batching: Batching, batch: Sequence[Queued], leave: Callable[[BaseException], None]) -> None:
        began = monotonic()
        found = batching.handler.run_batch(batching.members(batch), leave=leave, meanwhile=batching.read_ahead())
        batching.size.ended(len(batch), timedelta(seconds=monotonic() - began), deadlocked=found.deadlocked)
        for one, result in zip(batch, found.results, strict=True):
            if isinstance(result, BaseException):
                one.future.set_exception(result)
            else:
                one.future.set_result(result)

    def _same_process(self) -> None:
        """If a handler forked, end the copy of this thread in the child: it would wait for work that never comes."""
        if self._process is not fork.here:
            fork.end(fork.inside())

    def _leave(self, error: BaseException) -> None:
        """Re-raise if the loop ends. Else the handler cancelled itself, or awaited a cancelled task: undo the cancellation."""
        import asyncio

        if self._stopping:
            raise error
        task = asyncio.current_task()
        while task is not None and task.uncancel():
            pass

    # -- the loop ----------------------------------------------------------------------------------------------------

    def _start_loop(self, most: int) -> None:
        import asyncio

        loop = self._loop = asyncio.new_event_loop()
        self._running_at_once = asyncio.Semaphore(most)  # more messages are in hand than the pool has connections
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
            # cancelled handlers roll back before the loop ends, so that no key stays locked
            ended = asyncio.gather(*tasks, return_exceptions=True)
            while not ended.done():
                with suppress(SystemExit, KeyboardInterrupt, RuntimeError):  # as in `_go_on`
                    loop.run_until_complete(ended)
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    def _go_on(self, loop: "asyncio.AbstractEventLoop") -> None:
        """Run the loop until it is stopped, or until something in it exits.

        asyncio lets SystemExit and KeyboardInterrupt of any task or callback end the whole loop, and a handler can stop the loop:
        then every message would hang. The loop loses nothing by this end, so it is run again. The task has the exception as its
        result: a handler that awaits the task fails with it. Ctrl-C is raised in the main thread, never here.
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

    async def _arun(self, delivery: Delivery, features: Features, found: Sequence[Processor]) -> Result:
        async with self._running_at_once:
            try:
                return await greenlet_spawn(self._run, delivery, features, found)
            finally:
                self._same_process()
