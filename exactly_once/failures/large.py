"""Bodies that one statement does not carry: MySQL and MariaDB limit it, and our bytes travel as digits, two a byte.

They are written in parts, in the transaction of their row. A crash in between leaves no row, as it does with a small one.
"""

from typing import Any, Final

from sqlalchemy import Connection, Table, func, literal, update

__all__ = ["TooLarge", "append", "parts_of"]

_AT_ONCE: Final = 256 * 1024  # its digits and all that goes with them fit wherever a server takes a mebibyte
_BESIDE: Final = 16 * 1024  # for the rest of the statement
_LIMIT: Final = "SELECT CAST(@@max_allowed_packet AS BINARY) LIMIT 1"


class TooLarge(Exception):
    """The server takes no value of this size, in however many statements."""


def parts_of(connection: Connection, body: bytes | None, *, beside: int) -> list[bytes | None]:
    """Return what to write of a body with its row, and what to append to it then.

    Args:
        connection: To its database.
        body: Of a message.
        beside: The size of what stands in the row with it, for the row is read in one piece.

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
