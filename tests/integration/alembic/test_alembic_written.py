"""`exactly-once db sql`: what it prints makes the same tables, and the role it names can do its work and no more."""

import secrets
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine, insert, make_url, select, text, update
from sqlalchemy.exc import DBAPIError
from typer.testing import CliRunner

import exactly_once.alembic
from exactly_once.cli.db import app
from exactly_once.database.schema import tables
from exactly_once.database.server_clock import utcnow
from tests.integration.alembic.compared import differences, run
from tests.integration.user_project import OURS, alembic, done, table_names

# roles belong to the server, which another test run may be using
ROLE = f"eo_worker_{secrets.token_hex(4)}"
PASSWORD = secrets.token_hex(8)
REFUSED = {
    "42501",  # PostgreSQL: insufficient privilege
    1142,  # MySQL and MariaDB: command denied for table
    1044,  # access denied to database
}


def printed(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["sql", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_printed_sql_makes_the_tables_of_the_newest_version(empty_url: str) -> None:
    run(empty_url, printed("--database", empty_url))
    assert table_names(empty_url) == OURS
    engine = create_engine(empty_url)
    with engine.connect() as connection:
        assert exactly_once.alembic.check(connection) is None
        assert differences(connection) == []
    engine.dispose()
    exactly_once.alembic.upgrade(empty_url)
    exactly_once.alembic.downgrade(empty_url, version=0)
    assert table_names(empty_url) == set()


def test_printing_opens_no_database() -> None:
    assert "CREATE TABLE message_idempotent" in printed("-d", "postgresql+psycopg://nobody@127.0.0.1:1/nothing")
    assert printed("--dialect", "mariadb") == exactly_once.alembic.sql("mariadb")


def test_the_printed_sql_makes_a_named_schema(empty_postgres_url: str) -> None:
    run(empty_postgres_url, printed("-d", empty_postgres_url, "--schema", "Mes saging"))
    assert table_names(empty_postgres_url, "Mes saging") == OURS
    engine = create_engine(empty_postgres_url)
    with engine.connect() as connection:
        assert exactly_once.alembic.check(connection, "Mes saging") is None
    engine.dispose()


def test_the_sql_of_a_checkout_makes_the_same(empty_url: str) -> None:
    run(empty_url, done(alembic("upgrade", "head", "--sql", env={"EXACTLY_ONCE_DATABASE": empty_url})))
    assert table_names(empty_url) == OURS
    engine = create_engine(empty_url)
    with engine.connect() as connection:
        assert exactly_once.alembic.check(connection) is None
        assert differences(connection) == []
    engine.dispose()


def test_the_sql_of_a_checkout_makes_a_named_schema(empty_postgres_url: str) -> None:
    script = done(alembic("-x", f"url={empty_postgres_url}", "-x", "schema=messaging", "upgrade", "head", "--sql"))
    run(empty_postgres_url, script)
    assert table_names(empty_postgres_url, "messaging") == OURS


@pytest.mark.parametrize(
    "arguments",
    [
        ("--dialect", "oracle"),
        ("--dialect", "sqlite", "--grants", "worker"),
        ("--nonsense",),
        ("--dialect", "mariadb", "--only-grants"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...]) -> None:
    assert CliRunner().invoke(app, ["sql", *arguments]).exit_code == 2


# The rights of the workers' role


@pytest.mark.parametrize("dialect", ["postgresql", "mariadb"])
def test_only_the_grants_are_printed_where_the_tables_are_there(dialect: str) -> None:
    whole = printed("--dialect", dialect, "--grants", "app").splitlines()
    alone = printed("--dialect", dialect, "--grants", "app", "--only-grants").splitlines()
    assert [line for line in alone if "GRANT" in line] == [line for line in whole if line.startswith("GRANT")]
    rest = {line for line in alone if line and not line.startswith(("GRANT", "--"))}
    assert rest == ({"BEGIN;", "COMMIT;"} if dialect == "postgresql" else set())


def login(url: str, schema: str | None) -> str:
    """Make the tables and the role as an administrator would, from what is printed; return the role's own URL."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "postgresql":
        run(url, f"DROP ROLE IF EXISTS {ROLE}")
        run(url, f"CREATE ROLE {ROLE} LOGIN PASSWORD '{PASSWORD}'")
        arguments = ["--grants", ROLE]
    else:
        run(url, f"CREATE OR REPLACE USER '{ROLE}'@'127.0.0.1' IDENTIFIED BY '{PASSWORD}'")
        arguments = ["--grants", f"{ROLE}@127.0.0.1"]
    run(url, printed("-d", url, *arguments, *(["--schema", schema] if schema else [])))
    return parsed.set(username=ROLE, password=PASSWORD).render_as_string(hide_password=False)


@pytest.fixture(params=["postgres", "postgres in a schema", "mariadb"])
def limited(request: pytest.FixtureRequest) -> Iterator[tuple[str, str | None]]:
    """The URL of a role with the printed rights, and the schema."""
    kind = str(request.param)
    url = request.getfixturevalue(f"empty_{kind.split()[0]}_url")
    schema = "messaging" if "schema" in kind else None
    yield login(url, schema), schema
    # before the role can go, its rights must
    run(url, f"DROP OWNED BY {ROLE}; DROP ROLE {ROLE}" if kind != "mariadb" else f"DROP USER '{ROLE}'@'127.0.0.1'")


def refused(connection: Connection, statement: Any) -> None:
    with pytest.raises(DBAPIError) as caught:
        connection.execute(text(statement) if isinstance(statement, str) else statement)
    original: Any = caught.value.orig
    assert REFUSED & {getattr(original, "sqlstate", None), *original.args[:1]}, original
    connection.rollback()


def test_the_role_can_claim_queue_and_count_up(limited: tuple[str, str | None]) -> None:
    url, schema = limited
    t = tables(schema)
    message = {"topic": "orders", "properties": "{}", "message_id": "m"}
    engine = create_engine(url)
    with engine.begin() as connection:
        assert exactly_once.alembic.check(connection, schema) is None
        key = {"consumer_group": "g", "handler": "h", "business_key": "k"}
        connection.execute(insert(t.idempotent).values(**key, status=1, fingerprint=b"", created_at=utcnow()))
        connection.execute(update(t.idempotent).values(retry_times=1))
        connection.execute(insert(t.step).values(**key, step="s", ordinal=0, status=1, created_at=utcnow()))
        connection.execute(insert(t.outbox).values(**message, created_at=utcnow()))
        connection.execute(insert(t.queue).values(**message, consumer_group="g", deliver_at=utcnow()))
        connection.execute(insert(t.queue_group).values(topic="orders", consumer_group="g", joined_at=utcnow()))
        connection.execute(
            insert(t.failure).values(
                consumer_group="g",
                handler="h",
                failure_key="k:k",
                fingerprint=b"",
                topic="orders",
                properties="{}",
                error_class="E",
                error_text="e",
                attempts=1,
                first_failed_at=utcnow(),
                last_failed_at=utcnow(),
                state="dead",
            )
        )
        connection.execute(
            insert(t.cutover).values(
                name="c", effective_from=utcnow(), source="a", target="b", percent=0, created_at=utcnow()
            )
        )
        assert connection.execute(select(t.cutover.c.name)).scalars().all() == ["c"]
        for table in (t.idempotent, t.step, t.outbox, t.queue, t.queue_group, t.failure):
            assert connection.execute(table.delete()).rowcount == 1
    engine.dispose()


def test_the_role_can_neither_change_tables_nor_rewrite_the_schedule(limited: tuple[str, str | None]) -> None:
    url, schema = limited
    t = tables(schema)
    prefix = f"{schema}." if schema else ""
    engine = create_engine(url)
    with engine.connect() as connection:
        refused(connection, f"DROP TABLE {prefix}message_idempotent")
        refused(connection, f"ALTER TABLE {prefix}message_idempotent ADD COLUMN more INTEGER")
        refused(connection, f"TRUNCATE TABLE {prefix}message_failure")
        refused(connection, t.cutover.update().values(percent=100))
        refused(connection, t.cutover.delete())
        refused(connection, f"UPDATE {prefix}exactly_once_version SET version_num = '0009'")
        if schema or "mysql" in url:
            refused(connection, f"CREATE TABLE {prefix}mine (id INTEGER)")
    engine.dispose()
