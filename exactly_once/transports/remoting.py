"""Asks RocketMQ's name servers and brokers over their remoting protocol: routes, groups, offsets in queues.

It sends no messages. It receives some only to look at them (`rocketmq4.ahead`). Called by the rocketmq4 transport, because
librocketmq "starts" without a server, without the topic and without the group, and then does nothing; and by the rocketmq5
transport if its URL names name servers, for what gRPC does not tell. Each request has a connection of its own and a timeout.

A frame is: total length, header length (its top byte 0 means JSON), header, body. Lengths are big-endian 32 bits. The
request codes are those of `RequestCode` in Apache RocketMQ, the same in 4.x and 5.x.
"""

import base64
import hashlib
import hmac
import json
import re
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from exactly_once.errors import TransportError

__all__ = ["Admin", "Queue", "Refused", "Wanted"]

PULL_MESSAGE: Final = 11
QUERY_CONSUMER_OFFSET: Final = 14
UPDATE_CONSUMER_OFFSET: Final = 15
GET_MAX_OFFSET: Final = 30
GET_CONSUMERS_OF_GROUP: Final = 38
UNLOCK_QUEUES: Final = 42
GET_ROUTE_BY_TOPIC: Final = 105
GET_BROKERS: Final = 106
# Not 352, which asks for one group: a broker that creates groups automatically would create it, with its own defaults.
GET_ALL_GROUPS: Final = 201
GET_CONNECTIONS_OF_GROUP: Final = 203
GET_RUNNING_INFO_OF_CONSUMER: Final = 307
GET_TOPIC_CONFIG: Final = 351

SUCCESS: Final = 0
TOPIC_UNKNOWN: Final = 17
OFFSET_UNKNOWN: Final = 22
RETRIES: Final = "%RETRY%"
READABLE: Final = 4  # a bit of a topic's permissions
NOTHING_FOUND: Final = (19, 20, 21)  # at the end; no message passes the filter; the offset is gone
SUBSCRIPTION_GIVEN: Final = 4
MOST_PER_PULL: Final = 32  # a broker gives no more unless configured to
TIMEOUT_S: Final = 3.0
VERSION: Final = 500  # any version that knows JSON headers; the server uses it for nothing else here


Wanted = Mapping[str, str]
"""A subscription: the tag expression of each topic, "*" for all, tags sorted."""


class Refused(TransportError):
    """The server answered with an error code."""

    def __init__(self, address: str, request: int, code: int, remark: str) -> None:
        super().__init__(f"RocketMQ at {address} refused request {request} with code {code}: {remark or 'no reason'}")
        self.code = code


@dataclass(frozen=True, slots=True)
class Queue:
    """One queue of a topic, and the address of its master broker."""

    topic: str
    broker: str
    number: int
    address: str = field(compare=False)


@dataclass(frozen=True, slots=True)
class _Reply:
    fields: Mapping[str, str]
    body: bytes


