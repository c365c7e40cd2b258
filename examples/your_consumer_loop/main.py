"""Entry point 2: the consumer loop that you have, sync and async. It asks one question: may it acknowledge this message?

The list below plays the role of your broker: it redelivers a message until it is acknowledged. `process` never raises because of
an error in a message, a handler or the database. It also schedules nothing: your broker makes the retry.
"""

import asyncio
from collections import deque

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from exactly_once import ExactlyOnce, Message, Reject, Retry

eo = ExactlyOnce(group="billing")


class Base(DeclarativeBase):
    pass


class Invoice(Base):
    __tablename__ = "door2_invoice"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_no: Mapped[str]


moody = {"A-2", "B-2"}  # orders whose first run fails
at_most_three = Retry(immediate=0, max_attempts=3)


@eo.handler("orders", key="order_no", retry=at_most_three)
def invoice(session: Session, order: dict[str, str]) -> None:
    session.add(Invoice(order_no=order["order_no"]))
    trouble(order)


@eo.handler("returns", key="order_no", retry=at_most_three)
async def credit(session: AsyncSession, order: dict[str, str]) -> None:
    session.add(Invoice(order_no=order["order_no"]))
    await session.flush()
    trouble(order)


def trouble(order: dict[str, str]) -> None:
    if "amount" not in order:
        raise Reject("an order without an amount cannot be invoiced")
    if order["order_no"] in moody:
        moody.remove(order["order_no"])
        raise TimeoutError("the tax table was locked")


def brought(topic: str, letter: str) -> deque[Message]:
    bodies = (
        f'{{"order_no": "{letter}-1", "amount": "10"}}',
        f'{{"order_no": "{letter}-1", "amount": "10"}}',  # a copy
        f'{{"order_no": "{letter}-2", "amount": "20"}}',  # fails once
        f'{{"order_no": "{letter}-3"}}',  # poison
    )
    return deque(Message(topic, body.encode(), message_id=f"{letter}{n}") for n, body in enumerate(bodies))


def told(message: Message, outcome: object) -> None:
    print(message.topic, message.message_id, outcome)


def sync_loop(broker: deque[Message]) -> None:
    while broker:
        message = broker.popleft()
        outcome = eo.process(message)
        told(message, outcome.value)
        if not outcome.acknowledge:
            broker.append(message)  # not acknowledged: redeliver it


async def async_loop(broker: deque[Message]) -> None:
    while broker:
        message = broker.popleft()
        outcome = await eo.aprocess(message)
        told(message, outcome.value)
        if not outcome.acknowledge:
            broker.append(message)


if __name__ == "__main__":
    Base.metadata.create_all(next(iter(eo.stores.values())).engine)
    sync_loop(brought("orders", "A"))
    asyncio.run(async_loop(brought("returns", "B")))
