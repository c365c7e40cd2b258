"""Leases in each database keep the contract of a store of leases."""

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine

from exactly_once.leases import LeaseStore
from exactly_once.leases.sql import SqlLeases
from exactly_once.store import Store
from tests.integration.lease_conformance import LeaseConformance


class TestLeasesInSql(LeaseConformance):
    @pytest.fixture
    def store(self, database: Engine) -> Iterator[LeaseStore]:
        opened = Store("default", database.url, pool_size=16)
        yield SqlLeases(opened.name, opened.engine, opened.dialect, lambda: opened.tables)
        opened.close()
