"""Entry point 1: a claim in the transaction that you have. Nothing else of your program changes.

The claim and the order's effects are one commit: a crash between them leaves neither. Acknowledge after the commit.
"""

import os

from sqlalchemy import create_engine, func, select, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from exactly_once import ExactlyOnce, PayloadConflict

eo = ExactlyOnce(group="inventory")
engine = create_engine(os.environ["EXACTLY_ONCE_DATABASE"])


class Base(DeclarativeBase):
    pass


class Stock(Base):
    __tablename__ = "door1_stock"
    sku: Mapped[str] = mapped_column(primary_key=True)
    left: Mapped[int]


class Reservation(Base):
    __tablename__ = "door1_reservation"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_no: Mapped[str]


def reserve(session: Session, order_no: str) -> None:
    """The work of the shop. It does not know about messages."""
    session.add(Reservation(order_no=order_no))
    session.execute(update(Stock).where(Stock.sku == "chair").values(left=Stock.left - 1))


def on_message(order_no: str, body: bytes) -> str:
    """What a consumer does with one delivery. When this returns, the consumer may acknowledge it."""
    with Session(engine) as session, session.begin():
        # payload= is optional: with it, another body with a known key is an error, and not a duplicate
        if not eo.claim(session, "reserve_stock", order_no, payload=body):
            return "done before"
        reserve(session, order_no)
    return "reserved"


def main() -> None:
    Base.metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        if session.get(Stock, "chair") is None:
            session.add(Stock(sku="chair", left=10))
    for order_no, body in [
        ("A-1", b'{"quantity": 1}'),
        ("A-2", b'{"quantity": 1}'),
        ("A-1", b'{"quantity": 1}'),  # the broker redelivers it
    ]:
        print(order_no, on_message(order_no, body))
    try:
        on_message("A-2", b'{"quantity": 7}')  # another order with a known number: not a duplicate
    except PayloadConflict:
        print("A-2 refused: known with another payload")
    with Session(engine) as session:
        print("reservations:", session.scalar(select(func.count()).select_from(Reservation)))
        print("chairs left:", session.get_one(Stock, "chair").left)


if __name__ == "__main__":
    main()
