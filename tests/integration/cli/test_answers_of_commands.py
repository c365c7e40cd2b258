"""What a person mistypes is answered with what it was taken for and what to type; nothing waits that could not end well."""

import os
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from threading import Thread
from time import monotonic
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from typer.testing import CliRunner

import exactly_once.alembic
from exactly_once import ConfigurationError, ExactlyOnce, Message, Misuse, Outcome, SchemaError, SendFailed
from exactly_once.cli.failures import app as failures
from exactly_once.cli.reference import application
from exactly_once.transports.rocketmq5.endpoints import Endpoints, not_grpc
from tests.integration.shop import Shop, on, order, put

ROOT = Path(__file__).parents[3]

# -- sending ---------------------------------------------------------------------------------------------------------


def test_a_message_for_tables_that_are_not_made_says_so_at_the_first_try(empty_url: str) -> None:
    eo = ExactlyOnce(empty_url, group="answers")
    began = monotonic()
    with eo.producer("sql://") as producer, pytest.raises((SendFailed, SchemaError)) as refused:
        producer.send(Message("orders", b"{}"))
    assert "Type: exactly-once db upgrade" in str(refused.value)
    assert "tries" not in str(refused.value)
    exactly_once.alembic.upgrade(empty_url)
    with ExactlyOnce(empty_url, group="answers").producer("sql://") as producer:
        assert producer.send(Message("orders", b"{}")).topic == "orders"
    assert monotonic() - began < 30


# -- settings and references -----------------------------------------------------------------------------------------


def said_without_settings(what: str) -> str:
    eo = ExactlyOnce(group="answers")

    @eo.handler("orders", key="no")
    def reserve(session: Session, body: dict[str, Any]) -> None: ...

    with pytest.raises(ConfigurationError) as refused:
        eo.transport() if what == "transport" else eo.redis_at() if what == "redis" else eo.stores
    return str(refused.value)


