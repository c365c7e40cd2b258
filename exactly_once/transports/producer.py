"""Sends messages and reports the result of each: a receipt once the broker has stored it, or an error that carries the message.

It tries three times and knows no broker: a transport's own producer does the sending. If the result of a try is unknown, it sends
again, so a message may be stored twice. The consumer's guard finds one business key and acknowledges the second.

Made by the facade, `eo.producer(url)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import wraps
from threading import Event
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self, TypeVar, cast

from exactly_once import fork
from exactly_once.errors import ConfigurationError, SendFailed, TransportError
from exactly_once.message import Message
from exactly_once.transports.contract import BrokerProducer, Receipt

__all__ = ["Producer"]

TRIES: Final = 3
# Before the second and the third try: a restarted broker or an unknown route needs a moment, and the caller (a web
# request, as a rule) can spare about half a second.
_PAUSES_S: Final = (0.1, 0.4)


_WRITE: Final = 'Write producer.send(Message("orders", body)), with the body as bytes'
F = TypeVar("F", bound=Callable[..., Any])


def _of_one(send: F) -> F:
    """Report a call such as `send("orders", body)` with what to write instead of Python's own text about arguments."""

    @wraps(send)
    def call(self: Producer, *given: Any, **named: Any) -> Any:
        if len(given) > 1 or not {"message", "delay"}.issuperset(named):
            raise TypeError(f"A producer's send takes one Message, and delay= by its name. {_WRITE}.")
        return send(self, *given, **named)

    return cast("F", call)


class Producer:
    """A producer to one broker, used with `with`. Thread-safe.

    Args:
        broker_producer: The transport's own producer.
        describe: The broker's URL without its secrets, for errors.

    Example:
        with eo.producer("rocketmq://127.0.0.1:8081") as producer:
            receipt = producer.send(Message("orders", b'{"order_no": "A-1"}', tag="created", key="A-1"))
    """

    def __init__(self, broker_producer: BrokerProducer, describe: str) -> None:
        self._broker, self._describe = broker_producer, describe
        self._closed = Event()
        fork.tell(self)

    def forked(self) -> None:
        """Runs in a forked child: a thread of the parent may have held the event's lock."""
        closed, self._closed = self._closed.is_set(), Event()
        if closed:
            self._closed.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    if not TYPE_CHECKING:  # a type checker itself reports that `async with` does not work

        async def __aenter__(self) -> NoReturn:
            self.close()
            raise TypeError(
                "A producer is used with `with`, also in an event loop: `with eo.producer(URL) as producer:`, and there"
                " `await asyncio.to_thread(producer.send, message)`, for a send waits for the broker."
            )

        async def __aexit__(self, *_: object) -> None:
            """Never reached. Without it Python's error would name this method, and not the other."""

    @_of_one
    def send(self, message: Message, *, delay: timedelta | None = None) -> Receipt:
        """Send one message.

        Args:
            message: What to send.
            delay: Deliver it not before this time has passed. None: at once.

        Returns:
            The broker's receipt: it has stored the message.

        Raises:
            SendFailed: The broker refused the message, or three tries failed. `error.message` is the message.
            TypeError: It is no Message.
        """
        [receipt] = self.send_all([message], delay=delay)
        return receipt

    def send_all(self, messages: Sequence[Message], *, delay: timedelta | None = None) -> list[Receipt]:
        """Send several messages; those of one ordering key in the order given.

        Args:
            messages: What to send.
            delay: Deliver them not before this time has passed. None: at once.

        Returns:
            A receipt for each, in the order given.

        Raises:
            SendFailed: One was refused or failed three times; the text says how many of the others are stored.
            TypeError: One is no Message; none was sent.
        """
        if self._closed.is_set():
            raise TransportError(f"The producer to {self._describe} is closed. Open another with eo.producer(...).")
        messages = _checked(messages)
        answers: list[Receipt | Exception] = list(self._broker.send(messages, delay=delay)) if messages else []
        for pause_s in _PAUSES_S:
            failed = [n for n, answer in enumerate(answers) if not isinstance(answer, Receipt)]
            # A refused message: later ones of its key would wait in vain. A configuration error: no try helps
            # until a person acts.
            if not failed or any(isinstance(answer, (ValueError, ConfigurationError)) for answer in answers):
                break
            if self._closed.wait(pause_s):
                break
            again = self._broker.send([messages[n] for n in failed], delay=delay)
            for n, answer in zip(failed, again, strict=True):
                answers[n] = answer
        receipts = [answer for answer in answers if isinstance(answer, Receipt)]
        if len(receipts) < len(answers):
            raise self._failure(messages, answers)
        return receipts

    def close(self) -> None:
        """Flush and leave. Idempotent."""
        if not self._closed.is_set():
            self._closed.set()
            self._broker.close()

    def _failure(self, messages: Sequence[Message], answers: Sequence[Receipt | Exception]) -> SendFailed:
        failed = [(m, a) for m, a in zip(messages, answers, strict=True) if not isinstance(a, Receipt)]
        # The refused message first: it explains why others of its key were not sent.
        message, reason = next(((m, a) for m, a in failed if isinstance(a, ValueError)), failed[0])
        named = f" with key {message.key!r}" if message.key is not None else " without a key"
        refused = isinstance(reason, (ValueError, ConfigurationError))
        how = "was refused" if refused else f"could not be sent in {TRIES} tries"
        text = f"The message{named} to topic {message.topic!r} {how} by {self._describe}: {reason}"
        text += "" if text.endswith((".", "!")) else "."
        if len(messages) > 1:
            text += f" Of {len(messages)} messages {len(messages) - len(failed)} are stored."
        error = SendFailed(text, message)
        error.__cause__ = reason
        return error


def _checked(messages: Sequence[Message]) -> Sequence[Message]:
    if isinstance(messages, Message):
        raise TypeError(f"A producer's send_all takes several messages in a list. {_WRITE}.")
    every = list(messages)
    for each in every:
        if not isinstance(each, Message):
            raise TypeError(f"A producer sends a Message, not {type(each).__name__}. {_WRITE}.")
    return every
