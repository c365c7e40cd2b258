"""Tables that are missing, in another database or schema, or half gone: the answer names where, and what to type there."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, MetaData, create_engine, make_url, text
from sqlalchemy.orm import Session
from sqlalchemy.pool import StaticPool
from typer.testing import CliRunner

import exactly_once.alembic
from exactly_once import ConfigurationError, ExactlyOnce, Message, SchemaError
from exactly_once.alembic import ready
from exactly_once.cli.db import app as db
from exactly_once.wording.redaction import redacted
from tests.waiting import until


def said_by(*typed: str) -> tuple[int, str]:
    told = CliRunner().invoke(db, list(typed))
    assert told.exception is None or isinstance(told.exception, SystemExit), told.exception
    return told.exit_code, told.output


@contextmanager
def engine_on(url: str) -> Iterator[Engine]:
    engine = create_engine(url)
    yield engine
    engine.dispose()


def put_into_schema(url: str, schema: str) -> None:
    with engine_on(url) as engine:
        if engine.dialect.name == "mysql":
            with engine.begin() as connection:
                connection.execute(text(f"CREATE DATABASE {schema}"))
    exactly_once.alembic.upgrade(url, schema=schema)


def of_a_named_database(url: str) -> str:
    return f"exactly_tables_of_{make_url(url).database}"


# -- another database ------------------------------------------------------------------------------------------------


def claimed(eo: ExactlyOnce, engine: Engine) -> str:
    with Session(engine) as session, pytest.raises(SchemaError) as refused:
        eo.claim(session, "reserve", "A-1")
    return str(refused.value)


def test_a_claim_in_another_database_is_answered_with_the_command_for_that_one(
    empty_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = f"sqlite:///{tmp_path / 'settings.db'}"
    exactly_once.alembic.upgrade(settings)
    monkeypatch.setenv("EXACTLY_ONCE_DATABASE", settings)
    with engine_on(empty_url) as engine:
        said = claimed(ExactlyOnce(group="answers"), engine)
    assert redacted(empty_url) in said
    assert said.partition("Type: ")[2].startswith("exactly-once db upgrade --database ")
    assert redacted(empty_url) in said.partition("Type: ")[2]
    assert ("in place of ***" in said) == (make_url(empty_url).password is not None)
    # what was printed mends it, with the password put in
    assert said_by("upgrade", "--database", empty_url)[0] == 0
    with engine_on(empty_url) as engine, Session(engine) as session:
        assert ExactlyOnce(group="answers").claim(session, "reserve", "A-1")


def test_a_database_of_the_settings_is_answered_with_the_plain_command(
    empty_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXACTLY_ONCE_DATABASE", empty_url)
    (store,) = ExactlyOnce(group="answers").stores.values()
    with pytest.raises(SchemaError) as refused:
        ready.problem(store)
    assert str(refused.value).endswith("Type: exactly-once db upgrade")
    assert redacted(empty_url) in str(refused.value)
    assert said_by("check")[1].rstrip().endswith("Type: exactly-once db upgrade")


def test_a_check_of_a_database_that_was_typed_names_it_in_the_command(empty_url: str) -> None:
    exactly_once.alembic.upgrade(empty_url)
    exactly_once.alembic.downgrade(empty_url, version=0)
    code, said = said_by("check", "--database", empty_url)
    assert code == 1
    assert f"Type: exactly-once db upgrade --database {redacted(empty_url)}" in said.replace("'", "")


def test_a_claim_in_a_database_in_memory_is_answered_with_the_call() -> None:
    engine = create_engine("sqlite://", poolclass=StaticPool)
    said = claimed(ExactlyOnce("sqlite:///x.db", group="answers"), engine)
    assert said.endswith("Write in the program: exactly_once.alembic.upgrade(engine)")
    assert "Type:" not in said
    exactly_once.alembic.upgrade(engine)
    with Session(engine) as session:
        assert ExactlyOnce("sqlite:///x.db", group="answers").claim(session, "reserve", "A-1")


# -- another schema --------------------------------------------------------------------------------------------------


@pytest.fixture
def apart(request: pytest.FixtureRequest, empty_url: str) -> Iterator[tuple[str, str]]:
    """An empty database, and the name of a schema in which our tables are."""
    schema = of_a_named_database(empty_url)
    put_into_schema(empty_url, schema)
    yield empty_url, schema
    with engine_on(empty_url) as engine, engine.begin() as connection:
        connection.execute(
            text(f"DROP DATABASE {schema}" if engine.dialect.name == "mysql" else f"DROP SCHEMA {schema} CASCADE")
        )


postgres = pytest.mark.where(lambda empty_url, **_: empty_url == "postgres")
no_sqlite = pytest.mark.where(lambda empty_url, **_: empty_url != "sqlite")


@postgres
def test_tables_in_a_schema_that_the_settings_do_not_name_are_told_to_be_there(
    apart: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, schema = apart
    monkeypatch.setenv("EXACTLY_ONCE_DATABASE", url)
    (store,) = ExactlyOnce(group="answers").stores.values()
    with pytest.raises(SchemaError) as refused:
        ready.problem(store)
    for said in (str(refused.value), said_by("check")[1]):
        assert f"The schema {schema} has them: if that is yours, type: export EXACTLY_ONCE_SCHEMA={schema}" in said
        assert said.rstrip().endswith("Only to make others, type: exactly-once db upgrade")
    monkeypatch.setenv("EXACTLY_ONCE_SCHEMA", schema)
    assert said_by("check")[0] == 0


@postgres
def test_a_claim_says_that_too(apart: tuple[str, str]) -> None:
    url, schema = apart
    with engine_on(url) as engine:
        said = claimed(ExactlyOnce("sqlite:///x.db", group="answers"), engine)
    assert f"export EXACTLY_ONCE_SCHEMA={schema}" in said


@postgres
def test_a_wrong_schema_is_answered_with_the_one_that_has_them(apart: tuple[str, str]) -> None:
    url, schema = apart
    code, said = said_by("check", "-d", url, "--schema", "mesaging")
    assert code == 1
    assert "mesaging" in said
    assert f"export EXACTLY_ONCE_SCHEMA={schema}" in said


@no_sqlite
def test_an_upgrade_into_a_schema_says_what_programs_must_be_told(
    empty_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = of_a_named_database(empty_url)
    if empty_url.startswith("mysql"):
        with engine_on(empty_url) as engine, engine.begin() as connection:
            connection.execute(text(f"CREATE DATABASE {schema}"))
    try:
        said = said_by("upgrade", "-d", empty_url, "--schema", schema)[1].rstrip()
        assert f"the tables are made in the schema {schema}." in said
        assert said.endswith(f"Programs must be told: export EXACTLY_ONCE_SCHEMA={schema}")
        assert (
            said_by("upgrade", "-d", empty_url, "--schema", schema)[1]
            .rstrip()
            .endswith(f"EXACTLY_ONCE_SCHEMA={schema}")
        )
        monkeypatch.setenv("EXACTLY_ONCE_SCHEMA", schema)
        assert "export" not in said_by("upgrade", "-d", empty_url)[1]
    finally:
        with engine_on(empty_url) as engine, engine.begin() as connection:
            connection.execute(
                text(f"DROP DATABASE {schema}" if engine.dialect.name == "mysql" else f"DROP SCHEMA {schema} CASCADE")
            )


@pytest.mark.parametrize("verb", ["upgrade", "check"])
def test_a_schema_of_sqlite_is_answered_with_that_it_has_none(verb: str, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shop.db'}"
    assert said_by(verb, "-d", url, "--schema", "messaging") == (
        2,
        "SQLite has no schemas. Leave 'messaging' out: --schema, EXACTLY_ONCE_SCHEMA, or schema= in the program.\n",
    )
    assert not (tmp_path / "shop.db").exists()


def test_a_worker_with_a_schema_of_sqlite_is_answered_so_too(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXACTLY_ONCE_SCHEMA", "messaging")
    (store,) = ExactlyOnce(sqlite_url, group="answers").stores.values()
    with pytest.raises(ConfigurationError, match=r"^SQLite has no schemas\. Leave 'messaging' out"):
        ready.problem(store)


# -- half gone -------------------------------------------------------------------------------------------------------


def emptied(url: str) -> None:
    """A clean-up of tests that deletes from each table it finds."""
    with engine_on(url) as engine:
        metadata = MetaData()
        metadata.reflect(engine)
        with engine.begin() as connection:
            for table in reversed(metadata.sorted_tables):
                connection.execute(table.delete())


def test_a_version_that_was_deleted_is_told_and_put_back(empty_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXACTLY_ONCE_DATABASE", empty_url)
    exactly_once.alembic.upgrade(empty_url)
    emptied(empty_url)
    (store,) = ExactlyOnce(group="answers").stores.values()
    with pytest.raises(SchemaError) as refused:
        ready.problem(store)
    said = (
        f"The tables of exactly_once are in {redacted(empty_url)}, and the table exactly_once_version is empty: something deleted"
        " its row, such as a clean-up of tests that empties every table. Leave that table out there. To put the row back, type:"
        " exactly-once db upgrade"
    )
    assert str(refused.value) == said
    assert said_by("check") == (1, f"{said}\n")
    code, told = said_by("upgrade")
    assert (code, told) == (0, f"{redacted(empty_url)}: version 0002; the row of exactly_once_version is put back.\n")
    assert ready.problem(store) is None


def test_a_version_that_was_deleted_of_tables_that_are_older_is_asked_of_a_person(empty_url: str) -> None:
    exactly_once.alembic.upgrade(empty_url, version=1)
    emptied(empty_url)
    code, told = said_by("upgrade", "-d", empty_url)
    if empty_url.startswith("mysql"):  # there a run that was killed leaves the same, and the next one finishes it
        assert (code, "version 0002" in told) == (0, True)
        return
    assert code == 1
    assert "not as version 0002 makes them. Put back the row that was there, such as '0001' in" in told
    with engine_on(empty_url) as engine, engine.begin() as connection:
        connection.execute(text("INSERT INTO exactly_once_version VALUES ('0001')"))
    assert said_by("upgrade", "-d", empty_url)[1].rstrip().endswith("version 0002, was 0001.")


def test_no_row_is_put_back_where_the_tables_are_taken_away(empty_url: str) -> None:
    exactly_once.alembic.upgrade(empty_url)
    emptied(empty_url)
    exactly_once.alembic.downgrade(empty_url, version=0)
    assert "the tables are made" in said_by("upgrade", "-d", empty_url)[1]


def test_tables_that_are_dropped_under_a_worker_are_told_in_one_line(
    empty_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    exactly_once.alembic.upgrade(empty_url)
    eo = ExactlyOnce(empty_url, group="answers")

    @eo.handler("orders", key="no")
    def reserve(session: Session, order: dict[str, Any]) -> None: ...

    def receiving() -> list[str]:
        return [line for each in caplog.records if " receive" in (line := each.getMessage())]

    with caplog.at_level(logging.WARNING, "exactly_once"), eo.worker("sql://") as worker:
        exactly_once.alembic.downgrade(empty_url, version=0)
        until(lambda: len(receiving()) >= 2, "the queue's consumer and the pump say that they cannot receive")
        exactly_once.alembic.upgrade(empty_url)
        with eo.producer("sql://") as producer:
            producer.send(Message("orders", b'{"no": "A-1"}'))
        until(lambda: worker.counts.outcomes.get("processed"), "the worker goes on with the new tables")
    assert any(line.startswith("topic orders:") for line in receiving())
    assert any("(Pump)" in line for line in receiving())
    for line in receiving():
        assert "\n" not in line
        assert f"The tables of exactly_once are not in {redacted(empty_url)}" in line
        assert line.endswith("Type: exactly-once db upgrade")
