"""Reads what is in the database, and compares it with the truth. Writes nothing."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, text

from examples.demo.orders import PRODUCTS, STOCK, Truth

__all__ = ["Ledger", "Line", "Sample", "lines"]

_TOTALS: Final = (
    "SELECT (SELECT count(DISTINCT order_no) FROM {s}.reservation), (SELECT count(*) FROM {s}.reservation),"
    " (SELECT count(*) FROM {s}.payment), (SELECT coalesce(sum(amount_cents), 0) FROM {s}.payment),"
    " (SELECT count(*) FROM (SELECT 1 FROM {s}.reservation GROUP BY order_no HAVING count(*) > 1) AS repeated)"
)


@dataclass(frozen=True, slots=True)
class Ledger:
    """The numbers of one shop."""

    orders: int
    """Different orders that have a reservation."""
    reservations: int
    payments: int
    cents: int
    repeated: int
    """Orders with more than one reservation."""
    left: dict[str, int]

    @classmethod
    def read(cls, connection: Connection, schema: str) -> "Ledger":
        """Read the numbers of one shop, all at the same moment."""
        orders, reservations, payments, cents, repeated = connection.execute(text(_TOTALS.format(s=schema))).one()
        left = connection.execute(text(f'SELECT sku, "left" FROM {schema}.stock'))
        return cls(orders, reservations, payments, int(cents), repeated, {row.sku: row.left for row in left})

    def doubled(self) -> int:
        """How many reservations are too many."""
        return self.reservations - self.orders

    def lost(self, truth: Truth) -> int:
        """How many orders have no reservation."""
        return truth.orders - self.orders

    def right(self, truth: Truth) -> bool:
        """Whether every number is the true one."""
        return all(line.true == line.found for line in lines(self, truth))


@dataclass(frozen=True, slots=True)
class Line:
    """One number of a ledger beside the true one."""

    what: str
    true: int
    found: int
    is_money: bool = False

    @property
    def difference(self) -> int:
        """Found minus true."""
        return self.found - self.true

    def shown(self, number: int, *, signed: bool = False) -> str:
        """Format a number for people."""
        sign = "+" if signed else ""
        return f"{number / 100:{sign},.2f}" if self.is_money else f"{number:{sign},}"


def lines(ledger: Ledger, truth: Truth) -> list[Line]:
    """Return the ledger line by line."""
    return list(_lines(ledger, truth))


def _lines(ledger: Ledger, truth: Truth) -> Iterator[Line]:
    yield Line("orders", truth.orders, ledger.orders)
    yield Line("reservations", truth.orders, ledger.reservations)
    yield Line("payments", truth.orders, ledger.payments)
    yield Line("money taken", truth.cents, ledger.cents, is_money=True)
    for sku in PRODUCTS:
        yield Line(f"left of {sku}", STOCK - truth.units[sku], ledger.left[sku])


@dataclass(frozen=True, slots=True)
class Sample:
    """The ledgers of both shops at one moment of the run."""

    at_s: float
    sent: int
    """Different orders sent until then."""
    ours: Ledger
    naive: Ledger
