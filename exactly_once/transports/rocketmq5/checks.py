"""Asks a RocketMQ 5 server whether it is as a group needs it. Changes nothing, receives nothing, and leaves again.

A client that starts proves nothing: it starts without a server, without the topic and without the group. Proof is a TCP
connection, a route for each topic, and the settings that the proxy sends to a group it knows.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from rocketmq.grpc_protocol import Code, MessageType

from exactly_once.errors import TransportError
from exactly_once.transports.contract import Away, Subscription
from exactly_once.transports.rocketmq5.advice import about_group, about_topic
from exactly_once.transports.rocketmq5.endpoints import Endpoints, not_grpc, reachable
from exactly_once.transports.rocketmq5.group_client import GroupClient, describe

__all__ = ["problems"]

DEFAULT_RETRIES: Final = 16
"""The retryMaxTimes of a group that is created without one. It allows one delivery more than that."""


class _Absent(str):
    """A topic that does not exist."""

    __slots__ = ()


def problems(proxies: Endpoints, group: str, subscriptions: Sequence[Subscription], *, max_attempts: int) -> list[str]:
    """Return a sentence for each problem, with the command to type; see `contract.Transport.check`."""
    reason = reachable(proxies)
    if reason is not None:
        return [Away(f"RocketMQ's proxy at {proxies} does not answer ({reason}). Start it, or correct the URL.")]
    session = GroupClient(proxies, group, subscriptions)
    try:
        return _ask(session, proxies, group, subscriptions, max_attempts)
    finally:
        session.close()


def _ask(
    session: GroupClient, proxies: Endpoints, group: str, subscriptions: Sequence[Subscription], max_attempts: int
) -> list[str]:
    try:
        session.start()
    except Exception as error:
        return [not_grpc(proxies) or f"RocketMQ at {proxies} cannot be used: {describe(error)}."]
    found = list(dict.fromkeys(problem for s in subscriptions if (problem := _topic_problem(session, proxies, s))))
    for subscription in subscriptions:
        # The client's own request at its start may have come a moment before the topic was known.
        with suppress(Exception):
            session.queues(subscription.topic)
    if not session.routed:
        if not all(isinstance(problem, _Absent) for problem in found):
            return found  # without access, or without an answer, we learn nothing of the group either
        try:
            session.introduce()
        except TransportError:
            return found  # nothing is known of the group
    if not session.joined():
        retries = max_attempts if max_attempts > DEFAULT_RETRIES else None
        found.append(
            f"Group {group} does not exist at {proxies}: nothing would ever be received. Type: "
            + about_group(proxies, group, ordered=any(s.ordered for s in subscriptions), retries=retries)
        )
        return found
    ordered = [s.topic for s in subscriptions if s.ordered]
    if ordered and not session.fifo:
        found.append(
            f"Group {group} does not keep order, which the handlers of {', '.join(ordered)} ask for. Type: "
            + about_group(proxies, group, ordered=True)
        )
    if session.deliveries <= max_attempts:
        found.append(
            f"Group {group} takes a message away after {session.deliveries} deliveries, but max_attempts={max_attempts} "
            f"needs one more, to park it. Type: {about_group(proxies, group, ordered=session.fifo, retries=max_attempts)} "
            f"or put max_attempts={max(1, session.deliveries - 1)} into the URL."
        )
    return found


def _topic_problem(session: GroupClient, proxies: Endpoints, subscription: Subscription) -> str | None:
    topic = subscription.topic
    kind = "FIFO" if subscription.ordered else "NORMAL"
    try:
        answer = session.route(topic)
    except Exception as error:
        return Away(
            not_grpc(proxies)
            or f"RocketMQ at {proxies} did not answer when asked for topic {topic}: {describe(error)}."
        )
    if answer.status.code == Code.TOPIC_NOT_FOUND:
        return _Absent(f"Topic {topic} does not exist at {proxies}. Type: {about_topic(proxies, topic, kind)}")
    if answer.status.code in (Code.UNAUTHORIZED, Code.FORBIDDEN):
        return (
            f"RocketMQ at {proxies} refused us topic {topic} ({describe(answer.status)}). "
            "Set access_key= and secret_key_file= in the URL, or have the user granted SUB on the topic."
        )
    if answer.status.code != Code.OK:
        return f"RocketMQ at {proxies} does not tell the route of topic {topic}: {describe(answer.status)}."
    types = {kind for queue in answer.message_queues for kind in queue.accept_message_types}
    if subscription.ordered and types and MessageType.FIFO not in types:
        names = ", ".join(sorted(MessageType.Name(kind) for kind in types))
        return (
            f"Topic {topic} is of type {names}, but its handler asks for order. A topic's type cannot be relied on to "
            f"change while it holds messages: make a new one. Type: {about_topic(proxies, topic + '-fifo', 'FIFO')}"
        )
    return None
