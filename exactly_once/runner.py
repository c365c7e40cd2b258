"""Runs deliveries: sync handlers on threads, async ones on one loop, both behind one call that gives a future at once.

Every handler that wants a message gets it, one after the other, each with its own claim and transaction; the delivery is
acknowledged when each has finished or is parked. One that must be asked again does not stop the others, and those that
have finished are duplicates then. Decides nothing about a single handler: `delivery` does. The worker calls `run`.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import lru_cache
from queue import SimpleQueue
from threading import BoundedSemaphore, Lock, Thread
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy.util import greenlet_spawn

from exactly_once.delivery import Delivering, Told
from exactly_once.message import Message
from exactly_once.outcome import Outcome
from exactly_once.transport import Delivery, Features
from exactly_once.verdict import Ack, Hold, Keep, Redeliver, Said, Verdict

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Coroutine

__all__ = ["Find", "Runner", "arun_all", "run_all", "together"]

Find = Callable[[Delivery], Sequence[Delivering]]
"""Which handlers a delivery is for."""

_log = logging.getLogger("exactly_once.worker")
_NOT_MINE: Final = Told(Outcome.NOT_MINE, Ack())
# of several handlers' outcomes the one that says most: what is not acknowledged first, then what happened
_WEIGHT: Final = {
    outcome: weight
    for weight, outcome in enumerate(
        (
            Outcome.WAITING,
            Outcome.UNKNOWN,
            Outcome.IN_PROGRESS,
            Outcome.FAILED,
            Outcome.DEAD,
            Outcome.PROCESSED,
            Outcome.DUPLICATE,
            Outcome.NOT_MINE,
        )
    )
}


# told the same message again, a handler that ended so runs nothing
_SETTLED: Final = frozenset({Outcome.PROCESSED, Outcome.DUPLICATE, Outcome.NOT_MINE})


def together(told: Sequence[Told]) -> Told:
    """Return what a delivery's handlers say with one voice.

    A store that does not answer holds the delivery; else the soonest redelivery anyone asks for; else it is kept, if
    anyone keeps it and the others have finished; else it is acknowledged.
    """
    if len(told) == 1:
        return told[0]
    if not told:
        return _NOT_MINE
    outcome = min((each.outcome for each in told), key=_WEIGHT.__getitem__)
    said: list[Said] = [each.verdict for each in told]
    for each in said:
        if isinstance(each, Hold):
            return Told(outcome, each)
    kept = [each for each in said if isinstance(each, Keep)]
    verdict = _soonest([each for each in said if not isinstance(each, (Hold, Keep))])
    if not kept or isinstance(verdict, Redeliver):
        # of a Keep and a Redeliver the latter: what is kept runs again for all its handlers, twice a second, and the one
        # that asked for a delay would spend its attempts on looks at another's lease
        return Told(outcome, verdict)
    then = _soonest([each.then for each in kept])
    if any(each.outcome not in _SETTLED and not isinstance(each.verdict, Keep) for each in told):
        return Told(outcome, then)  # the same for one whose failure is stored for the pump, or for a person
    return Told(outcome, Keep(min(each.again for each in kept), min(each.longest for each in kept), then))


def _soonest(verdicts: Sequence[Verdict]) -> Verdict:
    """Return the redelivery that is due first; `Ack` only where none is asked for, or someone's message would be lost."""
    again = [each for each in verdicts if isinstance(each, Redeliver)]
    return min(again, key=lambda each: each.delay) if again else Ack()


@lru_cache(maxsize=16)
def _each_by_itself(features: Features) -> Features:
    """Of several handlers those that fail are stored with their own times, for the pump to run each alone.

    A redelivery is for all of them: the most impatient one would spend the others' attempts, and a parked one would run.
    """
    return replace(features, redelivers=False)


def run_all(
    found: Sequence[Delivering], message: Message, features: Features, *, pumped: bool = False, foreign: bool = False
) -> Told:
    """Run all handlers of a message in this thread, one after the other."""
    if len(found) == 1:
        return found[0].run(message, features, pumped=pumped, foreign=foreign)
    return together([each.run(message, features, pumped=pumped, foreign=foreign) for each in found])


