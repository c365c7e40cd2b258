"""A database that cannot be used is answered with which one it is, what is wrong with it and what to type; and in time."""

import logging
import shlex
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread
from time import monotonic
from typing import Any

import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.orm import Session
from typer.testing import CliRunner

from exactly_once import ConfigurationError, ExactlyOnce, Message, StoreUnavailable, alembic
from exactly_once.alembic import ready
from exactly_once.alembic.version_table import HEAD
from exactly_once.cli.db import app as db
from exactly_once.database.store import Store
from exactly_once.doctor.looking import examine
from exactly_once.testing.databases import DatabaseServer
from tests.integration.alembic.compared import run


def said_by(verb: str, url: str, *more: str) -> tuple[int, str]:
    told = CliRunner().invoke(db, [verb, "-d", url, *more])
    assert told.exception is None or isinstance(told.exception, SystemExit), told.exception
    return told.exit_code, told.output


def application(url: str) -> ExactlyOnce:
    eo = ExactlyOnce(url, group="answers")

    @eo.handler("orders", key="no")
    def reserve(session: Session, order: dict[str, Any]) -> None: ...

    return eo


def waited(url: str, caplog: pytest.LogCaptureFixture, seconds: float = 3) -> str:
    """What a worker says while it waits, and what it says at the end of its patience."""
    with (
        caplog.at_level(logging.WARNING, "exactly_once"),
        pytest.raises((ConfigurationError, StoreUnavailable)) as vain,
    ):
        application(url).worker("sql://", patience=timedelta(seconds=seconds)).start()
    return f"{caplog.text}\n{vain.value}"


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A server that accepts and waits for a first word that it understands, as Redis does."""
    ended, kept = Event(), []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)

        def accept() -> None:
            while not ended.is_set():
                with suppress(TimeoutError):
                    kept.append(server.accept()[0])

        thread = Thread(target=accept)
        thread.start()
        yield server.getsockname()[1]
        ended.set()
        thread.join()
        for each in kept:
            each.close()


# -- read only -------------------------------------------------------------------------------------------------------


def only_read(url: str, how: str) -> str:
    made = make_url(url)
    if how == "sqlite":
        return f"sqlite:///file:{made.database}?mode=ro&uri=true"
    option = {"options": "-c default_transaction_read_only=on"}
    return made.update_query_dict(option).render_as_string(hide_password=False)


@pytest.mark.parametrize("how", ["postgres", "sqlite"])
def test_a_database_that_is_read_only_answers_and_is_told_to_be_so(
    how: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    url = only_read(request.getfixturevalue(f"{how}_url"), how)
    said = waited(url, caplog)
    assert "answers and is read only" in said
    assert "does not answer" not in said
    assert ("Point EXACTLY_ONCE_DATABASE at the primary" in said) == (how == "postgres")
    assert "***@" in said or how == "sqlite"
    code, said = said_by("check", url)
    assert (code, "answers and is read only" in said) == (1, True)


def test_a_mariadb_that_is_read_only_is_told_to_be_so(
    mariadb_server: DatabaseServer, mariadb_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with user_of(mariadb_server, mariadb_url, "GRANT ALL ON {name}.* TO {user}") as url:
        settings = create_engine(mariadb_server.url)
        with settings.connect() as connection:
            connection.execute(text("SET GLOBAL read_only = ON"))
            try:
                assert "answers and is read only: a standby?" in waited(url, caplog)
                assert "answers and is read only: a standby?" in said_by("check", url)[1]
            finally:
                connection.execute(text("SET GLOBAL read_only = OFF"))
        settings.dispose()


# -- rights ----------------------------------------------------------------------------------------------------------


@contextmanager
def user_of(server: DatabaseServer, url: str, *grants: str) -> Iterator[str]:
    """The URL of a user with these rights and no others."""
    made, postgres = make_url(url), url.startswith("postgresql")
    account = "weak" if postgres else "'weak'@'%'"
    engine = create_engine(url if postgres else server.url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        if postgres:
            connection.execute(text("DROP ROLE IF EXISTS weak"))
            connection.execute(text("CREATE ROLE weak LOGIN PASSWORD 'feeble'"))
        else:
            connection.execute(text("DROP USER IF EXISTS 'weak'@'%'"))
            connection.execute(text("CREATE USER 'weak'@'%' IDENTIFIED BY 'feeble'"))
        for grant in grants:
            connection.execute(text(grant.format(name=made.database, user=account)))
        yield made.set(username="weak", password="feeble").render_as_string(hide_password=False)
        connection.execute(text("DROP OWNED BY weak" if postgres else "SELECT 1"))
        connection.execute(text("DROP ROLE weak" if postgres else "DROP USER 'weak'@'%'"))
    engine.dispose()


LITTLE = {
    "nothing": (),
    "the version alone": ("GRANT SELECT ON exactly_once_version TO {user}",),
}
LITTLE_ON_MYSQL = {
    "nothing": (),
    "the version alone": ("GRANT SELECT ON {name}.exactly_once_version TO {user}",),
}


def _all_but_the_queue(dialect: str) -> list[str]:
    printed = alembic.sql("postgresql" if dialect == "postgres" else "mariadb", grants_role="weak").splitlines()
    grants = [line.rstrip(";") for line in printed if line.startswith("GRANT")]
    if dialect == "mariadb":
        grants = [line.replace(" ON ", " ON {name}.").replace("TO 'weak'", "TO {user}") for line in grants]
    left = [line for line in grants if "message_queue TO" not in line and "message_queue_group TO" not in line]
    assert len(left) == len(grants) - 2
    return left


def doctor_of(url: str) -> list[str]:
    eo = application(url)
    return [f"{finding.mark.value}  {finding.text}" for finding in examine(eo, eo.transport("sql://"))]


@pytest.mark.parametrize("rights", LITTLE)
@pytest.mark.parametrize("dialect", ["postgres", "mariadb"])
def test_a_role_without_rights_is_told_who_gives_them_and_with_what(
    dialect: str, rights: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    server = request.getfixturevalue("eo_server" if dialect == "postgres" else "mariadb_server")
    given = request.getfixturevalue(f"{dialect}_url")
    with user_of(server, given, *(LITTLE if dialect == "postgres" else LITTLE_ON_MYSQL)[rights]) as url:
        backend = make_url(url).get_backend_name()
        for said in (
            waited(url, caplog),
            said_by("check", url)[1],
            "\n".join(finding.text for finding in examine(application(url), None)),
        ):
            assert "may not use the tables of exactly_once in" in said
            assert f"exactly-once db sql --dialect {backend} --grants weak" in said
            assert "Check the URL" not in said
            assert "feeble" not in said


@pytest.mark.parametrize("dialect", ["postgres", "mariadb"])
def test_an_upgrade_without_rights_is_told_to_be_the_owners(dialect: str, request: pytest.FixtureRequest) -> None:
    server = request.getfixturevalue("eo_server" if dialect == "postgres" else "mariadb_server")
    with user_of(server, request.getfixturevalue(f"{dialect}_url")) as url:
        code, said = said_by("upgrade", url)
    assert code == 1
    assert "Upgrade as their owner: exactly-once db upgrade --database URL" in said


@pytest.mark.parametrize("dialect", ["postgres", "mariadb"])
def test_what_is_named_to_the_owner_gives_the_rights_where_the_tables_are_there(
    dialect: str, request: pytest.FixtureRequest
) -> None:
    """The printed command, run by the owner as it is printed; then the role's message goes through."""
    server = request.getfixturevalue("eo_server" if dialect == "postgres" else "mariadb_server")
    owner = request.getfixturevalue(f"{dialect}_url")
    run(owner, "CREATE TABLE seen (no VARCHAR(10))")
    with user_of(server, owner, f"GRANT INSERT ON {'' if dialect == 'postgres' else '{name}.'}seen TO {{user}}") as url:
        code, said = said_by("check", url)
        assert (code, "Have their owner run what this prints: exactly-once db sql --dialect " in said) == (1, True)
        command = said.partition("exactly-once db ")[2]
        if dialect == "mariadb":  # what the server says is the host of the client, which is no account
            assert command.endswith(
                "--grants weak@HOST --only-grants (HOST as SELECT CURRENT_USER() says of that login)\n"
            )
            command = command.partition(" (")[0].replace("HOST", "%")
        arguments = shlex.split(command)
        told = CliRunner().invoke(db, arguments)
        assert told.exit_code == 0, told.output
        run(owner, told.stdout)
        assert said_by("check", url) == (0, f"{make_url(url).render_as_string()}: ready.\n")
        assert ready.problem(Store("default", url)) is None
        eo = ExactlyOnce(url, group="answers")

        @eo.handler("orders", key="no")
        def reserve(session: Session, order: dict[str, Any]) -> None:
            session.execute(text("INSERT INTO seen VALUES (:no)"), order)

        with eo.worker("sql://") as worker, eo.producer("sql://") as producer:
            producer.send(Message("orders", b'{"no": "A-1"}'))
            worker.drain()
        engine = create_engine(owner)
        with engine.connect() as connection:
            assert connection.execute(text("SELECT no FROM seen")).scalars().all() == ["A-1"]
        engine.dispose()


