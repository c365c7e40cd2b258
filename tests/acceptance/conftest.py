"""Servers that several acceptance tests share: started once, when first asked for."""

from collections.abc import Iterator

import pytest

from tests.services import rocketmq as service
from tests.services.need import require


@pytest.fixture(scope="session")
def rocketmq() -> Iterator[service.RocketMQ]:
    """A RocketMQ 5. A test that kills its proxy brings it back."""
    require(service)
    with service.RocketMQ(heap_mb=384) as server:
        yield server
