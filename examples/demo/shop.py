"""The shop: its tables, its work for one order, and the handler that exactly_once runs once for each order.

`reserve` is the shop's own code and does not know about messages; the naive consumer calls the same function. No table has a
unique constraint on the order number. Such a constraint would stop the second reservation here, but no constraint can stop the
second `UPDATE stock`, and few shops have one for every effect.

Run by `exactly-once run examples.demo.shop:eo`. The database and the transport come from the environment.
"""

from pydantic import BaseModel
from sqlalchemy import update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from exactly_once import ExactlyOnce
from examples.demo.orders import TAG, TOPIC

__all__ = ["Base", "OrderCreated", "Payment", "Reservation", "Stock", "eo", "reserve", "reserve_stock"]

GROUP = "shop"


class Base(DeclarativeBase):
    """The shop's tables."""


class Stock(Base):
    """How many units of a product are left."""

    __tablename__ = "stock"
    sku: Mapped[str] = mapped_column(primary_key=True)
    left: Mapped[int]


class Reservation(Base):
    """Units set aside for an order."""

    __tablename__ = "reservation"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_no: Mapped[str] = mapped_column(index=True)
    sku: Mapped[str]
    quantity: Mapped[int]


class Payment(Base):
    """Money taken for an order."""

    __tablename__ = "payment"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_no: Mapped[str] = mapped_column(index=True)
    amount_cents: Mapped[int]


class OrderCreated(BaseModel):
    """The body of the message."""

    order_no: str
    sku: str
    quantity: int
    amount_cents: int


def reserve(session: Session, order: OrderCreated) -> None:
    """Reserve units, take them from the stock, and take the money."""
    session.add(Reservation(order_no=order.order_no, sku=order.sku, quantity=order.quantity))
    session.add(Payment(order_no=order.order_no, amount_cents=order.amount_cents))
    session.execute(update(Stock).where(Stock.sku == order.sku).values(left=Stock.left - order.quantity))


eo = ExactlyOnce(group=GROUP)


@eo.handler(TOPIC, tag=TAG, key="order_no")
def reserve_stock(session: Session, order: OrderCreated) -> None:
    """Do the shop's work for an order. The decorator makes it happen once."""
    reserve(session, order)
