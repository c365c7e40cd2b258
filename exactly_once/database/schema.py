"""The tables, as SQLAlchemy metadata, and their limits. Data only; nothing connects.

Alembic's migrations create these tables; a test compares the two. `tables(schema)` is built on first
use, once for each schema name. Keys are compared byte by byte on every server: case, accents and trailing spaces count.
"""

from functools import lru_cache
from typing import Any, Final, TypeVar

from sqlalchemy import (
    BigInteger,
    Column,
    Index,
    Integer,
    MetaData,
    Select,
    SmallInteger,
    Table,
    UniqueConstraint,
    text,
)

from exactly_once.database.column_types import Body, Bytes, KeyText, LongText, Moment, Words

__all__ = [
    "CONSUMED",
    "CONSUMING",
    "DISCARDED",
    "GROUP_BYTES",
    "HANDLER_BYTES",
    "KEY_BYTES",
    "STEP_BEGUN",
    "STEP_BYTES",
    "STEP_FINISHED",
    "STEP_TRACE",
    "UNFINISHED",
    "Tables",
    "all_rows",
    "tables",
]

CONSUMING: Final = 0
"""Under a lease, or free after one."""
CONSUMED: Final = 1
DISCARDED: Final = "discarded"
"""The owner of a claim that an operator wrote."""
UNFINISHED: Final = 2
"""First status in a transaction on MySQL and MariaDB. The statement that travels with COMMIT changes it to CONSUMED. Other
sessions see it only if something committed the transaction in between."""
STEP_BEGUN: Final = 0
STEP_FINISHED: Final = 1
STEP_TRACE: Final = 2
"""Of no step: marks a transaction under a lease that is not committed. Others see it only if something else committed it."""

# Limits in bytes of UTF-8: the widest index (group, handler, key, step) stays far below PostgreSQL's 2,704 bytes a row
# and InnoDB's 3,072.
GROUP_BYTES: Final = 64
HANDLER_BYTES: Final = 128
KEY_BYTES: Final = 255
STEP_BYTES: Final = 64
FINGERPRINT_BYTES: Final = 120

_ALL_ROWS: Final = 2**63 - 1
_Selects = TypeVar("_Selects", bound=Select[Any])

# Explicit: the database's default may be latin1, which refuses an error text with an emoji.
MYSQL_OPTIONS: Final[dict[str, Any]] = {
    f"{server}_{option}": value
    for server in ("mysql", "mariadb")
    for option, value in (("engine", "InnoDB"), ("default_charset", "utf8mb4"), ("collate", "utf8mb4_bin"))
}


def all_rows(statement: _Selects, server: str) -> _Selects:
    """Ask MySQL and MariaDB for all rows. Without a LIMIT `sql_select_limit` applies, which an earlier user may have left there.

    Args:
        statement: A statement without a limit.
        server: SQLAlchemy's name of the dialect.
    """
    return statement.limit(_ALL_ROWS) if server in ("mysql", "mariadb") else statement


