"""The messages: orders as JSON, each with a number of its own and one stock row."""

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
    """Return messages of new orders.

    Args:
        how_many: How many.
        topic: Their topic.
        skus: The number of stock rows that they use. The rows are shuffled again each time all were used.
        maker: The beginning of the order numbers: different in each process that works at the same time.
        scattered: The order numbers have no order, like UUIDs: their keys are spread over the whole index.
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
