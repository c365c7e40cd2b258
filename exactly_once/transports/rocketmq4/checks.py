"""Finds what is wrong before a start, and the command that repairs it; and repairs one thing before joining.
Called by the transport.

It asks the servers and never trusts the client, which starts without any of this. It changes only one thing: the
starting offset of a group that has none.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from exactly_once.errors import TransportError
from exactly_once.transports.contract import Away, Subscription
from exactly_once.transports.remoting import Admin, Queue, Refused
from exactly_once.transports.rocketmq4.messages import Names
from exactly_once.wording.steady_log import steady
from exactly_once.wording.text import stopped

__all__ = ["fix_starting_points", "locks_of", "problems"]

ENDLESS: Final = 2147483647
"""A retryMaxTimes that is never reached: after any other the broker drops the message, because this client does not send
a field that the broker needs. We never use that retry, but another member of the group may."""

_log = steady("exactly_once.transports.rocketmq4")


def problems(
    admin: Admin, names: Names, name_servers: Sequence[str], group: str, subscriptions: Sequence[Subscription]
) -> Iterator[str]:
    """Yield each problem that would keep the group from receiving, with the command that repairs it."""
    servers = ";".join(name_servers)
    brokers: dict[str, str] = {}
    for subscription in subscriptions:
        topic = names.outside(subscription.topic)
        try:
            queues = admin.queues(topic)
        except TransportError as error:
            yield Away(f"{stopped(str(error))} Start it, or correct the hosts of the rocketmq4:// URL.")
            return
        if not queues:
            yield _no_route(admin, servers, topic)
        brokers.update({queue.broker: queue.address for queue in queues})
    if not brokers:  # no topic exists: the group is looked for on the brokers, so that both can be created in one go
        with suppress(TransportError):
            brokers = {name: address for name, address in admin.brokers().items() if address is not None}
    wanted = names.outside(group)
    for broker, address in sorted(brokers.items()):
        try:
            settings = admin.group(address, wanted)
        except Refused as error:
            why = stopped(str(error))
            yield f"The settings of group {wanted} could not be verified: {why} Look with mqadmin and decide yourself."
        except (OSError, TransportError) as error:
            yield Away(f"The RocketMQ broker {broker} at {address} does not answer: {stopped(str(error))} Start it.")
        else:
            yield from _group_problems(servers, broker, address, wanted, settings)


def _no_route(admin: Admin, servers: str, topic: str) -> str:
    """Say what it means that no name server has a route to read the topic.

    A name server knows a topic only from brokers that are up. It forgets the topics of a broker that restarts, and a new name
    server hears from each broker within 30 s. So the topic is missing only if the brokers say so; until then it is an outage.
    """
    try:
        brokers = admin.brokers()
    except TransportError as error:
        return Away(f"{stopped(str(error))} Start it, or correct the hosts of the rocketmq4:// URL.")
    if not brokers:
        return Away(
            f"The RocketMQ name server at {servers} knows no broker yet, and so no topic {topic}. A broker that restarts"
            f" registers by itself; look with: mqadmin clusterList -n '{servers}'"
        )
    for broker, address in sorted(brokers.items()):
        if address is None:
            return Away(
                f"The RocketMQ name server knows only slaves of the broker {broker}, and no place to read topic {topic}."
                " Start its master."
            )
        try:
            has = admin.has_readable(address, topic)
        except (OSError, TransportError) as error:
            return Away(f"The RocketMQ broker {broker} at {address} does not answer: {stopped(str(error))} Start it.")
        if has:
            return Away(
                f"The RocketMQ broker {broker} has the topic {topic}, and the name server does not know it yet."
            )
    return (
        f"The RocketMQ topic {topic} does not exist, or cannot be read. Type: "
        f"mqadmin updateTopic -n '{servers}' -c CLUSTER -t '{topic}' (CLUSTER as in mqadmin clusterList)"
    )


def _group_problems(
    servers: str, broker: str, address: str, group: str, settings: Mapping[str, Any] | None
) -> Iterator[str]:
    command = f"mqadmin updateSubGroup -n '{servers}' -b {address} -g '{group}' -r {ENDLESS}"
    if settings is None:
        yield f"The RocketMQ group {group} does not exist on broker {broker}. Type: {command}"
    elif settings.get("consumeEnable") is False:
        yield f"The RocketMQ group {group} may not consume on broker {broker}. Type: {command} -s true"
    elif settings.get("retryMaxTimes") != ENDLESS:
        yield (
            f"The RocketMQ group {group} has retryMaxTimes {settings.get('retryMaxTimes')} on broker {broker}: with this "
            f"client the broker loses a message that was sent back more often. Type: {command}"
        )


def fix_starting_points(admin: Admin, names: Names, group: str, subscriptions: Sequence[Subscription]) -> None:
    """Give a new group its offset in each queue for which the broker reports none: behind the last message.

    The broker reports none for a queue whose first message has left its memory or its disk. For a young queue it
    reports 0, and the group begins at the first message. The client itself starts at the same offsets, but records them only
    with its first stored offset, seconds later. A process that is killed before that starts again behind the *new* last
    message, and what it had received is lost.
    """
    for subscription in subscriptions:
        try:
            for queue in admin.queues(names.outside(subscription.topic)):
                if admin.offset(names.outside(group), queue) is None:
                    admin.put_at_end(names.outside(group), queue)
        except (OSError, TransportError) as error:
            _log.warning(
                "Group %s: its starting point in %s is left to the broker: %s", group, subscription.topic, error
            )


def locks_of(admin: Admin, names: Names, group: str, topics: Sequence[str], instance: str) -> Callable[[], None]:
    """Return a function that releases the queue locks of a member of an ordered group; call it after the member has left.

    The client forgets the lock of one queue of each broker when it leaves, and nobody else could read that queue for a minute.

    Args:
        instance: The member's instance name; its client id is an address, "@" and this.
    """
    by_address: dict[str, list[Queue]] = {}
    for topic in topics:
        for queue in admin.queues(names.outside(topic)):
            by_address.setdefault(queue.address, []).append(queue)
    # The brokers know the client id only while it is a member.
    mine = [
        (address, member)
        for address in by_address
        for member in admin.consumers(address, names.outside(group))
        if member.partition("@")[2].startswith(instance)
    ]

    def release() -> None:
        for address, member in mine:
            admin.unlock(address, names.outside(group), member, by_address[address])

    return release
