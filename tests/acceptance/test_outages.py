"""The database is killed, restarted and refuses connections under a running worker: nothing lost, doubled or counted."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

import exactly_once.alembic
from exactly_once import ExactlyOnce, Message, Outcome
from exactly_once.service.worker_service import IN_HAND
from exactly_once.testing.postgres import EmbeddedPostgres
from tests.acceptance.orders import Reservation, open_shop, take
from tests.acceptance.orders import ledger as orders_and_stock
from tests.waiting import until

PATIENCE_S = 60.0


def application(database: str) -> ExactlyOnce:
    eo = ExactlyOnce(database, group="outage")

    @eo.handler("orders", key="order_no")
    def reserve(session: Session, order: dict[str, str]) -> None:
        session.add(Reservation(order_no=order["order_no"]))
        session.flush()
        time.sleep(0.005)  # long enough in the middle that a kill finds some here
        session.execute(take())

    @eo.handler("async-orders", key="order_no")
    async def areserve(session: AsyncSession, order: dict[str, str]) -> None:
        session.add(Reservation(order_no=order["order_no"]))
        await session.flush()
        await session.execute(take())

    return eo


def prepare(database: str) -> None:
    engine = create_engine(database)
    exactly_once.alembic.upgrade(engine)
    open_shop(engine)
    engine.dispose()


def ledger(database: str) -> tuple[list[str], int, int]:
    """Orders reserved, stock taken, failure rows."""
    engine = create_engine(database)
    orders, taken = orders_and_stock(engine)
    with engine.connect() as connection:
        failures = connection.execute(text("SELECT count(*) FROM message_failure")).scalar_one()
    engine.dispose()
    return orders, taken, int(failures)


@contextmanager
def sending(eo: ExactlyOnce, url: str, orders: list[str], topic: str) -> Iterator[threading.Thread]:
    """Send every order twice, from a thread beside the test."""

    def send() -> None:
        with eo.producer(url) as producer:
            for no in orders:
                message = Message(topic, json.dumps({"order_no": no}).encode(), key=no)
                producer.send(message)
                producer.send(message)

    thread = threading.Thread(target=send)
    thread.start()
    yield thread
    thread.join()


@pytest.mark.parametrize("topic", ["orders", "async-orders"])
def test_postgresql_killed_three_times_under_load_loses_doubles_and_counts_nothing(
    own_postgres: EmbeddedPostgres, topic: str
) -> None:
    database = own_postgres.create_database("outage_" + topic.replace("-", "_"))
    prepare(database)
    eo = application(database)
    orders = [f"{topic}-{n}" for n in range(400)]
    url = f"memory://outage-{topic}"
    with eo.worker(url, concurrency=8) as worker:
        with sending(eo, url, orders, topic):
            for part in (1, 2, 3):
                until(lambda part=part: worker.counts.outcomes["processed"] > part * 80, lambda: worker.counts)  # type: ignore[misc]
                own_postgres.kill()
                until(lambda: worker.unready() is not None, lambda: worker.counts)
                own_postgres.restart()
                until(lambda: worker.unready() is None, lambda: worker.counts)
        worker.drain(timedelta(seconds=PATIENCE_S))
        counts = worker.counts
    reserved, taken, failures = ledger(database)
    assert reserved == sorted(orders)
    assert taken == len(orders)
    assert failures == 0, "an outage is no failure of a message"
    assert counts.outcomes["failed"] == 0
    assert counts.outcomes["dead"] == 0


def test_during_an_outage_the_worker_receives_nothing_and_redelivers_nothing(own_postgres: EmbeddedPostgres) -> None:
    database = own_postgres.create_database("outage_quiet")
    prepare(database)
    eo = application(database)
    url = "memory://outage-quiet"
    with eo.worker(url, concurrency=4) as worker, eo.producer(url) as producer:
        producer.send(Message("orders", b'{"order_no": "first"}'))
        worker.drain()
        own_postgres.kill()
        producer.send_all([Message("orders", json.dumps({"order_no": f"o-{n}"}).encode()) for n in range(100)])
        until(lambda: worker.unready() is not None)
        time.sleep(2)
        during = worker.counts
        assert during.held <= 4 * IN_HAND, "no more than fits in hand"
        assert during.redelivered == 0
        assert during.received <= 1 + 4 * IN_HAND
        own_postgres.restart()
        until(lambda: worker.unready() is None)
        worker.drain(timedelta(seconds=PATIENCE_S))
        assert worker.counts.redelivered == 0
    reserved, taken, failures = ledger(database)
    assert len(reserved) == len(set(reserved)) == taken == 101
    assert failures == 0


def test_out_of_connections_is_an_outage_and_not_a_failure(own_postgres: EmbeddedPostgres) -> None:
    database = own_postgres.create_database("outage_full")
    prepare(database)
    admin = create_engine(database, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text("CREATE ROLE shop LOGIN PASSWORD 'shop'"))
        connection.execute(text("GRANT ALL ON ALL TABLES IN SCHEMA public TO shop"))
        connection.execute(text("GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO shop"))
        connection.execute(text("ALTER ROLE shop CONNECTION LIMIT 3"))
    shop = create_engine(database).url.set(username="shop", password="shop").render_as_string(hide_password=False)
    eo = application(shop)
    url = "memory://outage-full"
    with eo.worker(url, concurrency=2) as worker, eo.producer(url) as producer:
        producer.send(Message("orders", b'{"order_no": "first"}'))
        worker.drain()
        with admin.connect() as connection:
            connection.execute(text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'shop'"))
            connection.execute(text("ALTER ROLE shop CONNECTION LIMIT 0"))
        producer.send_all([Message("orders", json.dumps({"order_no": f"o-{n}"}).encode()) for n in range(20)])
        until(lambda: worker.unready() is not None, lambda: worker.counts)
        with admin.connect() as connection:
            connection.execute(text("ALTER ROLE shop CONNECTION LIMIT 20"))
        until(lambda: worker.unready() is None, lambda: worker.counts)
        worker.drain(timedelta(seconds=PATIENCE_S))
    admin.dispose()
    reserved, taken, failures = ledger(database)
    assert len(reserved) == len(set(reserved)) == taken == 21
    assert failures == 0


def test_a_loop_of_the_callers_own_is_told_to_wait_while_the_database_is_down(own_postgres: EmbeddedPostgres) -> None:
    database = own_postgres.create_database("outage_door")
    prepare(database)
    eo = application(database)
    message = Message("orders", b'{"order_no": "A-1"}')
    own_postgres.kill()
    outcome = eo.process(message)
    assert outcome is Outcome.WAITING
    assert not outcome.acknowledge
    own_postgres.restart()
    assert eo.process(message) is Outcome.PROCESSED
    assert eo.process(message) is Outcome.DUPLICATE


def test_a_standby_that_cannot_write_is_waited_for(own_postgres: EmbeddedPostgres) -> None:
    database = own_postgres.create_database("outage_readonly")
    prepare(database)
    eo = application(database)
    url = "memory://outage-readonly"
    admin = create_engine(database, isolation_level="AUTOCOMMIT")
    with eo.worker(url, concurrency=2) as worker, eo.producer(url) as producer:
        with admin.connect() as connection:
            connection.execute(text("ALTER SYSTEM SET default_transaction_read_only = on"))
            connection.execute(text("SELECT pg_reload_conf()"))
        until(lambda: create_and_show(database) == "on")
        producer.send(Message("orders", b'{"order_no": "A-1"}'))
        until(lambda: worker.unready() is not None, lambda: worker.counts)
        with admin.connect() as connection:
            connection.execute(text("SET default_transaction_read_only = off"))
            connection.execute(text("ALTER SYSTEM RESET default_transaction_read_only"))
            connection.execute(text("SELECT pg_reload_conf()"))
        until(lambda: worker.unready() is None, lambda: worker.counts)
        worker.drain(timedelta(seconds=PATIENCE_S))
    admin.dispose()
    assert ledger(database) == (["A-1"], 1, 0)


def create_and_show(database: str) -> str:
    engine = create_engine(database)
    with engine.connect() as connection:
        shown = str(connection.execute(text("SHOW default_transaction_read_only")).scalar_one())
    engine.dispose()
    return shown
