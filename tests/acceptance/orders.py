"""What an order leaves in the database: a row of its own, and one piece less of the stock."""

from typing import Final

from sqlalchemy import Engine, String, Update, select, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

_STOCKED: Final = 10_000


class Base(DeclarativeBase):
    pass


class Reservation(Base):
    __tablename__ = "order_reservation"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_no: Mapped[str] = mapped_column(String(64))


class Stock(Base):
    __tablename__ = "order_stock"
    sku: Mapped[str] = mapped_column(String(64), primary_key=True)
    left: Mapped[int]


def open_shop(engine: Engine) -> None:
    """Make the tables, and fill the stock."""
    Base.metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        session.add(Stock(sku="one", left=_STOCKED))


def take(pieces: int = 1) -> Update:
    """The statement that takes them from the stock."""
    return update(Stock).where(Stock.sku == "one").values(left=Stock.left - pieces)


def ledger(engine: Engine) -> tuple[list[str], int]:
    """The orders that are reserved, and the pieces that were taken."""
    with Session(engine) as session:
        orders = sorted(session.scalars(select(Reservation.order_no)))
        return orders, _STOCKED - session.get_one(Stock, "one").left
