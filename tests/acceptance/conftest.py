"""Servers that several acceptance tests share: started once, when first asked for."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.services import rocketmq as service
from tests.services.need import require

# where journals are when nobody says: not in the home of who runs the tests
os.environ["XDG_STATE_HOME"] = str(Path(tempfile.gettempdir()) / f"exactly-once-tests-{os.geteuid()}")


@pytest.fixture(scope="session")
def rocketmq() -> Iterator[service.RocketMQ]:
    """A RocketMQ 5. A test that kills its proxy brings it back."""
    require(service)
    with service.RocketMQ(heap_mb=384) as server:
        yield server
