"""Leases in Redis keep the contract of a store of leases."""

from collections.abc import Iterator
from datetime import timedelta

import pytest

from exactly_once.guards.lease.contract import LeaseState, LeaseStore, judge
from exactly_once.guards.lease.redis import RedisLeases
from exactly_once.redis.connection import RedisConnection
from exactly_once.testing.conformance.leases import LeaseConformance, message


class TestLeasesInRedis(LeaseConformance):
    @pytest.fixture
    def store(self, redis_url: str) -> Iterator[LeaseStore]:
        connection = RedisConnection(redis_url)
        yield RedisLeases(connection.name, connection.script, timedelta(days=7))
        connection.close()

    def test_a_handlers_new_name_finds_its_messages(self, store: LeaseStore) -> None:
        assert isinstance(store, RedisLeases)
        odd = message("odd*key")._replace(handler="check[out]*")
        for row in (*(message(f"A-{n}") for n in range(2500)), odd):
            assert store.complete(self.won(store, row))
        assert store.rename("shop", "checkout", "till") == (2500, 0)
        assert store.rename("shop", "checkout", "till") == (0, 0)
        assert store.rename("shop", "check[out]*", "odd") == (1, 0)
        for row in (message("A-7")._replace(handler="till"), odd._replace(handler="odd")):
            assert judge(self.claim(store, row)[0], row.fingerprint) is LeaseState.CONSUMED
        assert self.claim(store, message("A-7"))[0].won
        assert store.rename("shop", "checkout", "till") == (0, 1)
