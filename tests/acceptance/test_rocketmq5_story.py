"""The broker's story over `rocketmq://`, the gRPC client of RocketMQ 5."""

from exactly_once.transports.rocketmq5 import wall
from tests.acceptance.broker_story import BrokerStory
from tests.services.need import need
from tests.services.rocketmq import RocketMQ


class TestRocketMQ5Story(BrokerStory):
    def url(self, server: RocketMQ) -> str:
        need(wall.missing())
        return f"rocketmq://{server.grpc}?invisible_s=10"

    def group(self, server: RocketMQ, name: str) -> None:
        server.create_group(name)
