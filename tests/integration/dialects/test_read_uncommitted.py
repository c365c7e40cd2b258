"""READ UNCOMMITTED, left in a pooled session or given to the engine: a claim that is rolled back after all makes no duplicate."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session

from exactly_once import Outcome
from exactly_once.database.schema import CONSUMED, tables
from exactly_once.database.store import Store
from exactly_once.failures.due import DueFailures
from exactly_once.guards.lease.contract import LeaseState, judge
from exactly_once.guards.lease.sql import SqlLeases
from exactly_once.testing.conformance.leases import message as claim_row
from tests.integration.shop import COLOURS, Shop, order, put, shops
from tests.integration.ways import ALONE

_DIRTY = {"isolation_level": "READ UNCOMMITTED"}


@pytest.fixture(scope="module", params=COLOURS)
def ground(request: pytest.FixtureRequest) -> Iterator[Shop]:
    yield from shops(request, "mariadb", request.param, options=_DIRTY)


def failing(shop: Shop, no: str, **options: Any) -> None:
    def do(session: Session, each: str) -> None:
        put(session, str(each))
        if each == no:
            raise ZeroDivisionError

    ALONE.handles(shop, do, **options)


def test_of_an_ordered_message_whose_key_is_blocked(shop: Shop) -> None:
    failing(shop, "A", ordered=True)
    first, second = order("A", ordering_key="k"), order("B", ordering_key="k")
    assert shop.process(first) is Outcome.FAILED
    with Session(shop.outside) as other:
        assert shop.eo.claim(other, "handler", "B", payload=second.body)
        assert shop.process(second) is Outcome.WAITING
        other.rollback()


def test_of_a_failure_that_the_sweep_looks_at(shop: Shop) -> None:
    failing(shop, "B")
    assert shop.process(order("B")) is Outcome.FAILED
    due, dirty = DueFailures(tables), shop.outside.execution_options(**_DIRTY)
    with Session(shop.outside) as other:
        assert shop.eo.claim(other, "handler", "B", payload=order("B").body)
        assert due.sweep(dirty.begin, "shop") == 0
        other.commit()
    assert due.sweep(dirty.begin, "shop") == 1


def test_of_a_lease_that_is_just_completed(mariadb_url: str) -> None:
    store = Store("default", mariadb_url, pool_size=4)
    leases = SqlLeases(store.name, store.engine.execution_options(**_DIRTY), store.dialect, lambda: store.tables)
    row = claim_row()
    assert leases.claim(row, uuid4().hex, timedelta(seconds=30), also=b"", steps=False).won
    with store.engine.connect() as run, run.begin() as transaction:
        run.execute(update(tables().idempotent).values(status=CONSUMED, lease_until=None))
        seen = leases.look(row)
        assert seen is not None
        assert judge(seen, row.fingerprint) is LeaseState.RUNNING
        transaction.rollback()
    store.close()
