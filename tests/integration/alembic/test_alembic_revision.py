"""`exactly-once db revision` writes where Alembic looks, or not at all; and says what an env.py lacks."""

import os
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from typer.testing import CliRunner

from exactly_once import alembic
from exactly_once.alembic import ready
from exactly_once.cli.db import app
from exactly_once.database.store import Store
from exactly_once.errors import SchemaError
from tests.integration.user_project import UserProject, done, make_project


def typed(*arguments: str) -> tuple[int, str]:
    return said_by("revision", *arguments)


def said_by(*arguments: str) -> tuple[int, str]:
    told = CliRunner().invoke(app, [*arguments])
    assert told.exception is None or isinstance(told.exception, SystemExit), told.exception
    return told.exit_code, told.output


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> UserProject:
    monkeypatch.chdir(tmp_path)
    return make_project(tmp_path, f"sqlite:///{tmp_path / 'shop.db'}")


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts}


@pytest.mark.parametrize("typed_folder", [".", "{here}", "history/versions/..", "nowhere", "src"])
def test_a_folder_without_an_env_py_is_refused_and_nothing_is_written(typed_folder: str, project: UserProject) -> None:
    if typed_folder.startswith("history"):
        assert typed("--directory", typed_folder)[0] == 0  # it is the folder
        return
    (project.folder / "src").mkdir()
    before = everything(project.folder)
    named = typed_folder.format(here=project.folder)
    code, said = typed("--directory", named)
    assert code == 1
    assert said == (
        f"There is no env.py in {named}, so Alembic would not see what is written there. Nothing was written. Did you mean"
        " --directory history?\n"
    )
    assert everything(project.folder) == before


def test_where_there_is_none_at_all_it_says_what_makes_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, said = typed("--directory", ".")
    assert code == 1
    assert said == (
        "There is no env.py in ., so Alembic would not see what is written there. Nothing was written. Type: alembic init"
        " migrations; or without a history of your own: exactly-once db upgrade\n"
    )


def test_a_folder_of_an_ini_file_without_an_env_py_is_refused_too(project: UserProject) -> None:
    (project.folder / "history" / "env.py").unlink()
    code, said = typed()
    assert code == 1
    assert said.startswith(f"There is no env.py in {project.folder / 'history'}, so Alembic would not see")
    assert project.versions() == []


def test_alembics_own_sentence_gets_no_second_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alembic.ini").write_text("[alembic]\nscript_location = gone\n")
    code, said = typed()
    assert code == 1
    assert said.endswith(". Nothing was written.\n")
    assert ".." not in said.replace("...", "")


def test_what_is_written_is_what_alembic_sees(project: UserProject) -> None:
    code, said = typed("--directory", "history")
    assert code == 0
    assert said.count("\n") == 1
    done(project.alembic("upgrade", "head"))
    assert (project.folder / "shop.db").stat().st_size


def test_an_env_py_that_does_not_leave_our_tables_out_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    project = make_project(tmp_path, f"sqlite:///{tmp_path / 'shop.db'}", options="")
    env = project.folder / "history" / "env.py"
    env.write_text(env.read_text().replace("from exactly_once.alembic import include_name\n", ""))
    code, said = typed("--directory", "history")
    assert code == 0
    assert said.splitlines()[1] == (
        f"{os.path.join('history', 'env.py')} does not name include_name: the next `alembic revision --autogenerate` would"
        " propose to drop our tables. Write there: context.configure(...,"
        " include_name=exactly_once.alembic.include_name)"
    )


LACKS = (
    " does not name include_name: the next `alembic revision --autogenerate` would propose to drop our tables. Write there:"
    " context.configure(..., include_name=exactly_once.alembic.include_name)"
)


@pytest.mark.parametrize("found_by", ["alembic.ini", "its folder", "being in it"])
def test_upgrade_and_check_tell_of_an_env_py_that_would_drop_the_tables(
    found_by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    url = f"sqlite:///{tmp_path / 'shop.db'}"
    project = make_project(tmp_path, url, options="")
    env = project.folder / "history" / "env.py"
    well = env.read_text()
    env.write_text(well.replace("from exactly_once.alembic import include_name\n", ""))
    shown = os.path.join("history", "env.py")
    if found_by != "alembic.ini":
        (project.folder / "alembic.ini").unlink()
    if found_by == "being in it":
        monkeypatch.chdir(project.folder / "history")
        shown = "env.py"
    code, said = said_by("check", "-d", url)
    assert code == 1
    assert said.splitlines()[1:] == [shown + LACKS]
    for verb in ("upgrade", "check"):
        code, said = said_by(verb, "-d", url)
        assert (code, said.splitlines()[1:]) == (0, [shown + LACKS]), said
    env.write_text(well)
    assert said_by("check", "-d", url)[1].count("\n") == 1


@pytest.mark.parametrize("broken", ["[alembic]\nscript_location = gone\n", "[alembic]\n", "no ini\n", "\x00"])
def test_a_history_that_cannot_be_read_does_not_trouble_the_upgrade(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alembic.ini").write_text(broken)
    code, said = said_by("upgrade", "-d", f"sqlite:///{tmp_path / 'shop.db'}")
    assert (code, said.count("\n")) == (0, 1), said


LOST = (
    " (The database has a table alembic_version: if these were there before, the claims went with them, and a copy of an old"
    " message would run again. Then restore them from a backup.)"
)


def test_missing_tables_beside_a_history_may_have_been_dropped_with_their_claims(empty_url: str) -> None:
    engine = create_engine(empty_url)
    with engine.connect() as connection:
        assert LOST not in str(alembic.check(connection))
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)"))
    with engine.connect() as connection:
        told = str(alembic.check(connection))
    engine.dispose()
    assert told.endswith(LOST)
    assert "Type: exactly-once db upgrade" in told
    code, said = said_by("check", "-d", empty_url)
    assert (code, said.endswith(f"{LOST}\n")) == (1, True)
    with pytest.raises(SchemaError) as refused:
        ready.problem(Store("default", empty_url))
    assert str(refused.value).endswith(LOST)
    assert said_by("upgrade", "-d", empty_url)[0] == 0
    assert said_by("check", "-d", empty_url)[0] == 0
