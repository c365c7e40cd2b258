"""The messages that are handled: orders as JSON, each with a number of its own and one stock row."""

import json
import os
from collections.abc import Iterator
from hashlib import blake2b
from itertools import count, islice
from random import Random
from typing import Final

from exactly_once import Message

__all__ = ["SKUS", "TOPIC", "messages"]

SKUS: Final = 16
TOPIC: Final = "orders"

_numbers = count(1)
_decks: dict[int, Iterator[int]] = {}


def _shuffled(size: int) -> Iterator[int]:
    dice, order = Random(os.getpid()), list(range(size))
    while True:
        dice.shuffle(order)
        yield from order


def messages(
    how_many: int, *, topic: str = TOPIC, skus: int = SKUS, maker: str = "A", scattered: bool = False
) -> list[Message]:
    """Return messages of as many new orders.

    Args:
        how_many: How many.
        topic: Their topic.
        skus: How many stock rows they are spread over, in an order shuffled anew each time all had their turn.
        maker: Begins the order numbers: processes that work side by side have one each.
        scattered: The order numbers come in no order, as UUIDs do: their keys go all over an index.
    """
    deck = _decks.setdefault(skus, _shuffled(skus))
    made = []
    for number, sku in zip(islice(_numbers, how_many), deck, strict=False):
        order_no = f"{maker}-{number:09d}"
        if scattered:
            order_no = blake2b(order_no.encode(), digest_size=12).hexdigest()
        order = {"order_no": order_no, "sku": f"sku-{sku}", "quantity": 1, "note": "x" * 40}
        body = json.dumps(order).encode()
        made.append(Message(topic, body, key=order_no, message_id=f"{number:032x}"))
    return made
