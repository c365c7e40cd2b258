"""Leases in each database keep the contract of a store of leases."""

from collections.abc import Iterator
from datetime import timedelta

import pytest
from sqlalchemy import Engine, select

from exactly_once.database.schema import tables
from exactly_once.database.store import Store
from exactly_once.guards.lease.contract import LeaseStore
from exactly_once.guards.lease.sql import SqlLeases
from exactly_once.testing.conformance import LeaseConformance


class TestLeasesInSql(LeaseConformance):
    @pytest.fixture
    def store(self, database: Engine) -> Iterator[LeaseStore]:
        opened = Store("default", database.url, pool_size=16)
        yield SqlLeases(opened.name, opened.engine, opened.dialect, lambda: opened.tables)
        opened.close()

    def test_a_claim_of_a_lease_that_runs_locks_nothing_so_copies_keep_no_lease_from_being_renewed(
        self, store: LeaseStore, database: Engine
    ) -> None:
        """Whoever else reads the row under a shared lock: a claim that wanted to lock it would wait, and know no end of it."""
        if database.dialect.name == "sqlite":
            pytest.skip("SQLite locks no rows")
        self.won(store)
        with database.connect() as other, other.begin():
            assert other.execute(select(tables().idempotent.c.token).with_for_update(read=True)).all()
            seen, _ = self.claim(store)
        assert not seen.won
        assert seen.remaining is not None
        assert seen.remaining > timedelta(seconds=20)
