"""RocketMQ administration over its remoting protocol: topics, groups, routes and offsets, one round trip each.

It never sends or receives messages. Called by `RocketMQ` and by tests. The `mqadmin` tool would do the same, but starts
a JVM for every call and exits 0 also when it failed. Request codes are those of `RequestCode` in Apache RocketMQ 5.5.
"""

import itertools
import json
import socket
import struct
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

__all__ = ["Admin", "Kind", "Refused", "Reply"]

Kind = Literal["NORMAL", "FIFO", "DELAY", "TRANSACTION"]

QUERY_CONSUMER_OFFSET = 14
UPDATE_AND_CREATE_TOPIC = 17
UPDATE_BROKER_CONFIG = 25
GET_MAX_OFFSET = 30
GET_MIN_OFFSET = 31
GET_ROUTE_BY_TOPIC = 105
UPDATE_AND_CREATE_GROUP = 200
GET_ALL_GROUPS = 201
DELETE_GROUP = 207
DELETE_TOPIC_IN_BROKER = 215
DELETE_TOPIC_IN_NAME_SERVER = 216

SUCCESS = 0
READ_AND_WRITE = 6
VERSION = 500  # any known 5.x: the server picks JSON headers by a flag in the frame, not by this


class Refused(Exception):
    """The server answered with an error code."""

    def __init__(self, request: int, code: int, remark: str | None) -> None:
        super().__init__(f"RocketMQ refused request {request} with code {code}: {remark}")
        self.code = code


@dataclass(frozen=True, slots=True)
class Reply:
    """A server's answer: its header's fields and its body."""

    code: int
    remark: str | None
    fields: dict[str, str]
    body: bytes


class Admin:
    """A connection to one broker or name server.

    A frame is: total length, header length (its top byte 0 says JSON), header, body; lengths are big-endian 32 bits.
    """

    def __init__(self, address: str, *, timeout_s: float = 10.0) -> None:
        host, port = address.rsplit(":", 1)
        self._socket = socket.create_connection((host, int(port)), timeout_s)
        self._numbers = itertools.count(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave."""
        self._socket.close()

    def ask(self, code: int, fields: dict[str, Any] | None = None, body: bytes = b"") -> Reply:
        """Send one request and return its answer, whatever its code."""
        number = next(self._numbers)
        header = json.dumps(
            {
                "code": code,
                "language": "OTHER",
                "version": VERSION,
                "opaque": number,
                "flag": 0,
                "extFields": {name: _text(value) for name, value in (fields or {}).items()},
            }
        ).encode()
        self._socket.sendall(struct.pack(">II", 4 + len(header) + len(body), len(header)) + header + body)
        while True:
            total, header_bytes = struct.unpack(">II", self._exactly(8))
            header_bytes &= 0xFFFFFF
            rest = self._exactly(total - 4)
            answer = json.loads(rest[:header_bytes])
            # servers send requests of their own on the same connection; the lowest flag bit marks an answer
            if answer.get("opaque") == number and answer.get("flag", 0) & 1:
                return Reply(answer["code"], answer.get("remark"), answer.get("extFields") or {}, rest[header_bytes:])

    def demand(self, code: int, fields: dict[str, Any] | None = None, body: bytes = b"") -> Reply:
        """Send one request and return its answer; raise `Refused` unless it succeeded."""
        reply = self.ask(code, fields, body)
        if reply.code != SUCCESS:
            raise Refused(code, reply.code, reply.remark)
        return reply

    def _exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            part = self._socket.recv(count - len(data))
            if not part:
                raise ConnectionError("RocketMQ closed the connection")
            data += part
        return bytes(data)

    # broker

    def create_topic(self, name: str, kind: Kind = "NORMAL", *, queues: int = 4) -> None:
        """Create or change a topic on this broker."""
        self.demand(
            UPDATE_AND_CREATE_TOPIC,
            {
                "topic": name,
                "defaultTopic": "TBW102",
                "readQueueNums": queues,
                "writeQueueNums": queues,
                "perm": READ_AND_WRITE,
                "topicFilterType": "SINGLE_TAG",
                "topicSysFlag": 0,
                "order": kind == "FIFO",
                "attributes": f"+message.type={kind}",
                "force": False,
            },
        )

    def delete_topic(self, name: str) -> None:
        """Delete a topic from this broker; ask the name server's connection too, or its route stays for a while."""
        self.demand(DELETE_TOPIC_IN_BROKER, {"topic": name})

    def create_group(self, name: str, *, orderly: bool = False, retries: int = 16, **config: Any) -> None:
        """Create or change a consumer group; `retries` r means r + 1 deliveries, `config` overrides any field."""
        self.demand(
            UPDATE_AND_CREATE_GROUP,
            body=json.dumps(
                {
                    "groupName": name,
                    "consumeEnable": True,
                    "consumeFromMinEnable": True,
                    "consumeBroadcastEnable": True,
                    "consumeMessageOrderly": orderly,
                    "retryQueueNums": 1,
                    "retryMaxTimes": retries,
                    "brokerId": 0,
                    "whichBrokerWhenConsumeSlowly": 1,
                    "notifyConsumerIdsChangedEnable": True,
                    **config,
                }
            ).encode(),
        )

    def delete_group(self, name: str) -> None:
        """Delete a consumer group and its offsets."""
        self.demand(DELETE_GROUP, {"groupName": name, "cleanOffset": True})

    def groups(self) -> dict[str, dict[str, Any]]:
        """Return every group's configuration, by name."""
        table: dict[str, dict[str, Any]] = json.loads(self.demand(GET_ALL_GROUPS).body)["subscriptionGroupTable"]
        return table

    def configure(self, **settings: Any) -> None:
        """Change settings of the running broker, named as in broker.conf."""
        self.demand(UPDATE_BROKER_CONFIG, body="\n".join(f"{k}={_text(v)}" for k, v in settings.items()).encode())

    def offsets(self, topic: str, queue: int) -> tuple[int, int]:
        """Return the first offset still kept and the one the next message will get."""
        place = {"topic": topic, "queueId": queue}
        first = self.demand(GET_MIN_OFFSET, place).fields["offset"]
        following = self.demand(GET_MAX_OFFSET, place).fields["offset"]
        return int(first), int(following)

    def group_offset(self, group: str, topic: str, queue: int) -> int | None:
        """Return the group's place in one queue, or None when it has none."""
        reply = self.ask(QUERY_CONSUMER_OFFSET, {"consumerGroup": group, "topic": topic, "queueId": queue})
        return int(reply.fields["offset"]) if reply.code == SUCCESS else None

    # name server

    def has_route(self, topic: str) -> bool:
        """Return whether this name server can tell clients where the topic is."""
        return self.ask(GET_ROUTE_BY_TOPIC, {"topic": topic}).code == SUCCESS

    def delete_route(self, topic: str) -> None:
        """Make this name server forget a topic."""
        self.demand(DELETE_TOPIC_IN_NAME_SERVER, {"topic": topic})


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
