"""Which properties of a RocketMQ message are its sender's, and their values. Pure; imports no client library.

Brokers and clients keep their own values (routes, times, the ordering key) among the properties. We neither hand these out
nor send them for a user.

RocketMQ drops a property with an empty value from the list of properties. And librocketmq reads a property
by its name and cannot list properties. So the names of a message's properties travel in one more
property, `eo-names`: always from `rocketmq4://`, and from `rocketmq://` if a value is empty. A name in it without a property
had an empty value. Called by `Message.from_rocketmq`, `Message.from_rocketmq4` and both transports.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, Final

from exactly_once.clients.values import text_of

__all__ = ["ORDERING_PROPERTY", "internal", "listed_properties", "named_properties", "with_names"]

NAMES_PROPERTY: Final = "eo-names"
ORDERING_PROPERTY: Final = "__SHARDINGKEY"
"""The property in which RocketMQ's clients keep the key whose messages stay in order (in version 5 the message group)."""

# `MessageConst` of Apache RocketMQ 5.5. A proxy removes most of them; brokers of other versions have others.
_INTERNAL: Final = frozenset(
    {"KEYS", "TAGS", "WAIT", "DELAY", "RETRY_TOPIC", "ORIGIN_GROUP", "REAL_TOPIC", "REAL_QID", "TRAN_MSG", "PGROUP"}
    | {"MIN_OFFSET", "MAX_OFFSET", "BUYER_ID", "ORIGIN_MESSAGE_ID", "TRANSFER_FLAG", "CORRECTION_FLAG", "MQ2_FLAG"}
    | {"RECONSUME_TIME", "MSG_REGION", "TRACE_ON", "UNIQ_KEY", "TRANS_OFFSET", "EXTEND_UNIQ_INFO", "INSTANCE_ID"}
    | {"MAX_RECONSUME_TIMES", "CONSUME_START_TIME", "_SYS_MSG_PRIORITY_", "INNER_NUM", "INNER_BASE", "DUP_INFO"}
    | {"CHECK_IMMUNITY_TIME_IN_SECONDS", "TRAN_PREPARED_QUEUE_OFFSET", "__transactionId__", "TRANSACTION_CHECK_TIMES"}
    | {"CORRELATION_ID", "REPLY_TO_CLIENT", "TTL", "ARRIVE_TIME", "PUSH_REPLY_TIME", "CLUSTER", "MSG_TYPE", "POP_CK"}
    | {"POP_CK_OFFSET", "1ST_POP_TIME", "__LITE_TOPIC", "PROPERTY_FORWARD_QUEUE_ID", "INNER_MULTI_DISPATCH"}
    | {"INNER_MULTI_QUEUE_OFFSET", "TRACE_CONTEXT", "TIMER_DELAY_SEC", "TIMER_DELIVER_MS", "__BORNHOST", "__CRC32#"}
    | {"BORN_TIMESTAMP", "TIMER_ENQUEUE_MS", "TIMER_DEQUEUE_MS", "TIMER_ROLL_TIMES", "TIMER_OUT_MS"}
    | {"TIMER_DEL_UNIQKEY", "TIMER_ROLL_LABEL", "TIMER_DELAY_LEVEL", "TIMER_DELAY_MS", "DLQ_ORIGIN_TOPIC"}
    | {"DLQ_ORIGIN_MESSAGE_ID"}
    | {ORDERING_PROPERTY, NAMES_PROPERTY}
)
_TRANSIENT: Final = "__RMQ.TRANSIENT."


def internal(name: str) -> bool:
    """Return whether a property of this name is RocketMQ's or ours, not a user's.

    Example:
        >>> internal("__SHARDINGKEY"), internal("region")
        (True, False)
    """
    return name in _INTERNAL or name.startswith(_TRANSIENT)


def listed_properties(every: Mapping[str, Any]) -> dict[str, str]:
    """Return the sender's own properties, for a client that lists all properties of the message.

    Example:
        >>> listed_properties({"__SHARDINGKEY": "A", "region": "eu", "eo-names": '["region", "note"]'})
        {'region': 'eu', 'note': ''}
    """
    found = {name: text_of(value) for name, value in every.items() if not internal(name)}
    for name in _names_in(every.get(NAMES_PROPERTY) or ""):
        found.setdefault(name, "")
    return found


def named_properties(value_of: Callable[[str], bytes | None], also: Iterable[str] = ()) -> Mapping[str, str]:
    """Return the sender's own properties, for a client that reads them by name: those that our producer listed, and `also`.

    Args:
        value_of: Reads one property; nothing or b"" if there is none.
        also: Names to read from messages of other producers, which list nothing.
    """
    found: dict[str, str] = {}
    for name in _names_in(value_of(NAMES_PROPERTY) or b""):
        found[name] = text_of(value_of(name) or b"")
    for name in also:
        if name not in found and (value := value_of(name)):
            found[name] = text_of(value)
    return found


def with_names(properties: Mapping[str, str]) -> dict[str, str]:
    """Return these and the list of their names, in the form in which they are sent."""
    names = json.dumps(list(properties), ensure_ascii=False, separators=(",", ":"))
    return {**properties, NAMES_PROPERTY: names}


@lru_cache(maxsize=1024)
def _names_in(listed: bytes | str) -> tuple[str, ...]:
    try:
        names = json.loads(listed) if listed else []
    except ValueError:
        return ()  # another program's property of that name
    if not isinstance(names, list):
        return ()
    return tuple(name for name in names if isinstance(name, str) and name and not internal(name))
