"""The README's Python does what the README says, with only the shop's own definitions supplied."""

import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel
from sqlalchemy import Engine, create_engine, select, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

import exactly_once.alembic
from exactly_once import ExactlyOnce, Message, Outcome
from exactly_once.testing import bound

README = (Path(__file__).parents[3] / "README.md").read_text()
DOOR_1, DOOR_2, DOOR_3, LEASED = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


class Base(DeclarativeBase):
    pass


class Stock(Base):
    __tablename__ = "stock"
    sku: Mapped[str] = mapped_column(primary_key=True)
    left: Mapped[int]


class Reservation(Base):
    __tablename__ = "reservation"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_no: Mapped[str]


class Ordered(Base):
    __tablename__ = "ordered"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_no: Mapped[str]
    receipt_no: Mapped[str | None]


class Hold(BaseModel):
    cents: int


class Receipt(BaseModel):
    receipt_no: str


def create_order(session: Session, order: "OrderCreated", hold: Hold) -> int:
    made = Ordered(order_no=order.order_no)
    session.add(made)
    session.flush()
    return made.id


class OrderCreated(BaseModel):
    order_no: str
    sku: str
    quantity: int


BODY = b'{"order_no": "A-1", "sku": "chair", "quantity": 2}'


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = create_engine(f"sqlite:///{tmp_path / 'shop.db'}")
    exactly_once.alembic.upgrade(engine)
    Base.metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        session.add(Stock(sku="chair", left=10))
    yield engine
    engine.dispose()


def reservations(engine: Engine) -> list[str]:
    with Session(engine) as session:
        return list(session.scalars(select(Reservation.order_no)))


def door_3() -> Any:
    names: dict[str, Any] = {"OrderCreated": OrderCreated, "Reservation": Reservation, "Stock": Stock}
    exec(compile(DOOR_3, "README.md", "exec"), names)
    return SimpleNamespace(**names)


def test_door_1_reserves_once_and_acknowledges_both(engine: Engine) -> None:
    acknowledged = []
    names: dict[str, Any] = {
        "Session": Session,
        "engine": engine,
        "eo": ExactlyOnce(engine, group="inventory"),
        "order": SimpleNamespace(no="A-1"),
        "reserve": lambda session, order: session.add(Reservation(order_no=order.no)),
        "consumer": SimpleNamespace(ack=acknowledged.append),
        "message": "the message",
    }
    for _ in range(2):
        exec(compile(DOOR_1, "README.md", "exec"), names)
    assert reservations(engine) == ["A-1"]
    assert len(acknowledged) == 2


def test_door_2_says_success_for_the_first_and_for_the_copy(engine: Engine) -> None:
    received = SimpleNamespace(  # a message as the official client hands it out
        corrupted=False, topic="orders", body=BODY, tag="created", keys={"A-1"}, message_group=None, properties={},
        message_id="01AB", born_timestamp=1_700_000_000_000, delivery_attempt=1,
    )  # fmt: skip
    shop = door_3()
    names: dict[str, Any] = {"Message": Message, "SUCCESS": "success", "LATER": "later"}
    exec(compile("def on_message(eo, m):\n    " + DOOR_2.strip(), "README.md", "exec"), names)
    with bound(shop.eo, engine) as eo:
        assert [names["on_message"](eo, received) for _ in range(2)] == ["success", "success"]
    assert reservations(engine) == ["A-1"]


def test_door_3s_handler_is_registered_and_takes_effect_once(engine: Engine) -> None:
    shop = door_3()
    message = Message("orders", BODY, tag="created", key="A-1")
    with bound(shop.eo, engine) as eo:
        assert [plan.name for plan in eo.plans] == ["reserve_stock"]
        assert [eo.process(message) for _ in range(2)] == [Outcome.PROCESSED, Outcome.DUPLICATE]
    assert reservations(engine) == ["A-1"]
    with Session(engine) as session:
        assert session.get_one(Stock, "chair").left == 8


def test_door_3s_handler_stays_a_plain_function(engine: Engine) -> None:
    with Session(engine) as session, session.begin():
        door_3().reserve_stock(session, OrderCreated.model_validate_json(BODY), Message("orders", BODY))
    assert reservations(engine) == ["A-1"]


def test_the_handler_under_a_lease_repeats_no_finished_step(engine: Engine) -> None:
    calls: list[tuple[Any, ...]] = []
    names: dict[str, Any] = {
        "eo": ExactlyOnce(engine, group="checkout"),
        "timedelta": timedelta,
        "Session": Session,
        "update": update,
        "OrderPlaced": OrderCreated,
        "Order": Ordered,
        "Hold": Hold,
        "Receipt": Receipt,
        "inventory": SimpleNamespace(lock=lambda *given: (calls.append(("lock", *given)), Hold(cents=100))[1]),
        "bank": SimpleNamespace(charge=lambda *given: (calls.append(("charge", *given)), Receipt(receipt_no="R-1"))[1]),
        "mail": SimpleNamespace(send=lambda *given: (calls.append(("mail", *given)), len(calls) == 3 and 1 / 0)[0]),
        "create": create_order,
    }
    exec(compile(LEASED, "README.md", "exec"), names)
    message = Message("orders", BODY, tag="placed", key="A-1")
    eo: ExactlyOnce = names["eo"]
    assert [eo.process(message) for _ in range(2)] == [Outcome.PROCESSED, Outcome.DUPLICATE]
    assert [call[0] for call in calls] == ["lock", "charge", "mail", "mail"]
    assert calls[2] == calls[3]
    with Session(engine) as session:
        assert session.scalars(select(Ordered.receipt_no)).all() == ["R-1"]


def test_the_producers_line_returns_a_receipt() -> None:
    [line] = re.findall(r"`(with eo\.producer\(url\) as p: .*?)`", README)
    names: dict[str, Any] = {
        "eo": ExactlyOnce(),
        "url": "memory://readme",
        "Message": Message,
        "body": BODY,
    }
    exec(compile(line.replace("p.send", "receipt = p.send"), "README.md", "exec"), names)
    assert names["receipt"].topic == "orders"
    assert names["receipt"].message_id
