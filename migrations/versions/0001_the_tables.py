"""The tables of exactly_once 0.1: claims, steps, failures, outbox, queue, queue groups, cutover.

Immutable once released: a later change is a later file. Therefore the types are written here in full, and nothing is imported
from `exactly_once.database.schema`, which changes. A test compares the newest migration with that module.

MySQL and MariaDB commit at every CREATE, so a run that was killed leaves some of the tables. On those servers existing tables are
skipped, and the next run finishes the work.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql
from sqlalchemy.dialects import postgresql as pg

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# utf8mb4_bin: columns that are not keys hold tokens and names, and any character that a person can type
MYSQL = {
    f"{server}_{option}": value
    for server in ("mysql", "mariadb")
    for option, value in (("engine", "InnoDB"), ("default_charset", "utf8mb4"), ("collate", "utf8mb4_bin"))
}


def key(bytes_: int) -> sa.types.TypeEngine[str]:
    """Text that is compared byte by byte."""
    return (
        sa.Text()
        .with_variant(pg.TEXT(collation="C"), "postgresql")
        .with_variant(mysql.VARBINARY(bytes_), "mysql", "mariadb")
    )


def short_bytes(bytes_: int) -> sa.types.TypeEngine[bytes]:
    return sa.LargeBinary().with_variant(mysql.VARBINARY(bytes_), "mysql", "mariadb")


def body() -> sa.types.TypeEngine[bytes]:
    return sa.LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")


def moment() -> sa.types.TypeEngine[Any]:
    return (
        sa.DateTime()
        .with_variant(sa.DateTime(timezone=True), "postgresql")
        .with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
    )


def long_text() -> sa.types.TypeEngine[str]:
    return sa.Text().with_variant(mysql.MEDIUMTEXT(), "mysql", "mariadb")


def identity() -> sa.Column[int]:
    # SQLite counts up by itself only for a column whose type is exactly INTEGER
    return sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False, autoincrement=True)


def message() -> list[sa.Column[Any]]:
    return [
        sa.Column("topic", key(255), nullable=False),
        sa.Column("tag", key(255)),
        sa.Column("message_key", key(1024)),
        sa.Column("ordering_key", key(255)),
        sa.Column("body", body()),
        sa.Column("properties", long_text(), nullable=False),
    ]


def upgrade(*, schema: str | None = None, operations: Any = op) -> None:
    mysql_or_mariadb = operations.get_context().dialect.name in ("mysql", "mariadb")
    there = _left_by_a_killed_run(operations, schema)

    def primary(table: str, *columns: str) -> sa.PrimaryKeyConstraint:
        # named, and f() protects the name from a naming convention of the user's own history; MySQL warns about any name
        name = None if mysql_or_mariadb else operations.f(f"{table}_pkey")
        return sa.PrimaryKeyConstraint(*columns, name=name)

    def create(table: str, *items: Any, indexes: dict[str, list[str]] | None = None, **options: Any) -> None:
        if table not in there:
            operations.create_table(table, *items, schema=schema, **MYSQL, **options)
        for name, columns in (indexes or {}).items():
            if name not in there.get(table, ()):
                using = {"postgresql_using": "brin"} if name == "ix_message_idempotent_created_at" else {}
                operations.create_index(operations.f(name), table, columns, schema=schema, **using)

    create(
        "message_idempotent",
        sa.Column("consumer_group", key(64), nullable=False),
        sa.Column("handler", key(128), nullable=False),
        sa.Column("business_key", key(255), nullable=False),
        sa.Column("status", sa.SmallInteger(), nullable=False),
        sa.Column("message_id", sa.String(255)),
        sa.Column("message_content", body()),
        sa.Column("fingerprint", short_bytes(120), nullable=False),
        sa.Column("retry_times", sa.Integer(), nullable=False, server_default=sa.text("0")),
        sa.Column("owner", sa.String(64)),
        sa.Column("token", sa.String(64)),
        sa.Column("lease_until", moment()),
        sa.Column("born_at", moment()),
        sa.Column("created_at", moment(), nullable=False),
        sa.Column("consumed_at", moment()),
        primary("message_idempotent", "consumer_group", "handler", "business_key"),
        indexes={"ix_message_idempotent_created_at": ["created_at"]},
    )
    create(
        "message_step",
        sa.Column("consumer_group", key(64), nullable=False),
        sa.Column("handler", key(128), nullable=False),
        sa.Column("business_key", key(255), nullable=False),
        sa.Column("step", key(64), nullable=False),
        sa.Column("ordinal", sa.Integer(), nullable=False),
        sa.Column("status", sa.SmallInteger(), nullable=False),
        sa.Column("result", body()),
        sa.Column("attempt", sa.Integer(), nullable=False, server_default=sa.text("1")),
        sa.Column("token", sa.String(64)),
        sa.Column("created_at", moment(), nullable=False),
        sa.Column("finished_at", moment()),
        primary("message_step", "consumer_group", "handler", "business_key", "step"),
    )
    create(
        "message_failure",
        identity(),
        sa.Column("consumer_group", key(64), nullable=False),
        sa.Column("handler", key(128), nullable=False),
        sa.Column("failure_key", key(257), nullable=False),
        sa.Column("fingerprint", short_bytes(120), nullable=False),
        sa.Column("business_key", key(255)),
        *message(),
        sa.Column("message_id", sa.String(255)),
        sa.Column("born_at", moment()),
        sa.Column("error_class", sa.String(255), nullable=False),
        sa.Column("error_text", long_text(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("first_failed_at", moment(), nullable=False),
        sa.Column("last_failed_at", moment(), nullable=False),
        sa.Column("next_attempt_at", moment()),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("decided_by", sa.String(255)),
        sa.Column("decided_at", moment()),
        sa.Column("decided_why", long_text()),
        sa.Column("side", sa.String(64)),
        primary("message_failure", "id"),
        sa.UniqueConstraint(
            "consumer_group",
            "handler",
            "failure_key",
            "fingerprint",
            name=operations.f("uq_message_failure_identity"),
        ),
        indexes={
            "ix_message_failure_due": ["consumer_group", "state", "next_attempt_at"],
            "ix_message_failure_order": ["consumer_group", "handler", "ordering_key", "id"],
        },
        # people type these ids: the id of a deleted row must not be given to another message
        sqlite_autoincrement=True,
    )
    create(
        "message_outbox",
        identity(),
        *message(),
        sa.Column("message_id", sa.String(64), nullable=False),
        sa.Column("deliver_at", moment()),
        sa.Column("attempts", sa.Integer(), nullable=False, server_default=sa.text("0")),
        sa.Column("next_attempt_at", moment()),
        sa.Column("last_error", long_text()),
        sa.Column("created_at", moment(), nullable=False),
        primary("message_outbox", "id"),
        indexes={
            "ix_message_outbox_due": ["next_attempt_at", "id"],
            "ix_message_outbox_order": ["ordering_key", "id"],
        },
    )
    create(
        "message_queue",
        identity(),
        sa.Column("consumer_group", key(64), nullable=False),
        *message(),
        sa.Column("message_id", sa.String(64), nullable=False),
        sa.Column("born_at", moment()),
        sa.Column("deliver_at", moment(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False, server_default=sa.text("0")),
        sa.Column("holder", sa.String(64)),
        primary("message_queue", "id"),
        indexes={
            "ix_message_queue_due": ["consumer_group", "topic", "deliver_at", "id"],
            "ix_message_queue_order": ["consumer_group", "topic", "ordering_key", "id"],
        },
    )
    create(
        "message_queue_group",
        sa.Column("topic", key(255), nullable=False),
        sa.Column("consumer_group", key(64), nullable=False),
        sa.Column("joined_at", moment(), nullable=False),
        primary("message_queue_group", "topic", "consumer_group"),
    )
    create(
        "message_cutover",
        sa.Column("name", key(64), nullable=False),
        sa.Column("effective_from", moment(), nullable=False),
        sa.Column("source", sa.String(64), nullable=False),
        sa.Column("target", sa.String(64), nullable=False),
        sa.Column("percent", sa.SmallInteger(), nullable=False),
        sa.Column("allow_list", long_text()),
        sa.Column("created_at", moment(), nullable=False),
        primary("message_cutover", "name", "effective_from"),
    )


def downgrade(*, schema: str | None = None, operations: Any = op) -> None:
    killable = operations.get_context().dialect.name in ("mysql", "mariadb")
    for table in (
        "message_cutover",
        "message_queue_group",
        "message_queue",
        "message_outbox",
        "message_failure",
        "message_step",
        "message_idempotent",
    ):
        operations.drop_table(table, schema=schema, if_exists=True if killable else None)


def _left_by_a_killed_run(operations: Any, schema: str | None) -> dict[str, set[str | None]]:
    """Return the existing tables, each with its indexes. Always empty on servers with transactional DDL."""
    context = operations.get_context()
    if context.as_sql or context.dialect.name not in ("mysql", "mariadb"):
        return {}
    inspector = sa.inspect(operations.get_bind())
    return {
        table: {index["name"] for index in inspector.get_indexes(table, schema=schema)}
        for table in inspector.get_table_names(schema=schema)
        if table.startswith("message_")
    }
