"""The broker of the demonstration: a table in the database, or a real RocketMQ that is started here.

Each has a transport URL, reports when the consumer groups have joined, and how many messages a group has not finished. Called by
`run`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from sqlalchemy import Engine, text

from examples.demo.orders import TOPIC

if TYPE_CHECKING:
    from tests.services.rocketmq import RocketMQ

__all__ = ["TRANSPORTS", "Broker", "Missing", "broker"]

TRANSPORTS: Final = ("sql", "rocketmq", "rocketmq4")
USUAL: Final = 16  # RocketMQ's default for a group
ENDLESS: Final = 2147483647  # rocketmq4's client loses messages sent back more often than a group's retryMaxTimes
# what a killed worker had in hand comes back after this time; short, because nobody wants to watch a demonstration wait
INVISIBLE_S: Final = 5


class Missing(Exception):
    """Something this machine does not have; the text says what to install."""


class Broker(Protocol):
    """See the module."""

    @property
    def url(self) -> str:
        """The transport URL."""

    @property
    def quiet_s(self) -> float:
        """How long a ledger must stay unchanged, with nothing left to receive, before it counts as final."""

    def joined(self, groups: Sequence[str]) -> bool:
        """Whether messages sent from now on reach each of these groups."""

    def left(self, group: str) -> int:
        """Return how many messages this group has not finished."""


@dataclass(frozen=True)
class _Table:
    """`sql://`: the broker in a table."""

    engine: Engine
    url: str = f"sql://?invisible_s={INVISIBLE_S}"
    quiet_s: float = 0.0  # a deleted row does not come back

    def joined(self, groups: Sequence[str]) -> bool:
        with self.engine.connect() as connection:
            query = text("SELECT consumer_group FROM message_queue_group WHERE topic = :topic")
            return set(groups) <= set(connection.execute(query, {"topic": TOPIC}).scalars())

    def left(self, group: str) -> int:
        with self.engine.connect() as connection:
            query = text("SELECT count(*) FROM message_queue WHERE consumer_group = :group")
            return int(connection.execute(query, {"group": group}).scalar_one())


@contextmanager
def broker(transport: str, engine: Engine, groups: Sequence[str]) -> Iterator[Broker]:
    """Start the broker, and create the topic and the groups.

    Raises:
        Missing: It cannot run on this machine.
    """
    if transport == "sql":
        yield _Table(engine)
        return
    from tests.services import rocketmq

    _require_client(transport)
    if reason := rocketmq.missing():
        raise Missing(f"{reason}. Without it: python -m examples.demo --transport sql")
    with rocketmq.RocketMQ() as server:
        server.create_topic(TOPIC)
        five = transport == "rocketmq"
        for group in groups:
            server.create_group(group, retries=USUAL if five else ENDLESS)
        yield _RocketMQ(server, five=five)


def _require_client(transport: str) -> None:
    from exactly_once.errors import ExactlyOnceError
    from exactly_once.transports.contract import Surroundings
    from exactly_once.transports.registry import transport_from

    try:
        made = transport_from(f"{transport}://127.0.0.1:1", Surroundings())
        if transport == "rocketmq4":
            made.producer().close()  # loads librocketmq
    except ExactlyOnceError as error:
        raise Missing(str(error)) from error


class _RocketMQ:
    """`rocketmq://` and `rocketmq4://`: a name server, a broker and a proxy, as children of ours."""

    quiet_s = 2.0 * INVISIBLE_S

    def __init__(self, server: "RocketMQ", *, five: bool) -> None:
        self._server, self._five = server, five
        self.url = (
            f"rocketmq://{server.grpc}?invisible_s={INVISIBLE_S}" if five else f"rocketmq4://{server.name_server}"
        )

    def joined(self, groups: Sequence[str]) -> bool:
        if self._five:
            return True  # a group that was created before the first message receives it
        with self._server.admin() as admin:  # the transport sets the position of a new group when it joins
            return all(admin.group_offset(group, TOPIC, queue) is not None for group in groups for queue in range(4))

    def left(self, group: str) -> int:
        with self._server.admin() as admin:
            ends = [(admin.offsets(TOPIC, queue)[1], admin.group_offset(group, TOPIC, queue)) for queue in range(4)]
        return sum(end - (place or 0) for end, place in ends)
