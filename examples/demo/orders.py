"""The stream of the demonstration: orders, duplicates, resends, and the true numbers. Sends nothing.

The truth is known because the orders are made here; no database is asked. Everything follows from a seed, so two runs send the
same messages.

Which messages repeat, and what causes that in real life:

* **duplicates**, 30 % of the orders: the same bytes a second time. Half of them come close behind the first, as after a double
  click or a web server's retry. The others come up to some 1,500 messages later, as after an upstream job that ran twice.
* **resends**, 1 %: the producer got no receipt in time and sent again. The event is the same, but every id of the sending is new,
  and the JSON is written again, here with its members in another order.

A third kind of repeat is not made here: the broker redelivers what a killed worker had in hand.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from exactly_once import Message

__all__ = ["PRODUCTS", "STOCK", "TAG", "TOPIC", "Order", "Stream", "Truth"]

TOPIC: Final = "orders"
TAG: Final = "created"
PRODUCTS: Final[dict[str, int]] = {
    "espresso": 250,
    "filter": 320,
    "flat-white": 380,
    "mocha": 420,
    "cold-brew": 450,
    "matcha": 480,
}
"""Prices in cents."""
STOCK: Final = 10_000
"""Units of each product before the first order."""

DUPLICATES: Final = 0.30
RESENDS: Final = 0.01
CLOSE: Final = 6  # the most messages between an order and a duplicate close behind it
FAR: Final = 1500


@dataclass(frozen=True, slots=True)
class Order:
    """One order, as the customer placed it."""

    order_no: str
    sku: str
    quantity: int
    amount_cents: int

    def message(self, request_id: str, *, anew: bool = False) -> Message:
        """Return the message about this order. `anew` writes the same event with its members in another order."""
        event = {
            "order_no": self.order_no,
            "sku": self.sku,
            "quantity": self.quantity,
            "amount_cents": self.amount_cents,
        }
        body = json.dumps(dict(reversed(event.items())) if anew else event).encode()
        return Message(TOPIC, body, tag=TAG, key=self.order_no, properties={"request_id": request_id})


@dataclass(frozen=True, slots=True)
class Truth:
    """What must be in the ledger after these orders, each handled once."""

    orders: int
    units: dict[str, int]
    cents: int


@dataclass(frozen=True, slots=True)
class Stream:
    """The messages in the order in which they are sent, and the true numbers."""

    messages: Sequence[Message]
    truth: Truth
    duplicates: int
    resends: int
    orders_by: Sequence[int]
    """How many different orders are among the first n + 1 messages."""

    @classmethod
    def of(cls, orders: int, *, seed: int = 20) -> "Stream":
        """Make a stream with so many orders."""
        dice = random.Random(seed)
        placed: list[tuple[float, Order, Message]] = []
        made: list[Order] = []
        duplicates = resends = 0
        for number in range(orders):
            sku = dice.choice(list(PRODUCTS))
            quantity = dice.randint(1, 4)
            order = Order(f"A-{number + 1:06d}", sku, quantity, quantity * PRODUCTS[sku])
            made.append(order)
            first = order.message(_id(dice))
            placed.append((number, order, first))
            if dice.random() < DUPLICATES:
                duplicates += 1
                behind = dice.uniform(0, CLOSE) if dice.random() < 0.5 else dice.uniform(CLOSE, FAR)
                placed.append((number + behind, order, first))
            if dice.random() < RESENDS:
                resends += 1
                placed.append((number + dice.uniform(0, CLOSE), order, order.message(_id(dice), anew=True)))
        placed.sort(key=lambda one: one[0])  # stable: an order comes before its repeats
        seen: set[str] = set()
        orders_by = []
        for _, order, _ in placed:
            seen.add(order.order_no)
            orders_by.append(len(seen))
        units = dict.fromkeys(PRODUCTS, 0)
        for order in made:
            units[order.sku] += order.quantity
        truth = Truth(len(made), units, sum(order.amount_cents for order in made))
        return cls([message for *_, message in placed], truth, duplicates, resends, orders_by)


def _id(dice: random.Random) -> str:
    return str(UUID(int=dice.getrandbits(128), version=4))
