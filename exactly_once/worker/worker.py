"""Receives deliveries, has them run, settles them, and stops. Knows no broker, no database and no event loop.

`run` returns a future, and the worker does not know what runs it. Each consumer has one thread that receives, here, and one that
settles and extends (`lane`). Order is the consumers' duty: they never hand out a message behind an unsettled message of its
ordering key. At most `capacity` messages are in hand, from the receive that asks for them to the end of the settle. That also
limits memory.

When a run returns `WaitForStore(store)`, the message stays in hand, no consumer receives any more, and the store is asked until
it answers (`outages`). Then the held messages run again, oldest first. When a run returns `WaitForKey`, only its message stays in
hand. It runs again a little later (`busy_keys`), until its time is over, and occupies a place of `capacity` until then.

If the process dies on any line here, the broker redelivers what was in hand, and the claims in the database show what is done.
Made by `worker_service`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from threading import Condition, Event
from time import monotonic
from typing import Final

from exactly_once.errors import ConfigurationError, ExactlyOnceError
from exactly_once.events.run_ended import OutcomeCounts, RunEnded
from exactly_once.events.throttled_log import ThrottledLog
from exactly_once.outcome import Ack, Redeliver, RunFuture, WaitForKey, WaitForStore
from exactly_once.transports.contract import Consumer, Delivery, Features
from exactly_once.wording.steady_log import steady
from exactly_once.wording.text import escaped
from exactly_once.worker.busy_keys import BusyKeys
from exactly_once.worker.capacity import Capacity
from exactly_once.worker.lane import Lane
from exactly_once.worker.outages import Outages, WaitingDeliveries
from exactly_once.worker.threads import join, lasting, on_each

__all__ = ["Counts", "Run", "Worker"]

Run = Callable[[Delivery, Features], RunFuture]

POLL: Final = timedelta(seconds=1)
"""The longest wait of an empty receive. A full worker keeps its sessions with the broker alive at the same interval."""
SHORT_POLL: Final = timedelta(seconds=0.05)
"""The same if there are no more places than consumers: an idle consumer then occupies a place that others need."""
RETRY_S: Final = (0.1, 30.0)
"""The first pause after a receive that raised, and the longest. Each pause is twice as long as the one before."""
AGAIN: Final = timedelta(seconds=1)
"""The delay of a message whose run raised, so that it does not come in a tight loop. (A failed handler has a verdict.)"""
LAST_SETTLE_S: Final = 10.0
"""How long `stop` waits for the last settle of all consumers, and then for their close, before it gives up waiting."""

_log = steady("exactly_once.worker")


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """The counts of a worker. Read without a lock, so the numbers may differ by the messages under way."""

    received: int
    acked: int
    redelivered: int
    given_back: int
    in_hand: int
    held: int
    """How many in hand wait for a store that does not answer."""
    outages: tuple[str, ...]
    """The stores that do not answer."""
    outcomes: Mapping[str, int]
    """Messages by outcome. A message of several handlers counts once, with the outcome of its combined result."""
    handlers: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Messages by outcome, for each handler."""


