"""What the migrations make is what the program believes: types, keys, indexes, collations, on every dialect."""

import subprocess
import sys
import unicodedata
from typing import Any

import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, insert, inspect, select, text

import exactly_once.alembic
from exactly_once.alembic.version_table import TABLES
from exactly_once.database.schema import tables
from exactly_once.database.server_clock import utcnow
from tests.integration.alembic.compared import differences
from tests.integration.user_project import OURS, ROOT, table_names

KEYS = [
    "a",
    "A",
    "a ",
    " a",
    "ä",
    "Ä",
    "é",
    unicodedata.normalize("NFD", "é"),
    "ß",
    "ss",
    "🎁",
    "🎂",
    "it's",
    '"q"',
    "a%s",
    "\\",
]


def shape(engine: Engine) -> dict[str, Any]:
    """Everything the server can tell of our tables, types in its own words."""
    look = inspect(engine)
    found: dict[str, Any] = {}
    for name in sorted(TABLES - {exactly_once.alembic.VERSION_TABLE}):
        columns = [
            (column["name"], column["type"].compile(engine.dialect), column["nullable"], column["default"])
            for column in look.get_columns(name)
        ]
        indexes = sorted(
            (
                str(index["name"]),
                tuple(index["column_names"]),
                bool(index["unique"]),
                str(index.get("dialect_options", {})),
            )
            for index in look.get_indexes(name)
        )
        uniques = sorted((str(one["name"]), tuple(one["column_names"])) for one in look.get_unique_constraints(name))
        options = {key: value for key, value in look.get_table_options(name).items() if "auto_increment" not in key}
        found[name] = (columns, look.get_pk_constraint(name)["constrained_columns"], indexes, uniques, options)
    return found


def test_the_metadata_and_the_newest_migration_are_the_same(empty_engine: Engine) -> None:
    exactly_once.alembic.upgrade(empty_engine)
    with empty_engine.connect() as connection:
        assert differences(connection) == []


def test_a_column_that_the_migration_lacks_would_be_noticed(empty_engine: Engine) -> None:
    exactly_once.alembic.upgrade(empty_engine)
    with empty_engine.begin() as connection:
        connection.execute(text("ALTER TABLE message_queue DROP COLUMN holder"))
        assert [one[0] for one in differences(connection)] == ["add_column"]


def test_what_the_migration_makes_is_what_create_all_makes_in_the_servers_own_words(empty_engine: Engine) -> None:
    exactly_once.alembic.upgrade(empty_engine)
    migrated = shape(empty_engine)
    exactly_once.alembic.downgrade(empty_engine, version=0)
    tables().metadata.create_all(empty_engine)
    assert migrated == shape(empty_engine)


def test_downgrade_leaves_nothing_of_ours(empty_engine: Engine) -> None:
    with empty_engine.begin() as connection:
        connection.execute(text("CREATE TABLE shop_order (id INTEGER)"))
    exactly_once.alembic.upgrade(empty_engine)
    exactly_once.alembic.downgrade(empty_engine, version=0)
    assert inspect(empty_engine).get_table_names() == ["shop_order"]
    assert inspect(empty_engine).get_sequence_names() == [] if empty_engine.dialect.supports_sequences else True
    exactly_once.alembic.downgrade(empty_engine, version=0)


def test_head_is_the_newest_migration_and_the_names_are_ours() -> None:
    scripts = ScriptDirectory(str(ROOT / "migrations"))
    assert scripts.get_heads() == [exactly_once.alembic.head()]
    assert {table.name for table in tables().metadata.tables.values()} == TABLES - {exactly_once.alembic.VERSION_TABLE}
    assert TABLES == OURS


def test_importing_costs_neither_alembic_nor_typer() -> None:
    code = "import sys, exactly_once.alembic; print([m for m in ('alembic', 'mako', 'typer') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# Keys


def write_key(connection: Connection, key: str) -> None:
    connection.execute(
        insert(tables().idempotent).values(
            consumer_group="g", handler="h", business_key=key, status=1, fingerprint=b"", created_at=utcnow()
        )
    )


def test_keys_are_compared_byte_by_byte(empty_engine: Engine) -> None:
    exactly_once.alembic.upgrade(empty_engine)
    table = tables().idempotent
    with empty_engine.begin() as connection:
        for key in KEYS:
            write_key(connection, key)
    with empty_engine.connect() as connection:
        for key in KEYS:
            found = connection.execute(select(table.c.business_key).where(table.c.business_key == key)).scalars().all()
            assert found == [key]
        kept = connection.execute(select(table.c.business_key)).scalars().all()
    assert sorted(kept) == sorted(KEYS)


@pytest.mark.parametrize("key", ["a" * 255, "é" * 127, "🎁" * 63])
def test_a_key_of_255_bytes_is_kept_whole(empty_engine: Engine, key: str) -> None:
    exactly_once.alembic.upgrade(empty_engine)
    with empty_engine.begin() as connection:
        write_key(connection, key)
        assert connection.execute(select(tables().idempotent.c.business_key)).scalar() == key


