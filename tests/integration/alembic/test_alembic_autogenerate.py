"""A user's `alembic revision --autogenerate` neither drops our tables nor proposes to make them."""

from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

import exactly_once.alembic
from tests.integration.user_project import done, make_project

PARENTS = {"schema_name": None}


def test_autogenerate_is_empty_beside_our_tables(tmp_path: Path, empty_url: str) -> None:
    project = make_project(tmp_path / "shop", empty_url)
    done(project.alembic("revision", "--autogenerate", "-m", "stock"))
    done(project.alembic("upgrade", "head"))
    exactly_once.alembic.upgrade(empty_url)
    assert "No new upgrade operations detected" in done(project.alembic("check"))


def test_autogenerate_is_empty_after_our_file_in_the_users_own_history(tmp_path: Path, empty_url: str) -> None:
    project = make_project(tmp_path / "shop", empty_url)
    done(project.alembic("revision", "--autogenerate", "-m", "stock"))
    exactly_once.alembic.revision(project.folder / "history")
    done(project.alembic("upgrade", "head"))
    assert "No new upgrade operations detected" in done(project.alembic("check"))


def test_without_include_name_autogenerate_would_drop_our_tables(tmp_path: Path, empty_url: str) -> None:
    project = make_project(tmp_path / "shop", empty_url, options="")
    exactly_once.alembic.upgrade(empty_url)
    done(project.alembic("stamp", "head"))
    result = project.alembic("check")
    assert result.returncode != 0
    for table in ("message_idempotent", "exactly_once_version"):
        assert table in result.stderr + result.stdout


@pytest.mark.parametrize("schema", ["messaging", "shop"])
def test_autogenerate_is_empty_where_our_tables_have_a_named_schema(
    tmp_path: Path, empty_postgres_url: str, schema: str
) -> None:
    engine = create_engine(empty_postgres_url)
    with engine.begin() as connection:
        connection.execute(text("CREATE SCHEMA shop"))
    engine.dispose()
    project = make_project(
        tmp_path / "shop", empty_postgres_url, schema="shop", options="include_name=include_name, include_schemas=True"
    )
    done(project.alembic("revision", "--autogenerate", "-m", "stock"))
    exactly_once.alembic.revision(project.folder / "history", schema=schema)
    done(project.alembic("upgrade", "head"))
    assert "No new upgrade operations detected" in done(project.alembic("check"))


def test_a_table_of_the_user_with_one_of_our_names_in_another_schema_can_be_seen() -> None:
    include = exactly_once.alembic.include_name
    assert not include("message_queue", "table", {"schema_name": "messaging"}, schema="messaging")
    assert include("message_queue", "table", {"schema_name": None}, schema="messaging")
    assert not include("message_queue", "table", PARENTS, schema=None)
    assert include("message_queue", "table", {"schema_name": "shop"}, schema=None)


def test_only_tables_of_our_names_are_left_out() -> None:
    include = exactly_once.alembic.include_name
    assert include("orders", "table", PARENTS)
    assert include("message_queue", "column", PARENTS)
    assert include("messaging", "schema", {})
    assert include(None, "schema", {})
    assert not include("message_queue", "table", {"schema_name": "anything"})
