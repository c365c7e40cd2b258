"""What is wrong of a server, found out while a worker runs: its messages are held, and none is blamed or spends its attempts.

An operator sets the server's sql_mode, and each new connection of the pool has it: no claim there could be trusted.
"""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import Engine, event
from sqlalchemy.orm import Session

from exactly_once import ConfigurationError, ExactlyOnce, Outcome
from exactly_once.errors import SchemaError
from tests.integration.outside import run
from tests.integration.shop import COLOURS, GROUP, Shop, order, put, shops
from tests.integration.ways import ALONE, IN_A_BATCH, IN_A_STEP, UNDER_A_LEASE, Way
from tests.waiting import until


@pytest.fixture(params=COLOURS)
def shop(request: pytest.FixtureRequest) -> Iterator[Shop]:
    yield from shops(request, "mariadb", request.param, pool_size=3)


def each_connection_has(mode: list[str], engine: Engine) -> None:
    """As the server's own setting: each new connection has the mode of that moment."""

    @event.listens_for(engine, "connect")
    def set_it(dbapi: Any, _: Any) -> None:
        cursor = dbapi.cursor()
        cursor.execute(f"SET sql_mode = '{mode[0]}'")
        cursor.close()


@pytest.mark.parametrize("way", [ALONE, IN_A_BATCH, UNDER_A_LEASE], ids=str)
def test_messages_are_held_until_the_server_is_right_again(shop: Shop, way: Way) -> None:
    mode = ["STRICT_TRANS_TABLES"]
    engine = shop.async_engine.sync_engine if shop.is_async else shop.engine

    each_connection_has(mode, engine)
    shop.eo = ExactlyOnce(shop.async_engine if shop.is_async else shop.engine, group=GROUP)
    way.handles(shop, lambda session, no: put(session, f"{no}"))
    with shop.eo.worker("sql://?max_attempts=3", concurrency=2) as worker, shop.eo.producer("sql://") as producer:
        producer.send(order(1))
        until(lambda: worker.counts.acked == 1, "the first is done")
        mode[0] = ""
        engine.pool.dispose()
        producer.send_all([order(no) for no in (2, 3, 4)])
        until(worker.unready, "it is seen")
        mode[0] = "STRICT_TRANS_TABLES"
        engine.pool.dispose()
        until(lambda: worker.counts.acked == 4, "the others are done")
        assert worker.counts.redelivered == 0
    assert shop.failures() == []
    assert sorted(shop.effects()) == ["1", "2", "3", "4"]


def lets_it_out(session: Session, no: Any) -> None:
    put(session, f"{no}")


def wraps_it(session: Session, no: Any) -> None:
    try:
        put(session, f"{no}")
    except Exception as error:
        raise ValueError("the order could not be written") from error


def swallows_it(session: Session, no: Any) -> None:
    with suppress(Exception):
        put(session, f"{no}")


@pytest.mark.parametrize(
    ("way", "do"),
    [(UNDER_A_LEASE, lets_it_out), (UNDER_A_LEASE, wraps_it), (UNDER_A_LEASE, swallows_it), (IN_A_STEP, lets_it_out)],
    ids=lambda each: getattr(each, "__name__", str(each)),
)
def test_what_is_wrong_after_the_claim_counts_for_no_message(shop: Shop, way: Way, do: Any) -> None:
    """The claim of a lease was made while the server was right; the handler's own connection is made when it is not."""
    mode, runs = ["STRICT_TRANS_TABLES"], list[Any]()
    engine = shop.async_engine.sync_engine if shop.is_async else shop.engine

    each_connection_has(mode, engine)
    shop.eo = ExactlyOnce(shop.async_engine if shop.is_async else shop.engine, group=GROUP)

    def handler(session: Session, no: Any) -> None:
        runs.append(no)
        if len(runs) == 1:
            mode[0] = ""
            engine.pool.dispose()
        do(session, no)

    way.handles(shop, handler)
    with pytest.raises(ConfigurationError, match="STRICT_TRANS_TABLES"):
        shop.process(order(1))
    mode[0] = "STRICT_TRANS_TABLES"
    engine.pool.dispose()
    assert shop.failures() == []
    assert shop.process(order(1)) is Outcome.PROCESSED
    assert shop.effects() == ["1"]


def test_a_table_of_ours_that_is_missing_behind_the_claim_counts_for_no_message(shop: Shop) -> None:
    """The lease is claimed in one table, and the handler's transaction leaves its trace in another."""
    UNDER_A_LEASE.handles(shop, lambda session, no: put(session, f"{no}"))
    run(shop, "RENAME TABLE message_step TO message_step_aside")
    try:
        with pytest.raises(SchemaError, match="table"):
            shop.process(order(1))
    finally:
        run(shop, "RENAME TABLE message_step_aside TO message_step")
    assert shop.failures() == []
    assert shop.process(order(1)) is Outcome.PROCESSED
    assert shop.effects() == ["1"]
