"""What tests need to know of `rocketmq-client-python` and of its members in a group. Starts nothing."""

import re
from importlib.util import find_spec
from pathlib import Path

from tests.services.need import need
from tests.services.rocketmq import RocketMQ
from tests.services.rocketmq_admin import SUCCESS

__all__ = ["missing", "need_client", "shares"]

GET_CONSUMERS_OF_GROUP = 38
GET_CONSUMER_RUNNING_INFO = 307


def missing() -> str | None:
    """Say why this environment cannot speak RocketMQ's remoting protocol, or return None."""
    spec = find_spec("rocketmq")
    places = list(spec.submodule_search_locations or []) if spec else []
    if not places or not (Path(places[0]) / "ffi.py").exists():
        return "rocketmq-client-python is not in this environment; `make test` makes a second one for it"
    return None


def need_client() -> None:
    """Skip the test where the client is not installed."""
    need(missing())


def shares(server: RocketMQ, group: str) -> list[set[tuple[str, int]]]:
    """Return the (topic, queue) pairs each member of a group says it reads, retry topics left out."""
    found: list[set[tuple[str, int]]] = []
    with server.admin() as broker:
        reply = broker.ask(GET_CONSUMERS_OF_GROUP, {"consumerGroup": group})
        members = re.findall(r'"([^"]+@[^"]+)"', reply.body.decode()) if reply.code == SUCCESS else []
        for member in members:
            told = broker.ask(
                GET_CONSUMER_RUNNING_INFO, {"consumerGroup": group, "clientId": member, "jstackEnable": False}
            )
            # the client writes objects as names of objects, which no JSON parser takes
            table = told.body.decode("utf-8", "replace").partition('"mqTable"')[2]
            queues = re.findall(r'"queueId"\s*:\s*(\d+)\s*,\s*"topic"\s*:\s*"([^"]+)"', table)
            found.append({(topic, int(queue)) for queue, topic in queues if not topic.startswith("%RETRY%")})
    return found
