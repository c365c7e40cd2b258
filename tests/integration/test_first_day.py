"""Mistakes of a first day, at each door: one sentence that says what to type, and nothing is lost or blamed on a message."""

import json
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from typer import Typer
from typer.testing import CliRunner

from exactly_once import ConfigurationError, ExactlyOnce, Message, Outcome, Retry
from exactly_once.cli import db, failures, send
from exactly_once.errors import SchemaError, StoreUnavailable
from exactly_once.testing.child import free_ports
from tests.integration.shop import COLOURS, GROUP, Shop, order, put, shops

NOBODY = {
    "postgresql": "postgresql+psycopg://nobody@127.0.0.1:{port}/nothing",
    "mysql": "mysql+pymysql://nobody@127.0.0.1:{port}/nothing",
}


@pytest.fixture(params=COLOURS)
def shop(request: pytest.FixtureRequest) -> Iterator[Shop]:
    yield from shops(request, "postgres", request.param)


# -- no tables, no database ----------------------------------------------------------------------------------------------


def test_a_claim_without_tables_says_what_to_type(empty_engine: Engine) -> None:
    eo = ExactlyOnce(group=GROUP)
    with Session(empty_engine) as session, pytest.raises(SchemaError, match=r"Type: exactly-once db upgrade"):
        eo.claim(session, "handler", "A-1")


def test_a_message_processed_without_tables_is_not_blamed_for_it(empty_engine: Engine) -> None:
    eo = ExactlyOnce(empty_engine, group=GROUP)
    ran: list[str] = []

    @eo.handler("orders", key="no")
    def handler(session: Session, order: dict[str, Any]) -> None:
        ran.append("ran")

    for attempt in (1, 2):
        with pytest.raises(SchemaError, match=r"Type: exactly-once db upgrade"):
            eo.process(order("A-1", attempt=attempt))
    assert ran == []


@pytest.mark.parametrize("server", sorted(NOBODY))
def test_a_claim_on_a_database_that_is_not_there_says_so(server: str) -> None:
    (port,) = free_ports()
    engine = create_engine(NOBODY[server].format(port=port))
    eo = ExactlyOnce(group=GROUP)
    with Session(engine) as session, pytest.raises(StoreUnavailable, match="does not answer"):
        eo.claim(session, "handler", "A-1")


def test_a_loop_of_ones_own_hears_once_that_the_database_is_away(caplog: pytest.LogCaptureFixture) -> None:
    (port,) = free_ports()
    eo = ExactlyOnce(create_engine(NOBODY["postgresql"].format(port=port)), group=GROUP)

    @eo.handler("orders", key="no")
    def handler(session: Session) -> None: ...

    assert [eo.process(order(n)) for n in range(3)] == [Outcome.WAITING] * 3
    assert [record.getMessage().partition(" ")[0] for record in caplog.records] == ["store_away"]


def test_a_database_in_memory_is_not_said_to_be_upgraded() -> None:
    told = CliRunner().invoke(db.app, ["upgrade", "--database", "sqlite://"])
    assert told.exit_code == 2
    assert "sqlite:///orders.db" in told.output


def test_failures_of_several_databases_are_asked_for_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sqlite_url: str
) -> None:
    both = json.dumps({"eu": sqlite_url, "us": f"sqlite:///{tmp_path / 'us.db'}"})
    program = 'from exactly_once import ExactlyOnce\neo = ExactlyOnce(group="g", route=lambda message: "eu")\n'
    (tmp_path / "two_databases.py").write_text(program)
    monkeypatch.setenv("EXACTLY_ONCE_DATABASE", both)
    monkeypatch.chdir(tmp_path)
    for verb in (["list"], ["requeue", "1"], ["discard", "1"]):
        told = CliRunner().invoke(failures.app, [*verb, "--app", "two_databases:eo"])
        assert isinstance(told.exception, ConfigurationError)
        assert "eu, us. Say which: --database eu" in str(told.exception)
    told = CliRunner().invoke(failures.app, ["list", "--app", "two_databases:eo", "--database", "eu"])
    assert told.exit_code == 0, told.output
    assert "0 of 0 failure(s)" in told.output


# -- what is no message --------------------------------------------------------------------------------------------------


def test_what_is_no_message_is_refused_where_it_is_given(shop: Shop) -> None:
    shop.handles(lambda session: None)
    not_a_message: Any = {"no": "A-1"}
    with pytest.raises(ConfigurationError, match=r"A dict was given.*from_rocketmq"):
        shop.process(not_a_message)
    text_body: Any = '{"no": "A-1"}'
    with pytest.raises(TypeError, match=r"body\.encode\(\)"):
        Message("orders", text_body)


def test_a_message_sent_into_the_memory_of_a_command_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    one_command = Typer()
    one_command.command()(send.command)
    monkeypatch.setenv("EXACTLY_ONCE_TRANSPORT", "memory://orders")
    for arguments in ([], ["--transport", "memory://orders"]):
        told = CliRunner().invoke(one_command, ["--topic", "orders", "--body", "{}", *arguments])
        assert isinstance(told.exception, ConfigurationError)
        assert "sql://" in str(told.exception)


def test_a_module_to_import_that_is_not_there_is_named_with_its_setting(tmp_path: Path) -> None:
    eo = ExactlyOnce("sqlite:///x.db", group=GROUP, imports=["shop_nowhere.handlers"])
    with pytest.raises(ConfigurationError, match=r"no module 'shop_nowhere'.*imports=.*PYTHONPATH"):
        eo.process(order())


# -- a handler's own bug -------------------------------------------------------------------------------------------------


def test_a_handlers_bug_is_told_with_its_line(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    def buggy(session: Session) -> None:
        session.execute(text("SELECT 1"))
        {}["sku"]

    line = buggy.__code__.co_firstlineno + 2
    shop.handles(buggy)
    assert shop.process(order()) is Outcome.FAILED
    told = f"'sku' (at integration/test_first_day.py:{line} in buggy)"
    assert shop.failure().error_text == told
    assert told in caplog.text


def test_sys_exit_in_a_worker_is_a_failure_like_any_other(shop: Shop) -> None:
    url = f"memory://exits-{shop.colour}"

    def leave(session: Session) -> None:
        put(session, "before")
        sys.exit(3)

    if shop.is_async:

        @shop.eo.handler("orders", key="no", retry=Retry(max_attempts=2, delays=[timedelta(0)]))
        async def awaited(session: AsyncSession) -> None:
            await session.run_sync(leave)
    else:

        @shop.eo.handler("orders", key="no", retry=Retry(max_attempts=2, delays=[timedelta(0)]))
        def plain(session: Session) -> None:
            leave(session)

    with shop.eo.producer(url) as producer:
        producer.send(order())
    with shop.eo.worker(url, concurrency=2) as worker:
        outcomes = worker.drain(timedelta(seconds=30))
    assert outcomes["dead"] == 1
    failure = shop.failure()
    assert (failure.state, failure.attempts, failure.error_class) == ("dead", 2, "Misuse")
    assert "sys.exit(3)" in failure.error_text
    assert shop.effects() == []
