"""The work that is measured: one ORM insert and one ORM-enabled update for each message, with and without deduplication.

`reserve` is the handler, and `reserve_all` does the same for a list of orders, in two statements. There are three ways to run
`reserve` for a message of `orders`:

* `Ours`: `eo.process(message)`, the whole path of an attempt: body, key and fingerprint, claim, handler, COMMIT.
* `HandWritten`: what you would write: `insert(Seen).on_conflict_do_nothing()` first, in the handler's own session, then the
  handler, then COMMIT. It is right, as far as it goes.
* `Bare`: no deduplication at all. It is wrong, and shown as information.
* `Floor`: `Bare` with the two texts that PostgreSQL gets for a message of ours, and nothing else of ours: no key is read, no
  transaction watched. What that costs is the server's, and the least that a claim in the handler's transaction can cost.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from time import perf_counter
from typing import Any, Final

from sqlalchemy import Engine, String, delete, func, insert, select, text, update
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

import exactly_once.alembic
from benchmarks.measure import WrongRows
from benchmarks.orders import SKUS, TOPIC, messages
from exactly_once import ExactlyOnce, Message, Outcome
from exactly_once.database.dialects.postgresql import CLAIM, TYPES
from exactly_once.database.dialects.postgresql_settings import DURABLE
from exactly_once.database.dialects.postgresql_wire import send

__all__ = [
    "RESERVATIONS",
    "STOCK_TAKEN",
    "Bare",
    "Floor",
    "HandWritten",
    "Ours",
    "application",
    "clear",
    "make_tables",
    "require",
    "reserve",
    "reserve_all",
]

STOCK: Final = 1_000_000_000


class Base(DeclarativeBase):
    """The tables."""


class Stock(Base):
    """How many units are left."""

    __tablename__ = "stock"
    sku: Mapped[str] = mapped_column(String(64), primary_key=True)
    left: Mapped[int]


class Reservation(Base):
    """Units set aside."""

    __tablename__ = "reservation"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_no: Mapped[str] = mapped_column(String(64))
    quantity: Mapped[int]


class Seen(Base):
    """The hand-written memory of what was handled."""

    __tablename__ = "seen"
    order_no: Mapped[str] = mapped_column(String(64), primary_key=True)
    seen_at: Mapped[datetime] = mapped_column(server_default=func.now())


def reserve(session: Session, order: dict[str, Any]) -> None:
    """Handle one order: one insert through the ORM, one update."""
    session.add(Reservation(order_no=order["order_no"], quantity=order["quantity"]))
    session.execute(update(Stock).where(Stock.sku == order["sku"]).values(left=Stock.left - order["quantity"]))


RESERVATIONS: Final = (
    "INSERT INTO reservation (order_no, quantity)"
    " SELECT * FROM unnest(CAST(:order_nos AS text[]), CAST(:quantities AS integer[]))"
)
# locks the rows in one order, whatever the plan is: two batches that need the same rows wait, but cannot deadlock
STOCK_TAKEN: Final = (
    "WITH wanted AS (SELECT sku, sum(quantity) AS quantity"
    " FROM unnest(CAST(:skus AS text[]), CAST(:quantities AS integer[])) AS ordered (sku, quantity) GROUP BY sku),"
    " locked AS (SELECT stock.sku FROM stock JOIN wanted ON wanted.sku = stock.sku ORDER BY stock.sku FOR UPDATE OF stock)"
    ' UPDATE stock SET "left" = stock."left" - wanted.quantity FROM wanted JOIN locked ON locked.sku = wanted.sku'
    " WHERE stock.sku = wanted.sku"
)
_RESERVATIONS, _STOCK_TAKEN = text(RESERVATIONS), text(STOCK_TAKEN)


def reserve_all(session: Session, orders: list[dict[str, Any]]) -> None:
    """Handle a list of orders: one INSERT of arrays, and one UPDATE that subtracts the total from each stock row."""
    quantities = [order["quantity"] for order in orders]
    session.execute(_RESERVATIONS, {"order_nos": [order["order_no"] for order in orders], "quantities": quantities})
    session.execute(_STOCK_TAKEN, {"skus": [order["sku"] for order in orders], "quantities": quantities})


def make_tables(engine: Engine, *, skus: int = SKUS) -> None:
    """Make exactly_once's tables and the shop's."""
    exactly_once.alembic.upgrade(engine)
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(insert(Stock), [{"sku": f"sku-{n}", "left": STOCK} for n in range(skus)])


def clear(engine: Engine) -> None:
    """Delete what the work has written."""
    with engine.begin() as connection:
        connection.execute(delete(Reservation))
        connection.execute(update(Stock).values(left=STOCK))


def require(engine: Engine, orders: int) -> None:
    """Raise `WrongRows` unless each of so many orders has exactly one reservation and its unit of stock."""
    with Session(engine) as session:
        rows, different = session.execute(
            select(func.count(), func.count(Reservation.order_no.distinct())).select_from(Reservation)
        ).one()
        gone = int(session.scalar(select(func.sum(STOCK - Stock.left))) or 0)
    if not rows == different == orders == gone:
        raise WrongRows(
            f"{orders} orders were handled, but there are {rows} reservations of {different} orders, and"
            f" {gone} units are gone"
        )


def application(
    database: Any,
    *,
    topic: str = TOPIC,
    group: str = "benchmark",
    cheap: bool = False,
    batch: int | None = None,
    batch_order: str | None = None,
    in_sets: bool = False,
) -> ExactlyOnce:
    """Return an application with the one handler.

    Args:
        database: Its database.
        topic: Its topic.
        group: The consumer group.
        cheap: The handler does nothing.
        batch: The messages of one commit. None: each has its own.
        batch_order: The path in the body by which a batch is sorted.
        in_sets: The handler takes a whole batch at once.
    """
    eo = ExactlyOnce(database, group=group)

    def reserve_stock(session: Session, order: dict[str, Any]) -> None:
        reserve(session, order)

    def reserve_many(session: Session, orders: list[dict[str, Any]]) -> None:
        reserve_all(session, orders)

    def nothing(session: Session, order: dict[str, Any]) -> None:
        pass

    if in_sets:
        eo.batch_handler(topic, key="order_no", batch=batch or 1)(reserve_many)
    else:
        handler = nothing if cheap else reserve_stock
        eo.handler(topic, key="order_no", batch=batch, batch_order=batch_order)(handler)
    with _nothing_set():
        assert eo.config.group.value == group  # reads the settings now: only the code says what is measured
    return eo


@contextmanager
def _nothing_set() -> Iterator[None]:
    """Hide the settings in the environment, so that they cannot change what is measured."""
    hidden = {name: value for name, value in os.environ.items() if name.startswith("EXACTLY_ONCE_")}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


class Ours:
    """Runs messages through `eo.process`."""

    def __init__(self, url: str) -> None:
        self._eo = application(url)
        self.handled: list[Message] = []

    def first(self, how_many: int) -> float:
        """Handle so many new messages and return the seconds it took."""
        fresh = messages(how_many)
        self.handled = fresh
        return self._run(fresh, Outcome.PROCESSED)

    def again(self, how_many: int) -> float:
        """Handle the latest messages again."""
        return self._run(self.handled[:how_many], Outcome.DUPLICATE)

    def _run(self, given: Sequence[Message], expected: Outcome) -> float:
        process = self._eo.process
        began = perf_counter()
        outcomes = [process(message) for message in given]
        took = perf_counter() - began
        if any(outcome is not expected for outcome in outcomes):
            raise WrongRows(f"not every message was {expected.value}")
        return took


class HandWritten:
    """Runs messages by hand-written code."""

    def __init__(self, engine: Engine) -> None:
        self._sessions = sessionmaker(engine, expire_on_commit=False)
        self.handled: list[Message] = []

    def process(self, message: Message) -> bool:
        """Handle a message, and return whether it was new."""
        order = json.loads(message.body or b"")
        with self._sessions.begin() as session:
            statement = postgresql.insert(Seen).values(order_no=order["order_no"]).on_conflict_do_nothing()
            # RETURNING, because `rowcount` of an ORM insert is always -1, and every duplicate would run
            if session.scalar(statement.returning(Seen.order_no)) is None:
                return False
            reserve(session, order)
        return True

    def first(self, how_many: int) -> float:
        """Handle so many new messages and return the seconds it took."""
        self.handled = messages(how_many)
        return self._run(self.handled, True)

    def again(self, how_many: int) -> float:
        """Handle the latest messages again."""
        return self._run(self.handled[:how_many], False)

    def _run(self, given: Sequence[Message], expected: bool) -> float:
        began = perf_counter()
        outcomes = [self.process(message) for message in given]
        took = perf_counter() - began
        if any(outcome is not expected for outcome in outcomes):
            raise WrongRows("the hand-written deduplication took a message for what it is not")
        return took


class Bare:
    """Runs messages without deduplication."""

    def __init__(self, engine: Engine) -> None:
        self._sessions = sessionmaker(engine, expire_on_commit=False)

    def first(self, how_many: int) -> float:
        """Handle so many new messages and return the seconds it took."""
        fresh = messages(how_many)
        began = perf_counter()
        for message in fresh:
            order = json.loads(message.body or b"")
            with self._sessions.begin() as session:
                reserve(session, order)
        return perf_counter() - began


class Floor:
    """Sends what a claim sends, around the same work, on PostgreSQL."""

    def __init__(self, engine: Engine, table: str = "public.message_idempotent") -> None:
        self._sessions = sessionmaker(engine, expire_on_commit=False)
        claim = (
            "BEGIN;SET LOCAL lock_timeout = 2000;EXECUTE floor('benchmark', 'floor', '%s', NULL, NULL,"
            " decode('%s', 'hex'), 0, '%s', NULL);SET LOCAL lock_timeout = DEFAULT"
        )
        self._prepare = f"PREPARE floor({TYPES}) AS {_numbered(CLAIM.replace('{table}', table))}".encode()
        self._claim, self._commit = claim, (DURABLE + "COMMIT").encode()
        self._prepared: set[int] = set()

    def first(self, how_many: int) -> float:
        """Handle so many new messages and return the seconds it took."""
        fresh = messages(how_many)
        began = perf_counter()
        for message in fresh:
            order = json.loads(message.body or b"")
            with self._sessions() as session:
                driver: Any = session.connection().connection.dbapi_connection
                if id(driver) not in self._prepared:
                    send(driver, self._prepare)
                    self._prepared.add(id(driver))
                send(driver, (self._claim % (order["order_no"], "00" * 32, "0" * 32)).encode())
                reserve(session, order)
                session.flush()
                send(driver, self._commit)
                session.commit()
        return perf_counter() - began


def _numbered(claim: str) -> str:
    names = ("group", "handler", "key", "message_id", "content", "fingerprint", "retry_times", "owner", "born_at")
    for number, name in enumerate(names, 1):
        claim = claim.replace("{" + name + "}", f"${number}")
    return claim
