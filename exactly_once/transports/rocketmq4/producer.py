"""The wall around librocketmq's producer. Called by the rocketmq4 transport; never receives anything.

What is walled off, and why:

* A send may fail at once with "No route info" although the topic exists: the client asks the name server again a moment later.
  Errors have one status for everything, and we do not read texts. So what fails *quickly* is tried again for
  `TRY_FOR_S`; a timeout takes longer than that and is reported. The client itself tries other brokers within one call.
* Bodies are set by length (`SetByteMessageBody`): the client's own `set_body` ends at a NUL byte.
* Each message is destroyed after its send: the client never does that, and 1,000 messages of 100 kB leave 98 MB.
* The Java client's hash of the ordering key chooses the queue. The selector gets an argument that is never NULL, because
  librocketmq refuses NULL, and no exception leaves the selector.
* A producer that was not shut down makes the process hang at its end, so an exit handler shuts down a forgotten producer.
* Only the status "stored" is a receipt: the others say that the broker has the message in memory and did not flush or replicate
  it in time. Sending again is safe, because consumers recognise the business key.
"""

import atexit
import ctypes
import os
from collections.abc import Sequence
from datetime import timedelta
from itertools import count
from threading import Lock
from time import monotonic, sleep
from typing import Any, Final

from exactly_once import fork
from exactly_once.errors import ForkedProcess, TransportError
from exactly_once.message import Message
from exactly_once.transports.contract import Receipt
from exactly_once.transports.rocketmq4.connection import Connection
from exactly_once.transports.rocketmq4.library import CallFailed, enter
from exactly_once.transports.rocketmq4.messages import (
    DELAY_LEVELS,
    MAX_BODY_BYTES,
    delay_level,
    native_message,
    queue_of,
)
from exactly_once.wording.steady_log import steady

__all__ = ["RocketMQ4Producer"]

_log = steady("exactly_once.transports.rocketmq4")

TRY_FOR_S: Final = 1.0
AGAIN_AFTER_S: Final = 0.05
SEND_TIMEOUT_MS: Final = 3000
STORED: Final = 0
ROOM_FOR_PROPERTIES: Final = 64 * 1024  # the client's limit is on the body alone, and must not be the stricter one

_numbers = count(1)
_kept: Final[list[Any]] = []
_Selector = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class _Result(ctypes.Structure):
    """The layout of librocketmq's `CSendResult`."""

    _fields_ = (("status", ctypes.c_int), ("message_id", ctypes.c_char * 256), ("offset", ctypes.c_longlong))


class _Choice:
    """Chooses the queue of one ordering key, inside the call that sends its message."""

    def __init__(self, ordering_key: str) -> None:
        self._key = ordering_key
        self.function = _Selector(self._choose)

    def _choose(self, queues: int, _message: int, _argument: int) -> int:
        try:
            return queue_of(self._key, queues)
        except BaseException:
            return 0  # the same for all messages of the key that fail here, so the order is kept


class RocketMQ4Producer:
    """A `BrokerProducer` over librocketmq. It connects at its first `send`."""

    def __init__(self, connection: Connection, delay_levels: Sequence[timedelta] = DELAY_LEVELS) -> None:
        self._connection = connection
        self._delay_levels = delay_levels
        self._library = connection.library
        self._lock = Lock()
        self._started: int | None = None
        self._closed = False
        self._argument = ctypes.c_int(0)  # anything with an address
        fork.tell(self)

    def forked(self) -> None:
        """Runs in a forked child: the client is the parent's, and the broker would notice its shutdown."""
        self._lock, self._started = Lock(), None
        atexit.unregister(self.close)

    def send(self, messages: Sequence[Message], *, delay: timedelta | None = None) -> Sequence[Receipt | Exception]:
        """Return a receipt for each message once the broker has stored it, else the reason.

        A delay is one of the broker's levels (1 s to 2 h): the smallest that waits at least that long.
        """
        answers: list[Receipt | Exception] = []
        failed_keys: set[tuple[str, str]] = set()
        for message in messages:
            key = (message.topic, message.ordering_key) if message.ordering_key is not None else None
            if key in failed_keys:
                answers.append(TransportError("Not sent: an earlier message of the same ordering key failed."))
                continue
            answer = self._send(message, delay)
            answers.append(answer)
            if key is not None and isinstance(answer, Exception):
                failed_keys.add(key)
        return answers

    def close(self) -> None:
        """Leave the broker."""
        with self._lock:
            started, self._started, self._closed = self._started, None, True
        if started is not None:
            atexit.unregister(self.close)
            try:
                self._library.check("ShutdownProducer", self._library.call.ShutdownProducer(started))
            except CallFailed as error:
                _log.warning("librocketmq's producer did not leave in order: %s", error)

    def _send(self, message: Message, delay: timedelta | None) -> Receipt | Exception:
        try:
            enter()  # before any call: in a child a call may never return
            native = native_message(
                self._library, self._connection.names, message, delay_level(delay, self._delay_levels)
            )
        except (ValueError, CallFailed, ForkedProcess) as error:
            return error
        try:
            return self._try(self._producer(), native, message)
        except (TransportError, CallFailed) as error:
            return TransportError(f"A message for topic {message.topic} was not stored by RocketMQ: {error}")
        finally:
            self._library.call.DestroyMessage(native)

    def _try(self, producer: int, native: int, message: Message) -> Receipt:
        result = _Result()
        until = monotonic() + TRY_FOR_S
        while True:
            try:
                self._send_native(producer, native, message.ordering_key, result)
                break
            except CallFailed:
                if monotonic() + AGAIN_AFTER_S >= until:
                    raise
                sleep(AGAIN_AFTER_S)
        if result.status != STORED:
            raise TransportError(
                f"the broker took it, but did not flush or replicate it in time (status {result.status})"
            )
        return Receipt(message.topic, result.message_id.decode())

    def _send_native(self, producer: int, native: int, ordering_key: str | None, result: _Result) -> None:
        call, check = self._library.call, self._library.check
        if ordering_key is None:
            check("SendMessageSync", call.SendMessageSync(producer, native, ctypes.addressof(result)))
            return
        choice = _Choice(ordering_key)
        status = call.SendMessageOrderly(
            *(producer, native, ctypes.cast(choice.function, ctypes.c_void_p), ctypes.addressof(self._argument)),
            *(1, ctypes.addressof(result)),
        )
        check("SendMessageOrderly", status)

    def _producer(self) -> int:
        with self._lock:
            if self._closed:
                raise TransportError("this producer is closed")
            if self._started is None:
                self._started = self._start()
            return self._started

    def _start(self) -> int:
        call, check = self._library.call, self._library.check
        # A unique name: a second producer of the same name is refused within a process.
        name = f"exactly-once-{os.getpid()}-{next(_numbers)}-{os.urandom(4).hex()}"
        handle: int = call.CreateProducer(name.encode())
        _kept.append(handle)
        self._connection.tell("Producer", handle)
        # The client's own limit is 128 KiB.
        check("SetProducerMaxMessageSize", call.SetProducerMaxMessageSize(handle, MAX_BODY_BYTES + ROOM_FOR_PROPERTIES))
        check("SetProducerSendMsgTimeout", call.SetProducerSendMsgTimeout(handle, SEND_TIMEOUT_MS))
        check("StartProducer", call.StartProducer(handle))
        atexit.register(self.close)
        return handle
