"""The same shop behind the deduplication most of us have written: SELECT, do the work, INSERT.

    if not already_handled(order_no):
        handle(order)
        mark_as_handled(order_no)

The comparison is fair. It uses the order number as its key, not a message id that changes with a resend. The mark has a primary
key. The work itself is one transaction. It acknowledges only after all of this, and gives a failed message back to the broker.
Nothing in it is slowed down. All the same it is wrong, for two reasons:

1. **the race**: two copies of an order are in hand at the same time, in two threads or two processes. Both SELECTs find nothing,
   because neither INSERT has happened yet, and both do the work. One mark then fails on its primary key. By then its work is
   committed, so the error is rightly taken for "another copy has marked it". The window is as long as the work and its commit, a
   few milliseconds. Some 750 of the 5,000 orders have a duplicate close behind them.
2. **the crash**: the process dies between the commit of the work and the commit of the mark. The broker redelivers the message,
   nothing is marked, and the work is done again.

(If the mark comes first, work is lost instead of doubled. Mark and work in one transaction, with the mark inserted first, is
right: that is what exactly_once does.)

It runs over the same transport as the other shop, in a consumer group of its own: `python -m examples.demo.naive`.
"""

import logging
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from queue import Empty, SimpleQueue
from threading import BoundedSemaphore, Event

from sqlalchemy import create_engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Mapped, Session, mapped_column, sessionmaker

from exactly_once.outcome import Ack, Redeliver, Settlement
from exactly_once.transports.contract import Consumer, Delivery, Subscription, Surroundings
from exactly_once.transports.registry import transport_from
from examples.demo.orders import TAG, TOPIC
from examples.demo.shop import Base, OrderCreated, reserve

__all__ = ["HandledOrder", "NaiveShop"]

GROUP = "shop-naive"
THREADS = 8

log = logging.getLogger("naive")


class HandledOrder(Base):
    """The mark of an order that was handled."""

    __tablename__ = "handled_order"
    order_no: Mapped[str] = mapped_column(primary_key=True)


class NaiveShop:
    """SELECT, do the work, INSERT; see the module."""

    def __init__(self, sessions: sessionmaker[Session]) -> None:
        self._sessions = sessions

    def on_message(self, body: bytes) -> None:
        """Handle one message. A normal return acknowledges it."""
        order = OrderCreated.model_validate_json(body)
        if self._already_handled(order.order_no):
            return
        with self._sessions.begin() as session:
            reserve(session, order)
        self._mark_as_handled(order.order_no)

    def _already_handled(self, order_no: str) -> bool:
        with self._sessions() as session:
            return session.get(HandledOrder, order_no) is not None

    def _mark_as_handled(self, order_no: str) -> None:
        try:
            with self._sessions.begin() as session:
                session.add(HandledOrder(order_no=order_no))
        except IntegrityError:
            log.info("order %s was handled by somebody else meanwhile", order_no)


class _Loop:
    """Receives, runs on threads, and settles. Uses only the transports of exactly_once."""

    def __init__(self, consumer: Consumer, shop: NaiveShop) -> None:
        self._consumer, self._shop = consumer, shop
        self._free = BoundedSemaphore(2 * THREADS)
        self._done: SimpleQueue[tuple[Delivery, Settlement] | None] = SimpleQueue()

    def run(self, stopped: Event) -> None:
        with ThreadPoolExecutor(1) as settling:
            settling.submit(self._settle)
            with ThreadPoolExecutor(THREADS) as threads:
                while not stopped.is_set():
                    for delivery in self._receive():
                        threads.submit(self._handle, delivery)
            self._done.put(None)  # all have run

    def _receive(self) -> list[Delivery]:
        self._free.acquire()
        places = 1
        while self._free.acquire(blocking=False):
            places += 1
        received = list(self._consumer.receive(places, timedelta(milliseconds=200)))
        for _ in range(places - len(received)):
            self._free.release()
        return received

    def _handle(self, delivery: Delivery) -> None:
        try:
            self._shop.on_message(delivery.message.body or b"")
        except Exception:
            log.exception("not handled; the broker shall bring it again")
            self._done.put((delivery, Redeliver(timedelta(seconds=1))))
        else:
            self._done.put((delivery, Ack()))
        self._free.release()

    def _settle(self) -> None:
        more = True
        while more:
            taken = [self._done.get()]
            with suppress(Empty):
                while len(taken) < 32:
                    taken.append(self._done.get_nowait())
            finished = [each for each in taken if each is not None]
            more = len(finished) == len(taken)
            if finished:
                self._consumer.settle(finished)


def main() -> None:
    """Consume until SIGTERM."""
    logging.basicConfig(level=logging.WARNING)
    engine = create_engine(os.environ["EXACTLY_ONCE_DATABASE"], pool_size=THREADS + 4)
    transport = transport_from(os.environ["EXACTLY_ONCE_TRANSPORT"], Surroundings(lambda: engine))
    [consumer] = transport.subscribe(GROUP, [Subscription(TOPIC, (TAG,))])
    stopped = Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.set())
    try:
        _Loop(consumer, NaiveShop(sessionmaker(engine, expire_on_commit=False))).run(stopped)
    finally:
        consumer.stop()
        consumer.close()


if __name__ == "__main__":
    main()
