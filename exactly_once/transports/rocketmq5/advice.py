"""Sentences about topics and groups, each with the command to type. Asks nothing: the caller knows what is wrong.

The commands are those of RocketMQ's own `mqadmin`. The reader fills in NAMESERVER and CLUSTER, which a
proxy does not report.
"""

from typing import Any, Final

from rocketmq.grpc_protocol import Code

from exactly_once.errors import TransportError
from exactly_once.transports.rocketmq5.endpoints import Endpoints
from exactly_once.transports.rocketmq5.group_client import describe

__all__ = ["about_group", "about_send", "about_topic"]

_FOR_GOOD: Final = frozenset(
    {
        Code.BAD_REQUEST,
        Code.ILLEGAL_TOPIC,
        Code.ILLEGAL_MESSAGE_TAG,
        Code.ILLEGAL_MESSAGE_KEY,
        Code.ILLEGAL_MESSAGE_GROUP,
        Code.ILLEGAL_MESSAGE_PROPERTY_KEY,
        Code.ILLEGAL_MESSAGE_ID,
        Code.ILLEGAL_DELIVERY_TIME,
        Code.MESSAGE_CORRUPTED,
        Code.MESSAGE_BODY_EMPTY,
        Code.MESSAGE_BODY_TOO_LARGE,
        Code.MESSAGE_PROPERTIES_TOO_LARGE,
        Code.PAYLOAD_TOO_LARGE,
    }
)
_WHERE: Final = "-n NAMESERVER:9876 -c CLUSTER"


def about_topic(proxies: Endpoints, topic: str, kind: str = "NORMAL") -> str:
    """Return the command that creates a topic, or changes its message type."""
    return f"mqadmin updateTopic {_WHERE} -t {proxies.named(topic)} -a +message.type={kind}"


def about_group(proxies: Endpoints, group: str, *, ordered: bool = False, retries: int | None = None) -> str:
    """Return the command that creates a group, or changes it."""
    more = (" -o true" if ordered else "") + (f" -r {retries}" if retries is not None else "")
    return f"mqadmin updateSubGroup {_WHERE} -g {proxies.named(group)}{more}"


def about_send(proxies: Endpoints, topic: str, status: Any) -> Exception:
    """Return the error for a refused send: a ValueError if another try cannot help."""
    told = describe(status)
    if status.code == Code.TOPIC_NOT_FOUND:
        return TransportError(f"Topic {topic} does not exist at {proxies}. Type: {about_topic(proxies, topic)}")
    if status.code == Code.MESSAGE_PROPERTY_CONFLICT_WITH_TYPE:
        return ValueError(
            f"Topic {topic} is of another message type ({told}): a message with an ordering key needs a topic of type "
            f"FIFO, one with a delay needs DELAY, any other NORMAL. Type: {about_topic(proxies, topic, 'FIFO|DELAY|NORMAL')}"
        )
    if status.code in (Code.UNAUTHORIZED, Code.FORBIDDEN):
        return TransportError(
            f"RocketMQ at {proxies} refused us ({told}). Set access_key= and secret_key_file= in the URL."
        )
    kind = ValueError if status.code in _FOR_GOOD else TransportError
    return kind(f"RocketMQ at {proxies} refused a message for {topic}: {told}.")
