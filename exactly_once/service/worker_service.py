"""A worker with its application and its broker, started and stopped as one thing.

Before it receives, `starting` waits for its servers; a wrong setting is refused with the command that repairs it.
Made by the facade; used with `with`, by `eo.run` and by the command line.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from datetime import timedelta
from threading import Event, Thread, current_thread
from types import TracebackType
from typing import Final

from exactly_once import fork
from exactly_once.database.probe import lacking_characters
from exactly_once.database.renamed import claimed_names, told_of_renamed
from exactly_once.database.store import Store
from exactly_once.errors import ForkedProcess
from exactly_once.exceptions.words import words_of
from exactly_once.executor.background import Job
from exactly_once.executor.executor import Executor
from exactly_once.executor.routing import Router
from exactly_once.service.sources import jobs, pumps
from exactly_once.service.starting import wait_for_servers
from exactly_once.transports.contract import Subscription, Transport
from exactly_once.wording.redaction import redacted
from exactly_once.wording.steady_log import steady
from exactly_once.wording.text import taken
from exactly_once.worker.worker import Counts, Worker

__all__ = ["WorkerService"]

PATIENCE: Final = timedelta(minutes=5)
"""How long a start waits for a server that does not answer. After that a supervisor may start us again."""
IN_HAND: Final = 4
"""Messages in hand for each running message: one waits for its turn, and two are on their way from or to the broker.