class Admin:
    """Requests to one cluster. Making one opens nothing.

    Args:
        name_servers: Their addresses; each is asked in turn until one answers.
        keys: Access key and secret key, if brokers check signatures.
    """

    def __init__(self, name_servers: Sequence[str], keys: tuple[str, str] | None = None) -> None:
        self._name_servers = name_servers
        self._keys = keys

    def queues(self, topic: str) -> Sequence[Queue]:
        """Return the topic's readable queues; none if no name server that answers knows the topic.

        Raises:
            TransportError: No name server answers.
        """
        fields = {"topic": topic, "acceptStandardJsonOnly": "true"}
        routes = (_json(reply.body) for reply in self._named(GET_ROUTE_BY_TOPIC, fields))
        return next((found for route in routes if (found := list(_queues(topic, route)))), [])

    def brokers(self) -> Mapping[str, str | None]:
        """Return the address of each broker's master, or None if the name servers know only its slaves.

        An unavailable broker is missing: name servers forget it when its connection ends.

        Raises:
            TransportError: No name server answers.
        """
        found: dict[str, str | None] = {}
        for reply in self._named(GET_BROKERS, {}):
            for name, broker in (_json(reply.body).get("brokerAddrTable") or {}).items():
                found[name] = broker["brokerAddrs"].get("0") or found.get(name)
        return found

    def has_readable(self, address: str, topic: str) -> bool:
        """Return whether a broker has the topic, readable. False if it does not answer."""
        try:
            return bool(
                int(_json(self._ask(address, GET_TOPIC_CONFIG, {"topic": topic}).body).get("perm", 0)) & READABLE
            )
        except Refused:
            return False

    def _named(self, code: int, fields: Mapping[str, str]) -> Iterator[_Reply]:
        """Yield the answer of each name server that is up. Servers that do not know the topic yield nothing."""
        failed: Exception | None = None
        answered = False
        for address in self._name_servers:
            try:
                reply = self._ask(address, code, fields)
            except Refused as error:
                answered = answered or error.code == TOPIC_UNKNOWN
                failed = error
            except (OSError, TransportError) as error:
                failed = error
            else:
                answered = True
                yield reply
        if not answered:
            raise TransportError(
                f"No RocketMQ name server answers at {', '.join(self._name_servers)}: {failed}"
            ) from failed

    def group(self, address: str, group: str) -> Mapping[str, Any] | None:
        """Return a group's settings on one broker, or None if the broker has no such group."""
        seen = 0
        while True:
            reply = self._ask(address, GET_ALL_GROUPS, {"groupSeq": str(seen), "maxGroupNum": "2000"})
            table: Mapping[str, Any] = _json(reply.body).get("subscriptionGroupTable") or {}
            if group in table:
                settings: Mapping[str, Any] = table[group]
                return settings
            seen += len(table)
            # Brokers before 5.3 have no pages and answer with everything.
            if not table or seen >= int(reply.fields.get("totalGroupNum", 0)):
                return None

    def offset(self, group: str, queue: Queue) -> int | None:
        """Return a group's offset in a queue, or None if it never had one."""
        fields = {"consumerGroup": group, "topic": queue.topic, "queueId": str(queue.number)}
        try:
            return int(self._ask(queue.address, QUERY_CONSUMER_OFFSET, fields).fields["offset"])
        except Refused as error:
            if error.code == OFFSET_UNKNOWN:
                return None
            raise

    def end(self, queue: Queue) -> int:
        """Return the offset that the queue's next message will get."""
        fields = {"topic": queue.topic, "queueId": str(queue.number)}
        return int(self._ask(queue.address, GET_MAX_OFFSET, fields).fields["offset"])

    def put_at_end(self, group: str, queue: Queue) -> None:
        """Set a group's offset to after a queue's last message."""
        self._put(group, queue, self.end(queue))

    def move(self, group: str, queue: Queue, offset: int) -> None:
        """Set a group's offset, unless it is farther already."""
        now = self.offset(group, queue)
        if now is None or now < offset:
            self._put(group, queue, offset)

    def _put(self, group: str, queue: Queue, offset: int) -> None:
        fields = {"topic": queue.topic, "queueId": str(queue.number), "consumerGroup": group}
        self._ask(queue.address, UPDATE_CONSUMER_OFFSET, {**fields, "commitOffset": str(offset)})

    def pull(self, group: str, queue: Queue, offset: int, expression: str) -> tuple[bytes, int]:
        """Return some messages from an offset on, as the broker's log has them, and the next offset. Changes no group's offset.

        Args:
            group: Who may read them; it need not be a member.
            queue: The queue.
            offset: The first offset.
            expression: Tags, "a || b", or "*" for every message. The broker compares hashes, so the caller must check the tag,
                too.
        """
        fields = {
            "consumerGroup": group,
            "topic": queue.topic,
            "queueId": str(queue.number),
            "queueOffset": str(offset),
        }
        fields |= {"maxMsgNums": str(MOST_PER_PULL), "sysFlag": str(SUBSCRIPTION_GIVEN), "commitOffset": "0"}
        fields |= {"suspendTimeoutMillis": "0", "subscription": expression, "subVersion": "0", "expressionType": "TAG"}
        reply = self._ask(queue.address, PULL_MESSAGE, fields, fine=NOTHING_FOUND)
        return reply.body, int(reply.fields["nextBeginOffset"])

    def consumers(self, address: str, group: str) -> Sequence[str]:
        """Return the client ids of a group's members as one broker knows them; none if it knows no such group."""
        try:
            return list(
                _json(self._ask(address, GET_CONSUMERS_OF_GROUP, {"consumerGroup": group}).body)["consumerIdList"]
            )
        except Refused:
            return []

    def members(self, address: str, group: str) -> tuple[Sequence[str], Wanted]:
        """Return the client ids of a group's members, and the group's last subscription, as one broker knows them."""
        try:
            told = _json(self._ask(address, GET_CONNECTIONS_OF_GROUP, {"consumerGroup": group}).body)
        except Refused:  # the group has no member
            return (), {}
        table = told.get("subscriptionTable") or {}
        return [each["clientId"] for each in told.get("connectionSet") or []], _wanted(table.values())

    def subscription(self, address: str, group: str, member: str) -> Wanted | None:
        """Ask one member, through its broker, for its subscription; None if it does not tell."""
        fields = {"consumerGroup": group, "clientId": member, "jstackEnable": "false"}
        try:
            told = self._ask(address, GET_RUNNING_INFO_OF_CONSUMER, fields).body.decode("utf-8", "replace")
        except (OSError, TransportError):
            return None
        # The whole is no valid JSON (tables have objects as keys), but this list is.
        begin = told.find("[", told.find('"subscriptionSet"'))
        try:
            return _wanted(json.JSONDecoder().raw_decode(told, begin)[0]) if '"subscriptionSet"' in told else None
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def unlock(self, address: str, group: str, consumer: str, queues: Sequence[Queue]) -> None:
        """Release a member's locks on queues, held or not."""
        locked = [{"topic": q.topic, "brokerName": q.broker, "queueId": q.number} for q in queues]
        body = {"consumerGroup": group, "clientId": consumer, "mqSet": locked, "onlyThisBroker": False}
        self._ask(address, UNLOCK_QUEUES, {}, json.dumps(body).encode())

    def _ask(
        self, address: str, code: int, fields: Mapping[str, str], body: bytes = b"", *, fine: Sequence[int] = ()
    ) -> _Reply:
        header = {
            "code": code,
            "language": "OTHER",
            "version": VERSION,
            "opaque": 1,
            "flag": 0,
            "extFields": self._signed(fields, body),
        }
        data = json.dumps(header).encode()
        host, _, port = address.rpartition(":")
        with socket.create_connection((host.strip("[]"), int(port)), TIMEOUT_S) as connection:
            connection.sendall(struct.pack(">II", 4 + len(data) + len(body), len(data)) + data + body)
            with connection.makefile("rb") as answers:
                while True:
                    total, length = struct.unpack(">II", _exactly(answers, 8))
                    length &= 0xFFFFFF
                    rest = _exactly(answers, total - 4)
                    answer = json.loads(rest[:length])
                    # A server also sends requests on any connection; the lowest bit marks an answer.
                    if answer.get("opaque") == 1 and answer.get("flag", 0) & 1:
                        break
        if answer["code"] != SUCCESS and answer["code"] not in fine:
            raise Refused(address, code, answer["code"], (answer.get("remark") or "").partition("\n")[0])
        return _Reply(answer.get("extFields") or {}, rest[length:] if answer["code"] == SUCCESS else b"")

    def _signed(self, fields: Mapping[str, str], body: bytes) -> Mapping[str, str]:
        if self._keys is None:
            return fields
        signed = {**fields, "AccessKey": self._keys[0]}
        content = "".join(signed[name] for name in sorted(signed)).encode() + body
        digest = hmac.new(self._keys[1].encode(), content, hashlib.sha1).digest()
        return {**signed, "Signature": base64.b64encode(digest).decode()}


