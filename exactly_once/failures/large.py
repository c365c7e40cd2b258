"""Writes bodies that are too large for one statement: MySQL and MariaDB limit its size, and we send each byte as two digits.

Such a body is written in parts, in the transaction of its row. A crash in between leaves no row, as with a small body. Called by
`store`.
"""

from typing import Any, Final

from sqlalchemy import Connection, Table, func, literal, update

__all__ = ["TooLarge", "append", "parts_of"]

_AT_ONCE: Final = 256 * 1024  # its digits and the rest of the statement fit into a mebibyte
_BESIDE: Final = 16 * 1024  # for the rest of the statement
_LIMIT: Final = "SELECT CAST(@@max_allowed_packet AS BINARY) LIMIT 1"


class TooLarge(Exception):
    """The server takes no value of this size, in any number of statements."""


def parts_of(connection: Connection, body: bytes | None, *, beside: int) -> list[bytes | None]:
    """Return the part of a body to insert with its row, and then the parts to append.

    Args:
        connection: A connection to its database.
        body: The body of a message.
        beside: The size of the rest of the row: a row is read as a whole, so the limit applies to all of it.

    Raises:
        TooLarge: No row can hold it.
    """
    if body is None or len(body) <= _AT_ONCE or connection.dialect.name not in ("mysql", "mariadb"):
        return [body]
    limit = int(connection.exec_driver_sql(_LIMIT).scalar_one())
    if len(body) + beside + _BESIDE > limit:
        raise TooLarge(f"{len(body)} bytes, and max_allowed_packet is {limit}")
    size = limit // 2 - _BESIDE
    return [b"", *(body[at : at + size] for at in range(0, len(body), size))]


def append(connection: Connection, t: Table, id_: int, part: bytes | None) -> None:
    """Append to the body of a row that was inserted in this transaction."""
    longer: Any = func.concat(t.c.body, literal(part, t.c.body.type), type_=t.c.body.type)
    connection.execute(update(t).where(t.c.id == id_).values(body=longer))
