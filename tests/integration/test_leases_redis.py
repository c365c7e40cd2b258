"""Leases in Redis keep the contract of a store of leases."""

from collections.abc import Iterator
from datetime import timedelta

import pytest

from exactly_once.leases import LeaseStore
from exactly_once.leases.redis import RedisLeases
from exactly_once.redis_connection import RedisConnection
from tests.integration.lease_conformance import LeaseConformance


class TestLeasesInRedis(LeaseConformance):
    @pytest.fixture
    def store(self, redis_url: str) -> Iterator[LeaseStore]:
        connection = RedisConnection(redis_url)
        yield RedisLeases(connection.name, connection.script, timedelta(days=7))
        connection.close()
