"""The broker's story over `rocketmq4://`, the remoting protocol: the failure store's pump is the only retry."""

from tests.acceptance.broker_story import BrokerStory
from tests.services.rocketmq import RocketMQ
from tests.services.rocketmq4_client import need_client


class TestRocketMQ4Story(BrokerStory):
    def url(self, server: RocketMQ) -> str:
        need_client()
        return f"rocketmq4://{server.name_server}"

    def group(self, server: RocketMQ, name: str) -> None:
        server.create_group(name, retries=2147483647)
