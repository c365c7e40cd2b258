"""Sends over RocketMQ 5: one try for each message, many messages in a request and many requests at a time.

It never sends anything twice. The client's own `send` tries three times inside one call, and a try that timed out may
have been stored; so we decide on retries, not the client. Called by `transports.producer` and by all code that uses
`contract.BrokerProducer`.

One call of `send` is one coroutine on the client's event loop, with a limited number of running requests. Messages of
one topic and ordering key are sent one after the other, each after the broker has stored the one before. Other messages of one
topic share requests: the broker stores such a request as a whole or refuses it as a whole. After a refusal each of
its messages is sent alone, so that a bad message does not affect the others.
"""

import asyncio
from collections.abc import Coroutine, Sequence
from concurrent.futures import CancelledError
from datetime import UTC, datetime, timedelta
from threading import Lock
from typing import Any, Final
from zlib import crc32

from rocketmq import Producer
from rocketmq.grpc_protocol import Code, QueryRouteRequest

from exactly_once import fork
from exactly_once.clients.rocketmq_properties import internal
from exactly_once.errors import ForkedProcess, TransportError
from exactly_once.message import Message
from exactly_once.transports.contract import Features, Receipt
from exactly_once.transports.rocketmq5.advice import about_send, about_topic
from exactly_once.transports.rocketmq5.endpoints import Endpoints, not_grpc, reachable
from exactly_once.transports.rocketmq5.group_client import REQUEST_TIMEOUT_S, configuration, describe
from exactly_once.transports.rocketmq5.requests import Job, request_of, together

__all__ = ["RocketMQ5Producer"]

MOST_UNDER_WAY: Final = 64  # requests of one call of `send`; more would only wait in the client's one event loop

# The broker answered, but may have stored the messages all the same: sent again they would be there twice.
_PERHAPS_STORED: Final = frozenset(
    {Code.MASTER_PERSISTENCE_TIMEOUT, Code.SLAVE_PERSISTENCE_TIMEOUT, Code.HA_NOT_AVAILABLE, Code.PROXY_TIMEOUT}
    | {Code.REQUEST_TIMEOUT}
)
# The reason does not concern one message: each alone would get the same answer.
_OF_NO_MESSAGE: Final = frozenset({Code.TOPIC_NOT_FOUND, Code.UNAUTHORIZED, Code.FORBIDDEN, Code.TOO_MANY_REQUESTS})

Chain = list[list[Job]]
"""What is sent one after the other; each item is one request."""


