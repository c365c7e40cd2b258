"""The three ways our tables come into a database, each on every dialect, with sync and async drivers."""

import asyncio
import json
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine
from typer.testing import CliRunner

import exactly_once.alembic
from exactly_once.cli.db import app
from exactly_once.errors import ConfigurationError, SchemaError
from tests.integration.user_project import (
    OURS,
    UserProject,
    alembic,
    async_url,
    done,
    make_project,
    table_names,
)


def ready(url: str, schema: str | None = None) -> str | None:
    with create_engine(url).connect() as connection:
        return exactly_once.alembic.check(connection, schema)


def db(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


# The first way: a checkout


def test_alembic_upgrade_head_in_a_checkout_makes_the_tables_and_downgrade_leaves_nothing(empty_url: str) -> None:
    env = {"EXACTLY_ONCE_DATABASE": empty_url}
    done(alembic("upgrade", "head", env=env))
    assert table_names(empty_url) == OURS
    assert ready(empty_url) is None
    done(alembic("upgrade", "head", env=env))
    done(alembic("downgrade", "base", env=env))
    assert table_names(empty_url) == set()


def test_a_checkout_takes_an_async_url_on_the_command_line(empty_url: str) -> None:
    done(alembic("-x", f"url={async_url(empty_url)}", "upgrade", "head"))
    assert table_names(empty_url) == OURS
    assert "No new upgrade operations" in done(alembic("-x", f"url={empty_url}", "check"))


@pytest.mark.parametrize("where", ["argument", "environment"])
def test_a_checkout_takes_a_named_schema(empty_postgres_url: str, where: str) -> None:
    env = {"EXACTLY_ONCE_DATABASE": empty_postgres_url}
    arguments = ["-x", "schema=messaging"] if where == "argument" else []
    if where == "environment":
        env["EXACTLY_ONCE_SCHEMA"] = "messaging"
    done(alembic(*arguments, "upgrade", "head", env=env))
    assert table_names(empty_postgres_url, "messaging") == OURS
    assert table_names(empty_postgres_url) == set()
    assert ready(empty_postgres_url, "messaging") is None
    done(alembic(*arguments, "downgrade", "base", env=env))
    assert table_names(empty_postgres_url, "messaging") == set()


def test_a_checkout_without_a_database_says_what_to_set() -> None:
    result = alembic("upgrade", "head")
    assert result.returncode != 0
    told = result.stdout + result.stderr  # Alembic prints its own errors to the first
    assert "EXACTLY_ONCE_DATABASE" in told
    assert "Traceback" not in told


# The second way: the installed package


@pytest.mark.parametrize("driver", ["sync", "async"])
def test_db_upgrade_makes_the_tables_and_check_then_says_ready(empty_url: str, driver: str) -> None:
    url = empty_url if driver == "sync" else async_url(empty_url)
    assert db("check", "-d", url)[0] == 1
    assert "exactly-once db upgrade" in db("check", "-d", url)[1]
    assert db("upgrade", "-d", url)[0] == 0
    assert table_names(empty_url) == OURS
    assert db("check", "--database", url)[0] == 0
    code, said = db("upgrade", "-d", url)
    assert (code, "nothing to do" in said) == (0, True)


def test_db_reads_the_database_from_the_environment_or_from_a_file(
    empty_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text(f"{empty_url}\n")
    monkeypatch.delenv("EXACTLY_ONCE_DATABASE", raising=False)
    monkeypatch.setenv("EXACTLY_ONCE_DATABASE_FILE", str(tmp_path / "secret"))
    assert db("upgrade")[0] == 0
    monkeypatch.delenv("EXACTLY_ONCE_DATABASE_FILE")
    monkeypatch.setenv("EXACTLY_ONCE_DATABASE", empty_url)
    assert db("check")[0] == 0
    monkeypatch.delenv("EXACTLY_ONCE_DATABASE")
    code, said = db("check")
    assert (code, "EXACTLY_ONCE_DATABASE" in said) == (2, True)


def test_db_upgrades_each_of_several_databases_and_the_schema_of_the_settings(
    empty_postgres_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = f"{empty_postgres_url}?options=-csearch_path%3Dother"
    exactly_once.alembic.upgrade(empty_postgres_url, schema="other")
    exactly_once.alembic.downgrade(empty_postgres_url, schema="other", version=0)
    monkeypatch.setenv("EXACTLY_ONCE_DATABASE", json.dumps({"eu": empty_postgres_url, "us": other}))
    code, said = db("upgrade")
    assert (code, len(said.splitlines())) == (0, 2), said
    assert table_names(empty_postgres_url) == table_names(empty_postgres_url, "other") == OURS
    monkeypatch.setenv("EXACTLY_ONCE_DATABASE", empty_postgres_url)
    monkeypatch.setenv("EXACTLY_ONCE_SCHEMA", "messaging")
    assert db("check")[0] == 1
    assert db("upgrade")[0] == 0
    assert table_names(empty_postgres_url, "messaging") == OURS


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("postgresql+psycopg://app:hush@127.0.0.1:1/shop", 1),
        ("mysql+asyncmy://app:hush@127.0.0.1:1/shop", 1),
        ("postgresql+psycopg://app@127.0.0.1:1/shop?password=hush", 1),
        ("app:hush@host", 2),
        ("nosuch://app:hush@127.0.0.1/shop", 2),
        ("sqlite:////no/such/folder/shop.db", 1),
    ],
)
def test_an_unreachable_database_is_one_paragraph_without_the_password(url: str, code: int) -> None:
    got, said = db("upgrade", "-d", url)
    assert got == code
    assert "hush" not in said
    assert "Traceback" not in said
    assert len(said.strip().splitlines()) == 1


def test_a_caller_with_an_async_engine_runs_it_on_the_connection(empty_url: str) -> None:
    async def main() -> None:
        engine = create_async_engine(async_url(empty_url))
        with pytest.raises(ConfigurationError, match="run_sync"):
            exactly_once.alembic.upgrade(engine)  # type: ignore[arg-type]
        async with engine.connect() as connection:
            await connection.run_sync(exactly_once.alembic.upgrade)
        # a URL works too where a loop is running already
        exactly_once.alembic.upgrade(async_url(empty_url))
        await engine.dispose()

    asyncio.run(main())
    assert table_names(empty_url) == OURS
    assert ready(empty_url) is None


def test_a_transaction_of_the_caller_stays_the_callers_to_commit(empty_postgres_url: str) -> None:
    engine = create_engine(empty_postgres_url)
    with engine.connect() as connection:
        with connection.begin() as transaction:
            exactly_once.alembic.upgrade(connection, schema="messaging")
            assert exactly_once.alembic.current(connection, schema="messaging") == exactly_once.alembic.head()
            transaction.rollback()
        assert exactly_once.alembic.current(connection, schema="messaging") is None
        connection.rollback()
        exactly_once.alembic.upgrade(connection)
    assert table_names(empty_postgres_url) == OURS
    engine.dispose()


def test_on_mariadb_a_schema_is_another_database_of_the_server(empty_mariadb_url: str) -> None:
    database = make_url(empty_mariadb_url).database
    url = make_url(empty_mariadb_url).set(database="mysql").render_as_string(hide_password=False)
    exactly_once.alembic.upgrade(url, schema=database)
    assert table_names(empty_mariadb_url) == OURS
    assert ready(url, database) is None
    assert ready(empty_mariadb_url) is None
    exactly_once.alembic.downgrade(url, version=0, schema=database)
    assert table_names(empty_mariadb_url) == set()


# The third way: a program's own history


@pytest.fixture
def project(tmp_path: Path, empty_url: str) -> UserProject:
    made = make_project(tmp_path / "shop", empty_url)
    done(made.alembic("revision", "--autogenerate", "-m", "stock", "--rev-id", "aaa1"))
    return made


def write_ours(project: UserProject, *, schema: str | None = None, down_revision: str | None = None) -> Path:
    return exactly_once.alembic.revision(project.folder / "history", schema=schema, down_revision=down_revision)


def test_db_revision_writes_one_file_that_a_users_own_upgrade_and_downgrade_run(project: UserProject) -> None:
    code, said = db("revision", "--directory", str(project.folder / "history"))
    assert code == 0, said
    assert len(project.versions()) == 2
    done(project.alembic("upgrade", "head"))
    assert table_names(project.url) == OURS | {"shop_stock", "alembic_version"}
    assert ready(project.url) is None
    assert "(head)" in done(project.alembic("current"))
    done(project.alembic("downgrade", "aaa1"))
    assert table_names(project.url) == {"shop_stock", "alembic_version"}
    done(project.alembic("upgrade", "head"))
    assert ready(project.url) is None


def test_a_program_may_change_from_the_second_way_to_the_third(project: UserProject) -> None:
    exactly_once.alembic.upgrade(project.url)
    write_ours(project)
    done(project.alembic("upgrade", "head"))
    assert ready(project.url) is None
    assert db("upgrade", "-d", project.url)[0] == 0


def test_what_follows_our_call_in_a_users_migration_still_has_its_operations(project: UserProject) -> None:
    path = write_ours(project)
    source = path.read_text().replace(
        "    exactly_once.alembic.upgrade(version=2)\n",
        "    exactly_once.alembic.upgrade(version=2)\n"
        "    from alembic import op\n"
        "    import sqlalchemy as sa\n"
        "    op.add_column('shop_stock', sa.Column('pieces', sa.Integer()))\n",
    )
    path.write_text(source)
    done(project.alembic("upgrade", "head"))
    with create_engine(project.url).connect() as connection:
        connection.execute(text("SELECT pieces FROM shop_stock"))


def test_a_users_own_offline_sql_holds_our_tables(project: UserProject) -> None:
    write_ours(project)
    script = done(project.alembic("upgrade", "head", "--sql"))
    for table in OURS:
        assert f" {table} (" in script
    back = done(project.alembic("downgrade", "head:aaa1", "--sql"))
    assert "DROP TABLE message_idempotent" in back or "DROP TABLE IF EXISTS message_idempotent" in back


def test_a_history_that_brings_the_version_already_is_left_alone(project: UserProject) -> None:
    first = write_ours(project)
    with pytest.raises(ConfigurationError, match=first.name):
        write_ours(project)
    assert len(project.versions()) == 2


def test_a_history_with_two_heads_is_left_alone(project: UserProject) -> None:
    done(project.alembic("revision", "-m", "other", "--rev-id", "bbb2", "--head", "base", "--splice"))
    with pytest.raises(ConfigurationError, match="2 heads: aaa1, bbb2"):
        write_ours(project)
    assert len(project.versions()) == 2
    assert "down_revision = 'bbb2'" in write_ours(project, down_revision="bbb2").read_text()


def test_revision_reads_where_the_history_is_from_alembic_ini(
    project: UserProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.folder)
    assert db("revision")[0] == 0
    assert len(project.versions()) == 2
    monkeypatch.chdir(project.folder.parent)
    code, said = db("revision")
    assert (code, "alembic.ini" in said) == (1, True)


def test_a_named_schema_is_in_the_file(tmp_path: Path, empty_postgres_url: str) -> None:
    project = make_project(tmp_path / "shop", empty_postgres_url)
    write_ours(project, schema="messaging")
    done(project.alembic("upgrade", "head"))
    assert table_names(project.url, "messaging") == OURS
    assert ready(project.url, "messaging") is None
    done(project.alembic("downgrade", "base"))
    assert table_names(project.url, "messaging") == set()


# What none of them does


def test_without_a_database_outside_a_migration_the_error_says_how() -> None:
    with pytest.raises(ConfigurationError, match="inside a migration"):
        exactly_once.alembic.upgrade(version=2)


@pytest.mark.parametrize("version", [-1, 99])
def test_a_version_that_is_not_there_is_refused(version: int) -> None:
    with pytest.raises(ConfigurationError, match="no schema version"):
        exactly_once.alembic.upgrade("sqlite://", version=version)


def test_a_strangers_table_with_one_of_our_names_is_not_touched(empty_url: str) -> None:
    engine = create_engine(empty_url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE message_queue (mine INTEGER)"))
    with pytest.raises(SchemaError, match="message_queue"):
        exactly_once.alembic.upgrade(empty_url)
    assert table_names(empty_url) == {"message_queue"}
    engine.dispose()


def test_check_tells_missing_old_and_too_new_apart(empty_url: str) -> None:
    assert "are not in" in str(ready(empty_url))
    exactly_once.alembic.upgrade(empty_url)
    assert ready(empty_url) is None
    engine = create_engine(empty_url)
    said = {}
    for version in ("0000", "0003", "0004"):
        with engine.begin() as connection:
            connection.execute(text(f"UPDATE exactly_once_version SET version_num = '{version}'"))
        said[version] = ready(empty_url)
    engine.dispose()
    assert "exactly-once db upgrade" in str(said["0000"])
    assert said["0003"] is None, "a migration stays usable by the release before it"
    assert "Install a newer release" in str(said["0004"])
