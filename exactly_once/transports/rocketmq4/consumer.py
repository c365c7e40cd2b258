"""The wall around librocketmq's push consumer: one consumer for a whole group, whatever its topics.

It never raises into librocketmq, never answers it by accident, and never uses its retry. Called by the rocketmq4
transport. What is walled off, and why:

* **RECONSUME_LATER is never answered while the client belongs to its group.** In concurrent mode it sends back the whole
  list that was pulled together (up to 32 messages, also those that are finished or not yet called). It drops each message that
  cannot be sent, and after retryMaxTimes the broker loses them. A message that is to come again waits here instead.
* **Leaving with unfinished messages.** The client joins its callback threads, and their answers count: success
  would lose the message, and "later" is the retry above. But a client in broadcasting mode sends nothing back and, with
  its offsets on the broker, stores no offset. So we first switch the mode, then answer, then the client leaves. Offsets stay
  where they were last stored (every 5 s), and from there the messages come again. Orderly mode has no such fault.
* **One client for all topics.** Two clients of one group with different topics overwrite each other's subscription on the
  broker, and nobody reads half of each topic's queues. A client has one callback, so the topic is read from the
  message. A group with one ordered topic is ordered for all its topics.
* **References are kept for ever.** A collected consumer is a segmentation fault, because native threads hold its address.
* **The client is shut down once, and never inside a callback.** Inside a callback that aborts the process.
* **A body that is packed, but not by zlib, ends the process** before any callback. `ahead` reads such messages instead of the
  client, and the client joins when they are settled.
* One thread works off a pulled list, one message at a time: parallelism is at most the number of lists in hand.
"""

import atexit
import ctypes
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from itertools import count
from threading import Event, Lock, Thread
from time import monotonic, sleep
from typing import Any, Final

from exactly_once import fork
from exactly_once.errors import TransportError
from exactly_once.exceptions.words import trace_of
from exactly_once.message import Message
from exactly_once.outcome import Settlement
from exactly_once.transports.contract import Delivery, Features, Subscription
from exactly_once.transports.handoff import Handoff
from exactly_once.transports.inflight import InFlight
from exactly_once.transports.rocketmq4.ahead import Ahead
from exactly_once.transports.rocketmq4.connection import Connection
from exactly_once.transports.rocketmq4.library import CallFailed, enter, leave_without_it
from exactly_once.transports.rocketmq4.messages import message_reader
from exactly_once.wording.steady_log import steady

__all__ = ["RocketMQ4Consumer"]

_log = steady("exactly_once.transports.rocketmq4")

CONSUME_SUCCESS: Final = 0
RECONSUME_LATER: Final = 1
BROADCASTING: Final = 0
CLUSTERING: Final = 1
# While we switch the mode, the client's timer may be storing offsets in the old mode. That takes about 0.1 ms for each
# queue, and until it is done no answer may move an offset.
MODE_SETTLES_S: Final = 0.5
LEAVE_WITHIN_S: Final = 20.0  # then the native client is left running, and the process ends without its exit code

