"""SQLite files that are not there, or only to be read: none is made where nothing is to be written, and the path is named."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

import exactly_once.alembic
from exactly_once import ConfigurationError, ExactlyOnce, Message, SchemaError, SendFailed
from exactly_once.cli.command import main
from exactly_once.doctor.looking import examine


def reserve(session: Session, order: dict[str, Any]) -> None: ...


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def typed(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as exited:
            main(arguments)
        told = capsys.readouterr()
        return int(str(exited.value.code or 0)), told.out + told.err

    return typed


@pytest.fixture
def missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Named in the settings by a relative path, and mistyped."""
    monkeypatch.chdir(tmp_path)
    exactly_once.alembic.upgrade("sqlite:///shop.db")
    monkeypatch.setenv("EXACTLY_ONCE_DATABASE", "sqlite:///shp.db")
    return tmp_path / "shp.db"


def no_file(path: Path) -> str:
    return (
        f"There is no file {path} (sqlite:///{path.name}), and none was made. Mend the URL, or make it with our tables in it."
        " Type: exactly-once db upgrade"
    )


@pytest.mark.parametrize(
    "line",
    [
        "db check",
        "failures list -g files",
        "failures requeue 1 -g files",
        "steps show A-1 -g files",
        "handlers rename a b -g files",
        "send -t sql:// --topic orders --body {}",
    ],
)
def test_no_command_but_an_upgrade_makes_a_file(
    line: str, typed: Callable[..., tuple[int, str]], missing: Path
) -> None:
    code, said = typed(*line.split())
    assert code in (1, 2)
    assert no_file(missing) in said
    assert "db upgrade" not in said.replace(no_file(missing), "")
    assert not missing.exists()
    assert typed("db", "upgrade")[0] == 0
    assert missing.exists()
    assert no_file(missing) not in typed(*line.split())[1]


@pytest.mark.parametrize("door", ["worker", "doctor", "process", "aprocess", "producer"])
def test_nor_does_a_program(door: str, missing: Path) -> None:
    app = ExactlyOnce(group="files")
    if door == "aprocess":

        @app.handler("orders", key="no", name="reserve")
        async def areserve(session: AsyncSession, order: dict[str, Any]) -> None: ...

    else:
        app.handler("orders", key="no", name="reserve")(reserve)
    message = Message("orders", b'{"no": "A-1"}')

    def send() -> None:
        with app.producer("sql://") as producer:
            producer.send(message)

    doors: dict[str, Callable[[], object]] = {
        "worker": lambda: app.worker("sql://").start(),
        "process": lambda: app.process(message),
        "aprocess": lambda: asyncio.run(app.aprocess(message)),
        "producer": send,
    }
    if door == "doctor":
        assert no_file(missing) in [each.text for each in examine(app, None)]
    else:
        with pytest.raises((SchemaError, SendFailed)) as refused:
            doors[door]()
        assert no_file(missing) in str(refused.value).replace("+aiosqlite", "")
    assert not missing.exists()


@pytest.mark.parametrize("verb", ["upgrade", "check"])
def test_a_folder_that_is_not_there_is_named(verb: str, typed: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/nowhere/shop.db"
    code, said = typed("db", verb, "-d", url)
    assert (code, said) == (1, f"There is no folder {tmp_path}/nowhere for {url}. Make it, or mend the URL.\n")
    with pytest.raises(ConfigurationError, match="There is no folder"):
        exactly_once.alembic.upgrade(url)


def test_a_worker_names_the_folder_too(tmp_path: Path) -> None:
    app = ExactlyOnce(f"sqlite:///{tmp_path}/nowhere/shop.db", group="files")
    app.handler("orders", key="no", name="reserve")(reserve)
    with pytest.raises(ConfigurationError, match=rf"There is no folder {tmp_path}/nowhere for"):
        app.worker("sql://").start()


def test_doctor_tells_of_a_file_that_is_only_read_as_a_file(tmp_path: Path) -> None:
    exactly_once.alembic.upgrade(f"sqlite:///{tmp_path}/shop.db")
    app = ExactlyOnce(f"sqlite:///file:{tmp_path}/shop.db?mode=ro&uri=true", group="files")
    app.handler("orders", key="no", name="reserve")(reserve)
    said = [each.text for each in examine(app, None) if "read only" in each.text]
    assert len(said) == 1
    assert "let this user write the file and its folder" in said[0]
    assert "primary" not in said[0]