@pytest.mark.parametrize("dialect", ["postgres", "mariadb"])
def test_doctor_does_not_say_that_the_broker_is_well_in_a_database_that_refuses_us(
    dialect: str, request: pytest.FixtureRequest
) -> None:
    server = request.getfixturevalue("eo_server" if dialect == "postgres" else "mariadb_server")
    owner = request.getfixturevalue(f"{dialect}_url")
    with user_of(server, owner, *_all_but_the_queue(dialect)) as url:
        found = doctor_of(url)
        assert "The broker answers" not in "\n".join(found)
        [told] = [line for line in found if "may not use the tables of exactly_once" in line]
        assert told.startswith("FAIL"), told
        assert "--only-grants" in told
    with user_of(server, owner) as url:
        found = doctor_of(url)
        assert "The broker answers" not in "\n".join(found)
        assert len([line for line in found if "may not use the tables of exactly_once" in line]) == 1


# -- URLs ------------------------------------------------------------------------------------------------------------


def test_a_url_without_the_name_of_a_database_is_told_where_it_goes(
    mariadb_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    url = make_url(mariadb_url)._replace(database=None)
    plain = url.render_as_string(hide_password=False)
    for said in (said_by("check", plain)[1], said_by("upgrade", plain)[1], waited(plain, caplog)):
        assert f"The URL names no database. Write {url.set(database='NAME').render_as_string()}" in said
        assert "AssertionError" not in said


@pytest.mark.parametrize("driver", ["postgresql+psycopg", "postgresql", "mysql+pymysql", "mariadb+asyncmy"])
def test_another_services_port_is_told_in_seconds(
    driver: str, silent_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"{driver}://shop:secret@127.0.0.1:{silent_port}/shop"
    began = monotonic()
    code, said = said_by("check", url)
    assert monotonic() - began < 15
    assert code == 1
    assert f"127.0.0.1:{silent_port} accepted the connection and did not speak" in said
    assert "is it another service's port" in said
    assert "away?." not in said
    assert f"accepted the connection and did not speak {'PostgreSQL' if driver.startswith('p') else 'M'}" in waited(
        url, caplog, 1
    )


@pytest.mark.parametrize("driver", ["postgresql+psycopg", "mysql+pymysql"])
def test_a_server_of_another_kind_is_told(
    driver: str, mariadb_server: DatabaseServer, eo_server: DatabaseServer
) -> None:
    other = mariadb_server if driver.startswith("p") else eo_server
    if other.url.port is None:
        pytest.skip("the server is on no port")
    code, said = said_by("check", f"{driver}://shop:secret@127.0.0.1:{other.url.port}/shop")
    assert (code, "accepted the connection and did not speak" in said) == (1, True)


WRONG_DRIVERS = {
    "postgres://a:b@h/shop": "SQLAlchemy knows no database 'postgres'. Write postgresql+psycopg://",
    "oracel://a:b@h/shop": "SQLAlchemy knows no database 'oracel'. Write postgresql+psycopg://",
    "postgresql+asyncpg://a:b@h/shop": "driver asyncpg, which is not installed. Write postgresql+psycopg://",
    "postgresql+psycopg2://a:b@h/shop": "driver psycopg2, which is not installed. Write postgresql+psycopg://",
    "postgresql+no://a:b@h/shop": "SQLAlchemy knows no driver 'postgresql+no'. Write postgresql+psycopg://",
    "mysql+mysqlconnector://a:b@h/shop": "driver mysqlconnector, which is not installed. Write mysql+pymysql://",
    "mssql+pyodbc://a:b@h/shop": "exactly_once speaks postgresql, mysql, mariadb and sqlite, and not mssql.",
    "oracle+oracledb://a:b@h/shop": "exactly_once speaks postgresql, mysql, mariadb and sqlite, and not oracle.",
}


@pytest.mark.parametrize("url", WRONG_DRIVERS)
def test_a_driver_that_is_not_there_is_answered_with_one_of_that_database(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    code, said = said_by("check", url)
    assert (code, WRONG_DRIVERS[url] in said) == (2, True), said
    with pytest.raises(ConfigurationError) as refused:
        application(url).worker("sql://").start()
    assert WRONG_DRIVERS[url] in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_url_that_names_no_driver_means_the_same_to_every_command(mariadb_url: str) -> None:
    bare = make_url(mariadb_url).set(drivername="mysql").render_as_string(hide_password=False)
    assert said_by("check", bare)[0] == 0
    assert ready.problem(Store("default", bare)) is None


def test_a_refusal_names_the_database_and_where_it_was_given(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wrong = make_url(postgres_url).set(password="wrong", username="nobody")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EXACTLY_ONCE_DATABASE", wrong.render_as_string(hide_password=False))
    told = CliRunner().invoke(db, ["check"])
    assert told.exit_code == 1
    assert wrong.render_as_string() in told.output
    assert "environment EXACTLY_ONCE_DATABASE" in told.output


def test_a_wrong_password_is_told_once(postgres_url: str, caplog: pytest.LogCaptureFixture) -> None:
    wrong = make_url(postgres_url).set(password="wrong", username="nobody").render_as_string(hide_password=False)
    with pytest.raises(ConfigurationError) as refused:
        application(wrong).worker("sql://").start()
    assert "\n" not in str(refused.value)
    assert "Start it" not in str(refused.value)
    eo = application(wrong)
    failed = [each.text for each in examine(eo, eo.transport("sql://")) if each.mark.value == "FAIL"]
    assert len(failed) == 1


def test_an_upgrade_of_tables_that_are_too_new_says_so(sqlite_url: str) -> None:
    engine = create_engine(sqlite_url)
    with engine.begin() as connection:
        connection.execute(text(f"UPDATE exactly_once_version SET version_num = '{HEAD + 7:04d}'"))
    engine.dispose()
    code, said = said_by("upgrade", sqlite_url)
    assert code == 1
    assert "Install a newer release of exactly_once" in said
    assert "nothing to do" not in said


def test_an_error_without_words_is_told_by_its_name_alone() -> None:
    from exactly_once.cli.command import _told

    assert _told(AssertionError()) == (
        "AssertionError. Type the command again with --traceback to see where.",
        1,
    )