_kept: Final[list[Any]] = []
_numbers = count(1)
_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class RocketMQ4Consumer:
    """A `Consumer` over librocketmq: the client's threads wait in the handoff until their messages are settled.

    Raises:
        TransportError: librocketmq refused to start; nothing is left behind. Raised by `receive` if it starts only then.
        ForkedProcess: No client can work in this process.
    """

    invisible: timedelta | None = None  # the broker waits as long as we are connected

    def __init__(
        self,
        connection: Connection,
        group: str,
        subscriptions: Sequence[Subscription],
        *,
        in_flight: InFlight,
        features: Features,
        threads: int,
        properties: Sequence[str],
        before_leaving: Callable[[str], Callable[[], None]],
        ahead: Ahead | None = None,
    ) -> None:
        enter()
        self.features = features
        self._library = library = connection.library
        self._ordered = any(subscription.ordered for subscription in subscriptions)
        self._in_flight = in_flight
        self._handoff = Handoff(in_flight)
        self._before_leaving = before_leaving
        self._closing = Lock()
        self._closed = False
        self._read: Callable[[int], Message] = message_reader(library, connection.names, properties)
        # A client's id is its address and this name. In one process a second client of a group with the same id is
        # refused; behind the same address, from another container, it is confused with the first.
        self.instance = f"{os.getpid()}-{next(_numbers)}-{os.urandom(4).hex()}"
        self._callback = _Callback(self._on_message)
        self._handle: int = library.call.CreatePushConsumer(connection.names.outside(group).encode())
        _kept.append(self)
        self._ahead = ahead
        self._join: Callable[[], None] | None = partial(self._joined, connection, group, subscriptions, threads)
        if ahead is None:
            try:
                self._join_group()
            except TransportError:
                in_flight.close()
                raise
        else:
            ahead.start(self._handoff.offer)
        # Leaving waits for every callback, and the callbacks wait for us, so it needs a thread of its own. It
        # is started now because a forgotten consumer leaves at the interpreter's exit, when no thread can be started any more.
        self._go, self._left = Event(), Event()
        Thread(target=self._leave, name="rocketmq4-leave", daemon=True).start()
        atexit.register(self.close)
        fork.tell(self)

    def forked(self) -> None:
        """Runs in a forked child: the member is the parent, and only the parent leaves the group."""
        atexit.unregister(self.close)
        self._closing, self._closed = Lock(), True

    def _join_group(self) -> None:
        """Let the client join, once the group has no unread message that would crash it."""
        if self._ahead is not None and not self._ahead.done:
            return
        with self._closing:
            if self._join is not None and not self._closed:
                self._join()
                self._join = None

    def _joined(self, connection: Connection, group: str, subscriptions: Sequence[Subscription], threads: int) -> None:
        try:
            self._start(connection, subscriptions, threads)
        except CallFailed as error:
            raise TransportError(
                f"The RocketMQ client could not join group {group} through {connection.name_servers}: {error}. "
                "Nothing was received."
            ) from error

    def _start(self, connection: Connection, subscriptions: Sequence[Subscription], threads: int) -> None:
        call, check, handle = self._library.call, self._library.check, self._handle
        connection.tell("PushConsumer", handle)
        check("SetPushConsumerInstanceName", call.SetPushConsumerInstanceName(handle, self.instance.encode()))
        check("SetPushConsumerThreadCount", call.SetPushConsumerThreadCount(handle, threads))
        check("SetPushConsumerMessageBatchMaxSize", call.SetPushConsumerMessageBatchMaxSize(handle, 1))
        check("SetPushConsumerMessageModel", call.SetPushConsumerMessageModel(handle, CLUSTERING))
        for subscription in subscriptions:
            topic = connection.names.outside(subscription.topic)
            expression = " || ".join(sorted(subscription.tags)) or "*"
            check("Subscribe", call.Subscribe(handle, topic.encode(), expression.encode()))
        # Registered once: each registration replaces the one before.
        register = "RegisterMessageCallbackOrderly" if self._ordered else "RegisterMessageCallback"
        check(register, getattr(call, register)(handle, self._callback))
        check("StartPushConsumer", call.StartPushConsumer(handle))

    def _on_message(self, _consumer: int, handle: int) -> int:
        """Called by native threads. ctypes answers 0, success, for anything that it cannot convert: so nothing may escape."""
        try:
            return CONSUME_SUCCESS if self._handoff.offer(self._read(handle)) else RECONSUME_LATER
        except BaseException as error:
            with suppress(BaseException):
                _log.error(
                    "A message could not be read from librocketmq; it is held until this process ends\n%s",
                    trace_of(error),
                )
            # Answered like any other when we leave, and then it comes again.
            return CONSUME_SUCCESS if self._handoff.keep() else RECONSUME_LATER

    def receive(self, limit: int, wait: timedelta) -> Sequence[Delivery]:
        """Hand out up to `limit` messages whose native threads wait for their settlement."""
        if self._join is not None:
            self._join_group()
        return self._handoff.receive(limit, wait)

    def settle(self, settlements: Sequence[tuple[Delivery, Settlement]]) -> None:
        """Let native threads go with success, or keep them with their message until it is due again."""
        self._handoff.settle(settlements)

    def extend(self, deliveries: Sequence[Delivery]) -> None:
        """Never needed: see `invisible`."""

    def stop(self) -> None:
        """Hand out nothing more."""
        self._handoff.stop()

    def close(self) -> None:
        """Leave the group. Unsettled messages come again, and so do those that were acknowledged in the last seconds."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        atexit.unregister(self.close)
        self._handoff.stop()
        left = self._left
        if self._join is not None:
            # No client has joined; and `ahead` moves the group's offset behind no unsettled message.
            assert self._ahead is not None
            self._ahead.leave()
            self._handoff.release()
        self._go.set()
        until = monotonic() + LEAVE_WITHIN_S
        released = False
        while not left.wait(0.02) and monotonic() < until:
            if self._handoff.holding and not released:
                self._let_go()
                released = True
        if not left.is_set():
            _log.warning("librocketmq did not shut down within %s s; its threads end with this process", LEAVE_WITHIN_S)
            leave_without_it()
        self._in_flight.close()

    def _leave(self) -> None:
        self._go.wait()
        if self._join is not None:
            self._left.set()
            return
        try:
            afterwards = self._prepared()
            self._library.check("ShutdownPushConsumer", self._library.call.ShutdownPushConsumer(self._handle))
            afterwards()
        except Exception as error:
            _log.error("RocketMQ was not left in good order; what is unsettled comes again\n%s", trace_of(error))
        finally:
            self._left.set()

    def _prepared(self) -> Callable[[], None]:
        try:
            return self._before_leaving(self.instance)
        except (OSError, TransportError) as error:
            _log.warning("No RocketMQ server answers while leaving; another member may wait up to a minute: %s", error)
            return lambda: None

    def _let_go(self) -> None:
        """Answer the callbacks that still wait, once no answer can move an offset or send a message back."""
        if not self._ordered:
            self._library.call.SetPushConsumerMessageModel(self._handle, BROADCASTING)
            sleep(MODE_SETTLES_S)
        self._handoff.release()