class Tables:
    """The tables of one database schema."""

    def __init__(self, schema: str | None) -> None:
        self.schema = schema
        self.metadata = MetaData(schema=schema)
        self.idempotent = self._idempotent()
        self.step = self._step()
        self.failure = self._failure()
        self.outbox = self._outbox()
        self.queue = self._queue()
        self.queue_group = self._queue_group()
        self.cutover = self._cutover()
        for table in self.metadata.tables.values():
            # A user's schema_translate_map is for their tables. It would send our statements to another schema.
            table._use_schema_map = False  # noqa: SLF001  (there is no public word for it)

    def _idempotent(self) -> Table:
        return Table(
            "message_idempotent",
            self.metadata,
            Column("consumer_group", KeyText(GROUP_BYTES), primary_key=True),
            Column("handler", KeyText(HANDLER_BYTES), primary_key=True),
            Column("business_key", KeyText(KEY_BYTES), primary_key=True),
            Column("status", SmallInteger, nullable=False),
            Column("message_id", Words(255)),
            Column("message_content", Body),
            Column("fingerprint", Bytes(FINGERPRINT_BYTES), nullable=False),
            Column("retry_times", Integer, nullable=False, server_default=text("0")),
            Column("owner", Words(64, ascii=True)),
            Column("token", Words(64, ascii=True)),
            Column("lease_until", Moment),
            Column("born_at", Moment),
            Column("created_at", Moment, nullable=False),
            Column("consumed_at", Moment),
            # BRIN on PostgreSQL: pruning reads by time, and a claim must not pay for a second B-tree.
            Index("ix_message_idempotent_created_at", "created_at", postgresql_using="brin"),
            **MYSQL_OPTIONS,
        )

    def _step(self) -> Table:
        return Table(
            "message_step",
            self.metadata,
            Column("consumer_group", KeyText(GROUP_BYTES), primary_key=True),
            Column("handler", KeyText(HANDLER_BYTES), primary_key=True),
            Column("business_key", KeyText(KEY_BYTES), primary_key=True),
            Column("step", KeyText(STEP_BYTES), primary_key=True),
            # 0, 1, 2 in the order in which steps ran: a clock can stand still between two steps, or go back.
            Column("ordinal", Integer, nullable=False),
            Column("status", SmallInteger, nullable=False),
            Column("result", Body),
            Column("attempt", Integer, nullable=False, server_default=text("1")),
            Column("token", Words(64, ascii=True)),
            Column("created_at", Moment, nullable=False),
            Column("finished_at", Moment),
            **MYSQL_OPTIONS,
        )

    def _failure(self) -> Table:
        return Table(
            "message_failure",
            self.metadata,
            _id(),
            Column("consumer_group", KeyText(GROUP_BYTES), nullable=False),
            Column("handler", KeyText(HANDLER_BYTES), nullable=False),
            # "k:" and the business key, or "m:" and the message id if there is no key. The prefix keeps the two apart.
            Column("failure_key", KeyText(KEY_BYTES + 2), nullable=False),
            Column("fingerprint", Bytes(FINGERPRINT_BYTES), nullable=False),
            Column("business_key", KeyText(KEY_BYTES)),
            *_message_columns(),
            Column("message_id", Words(255)),
            Column("born_at", Moment),
            Column("error_class", Words(255), nullable=False),
            Column("error_text", LongText(), nullable=False),
            Column("attempts", Integer, nullable=False),
            Column("first_failed_at", Moment, nullable=False),
            Column("last_failed_at", Moment, nullable=False),
            Column("next_attempt_at", Moment),
            Column("state", Words(16, ascii=True), nullable=False),
            Column("decided_by", Words(255)),
            Column("decided_at", Moment),
            Column("decided_why", LongText()),
            Column("side", Words(64)),
            # Of a broken message: the owner of its claim, which a requeue takes back.
            Column("claim_owner", Words(64, ascii=True)),
            UniqueConstraint(
                "consumer_group", "handler", "failure_key", "fingerprint", name="uq_message_failure_identity"
            ),
            Index("ix_message_failure_due", "consumer_group", "state", "next_attempt_at"),
            Index("ix_message_failure_order", "consumer_group", "handler", "ordering_key", "id"),
            # Operators type these ids: the id of a deleted row must never name another message.
            sqlite_autoincrement=True,
            **MYSQL_OPTIONS,
        )

    def _outbox(self) -> Table:
        return Table(
            "message_outbox",
            self.metadata,
            _id(),
            *_message_columns(),
            Column("message_id", Words(64), nullable=False),
            Column("deliver_at", Moment),
            Column("attempts", Integer, nullable=False, server_default=text("0")),
            Column("next_attempt_at", Moment),
            Column("last_error", LongText()),
            Column("created_at", Moment, nullable=False),
            Index("ix_message_outbox_due", "next_attempt_at", "id"),
            Index("ix_message_outbox_order", "ordering_key", "id"),
            **MYSQL_OPTIONS,
        )

    def _queue(self) -> Table:
        return Table(
            "message_queue",
            self.metadata,
            _id(),
            # One row for each group that had joined the topic. Empty if no group had joined: the first group that
            # joins takes the row.
            Column("consumer_group", KeyText(GROUP_BYTES), nullable=False),
            *_message_columns(),
            Column("message_id", Words(64), nullable=False),
            Column("born_at", Moment),
            Column("deliver_at", Moment, nullable=False),
            Column("attempts", Integer, nullable=False, server_default=text("0")),
            # Who holds the row. Settling with another holder's token changes nothing.
            Column("holder", Words(64, ascii=True)),
            Index("ix_message_queue_due", "consumer_group", "topic", "deliver_at", "id"),
            Index("ix_message_queue_order", "consumer_group", "topic", "ordering_key", "id"),
            **MYSQL_OPTIONS,
        )

    def _queue_group(self) -> Table:
        return Table(
            "message_queue_group",
            self.metadata,
            Column("topic", KeyText(255), primary_key=True),
            Column("consumer_group", KeyText(GROUP_BYTES), primary_key=True),
            Column("joined_at", Moment, nullable=False),
            **MYSQL_OPTIONS,
        )

    def _cutover(self) -> Table:
        return Table(
            "message_cutover",
            self.metadata,
            Column("name", KeyText(64), primary_key=True),
            Column("effective_from", Moment, primary_key=True),
            Column("source", Words(64), nullable=False),
            Column("target", Words(64), nullable=False),
            Column("percent", SmallInteger, nullable=False),
            Column("allow_list", LongText()),
            Column("created_at", Moment, nullable=False),
            **MYSQL_OPTIONS,
        )


def _id() -> Column[int]:
    # SQLite counts up by itself only if the column's type is exactly INTEGER.
    return Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True)


def _message_columns() -> list[Column[Any]]:
    return [
        Column("topic", KeyText(255), nullable=False),
        Column("tag", KeyText(255)),
        Column("message_key", KeyText(1024)),
        Column("ordering_key", KeyText(255)),
        Column("body", Body),
        Column("properties", LongText(), nullable=False),
    ]


@lru_cache(maxsize=16)
def tables(schema: str | None = None) -> Tables:
    """Return the tables of one database schema; the same object for the same name."""
    return Tables(schema)
