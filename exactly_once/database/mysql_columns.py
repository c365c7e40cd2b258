"""How the values of our columns travel to MySQL and MariaDB: hexadecimal digits to the server, bytes back from it.

An earlier user of the connection may have left another character set in it (`SET NAMES gbk`), or a mode in which a backslash
escapes nothing. The driver knows of neither. In gbk the second byte of a character may be a backslash. Then the driver's escape
character becomes the end of a character: the server stores another key, or reads the rest of a value as SQL.
Digits mean the same in every character set and every mode, and the server translates no bytes. `column_types` uses these types.
"""

from collections.abc import Callable
from typing import Any

from sqlalchemy import ColumnElement, Dialect, func
from sqlalchemy.dialects.mysql import LONGBLOB, MEDIUMTEXT, VARBINARY, VARCHAR
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeEngine

__all__ = ["AsciiVarchar", "DigitsLongBlob", "DigitsMediumText", "DigitsVarbinary", "DigitsVarchar"]


class _text_of(FunctionElement[str]):  # noqa: N801  (reads as a SQL function does)
    """The text whose UTF-8 these digits are. It names a collation: else it might not be comparable with a column
    of an older table."""

    inherit_cache = True
    name = "text_of"


@compiles(_text_of, "mysql", "mariadb")
def _as_text(element: _text_of, compiler: Any, **kw: Any) -> str:
    return f"CONVERT(UNHEX({compiler.process(element.clauses, **kw)}) USING utf8mb4) COLLATE utf8mb4_bin"


class _utf8_of(FunctionElement[bytes]):  # noqa: N801
    """The UTF-8 of a column's text, whatever its table's character set is."""

    inherit_cache = True
    name = "utf8_of"

    def __init__(self, column: Any, type_: TypeEngine[Any]) -> None:
        super().__init__(column)
        self.type = type_  # converts the bytes to text


@compiles(_utf8_of, "mysql", "mariadb")
def _as_utf8(element: _utf8_of, compiler: Any, **kw: Any) -> str:
    return f"CAST(CONVERT({compiler.process(element.clauses, **kw)} USING utf8mb4) AS BINARY)"


def _digits(dialect: Dialect) -> Callable[[bytes | None], str | None]:
    return lambda value: None if value is None else value.hex()


def _digits_of_text(dialect: Dialect) -> Callable[[str | None], str | None]:
    return lambda value: None if value is None else value.encode().hex()


def _from_utf8(dialect: Dialect, coltype: object) -> Callable[[Any], str | None]:
    return lambda value: value.decode() if isinstance(value, (bytes, bytearray)) else value


class DigitsVarbinary(VARBINARY):
    """Short bytes, sent as digits."""

    def bind_processor(self, dialect: Dialect) -> Any:
        return _digits(dialect)

    def bind_expression(self, bindvalue: Any) -> ColumnElement[Any]:
        return func.UNHEX(bindvalue)


class DigitsLongBlob(LONGBLOB):
    """Bytes of any length, sent as digits."""

    def bind_processor(self, dialect: Dialect) -> Any:
        return _digits(dialect)

    def bind_expression(self, bindvalue: Any) -> ColumnElement[Any]:
        return func.UNHEX(bindvalue)


class AsciiVarchar(VARCHAR):
    """Words that we make ourselves. They are sent as they are: all character sets that a client may use agree on ASCII."""

    def column_expression(self, colexpr: Any) -> ColumnElement[Any]:
        return _utf8_of(colexpr, self)

    def result_processor(self, dialect: Dialect, coltype: object) -> Any:
        return _from_utf8(dialect, coltype)


class DigitsVarchar(AsciiVarchar):
    """Text, sent as digits."""

    def bind_processor(self, dialect: Dialect) -> Any:
        return _digits_of_text(dialect)

    def bind_expression(self, bindvalue: Any) -> ColumnElement[Any]:
        return _text_of(bindvalue)


class DigitsMediumText(MEDIUMTEXT):
    """Text of any length, sent as digits."""

    def bind_processor(self, dialect: Dialect) -> Any:
        return _digits_of_text(dialect)

    def bind_expression(self, bindvalue: Any) -> ColumnElement[Any]:
        return _text_of(bindvalue)

    def column_expression(self, colexpr: Any) -> ColumnElement[Any]:
        return _utf8_of(colexpr, self)

    def result_processor(self, dialect: Dialect, coltype: object) -> Any:
        return _from_utf8(dialect, coltype)