async def arun_all(
    found: Sequence[Delivering], message: Message, features: Features, *, pumped: bool = False, foreign: bool = False
) -> Told:
    """The same in a loop: async handlers in SQLAlchemy's greenlet, sync ones in a thread beside the loop."""
    import asyncio

    told: list[Told] = []
    for each in found:
        if each.plan.is_async:
            told.append(await greenlet_spawn(each.run, message, features, pumped=pumped, foreign=foreign))
        else:
            told.append(await asyncio.to_thread(each.run, message, features, pumped=pumped, foreign=foreign))
    return together(told)


class Runner:
    """Threads and, if any handler is async, a loop of their own.

    Args:
        find: Which handlers a delivery is for.
        threads: How many deliveries run at once on threads, and as many on the loop.
        needs_loop: There are async handlers.
        limits: Of each handler with `concurrency=`, how many of it run at once.
    """

    def __init__(self, find: Find, *, threads: int, needs_loop: bool, limits: Mapping[str, int]) -> None:
        self._find = find
        self._work: SimpleQueue[tuple[Delivery, Features, Sequence[Delivering], Future[Any]] | None] = SimpleQueue()
        self._limits = {name: BoundedSemaphore(most) for name, most in limits.items()}
        self._counts: dict[Outcome, int] = dict.fromkeys(Outcome, 0)
        self._counting = Lock()
        self._threads = [Thread(target=self._turn, name=f"handler {n}", daemon=True) for n in range(1, threads + 1)]
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_thread: Thread | None = None
        if needs_loop:
            self._start_loop(threads, limits)
        for thread in self._threads:
            thread.start()

    def run(self, delivery: Delivery, features: Features) -> Future[Said]:
        """Begin a delivery and return at once; the future's result is the verdict."""
        found = self._find(delivery)
        if len(found) > 1:
            features = _each_by_itself(features)
        if self._loop is not None and any(each.plan.is_async for each in found):
            return self._on_loop(self._arun(delivery, features, found))
        future: Future[Said] = Future()
        self._work.put((delivery, features, found, future))
        return future

    def observe(self) -> Mapping[str, int]:
        """How many deliveries ended how, since the start; one that is kept has not ended, however often it is looked at."""
        return {outcome.value: count for outcome, count in self._counts.items()}

    def stop(self) -> None:
        """End the threads and the loop; what still runs is cancelled (async) or left to end unheard (threads)."""
        for _ in self._threads:
            self._work.put(None)
        if self._loop is not None and self._loop_thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop_thread.join(5)

    def _turn(self) -> None:
        while (work := self._work.get()) is not None:
            delivery, features, found, future = work
            if not future.set_running_or_notify_cancel():
                continue
            try:
                told = self._limited(delivery, features, found)
            except BaseException as error:  # the worker takes it for "bring it again"; a thread never dies
                future.set_exception(error)
            else:
                self._count(told)
                future.set_result(told.verdict)
            del work, delivery, found, future

    def _count(self, told: Told) -> None:
        if not isinstance(told.verdict, Keep):
            with self._counting:
                self._counts[told.outcome] += 1

    def _limited(self, delivery: Delivery, features: Features, found: Sequence[Delivering]) -> Told:
        pumped = delivery.handler is not None
        if not self._limits:
            return run_all(found, delivery.message, features, pumped=pumped)
        told: list[Told] = []
        for each in found:
            limit = self._limits.get(each.plan.name)
            if limit is None:
                told.append(each.run(delivery.message, features, pumped=pumped))
            else:
                with limit:
                    told.append(each.run(delivery.message, features, pumped=pumped))
        return together(told)

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
            loop.run_forever()
        finally:
            tasks = asyncio.all_tasks(loop)
            for task in tasks:
                task.cancel()
            # cancelled handlers roll back before the loop ends, so that no key stays locked behind us
            loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    def _on_loop(self, coroutine: "Coroutine[Any, Any, Said]") -> Future[Said]:
        import asyncio

        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _arun(self, delivery: Delivery, features: Features, found: Sequence[Delivering]) -> Said:
        pumped = delivery.handler is not None
        told: list[Told] = []
        async with self._places:
            for each in found:
                limit = self._async_limits.get(each.plan.name)
                if limit is None:
                    told.append(await arun_all((each,), delivery.message, features, pumped=pumped))
                else:
                    async with limit:
                        told.append(await arun_all((each,), delivery.message, features, pumped=pumped))
        one = together(told)
        self._count(one)
        return one.verdict