def test_the_widest_rows_of_every_index_fit_on_every_server(empty_engine: Engine) -> None:
    exactly_once.alembic.upgrade(empty_engine)
    failure, queue = tables().failure, tables().queue
    # bytes that no compression shortens
    noise = "".join(chr(33 + (index * 7919) % 94) for index in range(1024))
    message: dict[str, Any] = {
        "topic": noise[:255],
        "tag": noise[:255],
        "message_key": noise,
        "ordering_key": noise[1:256],
        "body": b"\0\xff" * 50_000,
        "properties": "🎁" * 20_000,
    }
    with empty_engine.begin() as connection:
        connection.execute(
            insert(failure).values(
                consumer_group=noise[:64],
                handler=noise[64:192],
                failure_key=noise[:257],
                fingerprint=b"f" * 120,
                business_key=noise[:255],
                message_id="m" * 255,
                error_class="E" * 255,
                error_text="🎁 Fehler " * 10_000,
                attempts=1,
                first_failed_at=utcnow(),
                last_failed_at=utcnow(),
                state="dead",
                **message,
            )
        )
        connection.execute(
            insert(queue).values(consumer_group=noise[:64], message_id="m" * 64, deliver_at=utcnow(), **message)
        )
        row = connection.execute(select(failure)).one()
    assert row.error_text == "🎁 Fehler " * 10_000
    assert (row.body, row.properties) == (message["body"], message["properties"])


def test_postgresql_compares_keys_by_collation_c(empty_postgres_url: str) -> None:
    exactly_once.alembic.upgrade(empty_postgres_url)
    with create_engine(empty_postgres_url).connect() as connection:
        found = connection.execute(
            text(
                "SELECT table_name || '.' || column_name, data_type, collation_name FROM information_schema.columns"
                " WHERE table_schema = 'public' AND column_name IN ('consumer_group', 'handler', 'business_key', 'step',"
                " 'failure_key', 'topic', 'tag', 'message_key', 'ordering_key', 'name')"
            )
        ).all()
        brin = connection.execute(
            text("SELECT indexdef FROM pg_indexes WHERE indexname = 'ix_message_idempotent_created_at'")
        ).scalar_one()
    assert len(found) == 27
    assert {tuple(row)[1:] for row in found} == {("text", "C")}
    assert "USING brin" in brin


def test_mariadb_keeps_keys_as_bytes_and_texts_as_utf8mb4_whatever_the_database_says(empty_mariadb_url: str) -> None:
    with create_engine(empty_mariadb_url).begin() as connection:
        connection.execute(text("ALTER DATABASE CHARACTER SET latin1 COLLATE latin1_swedish_ci"))
    exactly_once.alembic.upgrade(empty_mariadb_url)
    with create_engine(empty_mariadb_url).connect() as connection:
        lengths: dict[str, int] = dict(
            connection.execute(
                text(
                    "SELECT column_name, character_maximum_length FROM information_schema.columns"
                    " WHERE table_schema = DATABASE() AND data_type = 'varbinary'"
                    " AND table_name IN ('message_step', 'message_failure')"
                )
            ).all()
        )
        texts = connection.execute(
            text(
                "SELECT DISTINCT collation_name FROM information_schema.columns WHERE table_schema = DATABASE()"
                " AND collation_name IS NOT NULL AND table_name LIKE 'message%'"
            )
        ).scalars()
        assert list(texts) == ["utf8mb4_bin"]
        engines = connection.execute(
            text("SELECT DISTINCT engine FROM information_schema.tables WHERE table_schema = DATABASE()")
        ).scalars()
        assert list(engines) == ["InnoDB"]
    assert lengths == {
        "consumer_group": 64,
        "handler": 128,
        "business_key": 255,
        "step": 64,
        "failure_key": 257,
        "fingerprint": 120,
        "topic": 255,
        "tag": 255,
        "message_key": 1024,
        "ordering_key": 255,
    }


# The named schema


def test_a_named_schema_is_made_and_nothing_is_outside_it(empty_postgres_url: str) -> None:
    exactly_once.alembic.upgrade(empty_postgres_url, schema="Mes saging")
    assert table_names(empty_postgres_url, "Mes saging") == OURS
    assert table_names(empty_postgres_url) == set()
    with create_engine(empty_postgres_url).connect() as connection:
        assert differences(connection, "Mes saging") == []
    assert exactly_once.alembic.current(empty_postgres_url) is None
    exactly_once.alembic.downgrade(empty_postgres_url, version=0, schema="Mes saging")
    assert table_names(empty_postgres_url, "Mes saging") == set()


def test_two_schemas_of_one_database_have_a_version_each(empty_postgres_url: str) -> None:
    exactly_once.alembic.upgrade(empty_postgres_url, schema="one")
    exactly_once.alembic.upgrade(empty_postgres_url)
    exactly_once.alembic.downgrade(empty_postgres_url, version=0, schema="one")
    assert table_names(empty_postgres_url) == OURS
    assert exactly_once.alembic.current(empty_postgres_url, schema="one") is None
