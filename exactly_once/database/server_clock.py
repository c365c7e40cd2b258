"""The server's own clock as a SQL expression: no clock of a worker decides about a lease or a retry."""

from datetime import datetime
from typing import Any, Final

from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from exactly_once.database.column_types import Moment

__all__ = ["utcnow"]

_FARTHEST_S: Final = 36_500 * 86_400.0


class utcnow(FunctionElement[datetime]):  # noqa: N801  (reads as a SQL function does)
    """The server's clock at this instant: never the worker's clock, and not the start of the transaction.

    With `seconds`, that many seconds later: `utcnow(30)`. At most a hundred years: PostgreSQL refuses a date beyond its calendar,
    and SQLite writes it as NULL. A retry without a time would never be due.
    """

    type = Moment()
    inherit_cache = True
    name = "utcnow"

    def __init__(self, seconds: float | None = None) -> None:
        super().__init__(*(() if seconds is None else (float(seconds) if seconds < _FARTHEST_S else _FARTHEST_S,)))


@compiles(utcnow, "postgresql")
def _pg_now(element: utcnow, compiler: Any, **kw: Any) -> str:
    if not len(element.clauses):
        return "clock_timestamp()"
    return f"(clock_timestamp() + make_interval(secs => {compiler.process(element.clauses, **kw)}))"


@compiles(utcnow, "mysql", "mariadb")
def _mysql_now(element: utcnow, compiler: Any, **kw: Any) -> str:
    if not len(element.clauses):
        return "UTC_TIMESTAMP(6)"
    return f"TIMESTAMPADD(MICROSECOND, 1000000 * {compiler.process(element.clauses, **kw)}, UTC_TIMESTAMP(6))"


@compiles(utcnow, "sqlite")
def _sqlite_now(element: utcnow, compiler: Any, **kw: Any) -> str:
    # Three digits of milliseconds, then three zeros: SQLAlchemy's own format, so that comparing the texts compares the times.
    if not len(element.clauses):
        return "(strftime('%Y-%m-%d %H:%M:%f', 'now') || '000')"
    seconds = compiler.process(element.clauses, **kw)
    return f"(strftime('%Y-%m-%d %H:%M:%f', 'now', ({seconds}) || ' seconds') || '000')"