class Worker:
    """Passes what the consumers receive to `run`, and settles each delivery by the result.

    Args:
        consumers: The sources of messages. Closed by `stop`.
        run: Starts a delivery's run and returns its future at once. A future that ends in an exception, whichever it is, means
            that the message is redelivered.
        capacity: The most messages in hand at once, over all consumers.
        drain_timeout: How long `stop` lets running messages finish.
        answers: Whether the store of this name answers again. Called in a thread of its own; may block or raise.
        handlers: The names of the handlers, so that the counts include those that have run nothing yet.
        poll: The longest wait of an empty receive.

    Example:
        >>> from concurrent.futures import Future
        >>> worker = Worker([], lambda delivery, features: Future(), capacity=1, drain_timeout=timedelta(seconds=1))
        >>> worker.start()
        >>> worker.stop()
        0
    """

    def __init__(
        self,
        consumers: Sequence[Consumer],
        run: Run,
        *,
        capacity: int,
        drain_timeout: timedelta,
        answers: Callable[[str], bool] = lambda store: True,
        handlers: Sequence[str] = (),
        poll: timedelta = POLL,
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity is the most messages in hand and must be at least 1, not {capacity}")
        self._run, self._drain_timeout = run, drain_timeout
        self._outcomes = OutcomeCounts(handlers)
        self._poll, self._wait = poll, poll if capacity > len(consumers) else min(poll, SHORT_POLL)
        self._changed = Condition()
        self._outages = Outages(answers, self._run_again, self._changed, lambda: self._stopping)
        self._kept = BusyKeys(self._begin, self._changed, lambda: self._stopping)
        self._capacity = Capacity(capacity, self._changed, lambda: bool(self._outages))
        self._stopping = self._done = False
        self._stopped = Event()
        self._given_back = 0
        self._events = 0  # non-empty receives, and settles; `drain` waits for a receive without any
        self._throttled = ThrottledLog(_log)
        self._lanes: list[Lane] = []
        for n, consumer in enumerate(consumers, 1):
            name = f"consumer {n} ({type(consumer).__name__})"
            lane = Lane(consumer, name, self._has_settled)
            lane.receiver = lasting(f"receive: {name}", partial(self._receive, lane), self._breathe, self._throttled)
            lane.settler = lasting(f"settle: {name}", lane.settle, self._breathe, self._throttled)
            self._lanes.append(lane)

    def start(self) -> None:
        """Begin to receive."""
        for lane in self._lanes:
            lane.receiver_turned = lane.settler_turned = monotonic()
            lane.settler.start()
            lane.receiver.start()

    def stop(self) -> int:
        """Stop receiving, finish what runs within `drain_timeout`, give back the rest, and close the consumers.

        Giving back is safe: a run that ends later is ignored here, and the claim decides for the redelivery.

        Returns:
            How many messages were given back. A second call waits for the first, does nothing and returns the same number.
        """
        deadline = monotonic() + self._drain_timeout.total_seconds()
        with self._changed:
            first, self._stopping = not self._stopping, True
            self._changed.notify_all()
        if not first:
            self._stopped.wait()
            return self._given_back
        on_each(self._lanes, "stop", deadline)
        for lane in self._lanes:
            join(lane.receiver, deadline)
        with self._changed:
            waiting = self._outages.give_up() | self._kept.give_up()
        for delivery, lane in waiting.items():  # waiting cannot finish these
            self._give_back(lane, delivery)
        with self._changed:
            self._changed.wait_for(lambda: not self._in_hand(), max(0.0, deadline - monotonic()))
            self._done = True  # from now on what a receive returns is ignored: the broker redelivers it
        for lane in self._lanes:
            for delivery in tuple(lane.in_hand):
                self._give_back(lane, delivery)
            lane.decided.put(None)
        deadline = monotonic() + LAST_SETTLE_S
        for lane in self._lanes:
            join(lane.settler, deadline)
        on_each(self._lanes, "close", monotonic() + LAST_SETTLE_S)
        self._stopped.set()
        return self._given_back

    def drain(self, timeout: timedelta, blocked_by: Callable[[], str | None] = lambda: None) -> None:
        """Wait until each consumer had a whole receive without messages, with nothing in hand since it began. For tests.

        Args:
            timeout: How long to wait. Each try takes as long as an empty receive, `poll`.
            blocked_by: Returns the reason if messages are kept that waiting cannot finish, else None.

        Raises:
            ConfigurationError: All messages left are kept, and `blocked_by` returned the reason.
            TimeoutError: Messages are still in hand; the text names them.
            RuntimeError: The worker stops, or is not started.
        """
        with self._changed:
            self._events += 1  # a receive that began before this call proves nothing
            if self.unready() != "not started":
                self._changed.wait_for(
                    lambda: self._stopping or self._quiet() or (self._only_keeps() and blocked_by() is not None),
                    timeout.total_seconds(),
                )
            if self.unready() in ("not started", "stopping", "stopped"):
                raise RuntimeError("Only a worker that runs comes to rest: drain it after start and before stop.")
            if self._quiet():
                return
            if self._only_keeps() and (why := blocked_by()) is not None:
                raise ConfigurationError(f"What is left, {self._in_hand()} message(s), cannot be done: {why}")
            some_held = [delivery.message for lane in self._lanes for delivery in lane.in_hand.copy()]
        some = ", ".join(f"{message.topic} {message.key or message.message_id or '?'}" for message in some_held[:10])
        away = f" No answer from: {', '.join(self._outages.stores)}." if self._outages else ""
        raise TimeoutError(
            f"After {timeout.total_seconds():g} s the worker has {self._in_hand()} message(s) in hand, or more keep"
            f" coming. Not finished: {some or 'none'}{' ...' if len(some_held) > 10 else ''}.{away}"
        )

    @property
    def counts(self) -> Counts:
        """The present counts."""
        lanes = self._lanes
        return Counts(
            received=sum(lane.received for lane in lanes),
            acked=sum(lane.acked for lane in lanes),
            redelivered=sum(lane.redelivered for lane in lanes),
            given_back=self._given_back,
            in_hand=self._in_hand(),
            held=self._outages.held,
            outages=self._outages.stores,
            outcomes=self._outcomes.outcomes,
            handlers=self._outcomes.handlers,
        )

    def stuck(self, after: timedelta) -> Sequence[str]:
        """Return the names of threads that died, or showed no life for `after`. Empty before start and while stopping."""
        if self._stopping or self.unready() == "not started":
            return ()
        oldest = monotonic() - after.total_seconds()
        turns = [(lane.receiver, lane.receiver_turned) for lane in self._lanes]
        turns += [(lane.settler, lane.settler_turned) for lane in self._lanes]
        return [thread.name for thread, turned in turns if turned < oldest or not thread.is_alive()]

    def unready(self) -> str | None:
        """Return why nothing is received now, or None."""
        if self._stopping:
            return "stopped" if self._stopped.is_set() else "stopping"
        if any(lane.receiver.ident is None for lane in self._lanes):
            return "not started"
        stores = self._outages.stores
        return f"no answer from: {', '.join(sorted(stores))}" if stores else None

    def _breathe(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopping, 1.0)

    def _receive(self, lane: Lane) -> None:
        """Receive until the worker stops, whatever a consumer raises. The receiving thread runs only this."""
        retry = RETRY_S[0]
        while True:
            lane.receiver_turned = monotonic()
            booked = self._capacity.book(lane.seat, self._poll.total_seconds(), lambda: self._stopping)
            if self._stopping:
                return
            began = self._events
            try:
                got = lane.consumer.receive(booked, self._wait if booked else timedelta(0))
            except BaseException as error:  # noqa: BLE001, RUF100  (clients raise CancelledError and worse)
                known = isinstance(error, ExactlyOnceError)  # its text is enough, without a traceback
                self._throttled.warning(
                    f"receive {lane.name}",
                    "%s could not receive; trying until it can." + (" %s" if known else ""),
                    lane.name,
                    *((error,) if known else ()),
                    error=None if known else error,
                )
                with self._changed:
                    self._capacity.used(lane.seat, booked, 0)
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._stopping, retry)
                retry = min(2 * retry, RETRY_S[1])
                continue
            retry = RETRY_S[0]
            with self._changed:
                if self._done:
                    return
                self._capacity.used(lane.seat, booked, len(got))
                if got:
                    self._events += 1
                    lane.take(got)
                elif booked:
                    lane.quiet = began
                self._changed.notify_all()
                if self._outages.hold_all(got, lane):
                    continue
            for delivery in got:
                self._begin(lane, delivery)

    def _begin(self, lane: Lane, delivery: Delivery, since: float | None = None) -> None:
        """Start a delivery's run. `since` is when it was first kept, if it was."""
        if self._done:
            return
        try:
            future = self._run(delivery, lane.features)
        except BaseException as error:  # noqa: BLE001, RUF100
            self._raised(lane, delivery, error)
        else:
            lane.running[delivery] = future
            future.add_done_callback(partial(self._finish, lane, delivery, since))

    def _finish(self, lane: Lane, delivery: Delivery, since: float | None, done: RunFuture) -> None:
        """Act on the result of a run. Called by the thread that ended it. Never blocks, never raises."""
        lane.running.pop(delivery, None)
        try:
            result = done.result()
            self._outcomes.add(RunEnded(delivery.message.topic, result))
            verdict = result.verdict
        except BaseException as error:  # noqa: BLE001, RUF100  (cancellation too: it is not acknowledged)
            self._raised(lane, delivery, error)
            return
        if type(verdict) is Ack or type(verdict) is Redeliver:
            lane.decide(delivery, verdict)
        elif type(verdict) is WaitForStore:
            with self._changed:
                if not self._stopping:
                    self._outages.hold(verdict.store, delivery, lane)
                    return
            self._give_back(lane, delivery)
        elif type(verdict) is WaitForKey:
            with self._changed:
                stopping = self._stopping
                kept = not stopping and self._kept.keep(verdict, lane, delivery, since)
            if stopping:
                self._give_back(lane, delivery)
            elif not kept:
                lane.decide(delivery, verdict.then)
        else:
            self._raised(lane, delivery, TypeError(f"a run ended with {verdict!r}, which is not a verdict"))

    def _raised(self, lane: Lane, delivery: Delivery, error: BaseException) -> None:
        if isinstance(error, ConfigurationError) and error.store is not None:
            with self._changed:
                held = not self._stopping
                if held:  # the server is wrong, or lacks our tables: an outage, which spends no delivery attempt
                    self._outages.hold(error.store, delivery, lane)
            if held:
                self._throttled.warning("wrong", "%s", error)
                return
        if self._stopping:
            self._give_back(lane, delivery)
        elif lane.decide(delivery, Redeliver(AGAIN)):
            message = delivery.message
            text = "A run broke; its message will be brought again: topic=%s message_id=%s"
            self._throttled.warning(
                "run", text, escaped(message.topic), escaped(message.message_id or "none"), error=error
            )

    def _give_back(self, lane: Lane, delivery: Delivery) -> None:
        """Redeliver at once. Called without the lock, because a run's callbacks may take locks of their own.

        A run that has not begun never begins. A coroutine is cancelled. A thread ends by itself, and its result is ignored.
        """
        if lane.decide(delivery, Redeliver()):
            with self._changed:
                self._given_back += 1
            if run := lane.running.pop(delivery, None):
                run.cancel()

    def _run_again(self, waiting: WaitingDeliveries) -> None:
        """Start the runs of deliveries that waited for a store. Called by the outage's thread when the store answers."""
        held = [
            (batch.received, delivery, lane)
            for lane in self._lanes
            for delivery, batch in lane.in_hand.copy().items()  # in the order received
            if delivery in waiting
        ]
        for _, delivery, lane in sorted(held, key=lambda each: each[0]):
            if self._stopping:  # `stop` could not find these: they were neither waiting nor running
                self._give_back(lane, delivery)
            else:
                self._begin(lane, delivery)

    def _has_settled(self, number: int) -> None:
        with self._changed:
            self._capacity.free(number)
            self._events += 1
            self._changed.notify_all()

    def _in_hand(self) -> int:
        settled = sum(lane.settled for lane in self._lanes)  # read first: the difference is never negative
        return sum(lane.received for lane in self._lanes) - settled

    def _quiet(self) -> bool:
        return not self._outages and not self._in_hand() and self._nothing_comes()

    def _nothing_comes(self) -> bool:
        return all(lane.quiet == self._events for lane in self._lanes)

    def _only_keeps(self) -> bool:
        """Whether every message in hand is kept until its next look, and no other can come."""
        all_kept = 0 < self._in_hand() == self._kept.number
        return all_kept and not self._outages and (self._nothing_comes() or self._capacity.is_full)