@pytest.mark.parametrize("what", ["database", "transport", "redis"])
def test_a_setting_that_is_missing_names_the_file_that_was_looked_in(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(f"EXACTLY_ONCE_{what.upper()}", raising=False)
    (tmp_path / "pyproject.toml").write_text('[exactly_once]\ndatabase = "sqlite:///x.db"\n')
    said = said_without_settings(what)
    assert f"Type: export EXACTLY_ONCE_{what.upper()}=" in said
    assert f"settings were looked for in {tmp_path / 'pyproject.toml'}: no [tool.exactly_once] there" in said
    (tmp_path / "pyproject.toml").write_text('[tool.exactly_once]\ngroup = "x"\n')
    said = said_without_settings(what)
    assert f"settings were looked for in {tmp_path / 'pyproject.toml'})" in said
    (tmp_path / "pyproject.toml").unlink()
    assert "there is no pyproject.toml" in said_without_settings(what)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("consumers.py:eo", "consumers:eo"),
        ("shop/consumers.py:eo", "shop.consumers:eo"),
        ("./shop/consumers.py:eo", "shop.consumers:eo"),
        ("shop/consumers:eo", "shop.consumers:eo"),
        ("shop/__init__.py:eo", "shop:eo"),
        ("../elsewhere/consumers.py:eo", "consumers:eo"),
        ("{here}/shop/consumers.py:eo", "shop.consumers:eo"),
    ],
)
def test_a_file_in_place_of_a_module_is_answered_with_the_module(
    typed: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError) as refused:
        application(typed.format(here=tmp_path))
    kind = "file" if ".py" in typed else "path"
    assert str(refused.value).endswith(f"is a {kind}; type its module: {meant}")


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ('os.environ["SHOP_URL_THAT_NOBODY_SET"]', "KeyError"),
        ('json.loads("{")', "JSONDecodeError"),
        ("import reqests", "No module named 'reqests'"),
    ],
)
def test_an_error_at_import_names_the_programs_own_line(
    line: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"answers_{error[:4].lower().replace(' ', '_')}"
    (tmp_path / f"{name}.py").write_text(f"import json\nimport os\n\n{line}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigurationError) as refused:
        application(f"{name}:eo")
    assert error in str(refused.value)
    assert f"{name}.py:4 in <module>" in str(refused.value)
    assert "frozen" not in str(refused.value)


def test_alembic_without_a_database_says_so_in_one_sentence(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("EXACTLY_ONCE_")}
    told = subprocess.run(
        [sys.executable, "-m", "alembic", "-c", str(ROOT / "alembic.ini"), "upgrade", "head"],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert told.returncode != 0
    assert "One database must be given. Type: export EXACTLY_ONCE_DATABASE=" in told.stdout + told.stderr
    assert "Traceback" not in told.stdout + told.stderr


# -- failures --------------------------------------------------------------------------------------------------------


def test_a_group_that_is_misspelt_is_told_which_there_are(database: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXACTLY_ONCE_DATABASE", database.url.render_as_string(hide_password=False))
    eo = ExactlyOnce(database, group="inventory")

    @eo.handler("orders", key="no")
    def reserve(session: Session, body: dict[str, Any]) -> None: ...

    assert "there are:" not in CliRunner().invoke(failures, ["list", "--group", "inventroy"]).output
    assert eo.process(order()) is Outcome.PROCESSED
    told = CliRunner().invoke(failures, ["list", "--group", "inventroy"])
    assert told.exit_code == 0
    assert "no rows of group 'inventroy'; there are: inventory" in told.output
    assert "there are:" not in CliRunner().invoke(failures, ["list", "--group", "inventory"]).output


# -- one writer ------------------------------------------------------------------------------------------------------


@on("sqlite")
def test_a_message_run_inside_a_handler_of_the_same_file_is_refused_at_once(shop: Shop) -> None:
    refused: list[str] = []
    if shop.is_async:

        @shop.eo.handler("orders", key="no")
        async def outer(session: AsyncSession, body: dict[str, Any]) -> None:
            await session.run_sync(lambda inside: put(inside, "outer"))
            with pytest.raises(Misuse) as error:
                await shop.eo.aprocess(order("inner"))
            refused.append(str(error.value))
    else:

        @shop.eo.handler("orders", key="no")
        def outer(session: Session, body: dict[str, Any]) -> None:
            put(session, "outer")
            with pytest.raises(Misuse) as error:
                shop.eo.process(order("inner"))
            refused.append(str(error.value))

    began = monotonic()
    assert shop.process(order()) is Outcome.PROCESSED
    assert monotonic() - began < 5
    assert "SQLite has one writer for the whole file" in refused[0]
    assert shop.process(order("inner")) is Outcome.PROCESSED, "afterwards it runs, and meets the refusal itself"


@on("sqlite", colour="sync")
def test_a_message_sent_inside_a_handler_of_the_same_file_is_refused_at_once(shop: Shop) -> None:
    @shop.eo.handler("orders", key="no")
    def outer(session: Session, body: dict[str, Any]) -> None:
        with shop.eo.producer("sql://") as producer:
            producer.send(Message("invoices", b"{}"))

    began = monotonic()
    assert shop.process(order()) is Outcome.FAILED
    assert monotonic() - began < 5


@on("postgres", "mariadb", colour="sync")  # SQLite has one writer
def test_elsewhere_a_message_may_run_inside_a_handler(shop: Shop) -> None:
    engine = create_engine(shop.url)
    eo = ExactlyOnce(engine, group="answers")
    inner: list[Outcome] = []

    @eo.handler("orders", key="no")
    def outer(session: Session, body: dict[str, Any]) -> None:
        if body["no"] == "A-1":
            inner.append(eo.process(order("inner")))

    assert eo.process(order()) is Outcome.PROCESSED
    assert inner == [Outcome.PROCESSED]
    engine.dispose()


def test_another_thread_gets_its_turn_at_the_file(sqlite_url: str) -> None:
    eo, outcomes, threads = ExactlyOnce(sqlite_url, group="answers"), list[Outcome](), list[Thread]()

    @eo.handler("orders", key="no")
    def outer(session: Session, body: dict[str, Any]) -> None:
        if body["no"] == "A-1":
            threads.append(Thread(target=lambda: outcomes.append(eo.process(order("beside")))))
            threads[0].start()

    assert eo.process(order()) is Outcome.PROCESSED
    threads[0].join(30)
    assert outcomes == [Outcome.PROCESSED]


def test_a_connection_beside_the_session_is_told_why_the_file_is_locked(sqlite_url: str) -> None:
    eo = ExactlyOnce(sqlite_url, group="answers")
    own = create_engine(sqlite_url)
    file = own.url.database
    assert file is not None

    @eo.handler("orders", key="no")
    def outer(session: Session, body: dict[str, Any]) -> None:
        with closing(sqlite3.connect(file, timeout=0.1)) as connection:
            connection.execute("CREATE TABLE beside (no INTEGER)")

    assert eo.process(order()) is Outcome.FAILED
    with own.connect() as connection:
        kept = str(connection.execute(text("SELECT error_text FROM message_failure")).scalar_one())
    assert kept.startswith("database is locked (another connection holds the file, perhaps a handler's own")
    own.dispose()


# -- RocketMQ's ports ------------------------------------------------------------------------------------------------


@pytest.fixture
def port(request: pytest.FixtureRequest) -> Iterator[int]:
    """Somebody who accepts, answers the first word with this, and ends the connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection = server.accept()[0]
            with connection:
                connection.recv(1000)
                connection.sendall(request.param)

        thread = Thread(target=answer)
        thread.start()
        yield server.getsockname()[1]
        thread.join()


@pytest.mark.parametrize("port", [b"", b"-ERR unknown command\r\n"], indirect=True)
def test_a_name_servers_port_is_told_to_be_no_proxys(port: int) -> None:
    said = not_grpc(Endpoints((f"127.0.0.1:{port}",)))
    assert said is not None
    assert f"Something listens at 127.0.0.1:{port} and does not speak gRPC" in said
    assert "rocketmq4:// takes name servers" in said


@pytest.mark.parametrize("port", [b"\0\0\x06\x04\0\0\0\0\0" + b"\0" * 6], indirect=True)
def test_who_speaks_grpc_is_not_accused(port: int) -> None:
    assert not_grpc(Endpoints((f"127.0.0.1:{port}",))) is None


def test_where_nobody_listens_nobody_is_accused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    assert not_grpc(Endpoints((f"127.0.0.1:{free}",))) is None
