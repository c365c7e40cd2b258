"""A FastAPI application that stores an order and then sends it, and the worker that handles it.

There is no outbox here: the order is committed first, and its message is sent afterwards. Two cases to know:

* After a crash between commit and send, the order is stored but no message was sent. Here a repeated POST of the customer repairs
  it, because it finds the order and sends again. Without a repeated POST the message is lost.
* A message whose receipt never came is sent again, also by a repeated POST. It has the same key, so the handler runs once.
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
    with eo.producer() as producer:  # sends to EXACTLY_ONCE_TRANSPORT; one producer for the whole application
        app.state.producer = producer
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/orders", status_code=201)
def create_order(order: Order) -> dict[str, str]:
    # not in a dependency with `yield`: FastAPI ends it after the response is sent, so a refused COMMIT would already have been
    # answered with 201. Depends(a_session, scope="function") ends before the response, like this block
    with Session(engine) as session, session.begin():
        stored = session.get(OrderRow, order.order_no)
        if stored is None:
            session.add(OrderRow(order_no=order.order_no, quantity=order.quantity))
        elif stored.quantity != order.quantity:
            raise HTTPException(409, "this order number is taken by another order")
    # committed; a crash between here and the receipt is the first case above
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
    """Runs in the worker, a process of its own: exactly-once run main:eo."""
    session.add(Parcel(order_no=order.order_no, pieces=order.quantity))
