"""Mistakes of a first day, at each door: one sentence that says what to type, and nothing is lost or blamed on a message."""

import copy
import json
import os
import pickle
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from pydantic import BaseModel
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from typer import Typer
from typer.testing import CliRunner

from exactly_once import ConfigurationError, ExactlyOnce, Message, Outcome, Retry
from exactly_once.cli import db, failures, send
from exactly_once.cli.reference import application
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


# -- where a handler is registered ----------------------------------------------------------------------------------------

WRONG_CALLS: dict[str, tuple[Any, str]] = {
    "bare": (lambda eo: eo.handler(make_one), r"stands above 'make_one' alone.*@eo.handler\(\"orders\", key="),
    "bare batch": (lambda eo: eo.batch_handler(make_one), r"@eo.batch_handler stands above 'make_one' alone"),
    "keys=": (lambda eo: eo.handler("orders", keys="no"), r"no argument keys=. Did you mean 'key'\?"),
    "tags=": (lambda eo: eo.handler("orders", key="no", tags=["a"]), r"no argument tags=. Did you mean 'tag'\?"),
    "no key": (lambda eo: eo.handler("orders"), r"@eo.handler\('orders'\) must be told the key"),
    "no topic": (lambda eo: eo.handler(key="no"), r"must be told the topic"),
    "two places": (lambda eo: eo.handler("orders", "no"), r"takes one argument without a name, the topic"),
}


def make_one() -> ExactlyOnce:
    return ExactlyOnce(group=GROUP)


@pytest.mark.parametrize("call", WRONG_CALLS)
def test_a_decorator_with_wrong_arguments_says_what_to_write(call: str) -> None:
    wrong, says = WRONG_CALLS[call]
    with pytest.raises(ConfigurationError, match=says):
        wrong(make_one())


def test_classes_of_the_function_around_a_handler_are_known() -> None:
    class Order(BaseModel):
        no: str

    eo = make_one()

    @eo.handler("orders", key="no")
    def reserve(session: Session, order: "Order") -> None: ...

    assert eo._plans["reserve"].body_annotation is Order


# -- what a command is given ---------------------------------------------------------------------------------------------


def test_a_function_that_makes_the_application_is_no_application(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = """
        from exactly_once import ExactlyOnce
        def create_app(): return ExactlyOnce(group="g")
        class Settings: eo = create_app()
        settings = 3
    """
    (tmp_path / "made_by_a_function.py").write_text(dedent(program))
    (tmp_path / "made_and_named.py").write_text("from made_by_a_function import *\neo = create_app()\n")
    monkeypatch.chdir(tmp_path)
    for reference, says in (
        (
            "made_by_a_function:create_app",
            "is a function, and no ExactlyOnce object. A command imports, and calls nothing:",
        ),
        ("made_by_a_function:create_app", "`eo = create_app()`"),
        ("made_by_a_function:settings", "is a value of type int, and no ExactlyOnce object. It has no such object"),
        ("made_and_named:create_app", "is a function, and no ExactlyOnce object. It has: made_and_named:eo."),
        ("made_by_a_function:nothing", "has no ExactlyOnce object named 'nothing'"),
    ):
        with pytest.raises(ConfigurationError) as refused:
            application(reference)
        assert says in str(refused.value)
    assert application("made_by_a_function:Settings.eo").group == "g"


@pytest.mark.parametrize("url", ["postgres://shop:hidden@db/shop", "mssqll://shop:hidden@db/shop", "not a url hidden"])
def test_a_database_url_that_names_none_says_where_it_may_be_set(url: str) -> None:
    eo = ExactlyOnce(url, group=GROUP)

    @eo.handler("orders", key="no")
    def handler(session: Session) -> None: ...

    with pytest.raises(ConfigurationError, match="EXACTLY_ONCE_DATABASE") as refused:
        eo.process(order())
    assert "postgresql+psycopg" in str(refused.value)
    assert "hidden" not in str(refused.value)


def test_a_body_is_sent_as_it_was_typed(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one_command = Typer()
    one_command.command()(send.command)
    monkeypatch.setenv("EXACTLY_ONCE_DATABASE", sqlite_url)
    typed = os.fsdecode(b"caf\xe9 \xff")
    told = CliRunner().invoke(one_command, ["--transport", "sql://", "--topic", "orders", "--body", typed])
    assert told.exit_code == 0, told.output
    with create_engine(sqlite_url).connect() as connection:
        assert connection.execute(text("SELECT body FROM message_queue")).scalar_one() == b"caf\xe9 \xff"


# -- a handler's own bug -------------------------------------------------------------------------------------------------


def test_a_handlers_bug_is_told_with_its_line(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    def buggy(session: Session) -> None:
        session.execute(text("SELECT 1"))
        {}["sku"]

    line = buggy.__code__.co_firstlineno + 2
    shop.handles(buggy)
    assert shop.process(order()) is Outcome.FAILED
    told = f"'sku' (at application/test_first_day.py:{line} in buggy)"
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


# -- in another process ------------------------------------------------------------------------------------------------


def test_an_application_is_not_pickled() -> None:
    """multiprocessing with spawn, a task queue's argument, a cache."""
    eo = ExactlyOnce(group=GROUP)
    for whole in (eo, eo.run, {"eo": eo}):
        with pytest.raises(TypeError, match=r"An ExactlyOnce is not pickled or copied: import it in the other process"):
            pickle.dumps(whole)
    with pytest.raises(TypeError, match="not pickled or copied"):
        copy.copy(eo)
    assert pickle.loads(pickle.dumps(order("A-1"))) == order("A-1")
