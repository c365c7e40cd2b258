"""Sends over RocketMQ 5, one try a message, many at a time.

It never sends anything twice: the client's own `send` tries three times inside one call, and a try that timed out may
have been stored, so its retries are ours to decide on and not its. Called by the facade's producer and by whoever keeps
the contract of `transport.BrokerProducer`.

One call of `send` is one coroutine on the client's event loop, with a bounded number of requests under way. Messages of
one topic and ordering key are sent one after the other, each after the broker has stored the one before.
"""

import asyncio
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError
from datetime import UTC, datetime, timedelta
from threading import Lock
from typing import Any, Final
from zlib import crc32

from rocketmq import Producer
from rocketmq.grpc_protocol import Code, Encoding, MessageType, QueryRouteRequest, SendMessageRequest
from rocketmq.v5.util import MessageIdCodec, Misc

from exactly_once import fork
from exactly_once.errors import ForkedProcess, TransportError
from exactly_once.message import Message
from exactly_once.transport import Features, Receipt
from exactly_once.transports.rocketmq5.advice import about_send, about_topic
from exactly_once.transports.rocketmq5.endpoints import Endpoints, reachable
from exactly_once.transports.rocketmq5.session import REQUEST_TIMEOUT_S, configuration, describe

__all__ = ["RocketMQ5Producer"]

MOST_UNDER_WAY: Final = 64  # requests of one call of `send`; more only wait in the client's one event loop

Job = tuple[int, Message, Any]
"""Its place in the answer, the message, the request."""


