"""Other code shares the engine with the broker in a table, and what it left in a connection stops neither senders nor receivers.

The kind: a role, a time limit, READ ONLY or locked tables in a connection that goes back to the pool as it was.
"""

from collections.abc import Iterator

import pytest
from sqlalchemy import insert, select

from exactly_once.errors import SendFailed
from exactly_once.outcome import Ack
from exactly_once.transports.contract import Subscription
from exactly_once.transports.sql.database import Database
from exactly_once.transports.sql.transport import SqlTransport
from tests.integration.outside import by_other_code, run
from tests.integration.shop import STOCK, Shop, order, shops
from tests.integration.transports.test_sql_queue import SECOND
from tests.waiting import until

LEFT = {
    "postgres role": "SELECT set_config('role', 'nobody_of_the_queue', false)",
    "postgres read only": "SET default_transaction_read_only = on",
    "postgres time limit": "SET statement_timeout = 1",
    "postgres path": "SET search_path = pg_temp",
    "mariadb time limit": "SET max_statement_time = 0.000001",
    "mariadb read only": "SET SESSION TRANSACTION READ ONLY",
    "mariadb locked tables": "LOCK TABLES stock READ",
    "mariadb autocommit": "SET autocommit = 1",
    "sqlite query only": "PRAGMA query_only = ON",
}


@pytest.fixture(params=LEFT)
def left(request: pytest.FixtureRequest) -> Iterator[tuple[Shop, str]]:
    """A shop whose pool has several connections, and what is left in each of them."""
    what = request.param
    for shop in shops(request, what.split()[0], "sync", pool_size=4):
        if "role" in what:
            run(shop, "DROP ROLE IF EXISTS nobody_of_the_queue", "CREATE ROLE nobody_of_the_queue NOLOGIN")
        yield shop, LEFT[what]
        if "role" in what:
            shop.engine.dispose()
            run(shop, "DROP ROLE nobody_of_the_queue")


def leave(shop: Shop, statement: str) -> None:
    """In all connections of the pool, more than a producer tries."""
    held = [shop.engine.connect() for _ in range(4)]
    for each in held:
        each.exec_driver_sql(statement)
        each.commit()
    for each in held:
        each.close()


def test_a_producer_sends_whatever_was_left_in_the_whole_pool(left: tuple[Shop, str]) -> None:
    shop, statement = left
    with shop.eo.producer("sql://") as producer:
        for _ in range(2):
            leave(shop, statement)
            producer.send(order("ä"))  # the database is asked about its characters, too


def test_a_consumer_takes_extends_and_settles_whatever_was_left_in_the_whole_pool(left: tuple[Shop, str]) -> None:
    shop, statement = left
    leave(shop, statement)
    store = shop.eo.stores["default"]
    transport = SqlTransport(lambda: store.engine, schema=lambda: store.resolved_schema)
    assert transport.check("group", [Subscription("orders")]) == []
    leave(shop, statement)
    [consumer] = transport.subscribe("group", [Subscription("orders")])
    with shop.eo.producer("sql://") as producer:
        producer.send_all([order("1"), order("2")])
    leave(shop, statement)
    taken = consumer.receive(5, SECOND)
    assert len(taken) == 2
    leave(shop, statement)
    consumer.extend(taken)
    leave(shop, statement)

    def settled() -> bool:
        consumer.settle([(delivery, Ack()) for delivery in taken])
        with shop.outside.connect() as connection:
            return connection.exec_driver_sql("SELECT count(*) FROM message_queue").scalar_one() == 0

    # a limit that only the COMMIT meets is not tried again, for its work may be done: the messages would come once more
    until(settled, "they are settled")


@pytest.mark.parametrize("left", ["mariadb autocommit"], indirect=True)
def test_on_mariadb_no_statement_of_the_queue_commits_by_itself(left: tuple[Shop, str]) -> None:
    shop, statement = left
    store = shop.eo.stores["default"]
    database = Database(lambda: store.engine, schema=lambda: store.resolved_schema)
    leave(shop, statement)
    with pytest.raises(ZeroDivisionError):
        database.write(lambda connection: [connection.execute(insert(STOCK).values(item=77, amount=0)), 1 // 0])
    with shop.outside.connect() as connection:
        assert connection.execute(select(STOCK.c.item).where(STOCK.c.item == 77)).all() == []


def test_a_database_that_was_read_only_for_a_while_is_sent_to_again(request: pytest.FixtureRequest) -> None:
    """A connection made meanwhile keeps the default that it began with: it is closed, although nobody else had it."""
    for shop in shops(request, "postgres", "sync"):
        name = shop.engine.url.database
        with shop.eo.producer("sql://") as producer:
            producer.send(order("1"))
            run(
                shop,
                f'ALTER DATABASE "{name}" SET default_transaction_read_only = on',
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()",
            )
            with pytest.raises(SendFailed, match="could not be sent"):
                producer.send(order("2"))
            with shop.outside.begin() as connection:
                connection.exec_driver_sql("SET TRANSACTION READ WRITE")
                connection.exec_driver_sql(f'ALTER DATABASE "{name}" RESET default_transaction_read_only')
            producer.send(order("3"))


def test_a_message_is_stored_once_where_its_connection_was_left_changed(request: pytest.FixtureRequest) -> None:
    for shop in shops(request, "sqlite", "sync"):
        with shop.eo.producer("sql://") as producer:
            by_other_code(shop, "PRAGMA query_only = ON")
            producer.send(order("1"))
        with shop.outside.connect() as connection:
            assert connection.exec_driver_sql("SELECT count(*) FROM message_queue").scalar_one() == 1
