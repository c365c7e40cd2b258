"""The doctor finds each thing that is broken in a real database, says what to type, and finds nothing in a healthy one."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event, make_url, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

import exactly_once.alembic
from exactly_once import ExactlyOnce, Message
from exactly_once.cli.command import main
from exactly_once.doctor.looking import Finding, Mark, examine
from exactly_once.transports.contract import Surroundings
from exactly_once.transports.registry import transport_from
from tests.services import mariadb as mariadb_service
from tests.services.need import require


def loud(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def louder(*arguments: Any) -> Any:
        return function(*arguments)

    return louder


above = ExactlyOnce(group="doctor")


@loud
@above.handler("orders", key="no")
def wrapped(session: Session, order: dict[str, Any]) -> None: ...


below = ExactlyOnce(group="doctor")


@below.handler("orders", key="no", name="first")
def same(session: Session, order: dict[str, Any]) -> None: ...


@below.handler("orders", key="no", name="second")
@loud
def same(session: Session, order: dict[str, Any]) -> None: ...  # noqa: F811


def program(database: Any, *, asynchronous: bool = False, may_lose_commits: bool = False) -> ExactlyOnce:
    eo = ExactlyOnce(database, group="doctor", may_lose_commits=may_lose_commits)

    def reserve(session: Session, order: dict[str, Any]) -> None: ...

    async def notify(session: AsyncSession, order: dict[str, Any]) -> None: ...

    eo.handler("orders", key="no")(reserve)
    if asynchronous:
        eo.handler("orders", key="no")(notify)
    return eo


def look(eo: ExactlyOnce) -> list[Finding]:
    def engine() -> Engine:
        return next(iter(eo.stores.values())).engine

    return list(examine(eo, transport_from("sql://", Surroundings(engine))))


def worst(found: list[Finding]) -> str:
    """The findings that are not well, as a person reads them."""
    return "\n".join(f"{finding.mark.value} {finding.text}" for finding in found if finding.mark is not Mark.OK)


@contextmanager
def changed(url: str, do: str, undo: str = "") -> Iterator[None]:
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            connection.execute(text(do))
        yield
    finally:
        if undo:
            with engine.connect() as connection:
                connection.execute(text(undo))
        engine.dispose()


@pytest.mark.parametrize("dialect", ["postgres", "mariadb", "sqlite"])
def test_a_healthy_program_has_nothing_to_mend(dialect: str, request: pytest.FixtureRequest) -> None:
    found = look(program(request.getfixturevalue(f"{dialect}_url"), asynchronous=True))
    assert [finding for finding in found if finding.mark is Mark.FAIL] == []
    told = "\n".join(finding.text for finding in found)
    assert "through the sync driver a key claimed twice is won, then known" in told
    assert "through the async driver a key claimed twice is won, then known" in told
    assert "isolation is" in told
    assert "The broker answers" in told


def test_it_leaves_no_claim_behind(postgres_url: str) -> None:
    look(program(postgres_url, asynchronous=True))
    engine = create_engine(postgres_url)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM message_idempotent")).scalar_one() == 0
    engine.dispose()


def test_a_wrong_password_is_a_finding_that_does_not_say_it(postgres_url: str) -> None:
    told = worst(look(program(make_url(postgres_url).set(password="hunter2"))))
    assert "FAIL" in told
    assert "EXACTLY_ONCE_DATABASE" in told
    assert "hunter2" not in told


def test_a_server_that_is_away_is_a_finding(postgres_url: str) -> None:
    told = worst(look(program(make_url(postgres_url).set(port=1))))
    assert "does not answer" in told
    assert "Start it" in told


@pytest.mark.parametrize("dialect", ["postgres", "mariadb", "sqlite"])
def test_missing_tables_are_made_by_the_command_it_names(dialect: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue(f"{dialect}_url")
    with changed(url, "DROP TABLE exactly_once_version"):
        assert "exactly-once db upgrade" in worst(look(program(url)))


def test_a_table_without_its_primary_key_cannot_tell_a_duplicate(postgres_url: str) -> None:
    with changed(postgres_url, "ALTER TABLE message_idempotent DROP CONSTRAINT message_idempotent_pkey"):
        assert "FAIL database 'default': a claim through the sync driver fails" in worst(look(program(postgres_url)))


def test_a_trigger_that_swallows_claims_is_seen_by_claiming_twice(postgres_url: str) -> None:
    swallow = """
        CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
        CREATE TRIGGER swallow BEFORE INSERT ON message_idempotent FOR EACH ROW EXECUTE FUNCTION swallow()
    """
    with changed(postgres_url, swallow):
        assert "is seen as (False, False)" in worst(look(program(postgres_url)))


@pytest.mark.parametrize("dialect", ["postgres", "mariadb"])
def test_autocommit_is_refused(dialect: str, request: pytest.FixtureRequest) -> None:
    engine = create_engine(request.getfixturevalue(f"{dialect}_url"), isolation_level="AUTOCOMMIT", pool_size=20)
    told = worst(look(program(engine)))
    engine.dispose()
    assert "FAIL" in told
    assert "AUTOCOMMIT" in told


def test_an_engine_of_the_users_own_is_looked_at_for_waits_without_end_and_its_pool(postgres_url: str) -> None:
    engine = create_engine(postgres_url, pool_size=2, max_overflow=1)
    told = worst(look(program(engine)))
    engine.dispose()
    assert "idle_in_transaction_session_timeout is 0" in told
    assert "tcp_user_timeout" in told
    assert "the pool holds 3 connections and 16 messages run at once" in told
    assert "FAIL" not in told


def test_a_read_only_database_is_not_one_to_work_on(postgres_url: str) -> None:
    name = make_url(postgres_url).database
    with changed(postgres_url, f'ALTER DATABASE "{name}" SET default_transaction_read_only = on'):
        assert "read only" in worst(look(program(postgres_url)))


def test_commits_that_a_crash_may_lose_are_warned_of_on_postgresql(postgres_url: str) -> None:
    name = make_url(postgres_url).database
    with changed(postgres_url, f'ALTER DATABASE "{name}" SET synchronous_commit = off'):
        assert "warn database 'default': synchronous_commit is off" in worst(look(program(postgres_url)))


def test_a_packet_too_small_for_a_large_body_is_warned_of_on_mariadb(mariadb_url: str) -> None:
    name = "max_allowed_packet"
    with changed(mariadb_url, f"SET GLOBAL {name} = 1048576", f"SET GLOBAL {name} = 16777216"):
        told = worst(look(program(mariadb_url)))
    assert f"SET GLOBAL {name} = 16777216" in told
    assert name not in worst(look(program(mariadb_url)))


def test_commits_that_a_crash_may_lose_are_warned_of_on_mariadb(mariadb_url: str) -> None:
    name = "innodb_flush_log_at_trx_commit"
    with changed(mariadb_url, f"SET GLOBAL {name} = 2", f"SET GLOBAL {name} = 1"):
        told = worst(look(program(mariadb_url)))
    assert f"{name} is 2" in told
    assert f"SET GLOBAL {name} = 1" in told
    assert name not in worst(look(program(mariadb_url)))


def test_a_binary_log_of_statements_is_warned_of_on_mariadb() -> None:
    require(mariadb_service)
    with mariadb_service.MariaDB(settings={"log-bin": "log", "binlog-format": "STATEMENT", "server-id": "1"}) as server:
        server.create_database("logged")
        url = make_url(server.url).set(database="logged").render_as_string(hide_password=False)
        with pytest.raises(OperationalError, match="1665"):
            exactly_once.alembic.upgrade(url)
        in_rows = create_engine(url, connect_args={"init_command": "SET SESSION binlog_format = 'ROW'"})
        exactly_once.alembic.upgrade(in_rows)
        assert "binlog_format is STATEMENT" in worst(look(program(url)))
        assert "binlog_format" not in worst(look(program(in_rows)))
        in_rows.dispose()


def test_commits_that_a_crash_may_lose_are_warned_of_on_sqlite(sqlite_url: str) -> None:
    assert worst(look(program(sqlite_url))) == ""
    engine = create_engine(sqlite_url)
    with engine.connect() as connection:
        connection.execute(text("PRAGMA journal_mode = wal"))
    engine.dispose()
    engine = create_engine(sqlite_url)
    event.listen(engine, "connect", lambda dbapi, _: dbapi.execute("PRAGMA synchronous = NORMAL"))
    told = worst(look(program(engine, may_lose_commits=True)))
    engine.dispose()
    assert "synchronous is 1, journal wal" in told
    assert "PRAGMA synchronous = FULL" in told
    assert "synchronous" not in worst(look(program(engine)))  # a claim raises it
    engine.dispose()


def test_a_decorator_above_ours_would_not_run_and_one_below_does(sqlite_url: str) -> None:
    above.bind(sqlite_url)
    told = worst(look(above))
    assert "FAIL The handler 'wrapped' has a decorator above @eo.handler" in told
    below.bind(sqlite_url)
    assert "decorator" not in worst(look(below))


def test_claims_of_a_handler_that_is_gone_name_the_command_that_moves_them(sqlite_url: str) -> None:
    eo = program(sqlite_url)
    old = ExactlyOnce(sqlite_url, group="doctor")

    def reserv(session: Session, order: dict[str, Any]) -> None: ...

    old.handler("orders", key="no")(reserv)
    assert old.process(Message("orders", b'{"no": 1}')).acknowledge
    told = worst(look(eo))
    assert "exactly-once handlers rename reserv NEW" in told
    assert "Did you mean 'reserve'" in told


@pytest.mark.parametrize("dialect", ["postgres", "mariadb", "sqlite"])
def test_copies_that_differ_only_in_times_are_told_with_the_fingerprint_to_write(
    dialect: str, request: pytest.FixtureRequest
) -> None:
    eo = program(request.getfixturevalue(f"{dialect}_url"))

    def said(**members: Any) -> str:
        order = {"no": "A-1", "sku": "chair", "sent_at": "2026-01-31T12:00:00Z", "meta": {"ts": 1_769_860_800}}
        eo.process(Message("orders", json.dumps({**order, **members}).encode()))
        return "".join(finding.text for finding in look(eo) if "conflict with" in finding.text)

    assert said() == ""
    assert said() == "", "a copy is a duplicate"
    told = said(sent_at="2026-01-31T12:00:05.123+01:00")
    assert "that conflict with a consumed key (1 were read) differ from it in times alone: sent_at. They look" in told
    assert "fingerprint=['meta', 'no', 'sku']" in told
    told = said(sent_at="Sat, 31 Jan 2026 12:00:09 GMT", meta={"ts": 1_769_860_809_000})
    assert "(2 were read) differ from it in times alone: meta.ts, sent_at." in told
    assert "fingerprint=['no', 'sku']" in told
    assert said(sku="table") == "", "one that is another order: nothing is to be said of all of them"


def test_no_handlers_is_a_finding(sqlite_url: str) -> None:
    assert "EXACTLY_ONCE_IMPORTS" in worst(look(ExactlyOnce(sqlite_url, group="doctor")))


def test_the_command_prints_each_finding_and_exits_by_the_worst(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EXACTLY_ONCE_DATABASE", sqlite_url)
    for reference, code in ((f"{__name__}:healthy", 0), (f"{__name__}:ill", 1)):
        with pytest.raises(SystemExit) as exited:
            main(["doctor", "--app", reference, "--transport", "sql://"])
        assert exited.value.code == code
        told = capsys.readouterr().out
        assert ("FAIL" in told) is bool(code)
        assert "\x1b" not in told, "colours are for terminals"


healthy = ExactlyOnce(group="doctor")
ill = ExactlyOnce(group="doctor")


@healthy.handler("orders", key="no")
def well(session: Session, order: dict[str, Any]) -> None: ...


@loud
@ill.handler("orders", key="no")
def not_well(session: Session, order: dict[str, Any]) -> None: ...
