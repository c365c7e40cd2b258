"""The same work with psycopg alone: how fast it could be.

Messages come from a plain list. Failures are not recorded: a deadlock or a bad message ends the run. Each way writes the same
rows as `exactly_once` into `message_idempotent`, so that the database has the same work; only the fingerprint is a constant. The
rest of the difference is the cost of a broker, a worker and the handling of failures.
"""

import json
from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import Any, Final

import psycopg
from sqlalchemy import make_url

from benchmarks.measure import Span, WrongRows
from benchmarks.shop import RESERVATIONS, STOCK_TAKEN
from exactly_once import Message

__all__ = ["Grouped", "InSets", "OneByOne", "Pipelined"]

OWNER: Final = "raw"
FINGERPRINT: Final = bytes(40)  # about as long as that of such a body
COLUMNS: Final = (
    "consumer_group, handler, business_key, status, message_id, fingerprint, retry_times, owner, created_at,"
    " consumed_at"
)
CLAIM: Final = (
    f"INSERT INTO message_idempotent ({COLUMNS}) VALUES ('raw', 'reserve', %s, 1, %s, %s, 0, %s,"
    " clock_timestamp(), clock_timestamp()) ON CONFLICT DO NOTHING"
)
CLAIM_ALL: Final = (
    f"INSERT INTO message_idempotent ({COLUMNS}) SELECT 'raw', 'reserve', key, 1, message_id, %s, 0, %s,"
    " clock_timestamp(), clock_timestamp() FROM unnest(%s::text[], %s::text[]) AS claimed (key, message_id)"
    " ON CONFLICT DO NOTHING RETURNING business_key"
)
RESERVE: Final = "INSERT INTO reservation (order_no, quantity) VALUES (%s, %s)"
TAKE: Final = 'UPDATE stock SET "left" = "left" - %s WHERE sku = %s'


def _named(statement: str) -> str:
    """Replace SQLAlchemy's placeholders by those of psycopg."""
    for name in ("order_nos", "quantities", "skus"):
        statement = statement.replace(f":{name}", f"%({name})s")
    return statement


RESERVE_ALL: Final = _named(RESERVATIONS)
TAKE_ALL: Final = _named(STOCK_TAKEN)


class _Raw:
    """A connection, and a list of messages."""

    def __init__(self, url: str) -> None:
        conninfo = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
        self._connection = psycopg.connect(conninfo)
        self._given: Sequence[Message] = ()
        self._new = 0

    def take(self, given: Sequence[Message], new: int) -> None:
        self._given, self._new = given, new

    def run(self) -> Span:
        began = perf_counter()
        handled = self._handle(self._given)
        ended = perf_counter()
        if handled != self._new:
            raise WrongRows(f"{handled} messages were handled as new, not {self._new}")
        return Span(len(self._given), began, ended)

    def _handle(self, given: Sequence[Message]) -> int:
        raise NotImplementedError


class OneByOne(_Raw):
    """Claim, insert, update and commit, one round trip each."""

    def _handle(self, given: Sequence[Message]) -> int:
        return sum([self._one(message) for message in given])

    def _one(self, message: Message) -> bool:
        order = json.loads(message.body or b"")
        with self._connection.transaction(), self._connection.cursor() as cursor:
            cursor.execute(CLAIM, (order["order_no"], message.message_id, FINGERPRINT, OWNER))
            if cursor.rowcount != 1:
                return False
            cursor.execute(RESERVE, (order["order_no"], order["quantity"]))
            cursor.execute(TAKE, (order["quantity"], order["sku"]))
        return True


class Pipelined(_Raw):
    """The claim first; then insert, update and commit in one round trip."""

    def _handle(self, given: Sequence[Message]) -> int:
        return sum([self._one(message) for message in given])

    def _one(self, message: Message) -> bool:
        order = json.loads(message.body or b"")
        with self._connection.cursor() as cursor:
            cursor.execute(CLAIM, (order["order_no"], message.message_id, FINGERPRINT, OWNER))
            if cursor.rowcount != 1:
                self._connection.rollback()
                return False
            with self._connection.pipeline():
                cursor.execute(RESERVE, (order["order_no"], order["quantity"]))
                cursor.execute(TAKE, (order["quantity"], order["sku"]))
                self._connection.commit()
        return True


class _Many(_Raw):
    def __init__(self, url: str, size: int) -> None:
        super().__init__(url)
        self._size = size

    def _handle(self, given: Sequence[Message]) -> int:
        return sum([self._group(group) for group in _groups(given, self._size)])

    def _group(self, group: Sequence[Message]) -> int:
        orders = [json.loads(message.body or b"") for message in group]
        with self._connection.transaction(), self._connection.cursor() as cursor:
            keys = [order["order_no"] for order in orders]
            ids = [message.message_id for message in group]
            cursor.execute(CLAIM_ALL, (FINGERPRINT, OWNER, keys, ids))
            if cursor.rowcount != len(orders):
                won = {key for (key,) in cursor.fetchall()}
                orders = list({order["order_no"]: order for order in orders if order["order_no"] in won}.values())
            if orders:
                self._reserve(cursor, orders)
        return len(orders)

    def _reserve(self, cursor: "psycopg.Cursor[Any]", orders: list[dict[str, Any]]) -> None:
        raise NotImplementedError


class Grouped(_Many):
    """Batches with one claim and one commit; between them a statement for each row, in the order of the stock rows."""

    def _reserve(self, cursor: "psycopg.Cursor[Any]", orders: list[dict[str, Any]]) -> None:
        orders.sort(key=lambda order: str(order["sku"]))
        cursor.executemany(RESERVE, [(order["order_no"], order["quantity"]) for order in orders])
        cursor.executemany(TAKE, [(order["quantity"], order["sku"]) for order in orders])


class InSets(_Many):
    """Batches with one claim, one insert, one update and one commit: the work of `reserve_all`, and nothing else."""

    def _reserve(self, cursor: "psycopg.Cursor[Any]", orders: list[dict[str, Any]]) -> None:
        quantities = [order["quantity"] for order in orders]
        order_nos = [order["order_no"] for order in orders]
        cursor.execute(RESERVE_ALL, {"order_nos": order_nos, "quantities": quantities})
        cursor.execute(TAKE_ALL, {"skus": [order["sku"] for order in orders], "quantities": quantities})


def _groups(given: Sequence[Message], size: int) -> Iterator[Sequence[Message]]:
    return (given[start : start + size] for start in range(0, len(given), size))
