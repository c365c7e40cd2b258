"""Shops with few connections: what one handler leaves in a connection, the next one meets."""

from collections.abc import Iterator

import pytest

from tests.integration.shop import COLOURS, DIALECTS, Shop, shops


def ground_on(request: pytest.FixtureRequest, dialect: str, colour: str) -> Iterator[Shop]:
    """A shop of one dialect; its first connection is the next one's, too."""
    yield from shops(request, dialect, colour, pool_size=3, options={"pool_use_lifo": True})


GROUNDS = [(dialect, colour) for dialect in DIALECTS for colour in COLOURS]


@pytest.fixture(scope="module", params=GROUNDS, ids=[f"{dialect}-{colour}" for dialect, colour in GROUNDS])
def ground(request: pytest.FixtureRequest) -> Iterator[Shop]:
    """A shop with room for a step's connection beside its handler's own."""
    yield from shops(request, *request.param, pool_size=3, options={"pool_use_lifo": True})
