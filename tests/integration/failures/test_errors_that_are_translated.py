"""A listener of the application's puts an error of its own class in the place of each of SQLAlchemy's, as oslo.db does.

SQLAlchemy asks no further listener where one raises: what the server did was not seen then, and a deadlock was told as a broken
message. And what we know by the class of an error, a key that is taken, was not known.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event, insert, text, update
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

from exactly_once import Outcome
from exactly_once.database import claim_rows
from exactly_once.errors import SchemaError, TransportError
from exactly_once.transports.contract import Subscription
from exactly_once.transports.sql.transport import SqlTransport
from tests.integration.shop import COLOURS, DIALECTS, GROUP, STOCK, Shop, order, put, shops
from tests.integration.threads import Turn, in_thread
from tests.integration.ways import ALONE, IN_A_LIST, IN_A_STEP, UNDER_A_LEASE, Way

pytestmark = pytest.mark.nightly(meet=2)

P, D, F = Outcome.PROCESSED, Outcome.DUPLICATE, Outcome.FAILED


class DBError(Exception):
    """The application's."""


def raises(context: ExceptionContext) -> None:
    if isinstance(context.sqlalchemy_exception, DBAPIError):
        raise DBError(context.sqlalchemy_exception)


def chains(context: ExceptionContext) -> Any:
    return DBError(context.sqlalchemy_exception) if isinstance(context.sqlalchemy_exception, DBAPIError) else None


HOW: dict[str, tuple[Any, bool]] = {
    "raised by an engine's listener": (raises, False),
    "returned by an engine's listener": (chains, False),
    "raised by a listener of all engines": (raises, True),
}
each_how = pytest.mark.parametrize("how", list(HOW))


@contextmanager
def translated(shop: Shop, how: str) -> Iterator[Engine]:
    """Engines whose listener was there before ours, and an application on them."""
    listener, of_all = HOW[how]
    engine = create_engine(shop.engine.url, pool_size=3)
    async_engine = create_async_engine(shop.async_engine.url, pool_size=3)
    targets: list[Any] = [Engine] if of_all else [engine, async_engine.sync_engine]
    for target in targets:
        event.listen(target, "handle_error", listener, retval=True)
    try:
        shop.fresh_eo(engine, async_engine)
        yield engine
    finally:
        for target in targets:
            event.remove(target, "handle_error", listener)
        engine.dispose()
        shop.await_(async_engine.dispose())


def own_shops(*dialects: str) -> Any:
    grounds = [(dialect, colour) for dialect in dialects for colour in COLOURS]
    return pytest.mark.parametrize("own", grounds, ids="-".join, indirect=True)


@pytest.fixture
def own(request: pytest.FixtureRequest) -> Iterator[Shop]:
    yield from shops(request, *request.param)


@own_shops("postgres", "mariadb")  # SQLite has one writer
@each_how
@pytest.mark.parametrize("way", [ALONE, UNDER_A_LEASE, IN_A_STEP, IN_A_LIST], ids=str)
@pytest.mark.parametrize("swallowed", [True, False], ids=["swallowed", "let out"])
def test_a_deadlock_is_run_again_at_once(own: Shop, how: str, way: Way, swallowed: bool) -> None:
    shop = own
    with shop.outside.begin() as connection:
        connection.execute(insert(STOCK), [{"item": item, "amount": 9} for item in (1, 2)])
    handler_has_one, other_has_two = Turn(), Turn()
    runs: list[Any] = []

    def take(session: Any, item: int) -> None:
        session.execute(update(STOCK).where(STOCK.c.item == item).values(amount=STOCK.c.amount - 1))

    def other() -> None:
        with shop.outside.begin() as connection:
            if shop.dialect == "postgres":  # the first to look is the victim
                connection.execute(text("SET LOCAL deadlock_timeout = '60s'"))
            for item in range(100, 400):  # elsewhere it is the one that has written less
                connection.execute(insert(STOCK).values(item=item, amount=0))
            take(connection, 2)
            other_has_two.come()
            handler_has_one.wait()
            take(connection, 1)

    def do(session: Session, no: Any) -> None:
        runs.append(no)
        put(session, f"{no} before")
        if len(runs) == 1:
            other_has_two.wait()
            take(session, 1)
            handler_has_one.come()
            try:
                take(session, 2)
            except DBError:
                if not swallowed:
                    raise
        put(session, f"{no} after")

    with translated(shop, how):
        way.handles(shop, do)
        with in_thread(other):
            ends = way.attempted(shop, [order(1)])
        if swallowed and ends == [F]:  # the transaction is lost, and the handler did not say so
            assert shop.effects() == []
            ends = way.attempted(shop, [order(1, attempt=2)])
        assert ends == [P]
        assert shop.effects() == ["1 before", "1 after"]
        assert way.attempted(shop, [order(1, attempt=3)]) == [D]
    assert shop.effects() == ["1 before", "1 after"]


@own_shops("postgres", "mariadb")
def test_what_a_handler_raises_from_a_drivers_error_is_its_own_word(own: Shop) -> None:
    shop, runs = own, []
    slow = {
        "postgres": ("SET LOCAL statement_timeout = 50", "SELECT pg_sleep(5)"),
        "mariadb": ("SET innodb_lock_wait_timeout = 0", "SELECT item FROM stock WHERE item = 1 FOR UPDATE"),
    }[shop.dialect]

    def do(session: Session, no: Any) -> None:
        runs.append(no)
        put(session, str(no))
        session.execute(text(slow[0]))
        try:
            session.execute(text(slow[1]))
        except DBError as error:
            raise LookupError("the stock is locked") from error.__cause__

    with shop.outside.begin() as connection:
        connection.execute(insert(STOCK).values(item=1, amount=9))
        connection.execute(update(STOCK).values(amount=8))
        with translated(shop, "raised by an engine's listener"):
            ALONE.handles(shop, do)
            shop.process(order(1))
            assert shop.failure().error_class == "LookupError"
    assert len(runs) == 1


@own_shops(*DIALECTS)
@each_how
def test_a_claim_that_stands_is_no_error(own: Shop, how: str) -> None:
    """What a person does with a broken message, and what a lease leaves: a row of ours that may be there."""
    values = {
        "consumer_group": GROUP,
        "handler": "handler",
        "business_key": "1",
        "fingerprint": b"x" * 33,
        "retry_times": 0,
    }
    with translated(own, how) as engine, engine.begin() as connection:
        assert claim_rows.write(connection, own.tables.idempotent, values)
        assert not claim_rows.write(connection, own.tables.idempotent, values)


@own_shops(*DIALECTS)
@each_how
def test_the_broker_in_a_table_survives_an_error_of_its_database(own: Shop, how: str) -> None:
    with translated(own, how) as engine:
        broker = SqlTransport(lambda: engine)
        [consumer] = broker.subscribe(GROUP, [Subscription("orders")])
        with own.outside.begin() as connection:
            connection.execute(text("ALTER TABLE message_queue RENAME TO message_queue_away"))
        [answer] = broker.producer().send([order(1)])
        assert isinstance(
            answer, SchemaError | TransportError
        )  # where the look at the tables is answered, it says which
        assert consumer.receive(1, timedelta(seconds=0.1)) == []
        with own.outside.begin() as connection:
            connection.execute(text("ALTER TABLE message_queue_away RENAME TO message_queue"))
        broker.producer().send([order(1)])
        assert len(consumer.receive(1, timedelta(seconds=5))) == 1
        consumer.close()
