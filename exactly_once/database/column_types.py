"""The types of our columns: the same bytes come back from every server, whatever its character set and collation are."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import DateTime, Dialect, LargeBinary, String, Text, TypeDecorator
from sqlalchemy.types import TypeEngine

__all__ = ["Body", "Bytes", "KeyText", "LongText", "Moment", "Words"]


def _text(value: Any) -> str | None:
    """Decode a text that may come as bytes: from VARBINARY, or from PostgreSQL on a connection that was left in SQL_ASCII."""
    return value.decode() if isinstance(value, (bytes, bytearray)) else value


class KeyText(TypeDecorator[str]):
    """Text that is compared byte by byte: `text COLLATE "C"` on PostgreSQL, VARBINARY on MySQL and MariaDB.

    VARBINARY, because the two servers share no collation that neither folds case nor pads with spaces.
    """

    impl = Text
    cache_ok = True

    def __init__(self, bytes_: int) -> None:
        super().__init__()
        self.bytes = bytes_

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name == "postgresql":
            # Not type_descriptor(): it would return VARCHAR, the type with which the driver binds strings.
            from sqlalchemy.dialects.postgresql import TEXT

            return TEXT(collation="C")
        if dialect.name in ("mysql", "mariadb"):
            from exactly_once.database.mysql_columns import DigitsVarbinary

            return DigitsVarbinary(self.bytes)
        return dialect.type_descriptor(Text())

    def process_bind_param(self, value: str | None, dialect: Dialect) -> Any:
        if value is not None and dialect.name in ("mysql", "mariadb"):
            return value.encode()
        return value

    def process_result_value(self, value: Any, dialect: Dialect) -> str | None:
        return _text(value)


class Bytes(TypeDecorator[bytes]):
    """Short bytes that may be in an index. MySQL and MariaDB need a length for that."""

    impl = LargeBinary
    cache_ok = True

    def __init__(self, bytes_: int) -> None:
        super().__init__(bytes_)
        self.bytes = bytes_

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name in ("mysql", "mariadb"):
            from exactly_once.database.mysql_columns import DigitsVarbinary

            return DigitsVarbinary(self.bytes)
        return dialect.type_descriptor(LargeBinary())


class Body(TypeDecorator[bytes]):
    """A message body, up to 4 GiB. The default type of MySQL and MariaDB ends at 64 KiB."""

    impl = LargeBinary
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name in ("mysql", "mariadb"):
            from exactly_once.database.mysql_columns import DigitsLongBlob

            return DigitsLongBlob()
        return dialect.type_descriptor(LargeBinary())


class Words(TypeDecorator[str]):
    """Short text that is not compared as keys are.

    Args:
        length: In characters.
        ascii: We write the text ourselves, in ASCII. Not for values that come with a message.
    """

    impl = String
    cache_ok = True

    def __init__(self, length: int, *, ascii: bool = False) -> None:  # noqa: A002  (the name of the thing)
        super().__init__(length)
        self.length, self.ascii = length, ascii

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name in ("mysql", "mariadb"):
            from exactly_once.database.mysql_columns import AsciiVarchar, DigitsVarchar

            return (AsciiVarchar if self.ascii else DigitsVarchar)(self.length)
        return dialect.type_descriptor(String(self.length))

    def process_result_value(self, value: Any, dialect: Dialect) -> str | None:
        return _text(value)


class LongText(TypeDecorator[str]):
    """Text of any length. The default type of MySQL and MariaDB ends at 64 KiB."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name in ("mysql", "mariadb"):
            from exactly_once.database.mysql_columns import DigitsMediumText

            return DigitsMediumText()
        return Text()  # as it is: type_descriptor() would make VARCHAR of it on PostgreSQL

    def process_result_value(self, value: Any, dialect: Dialect) -> str | None:
        return _text(value)


class Moment(TypeDecorator[datetime]):
    """A moment, timezone-aware in Python; UTC without a zone where the server has no such type."""

    impl = DateTime
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name == "postgresql":
            return dialect.type_descriptor(DateTime(timezone=True))
        if dialect.name in ("mysql", "mariadb"):
            from sqlalchemy.dialects.mysql import DATETIME

            return dialect.type_descriptor(DATETIME(fsp=6))
        return dialect.type_descriptor(DateTime())

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value!r} has no time zone; a moment without one cannot be compared")
        return value if dialect.name == "postgresql" else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)
