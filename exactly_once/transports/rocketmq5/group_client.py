"""One membership of a consumer group: a client of `rocketmq-python-client` and the few calls we make through it.

Opened and discarded by the consumer; `checks` opens one to ask questions. It never retries and never waits longer than
a request may take. Every request is built here, because the client's own calls are unsafe or slow:

* `ack` sends one message in a request; one request with many entries is eight times faster.
* `change_invisible_duration` overwrites the receipt handle with the result of a *failed* call, which is nothing. Here only a
  successful answer replaces a handle.
* `receive` asks for whole seconds, loses messages that came before an error, blocks its caller past the caller's deadline, and
  sets a deadline that proxies with default settings refuse (40018). `poll` is a future instead.
* `ack_async` and `change_invisible_duration_async` fail in a plain thread (they make an asyncio future).
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from threading import Event
from typing import Any, Final

from rocketmq import ClientConfiguration, Credentials, FilterExpression, SimpleConsumer
from rocketmq.grpc_protocol import (
    AckMessageRequest,
    ChangeInvisibleDurationRequest,
    Code,
    QueryRouteRequest,
    ReceiveMessageRequest,
)

from exactly_once.errors import TransportError
from exactly_once.transports.contract import Subscription
from exactly_once.transports.rocketmq5 import wall
from exactly_once.transports.rocketmq5.endpoints import Endpoints

__all__ = ["Grip", "GroupClient", "Poll", "configuration", "describe"]

REQUEST_TIMEOUT_S: Final = 5  # a broker that has just started takes seconds for its first answers
# Short, because the broker can miss a message that arrives while a poll begins (1 in 400 on an idle topic). It
# then waits for the next poll. A proxy with default settings makes it 5 s, and refuses a poll with a shorter deadline.
POLL_S: Final = 2
POLL_DEADLINE_S: Final = 10
# The proxy answers with settings within 0.1 s if the group exists, and never if it does not.
SETTINGS_TIMEOUT_S: Final = 3.0
MOST_PER_POLL: Final = 32  # the broker's own limit


def configuration(proxies: Endpoints) -> Any:
    """Return the client's configuration object, with which every client begins.

    Raises:
        ForkedProcess: No client can work in this process.
    """
    wall.enter()
    return ClientConfiguration(
        ";".join(proxies.addresses),  # the client splits at semicolons
        Credentials(proxies.access_key, proxies.secret_key),
        request_timeout=REQUEST_TIMEOUT_S,
    )


@dataclass(slots=True, eq=False)
class Grip:
    """The receipt handle of one received message, replaced at each extension, and the endpoint to which it belongs."""

    message_id: str
    handle: str
    endpoints: Any
    received_at: float  # time.monotonic()


@dataclass(slots=True, eq=False)
class Poll:
    """One running receive: what has come so far, and how it ended."""

    asked: int
    owner: Any  # its GroupClient
    endpoints: Any
    messages: list[Any] = field(default_factory=list)
    status: Any = None
    abandoned: bool = False
    call: Any = None
    future: "Future[None]" = field(default_factory=Future)


class _Client(SimpleConsumer):  # type: ignore[misc]  # the client carries no types
    """Keeps the settings that the proxy sends, the only proof that it knows the group."""

    settings: Any = None
    settled: Event | None = None

    def reset_setting(self, settings: Any) -> None:
        # The loop thread may still deliver settings after shutdown, when the client's own event is gone.
        with suppress(AttributeError):
            super().reset_setting(settings)
        self.settings = settings
        if self.settled is not None:
            self.settled.set()


class GroupClient:
    """A client that has joined the group. It lives as long as its proxy.

    When the proxy restarts, a SimpleConsumer never recovers: its telemetry stream, by which the proxy knows the group,
    stays dead. So a session is discarded at the first error, and a new one is opened.

    Args:
        proxies: The addresses of the proxies.
        group: The consumer group.
        subscriptions: All of the group's, also those that this session does not receive: all members must subscribe alike.
    """

    def __init__(self, proxies: Endpoints, group: str, subscriptions: Sequence[Subscription]) -> None:
        self._proxies, self._group = proxies, proxies.named(group)
        # By the names in the protocol: stock proxies silently ignore the namespace that the client would send, so two
        # namespaces would share their topics. As a part of the name, as the remoting clients have it, it works everywhere.
        self._filters = {
            proxies.named(s.topic): FilterExpression(" || ".join(sorted(s.tags)) or "*") for s in subscriptions
        }
        self._client = _Client(configuration(proxies), self._group, dict(self._filters), await_duration=POLL_S)
        self._client.settled = Event()
        self._routes: dict[str, tuple[Any, list[Any]]] = {}

    def open(self) -> None:
        """Join the group, and wait until the proxy has confirmed that it knows the group.

        Raises:
            TransportError: The proxy did not answer, or does not know the group.
        """
        self.start()
        if not self.routed:
            raise TransportError(f"the proxy knows no route to {', '.join(sorted(self._filters))}")
        if not self.joined():
            raise TransportError(f"the proxy sent no settings for group {self._group}, so it does not know the group")

    def start(self) -> None:
        """Start the client. This succeeds also without a server, a topic or a group."""
        try:
            self._client.startup()
        except Exception as error:
            raise TransportError(describe(error)) from error

    @property
    def routed(self) -> bool:
        """Whether any of the topics has a route, so that there is a proxy to tell about the group."""
        return bool(self._client.route_manager.get_all_endpoints())

    def introduce(self) -> None:
        """Tell the proxies of the URL about the group. The client tells those of a topic's route, and there may be no topic.

        On the client's own loop: outside the main thread gRPC finds no loop elsewhere. The client logs that, and goes on without
        a stream.

        Raises:
            TransportError: They cannot be told.
        """
        endpoints = self._client.client_configuration.rpc_endpoints

        async def tell() -> None:
            self._client.on_new_endpoints(endpoints)

        try:
            told = asyncio.run_coroutine_threadsafe(tell(), self._client.rpc_client.get_channel_io_loop())
            told.result(REQUEST_TIMEOUT_S)
        except Exception as error:
            raise TransportError(describe(error)) from error

    def joined(self) -> bool:
        """Wait for the proxy's settings. False: it does not know the group."""
        assert self._client.settled is not None
        return self._client.settled.wait(SETTINGS_TIMEOUT_S)

    @property
    def fifo(self) -> bool:
        """Whether the broker keeps order for this group: one unsettled message blocks its queue."""
        return bool(self._client.settings.subscription.fifo)

    @property
    def deliveries(self) -> int:
        """How often the broker delivers a message before it moves it to the dead-letter queue (retryMaxTimes + 1)."""
        deliveries = int(self._client.settings.backoff_policy.max_attempts)
        # retryMaxTimes 2147483647 (which the remoting client's groups need) plus one overflows in the proxy.
        return deliveries if deliveries >= 0 else 2**31

    def queues(self, topic: str) -> list[Any]:
        """Return the topic's readable queues, from the route that the client refreshes every 30 s.

        Raises:
            TransportError: The topic has no route.
        """
        topic = self._proxies.named(topic)
        try:
            route = self._client.route_manager.retrieve_topic_route_data(topic)
        except Exception as error:
            raise TransportError(f"no route to topic {topic}") from error
        known, queues = self._routes.get(topic, (None, []))
        if known is not route:
            queues = [q for q in route.message_queues if q.is_readable() and q.is_master_broker()]
            self._routes[topic] = (route, queues)
        return queues

    def route(self, topic: str) -> Any:
        """Ask the proxy for the topic's route, without the client's cache, which keeps no reason if there is none."""
        request = QueryRouteRequest()
        request.topic.name = self._proxies.named(topic)
        endpoints = self._client.client_configuration.rpc_endpoints
        request.endpoints.CopyFrom(endpoints.endpoints)
        future = self._client.rpc_client.query_topic_route_async(
            endpoints, request, metadata=self._client.sign(), timeout=REQUEST_TIMEOUT_S
        )
        return future.result()

    def poll(self, topic: str, queue: Any, count: int, invisible: timedelta) -> Poll:
        """Begin to receive up to `count` messages from the queue's broker. `Poll.future` ends when it is done."""
        request = ReceiveMessageRequest(batch_size=count, auto_renew=False)
        request.group.name = self._group
        request.message_queue.CopyFrom(queue.message_queue0())
        expression = self._filters[self._proxies.named(topic)]
        request.filter_expression.type = expression.filter_type
        request.filter_expression.expression = expression.expression
        request.invisible_duration.FromTimedelta(invisible)
        request.long_polling_timeout.seconds = POLL_S
        poll = Poll(count, self, queue.endpoints)
        loop = self._client.rpc_client.get_channel_io_loop()
        poll.future = asyncio.run_coroutine_threadsafe(self._fill(poll, request), loop)
        return poll

    async def _fill(self, poll: Poll, request: Any) -> None:
        poll.call = await self._client.rpc_client.receive_message(
            poll.endpoints, request, metadata=self._client.sign(), timeout=POLL_DEADLINE_S
        )
        if poll.abandoned:  # abandoned before there was a call to cancel
            poll.call.cancel()
        try:
            async for response in poll.call:
                # Kept one by one: messages that came before an error or a cancellation are ours, and must be given back.
                if response.HasField("message"):
                    poll.messages.append(response.message)
                elif response.HasField("status"):
                    poll.status = response.status
        except asyncio.CancelledError:
            # The client lets this exception out of `receive`, where it ends a program: it is no Exception.
            if not poll.abandoned:
                raise

    def abandon(self, poll: Poll) -> None:
        """End a poll now; its future then ends normally. The proxy gives back messages that it cannot send any more."""
        poll.abandoned = True
        if poll.call is not None:
            self._client.rpc_client.get_channel_io_loop().call_soon_threadsafe(poll.call.cancel)

    def acknowledge(self, topic: str, grips: Sequence[Grip]) -> "Future[Any]":
        """Begin to acknowledge these, all of one endpoint, in one request."""
        request = AckMessageRequest()
        request.group.name = self._group
        request.topic.name = self._proxies.named(topic)
        for grip in grips:
            request.entries.add(message_id=grip.message_id, receipt_handle=grip.handle)
        answer: Future[Any] = self._client.rpc_client.ack_message_async(
            grips[0].endpoints, request, metadata=self._client.sign(), timeout=REQUEST_TIMEOUT_S
        )
        return answer

    def hide(self, topic: str, grip: Grip, seconds: int) -> "Future[Any]":
        """Begin to make this message invisible for `seconds` from now. The answer carries its next handle."""
        request = ChangeInvisibleDurationRequest(receipt_handle=grip.handle, message_id=grip.message_id)
        request.group.name = self._group
        request.topic.name = self._proxies.named(topic)
        request.invisible_duration.seconds = seconds
        answer: Future[Any] = self._client.rpc_client.change_invisible_duration_async(
            grip.endpoints, request, metadata=self._client.sign(), timeout=REQUEST_TIMEOUT_S
        )
        return answer

    def close(self, *, farewell: bool = True) -> None:
        """Leave. `farewell=False` if the proxy is gone: telling it would only wait for a timeout."""
        if not farewell:
            self._client.route_manager.clear()  # the client says goodbye to the endpoints of its routes
        with suppress(Exception):  # a client that did not start or is half gone; its threads are already stopped
            self._client.shutdown()


def describe(error: object) -> str:
    """Describe a call's exception or a response's status in one line, without the server's stack trace."""
    code = getattr(error, "code", None)
    if callable(code):  # a gRPC error: its status and detail
        details = getattr(error, "details", None)
        text = details() if callable(details) else ""
        return f"{code().name}: {_first_line(text)}"
    if isinstance(code, int) and hasattr(error, "message"):  # a status of RocketMQ
        return f"{code} {Code.Name(code) if code in Code.values() else ''}: {_first_line(error.message)}"
    return f"{type(error).__name__}: {_first_line(str(error))}" if str(error) else type(error).__name__


def _first_line(text: object) -> str:
    return str(text).strip().splitlines()[0][:300] if str(text).strip() else ""