def _exactly(answers: Any, count: int) -> bytes:
    data: bytes = answers.read(count)
    if len(data) < count:
        raise TransportError("RocketMQ closed the connection without an answer.")
    return data


def _json(body: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(body)
    except ValueError:
        # Older servers write maps with bare numbers as keys: {"brokerAddrs":{0:"10.0.0.1:10911"}}
        found = json.loads(re.sub(rb"([{,])\s*(\d+)\s*:", rb'\1"\2":', body))
    return found if isinstance(found, dict) else {}


def _wanted(subscriptions: Iterable[Mapping[str, Any]]) -> Wanted:
    found = {}
    for each in subscriptions:
        if not each["topic"].startswith(RETRIES):  # every member has that topic, and gets all of it
            tags = sorted({tag.strip() for tag in (each.get("subString") or "*").split("||")} - {""})
            found[each["topic"]] = " || ".join(tags) or "*"
    return found


def _queues(topic: str, route: Mapping[str, Any]) -> Iterator[Queue]:
    masters = {broker["brokerName"]: broker["brokerAddrs"].get("0") for broker in route.get("brokerDatas") or []}
    for part in route.get("queueDatas") or []:
        address = masters.get(part["brokerName"])
        if address and part["perm"] & READABLE:
            for number in range(part["readQueueNums"]):
                yield Queue(topic, part["brokerName"], number, address)