class RocketMQ5Producer:
    """A producer. Its client is made at the first `send`, and again after the proxy was away.

    Args:
        proxies: The addresses of the proxies.
        features: What the transport can do: the limits that are checked before sending.
    """

    def __init__(self, proxies: Endpoints, features: Features) -> None:
        self._proxies, self._features = proxies, features
        self._lock = Lock()
        self._client: Any = None
        self._closed = False
        fork.tell(self)

    def forked(self) -> None:
        """Runs in a forked child: the client is the parent's, and so are its threads."""
        fork.pin(self._client)
        self._lock, self._client = Lock(), None

    def send(self, messages: Sequence[Message], *, delay: timedelta | None = None) -> Sequence[Receipt | Exception]:
        """Return, for each message in order, a receipt once the broker has stored it, else the reason."""
        answers: list[Receipt | Exception] = [TransportError("not sent")] * len(messages)
        client = self._ready()
        if isinstance(client, Exception):
            return [client] * len(messages)
        deliver_at = datetime.now(UTC) + delay if delay and delay > timedelta(0) else None
        ordered: dict[tuple[str, str], Chain] = {}
        others: dict[str, list[Job]] = {}
        cut: set[tuple[str, str]] = set()
        for index, message in enumerate(messages):
            key = (message.topic, message.ordering_key) if message.ordering_key else None
            wrong = self._wrong(message, delay)
            if wrong is not None:
                answers[index] = wrong
                if key is not None:
                    cut.add(key)  # later messages of the key must not overtake it
            elif key is None:
                others.setdefault(message.topic, []).append((index, message))
            elif key in cut:
                answers[index] = _behind_another(message)
            else:
                ordered.setdefault(key, []).append([(index, message)])
        chains = [*ordered.values()]
        for jobs in others.values():
            # The broker delays no message that shares a request.
            chains += [[part] for part in (together(jobs) if deliver_at is None else ([job] for job in jobs))]
        if not chains:
            return answers
        routes = {topic: self._endpoints(client, topic) for topic in {topic for topic, _ in ordered} | others.keys()}
        try:
            self._on_loop(client, self._send_all(client, chains, routes, deliver_at, answers))
        except (CancelledError, RuntimeError):
            # Another thread's send got no answer, and shut this client down with all running requests, also ours.
            lost = _NoAnswerError(
                f"The connection to RocketMQ at {self._proxies} was given up meanwhile. Whether the message was stored is not"
                " known."
            )
            for index in (index for chain in chains for part in chain for index, _ in part):
                if not isinstance(answers[index], Receipt):
                    answers[index] = lost
        if any(isinstance(answer, _NoAnswerError) for answer in answers):
            # The client's channel would wait up to two minutes before it tries to connect again.
            self._forget(client)
        return answers

    def close(self) -> None:
        """Leave. Every `send` returns only after the broker's answer, so there is nothing to flush."""
        with self._lock:
            self._closed = True
            client, self._client = self._client, None
        if client is not None:
            client.shutdown()  # called once for each client: a second call would raise

    def _ready(self) -> Any:
        with self._lock:
            if self._closed:
                return TransportError("The producer is closed; make a new one with `eo.producer(url)`.")
            if self._client is None:
                # A client "starts" without a server, too.
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
                except Exception as error:  # returned for each message, as the contract says
                    reason = (
                        not_grpc(self._proxies) or f"RocketMQ at {self._proxies} cannot be used: {describe(error)}."
                    )
                    return TransportError(reason)
                self._client = client
            return self._client

    def _forget(self, client: Any) -> None:
        with self._lock:
            if self._client is not client:
                return
            self._client = None
        client.route_manager.clear()  # no goodbye to a proxy that is gone
        client.shutdown()

    def _endpoints(self, client: Any, topic: str) -> Any:
        """Return where to send, or the exception to return."""
        try:
            route = client.route_manager.retrieve_topic_route_data(self._proxies.named(topic))
        except Exception:  # the client has dropped the reason, so `_no_route` asks again
            return self._no_route(client, topic)
        queues = [queue for queue in route.message_queues if queue.is_writable() and queue.is_master_broker()]
        if not queues:
            return TransportError(f"Topic {topic} cannot be written. Type: {about_topic(self._proxies, topic)}")
        # The proxy chooses the queue: by the hash of the ordering key if there is one, else in turn.
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
            reason = not_grpc(self._proxies) or f"RocketMQ at {self._proxies} does not answer: {describe(error)}."
            return _NoAnswerError(f"{reason} Nothing was sent.")
        if status.status.code == Code.OK:  # it came back between the two requests
            return _NoAnswerError(f"RocketMQ at {self._proxies} did not answer a moment ago. Nothing was sent.")
        return about_send(self._proxies, topic, status.status)

    def _on_loop(self, client: Any, sending: Coroutine[Any, Any, None]) -> None:
        """Run it on the client's loop, and wait."""
        try:
            future = asyncio.run_coroutine_threadsafe(sending, client.rpc_client.get_channel_io_loop())
        except BaseException:
            sending.close()
            raise
        future.result()

    async def _send_all(
        self,
        client: Any,
        chains: Sequence[Chain],
        routes: dict[str, Any],
        deliver_at: datetime | None,
        answers: list[Receipt | Exception],
    ) -> None:
        work = iter(enumerate(chains))  # shared by all lanes; one loop thread, so no lock

        async def lane() -> None:
            for number, chain in work:
                failed = False
                for jobs in chain:
                    if failed:
                        [(index, message)] = jobs
                        answers[index] = _behind_another(message)
                        continue
                    got = await self._send_together(client, jobs, routes[jobs[0][1].topic], number, deliver_at)
                    for (index, _), answer in zip(jobs, got, strict=True):
                        answers[index] = answer
                        failed = failed or isinstance(answer, Exception)

        await asyncio.gather(*(lane() for _ in range(min(len(chains), MOST_UNDER_WAY))))

    async def _send_together(
        self, client: Any, jobs: list[Job], route: Any, number: int, deliver_at: datetime | None
    ) -> Sequence[Receipt | Exception]:
        """Send these in one request. If it is refused for what may be one message's fault, send each alone."""
        if isinstance(route, Exception):
            return [route] * len(jobs)
        topic, ordering_key = jobs[0][1].topic, jobs[0][1].ordering_key
        # The same in every process, so that one key is never sent through two proxies.
        spread = crc32(ordering_key.encode()) if ordering_key else number
        endpoints = route[spread % len(route)]
        request = request_of(self._proxies, jobs, deliver_at)
        try:
            stub = client.rpc_client.retrieve_or_create_channel(endpoints).async_stub
            response = await stub.SendMessage(request, metadata=client.sign(), timeout=REQUEST_TIMEOUT_S)
        except Exception as error:
            lost = _NoAnswerError(
                f"RocketMQ at {self._proxies} did not answer: {describe(error)}. Whether the message was stored is not known."
            )
            return [lost] * len(jobs)
        status = next(
            (one for one in (response.status, *(entry.status for entry in response.entries)) if one.code != Code.OK),
            None,
        )
        if status is None:
            # A consumer sees the id that we gave; of several messages the broker returns only the first one's id.
            return [Receipt(topic, one.system_properties.message_id) for one in request.messages]
        if len(jobs) == 1 or status.code in _PERHAPS_STORED | _OF_NO_MESSAGE:
            return [about_send(self._proxies, topic, status) for _ in jobs]
        return [
            answer for job in jobs for answer in await self._send_together(client, [job], route, number, deliver_at)
        ]

    def _wrong(self, message: Message, delay: timedelta | None) -> ValueError | None:
        """Say why the broker would refuse this. Checked here because its own answers name neither the limit nor a remedy."""
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
        for property_name in message.properties:
            if not property_name or internal(property_name):
                return ValueError(f"The property name {property_name!r} is RocketMQ's own; give it another one.")
        if delay and delay > timedelta(0) and message.ordering_key:
            return ValueError(f"{name} has an ordering key and a delay; RocketMQ takes one or the other.")
        return None


def _behind_another(message: Message) -> TransportError:
    return TransportError(f"Not sent: an earlier message of ordering key {message.ordering_key!r} could not be sent.")


class _NoAnswerError(TransportError):
    """No answer came: the connection must be made again."""
