"""A FastAPI application that stores an order and then sends it, and the worker that handles it.

There is no outbox here: the order is committed first and its message is sent after. What that leaves open:

* A crash between commit and send: the order is stored, and nobody is told. Here the customer's repeated POST mends it,
  because it finds the order and sends again; without a repeat the message is lost.
* A send whose receipt never came is sent again, and so is a repeated POST: the same key, so the handler runs once.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel
from sqlalchemy import create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from exactly_once import ExactlyOnce, Message, SendFailed

engine = create_engine(os.environ["EXACTLY_ONCE_DATABASE"])
eo = ExactlyOnce(engine, group="warehouse")


class Base(DeclarativeBase):
    pass


class OrderRow(Base):
    __tablename__ = "fastapi_order"
    order_no: Mapped[str] = mapped_column(primary_key=True)
    quantity: Mapped[int]


class Parcel(Base):
    __tablename__ = "fastapi_parcel"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_no: Mapped[str]
    pieces: Mapped[int]


class Order(BaseModel):
    order_no: str
    quantity: int


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    Base.metadata.create_all(engine)
    with eo.producer() as producer:  # to EXACTLY_ONCE_TRANSPORT; one for the whole application
        app.state.producer = producer
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/orders", status_code=201)
def create_order(order: Order) -> dict[str, str]:
    # not in a dependency with `yield`: FastAPI ends it after the answer is sent, and a COMMIT that is refused would have been
    # answered with 201. Depends(a_session, scope="function") ends before it, as this block does
    with Session(engine) as session, session.begin():
        stored = session.get(OrderRow, order.order_no)
        if stored is None:
            session.add(OrderRow(order_no=order.order_no, quantity=order.quantity))
        elif stored.quantity != order.quantity:
            raise HTTPException(409, "this order number is taken by another order")
    # committed; from here to the receipt is the gap this module's first lines speak of
    body = order.model_dump_json().encode()
    try:
        app.state.producer.send(Message("orders", body, tag="created", key=order.order_no))
    except SendFailed as error:
        raise HTTPException(503, "the order is stored, its message is not sent: please repeat") from error
    return {"order_no": order.order_no}


@app.get("/parcels")
def parcels() -> list[str]:
    with Session(engine) as session:
        return [
            f"{parcel.order_no}: {parcel.pieces}"
            for parcel in session.scalars(select(Parcel).order_by(Parcel.order_no))
        ]


@eo.handler("orders", tag="created", key="order_no")
def pack(session: Session, order: Order) -> None:
    """Runs in the worker beside: exactly-once run main:eo."""
    session.add(Parcel(order_no=order.order_no, pieces=order.quantity))