class RocketMQ5Producer:
    """A producer; its client is made at the first `send`, and again after the proxy went away.

    Args:
        proxies: Where the proxies are.
        features: What the transport can do: the limits that are checked before sending.
    """

    def __init__(self, proxies: Endpoints, features: Features) -> None:
        self._proxies, self._features = proxies, features
        self._lock = Lock()
        self._client: Any = None
        self._closed = False
        fork.tell(self)

    def forked(self) -> None:
        """In a process just forked: the client is the parent's, and so are its threads."""
        fork.pin(self._client)
        self._lock, self._client = Lock(), None

    def send(self, messages: Sequence[Message], *, delay: timedelta | None = None) -> Sequence[Receipt | Exception]:
        """Return, per message and in order, a receipt once the broker has stored it, else why not."""
        answers: list[Receipt | Exception] = [TransportError("not sent")] * len(messages)
        client = self._ready()
        if isinstance(client, Exception):
            return [client] * len(messages)
        deliver_at = datetime.now(UTC) + delay if delay and delay > timedelta(0) else None
        chains: dict[object, list[Job]] = {}
        for index, message in enumerate(messages):
            wrong = self._wrong(message, delay)
            if wrong is None:
                request = self._request(message, deliver_at)
                # of one ordering key one chain; without a key each message is its own
                chain = (message.topic, message.ordering_key) if message.ordering_key else index
                chains.setdefault(chain, []).append((index, message, request))
            else:
                answers[index] = wrong
                if message.ordering_key:
                    # its followers must not overtake it: a chain of which a link is refused is cut there
                    chains.setdefault((message.topic, message.ordering_key), []).append((index, message, None))
        if not chains:
            return answers
        routes = {
            topic: self._endpoints(client, topic) for topic in {m.topic for c in chains.values() for _, m, _ in c}
        }
        work = iter(chains.values())
        try:
            self._on_loop(client, self._send_all(client, work, len(chains), routes, answers))
        except (CancelledError, RuntimeError):
            # another thread's send had no answer, and shut this client down with all that was under way, ours too
            lost = _NoAnswerError(
                f"The connection to RocketMQ at {self._proxies} was given up meanwhile. Whether the message was stored is not"
                " known."
            )
            for index in (index for chain in chains.values() for index, _, request in chain if request is not None):
                if not isinstance(answers[index], Receipt):
                    answers[index] = lost
        if any(isinstance(answer, _NoAnswerError) for answer in answers):
            # the client's channel would wait up to two minutes before it tries to connect again
            self._forget(client)
        return answers

    def close(self) -> None:
        """Leave; every `send` has returned only after the broker's answer, so there is nothing to flush."""
        with self._lock:
            self._closed = True
            client, self._client = self._client, None
        if client is not None:
            client.shutdown()  # a second one would raise: it is called once per client

    def _ready(self) -> Any:
        with self._lock:
            if self._closed:
                return TransportError("The producer is closed; make a new one with `eo.producer(url)`.")
            if self._client is None:
                # a client "starts" without a server, too
                reason = reachable(self._proxies)
                if reason is not None:
                    return TransportError(
                        f"RocketMQ's proxy at {self._proxies} does not answer ({reason}). Nothing was sent."
                    )
                try:
                    client = Producer(configuration(self._proxies))
                except ForkedProcess as error:
                    return error
                try:
                    client.startup()
                except Exception as error:  # returned per message, as the contract says
                    return TransportError(f"RocketMQ at {self._proxies} cannot be used: {describe(error)}.")
                self._client = client
            return self._client

    def _forget(self, client: Any) -> None:
        with self._lock:
            if self._client is not client:
                return
            self._client = None
        client.route_manager.clear()  # no good-bye to a proxy that is gone
        client.shutdown()

    def _endpoints(self, client: Any, topic: str) -> Any:
        """Return where to send, or the exception to answer with."""
        try:
            route = client.route_manager.retrieve_topic_route_data(self._proxies.named(topic))
        except Exception:  # it has lost the reason; asked again below
            return self._no_route(client, topic)
        queues = [queue for queue in route.message_queues if queue.is_writable() and queue.is_master_broker()]
        if not queues:
            return TransportError(f"Topic {topic} cannot be written. Type: {about_topic(self._proxies, topic)}")
        # the proxy chooses the queue: by the ordering key's hash where there is one, else in turn
        return list({queue.endpoints.facade: queue.endpoints for queue in queues}.values())

    def _no_route(self, client: Any, topic: str) -> Exception:
        request = QueryRouteRequest()
        request.topic.name = self._proxies.named(topic)
        endpoints = client.client_configuration.rpc_endpoints
        request.endpoints.CopyFrom(endpoints.endpoints)
        try:
            status = client.rpc_client.query_topic_route_async(
                endpoints, request, metadata=client.sign(), timeout=REQUEST_TIMEOUT_S
            ).result()
        except Exception as error:
            return _NoAnswerError(f"RocketMQ at {self._proxies} does not answer: {describe(error)}. Nothing was sent.")
        if status.status.code == Code.OK:  # it came back between the two questions
            return _NoAnswerError(f"RocketMQ at {self._proxies} did not answer a moment ago. Nothing was sent.")
        return about_send(self._proxies, topic, status.status)

    def _on_loop(self, client: Any, sending: Coroutine[Any, Any, None]) -> None:
        """Have the client's loop do it, and wait."""
        try:
            future = asyncio.run_coroutine_threadsafe(sending, client.rpc_client.get_channel_io_loop())
        except BaseException:
            sending.close()
            raise
        future.result()

    async def _send_all(
        self,
        client: Any,
        work: Iterator[list[Job]],
        count: int,
        routes: dict[str, Any],
        answers: list[Receipt | Exception],
    ) -> None:
        async def lane() -> None:
            for chain in work:  # shared by all lanes; one loop thread, so no lock
                await self._send_chain(client, chain, routes, answers)

        await asyncio.gather(*(lane() for _ in range(min(count, MOST_UNDER_WAY))))

    async def _send_chain(
        self, client: Any, chain: list[Job], routes: dict[str, Any], answers: list[Receipt | Exception]
    ) -> None:
        failed = False
        for index, message, request in chain:
            if failed:
                if request is not None:
                    answers[index] = TransportError(
                        f"Not sent: an earlier message of ordering key {message.ordering_key!r} could not be sent."
                    )
                continue
            if request is not None:
                answers[index] = await self._send_one(client, index, message, request, routes[message.topic])
            failed = request is None or isinstance(answers[index], Exception)

    async def _send_one(
        self, client: Any, index: int, message: Message, request: Any, route: Any
    ) -> Receipt | Exception:
        if isinstance(route, Exception):
            return route
        # alike in every process, so that one key is never at two proxies at a time
        spread = crc32(message.ordering_key.encode()) if message.ordering_key else index
        endpoints = route[spread % len(route)]
        try:
            stub = client.rpc_client.retrieve_or_create_channel(endpoints).async_stub
            response = await stub.SendMessage(request, metadata=client.sign(), timeout=REQUEST_TIMEOUT_S)
        except Exception as error:
            return _NoAnswerError(
                f"RocketMQ at {self._proxies} did not answer: {describe(error)}. Whether the message was stored is not known."
            )
        entry = response.entries[0] if response.entries else response
        if response.status.code == Code.OK and entry.status.code == Code.OK:
            return Receipt(message.topic, entry.message_id)
        return about_send(
            self._proxies, message.topic, response.status if response.status.code != Code.OK else entry.status
        )

    def _wrong(self, message: Message, delay: timedelta | None) -> ValueError | None:
        """Say why the broker would refuse this; asked here because its own answers name neither limit nor way out."""
        limit, longest = self._features.max_body_bytes, self._features.max_send_delay
        name = f"A message for {message.topic}" + (f" with key {message.key!r}" if message.key else "")
        if not message.body:
            return ValueError(f"{name} has no body, and RocketMQ carries none without; send at least one byte.")
        if limit is not None and len(message.body) > limit:
            return ValueError(
                f"{name} has {len(message.body)} bytes; RocketMQ takes {limit} at most. Store the rest elsewhere and send where."
            )
        if delay is not None and longest is not None and delay > longest:
            return ValueError(f"{name} asks for a delay of {delay}; RocketMQ delays by {longest} at most.")
        if delay and delay > timedelta(0) and message.ordering_key:
            return ValueError(f"{name} has an ordering key and a delay; RocketMQ takes one or the other.")
        return None

    def _request(self, message: Message, deliver_at: datetime | None) -> Any:
        request = SendMessageRequest()
        one = request.messages.add()
        one.topic.name = self._proxies.named(message.topic)
        one.body = message.body
        if message.properties:
            one.user_properties.update(message.properties)
        system = one.system_properties
        if message.tag:
            system.tag = message.tag
        if message.key:
            system.keys.append(message.key)
        system.message_id = MessageIdCodec().next_message_id()
        system.born_timestamp.GetCurrentTime()  # the client would cut it to whole seconds
        system.born_host = Misc.get_local_ip()
        system.body_encoding = Encoding.IDENTITY
        if message.ordering_key:
            system.message_group = message.ordering_key
            system.message_type = MessageType.FIFO
        elif deliver_at is not None:
            system.delivery_timestamp.FromDatetime(deliver_at)
            system.message_type = MessageType.DELAY
        else:
            system.message_type = MessageType.NORMAL
        return request


class _NoAnswerError(TransportError):
    """No answer came: the connection is to be made anew."""
