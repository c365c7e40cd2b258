"""Entry point 3: the worker. Two handlers on one topic, a pydantic body, Reject and RetryLater. The broker is `sql://`.

Each handler has its own claim and its own transaction: one may fail while the other is done. `python main.py` sends a few orders,
works until nothing is left, and prints what is in the database. In production: `exactly-once run main:eo`.
"""

from datetime import timedelta

from pydantic import BaseModel
from sqlalchemy import func, select, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from exactly_once import ExactlyOnce, Message, Reject, RetryLater, keys

eo = ExactlyOnce(group="shop")


class Base(DeclarativeBase):
    pass


class Stock(Base):
    __tablename__ = "door3_stock"
    sku: Mapped[str] = mapped_column(primary_key=True)
    left: Mapped[int]


class Letter(Base):
    __tablename__ = "door3_letter"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_no: Mapped[str]
    text: Mapped[str]


class Order(BaseModel):
    order_no: str
    sku: str
    quantity: int


@eo.handler("orders", tag="created", key="order_no")
def reserve_stock(session: Session, order: Order) -> None:
    """Runs once for each order, however often its message comes."""
    if order.quantity < 1:
        raise Reject(f"{order.quantity} pieces cannot be reserved")  # no retry can help: kept for a person at once
    stock = session.get(Stock, order.sku)
    if stock is None:
        raise RetryLater(timedelta(seconds=0.5))  # the catalogue may be late: try again
    session.execute(update(Stock).where(Stock.sku == order.sku).values(left=Stock.left - order.quantity))


@eo.handler("orders", tag=["created", "cancelled"], key=(keys.tag(), "order_no"))
def write_letter(session: Session, order: Order, message: Message) -> None:
    """An order has two events: the tag is part of the key, or the second event would be taken for a duplicate."""
    session.add(Letter(order_no=order.order_no, text=f"Your order was {message.tag}."))


@eo.handler("catalogue", key="sku")
def list_article(session: Session, article: dict[str, str]) -> None:
    session.add(Stock(sku=article["sku"], left=10))


def order(tag: str, order_no: str, sku: str, quantity: int) -> Message:
    return Message("orders", Order(order_no=order_no, sku=sku, quantity=quantity).model_dump_json().encode(), tag=tag)


def main() -> None:
    Base.metadata.create_all(next(iter(eo.stores.values())).engine)
    with eo.producer("sql://") as producer:
        producer.send(Message("catalogue", b'{"sku": "chair"}'))
        producer.send_all([order("created", "A-1", "chair", 2)] * 2)  # a copy
        producer.send(order("cancelled", "A-1", "chair", 2))
        producer.send(order("created", "A-2", "table", 1))  # a table is listed later
        producer.send(order("created", "A-3", "chair", 0))
        producer.send(Message("catalogue", b'{"sku": "table"}'), delay=timedelta(seconds=1))
    with eo.worker("sql://") as worker:
        worker.drain()
    with Session(next(iter(eo.stores.values())).engine) as session:
        for stock in session.scalars(select(Stock).order_by(Stock.sku)):
            print(f"{stock.left} of {stock.sku} left")
        letters = select(Letter.order_no, Letter.text, func.count()).group_by(Letter.order_no, Letter.text)
        for number, text, count in session.execute(letters.order_by(Letter.order_no, Letter.text)):
            print(f"{number}: {count} letter: {text}")


if __name__ == "__main__":
    main()