With two for each, 16 threads over RocketMQ 5 stood idle for a quarter of the time; what a SIGKILL leaves is more of them."""
BATCHES_IN_HAND: Final = 3
"""Batches in hand for each handler that has them: one runs, one forms, and one is being acknowledged."""
_LAST_LOOK_S: Final = 1.0
"""Seconds that stopping waits for a start that is just looking at a server."""

_CONCERNED_S: Final = 3600.0
"""Seconds between two searches for conditions that cost the group messages; each is reported again."""
_CONCERNED_SOON_S: Final = 35.0
"""Seconds from the start to the second search. The first comes before we join, so programs that start together do not see each
other. A member reports its subscription every 30 s."""

_log = steady("exactly_once.worker")


class WorkerService:
    """A worker over one broker.

    Args:
        router: Handlers and databases.
        transport: The broker.
        concurrency: How many messages run at once.
        drain_timeout: How long stopping lets running messages finish.
        patience: How long the start waits for a server that does not answer; None: five minutes, and in the background without
            limit.
        background: `with` and `async with` do not wait for the start.
        describe: The broker's URL without its secrets, for the log.

    Example:
        with eo.worker("rocketmq://127.0.0.1:8081") as worker:
            ...
    """

    def __init__(
        self,
        router: Router,
        transport: Transport,
        *,
        concurrency: int,
        drain_timeout: timedelta,
        patience: timedelta | None = None,
        background: bool = False,
        describe: str = "",
    ) -> None:
        self._router, self._transport = router, transport
        self._concurrency, self.drain_timeout = concurrency, drain_timeout
        self._patience, self._background, self._describe = patience, background, describe
        self._asked = Event()
        self._starting: Thread | None = None
        self._failed: str | None = None
        self._worker: Worker | None = None
        self._executor: Executor | None = None
        self._process = fork.here
        fork.tell(self)

    def forked(self) -> None:
        """Runs in a forked child: the worker is the parent's, and stopping it here does nothing."""
        self._asked, self._worker, self._executor = Event(), None, None
        self._starting = None

    # -- starting and stopping ---------------------------------------------------------------------------------------

    def start(self, patience: timedelta | None = None) -> None:
        """Begin to receive before this returns, even if `background` was asked for.

        Args:
            patience: Replaces the worker's own.

        Raises:
            ConfigurationError: Something is wrong that waiting does not repair, or a server stayed away too long.
        """
        router = self._router
        self._process = fork.here
        for plan in router.plans:
            for warning in plan.warnings:
                _log.warning("%s", warning)
        for store in router.stores.values():
            store.check_threads()
        subscriptions = router.subscriptions()
        patience = patience or self._patience or (timedelta.max if self._background else PATIENCE)
        wait_for_servers(router, self._transport, subscriptions, self._asked, patience)
        for name, store in router.stores.items():
            if store.lacking is not None:
                _log.warning("%s", lacking_characters(name, store.lacking))
            self._tell_of_renamed(store)
        told = self._concerns(subscriptions)
        executor = Executor(router.find, router.plans, threads=self._concurrency)
        try:
            consumers = [*self._transport.subscribe(router.group, subscriptions), *pumps(router)]
            worker = Worker(
                consumers,
                executor.submit,
                capacity=IN_HAND * self._concurrency + BATCHES_IN_HAND * sum(plan.batch or 0 for plan in router.plans),
                drain_timeout=self.drain_timeout,
                answers=router.answers,
                handlers=[plan.name for plan in router.plans],
            )
            worker.start()
        except BaseException:
            executor.stop()
            raise
        executor.keep([*jobs(router, consumers), self._concerns_job(subscriptions, told)])
        self._executor, self._worker = executor, worker
        _log.info(
            "worker_started group=%s topics=%s handlers=%s concurrency=%d database=%s transport=%s",
            router.group,
            ",".join(sorted(taken(wanted.topic, wanted.tags) for wanted in subscriptions)),
            ",".join(plan.name for plan in router.plans),
            self._concurrency,
            ",".join(redacted(store.engine.url) for store in router.stores.values()),
            self._describe,
        )

    def _tell_of_renamed(self, store: Store) -> None:
        """Runs before anything is received. An error of the query does not keep the worker from starting."""
        router = self._router
        try:
            with store.engine.connect() as connection:
                claimed = list(claimed_names(connection, store.tables.idempotent, router.group))
        except Exception as error:  # noqa: BLE001, RUF100  (a role without SELECT; `doctor` tells)
            _log.debug("claims were not looked at: %s", words_of(error))
            return
        if (told := told_of_renamed(claimed, [plan.name for plan in router.plans])) is not None:
            _log.warning("%s", told)

    def _concerns(self, subscriptions: Sequence[Subscription], told: Sequence[str] = ()) -> Sequence[str]:
        """Report conditions that cost the group messages, unless `told` has them. Return all of them."""
        found = self._transport.concerns(self._router.group, subscriptions)
        for concern in found:
            if concern not in told:
                _log.warning("%s", concern)
        return found

    def _concerns_job(self, subscriptions: Sequence[Subscription], told: Sequence[str]) -> Job:
        """Whoever joins later does not tell us, and a line of a start is forgotten: told once more, and then again and again."""
        said = iter([told])

        def look() -> None:
            self._concerns(subscriptions, next(said, ()))

        first, every = timedelta(seconds=_CONCERNED_SOON_S), timedelta(seconds=_CONCERNED_S)
        return Job("look for concerns", every, look, first=min(first, every))

    def stop(self) -> int:
        """Stop receiving, finish running messages, give back the rest. Return how many were given back. Idempotent."""
        self._asked.set()
        if self._starting is not None and self._starting is not current_thread():
            self._starting.join(_LAST_LOOK_S)  # it stops by itself what it has started by then, or starts nothing
        if self._worker is None or self._executor is None:
            return 0
        given_back = self._worker.stop()
        self._executor.stop()
        return given_back

    def _start_aside(self, ended: "Future[None]") -> None:
        """Start it in a thread of its own, a daemon thread that does not delay the end of the process."""
        self._asked.clear()
        self._failed = None
        ended.set_running_or_notify_cancel()
        self._starting = Thread(target=self._starts, args=(ended,), daemon=True, name="worker's start")
        self._starting.start()

    def _starts(self, ended: "Future[None]") -> None:
        try:
            self.start()
        except BaseException as error:  # noqa: BLE001, RUF100  (told to whoever waits, and else logged)
            if self._background and not self._asked.is_set():
                self._failed = words_of(error)
                _log.error("worker_not_started: nothing is received, and nothing tries again. %s", self._failed)
            ended.set_exception(error)
        else:
            if self._asked.is_set():
                self.stop()
            ended.set_result(None)

    def __enter__(self) -> "WorkerService":
        if self._background:
            self._start_aside(Future())
        else:
            self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    async def __aenter__(self) -> "WorkerService":
        import asyncio

        ended: Future[None] = Future()
        self._start_aside(ended)
        if not self._background:
            try:
                await asyncio.wrap_future(ended)
            except asyncio.CancelledError:
                self._asked.set()  # from here on the thread starts nothing, or stops it again
                raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import asyncio

        await asyncio.to_thread(self.stop)

    # -- how it is doing ---------------------------------------------------------------------------------------------

    @property
    def worker(self) -> Worker:
        """The worker inside, once started: for health and progress."""
        if self._worker is None:
            if self._process is not fork.here:
                raise ForkedProcess(
                    "This worker is that of the process that this one was forked off: its threads are not here. Start"
                    " another one here: eo.worker(...)."
                )
            raise RuntimeError("The worker is not started: use it with `with`, or call start().")
        return self._worker

    @property
    def counts(self) -> Counts:
        """How far the worker is."""
        return self.worker.counts

    def drain(self, timeout: timedelta = timedelta(seconds=60)) -> Mapping[str, int]:
        """Wait until nothing is left to do, for tests: every source empty, nothing in hand, no retry due.

        Returns:
            Deliveries by outcome, since the start. For several handlers, the outcome that says most; the outcome of each handler
            is in `counts.handlers`.

        Raises:
            ConfigurationError: Only messages of held handlers are left: the handler is wrong, not a message. The text says why.
            TimeoutError: Something was left at the end of the time; the text says what is still in hand.
        """
        self.worker.drain(timeout, self._router.unready)
        return self.counts.outcomes

    def stuck(self, after: timedelta) -> Sequence[str]:
        """Name the threads that make no progress; none before the start."""
        if self._worker is None or self._executor is None:
            return ()
        return [*self._worker.stuck(after), *self._executor.dead()]

    def unready(self) -> str | None:
        """Say why nothing is received, or None."""
        if self._worker is None or self._executor is None:
            return "not started" if self._failed is None else f"not started: {self._failed}"
        if dead := self._executor.dead():
            return f"ended: {', '.join(dead)}"
        return self._worker.unready() or self._router.unready()
