"""A password that was not escaped is printed nowhere: not by us, and not in what the driver says of the rest of it."""

import asyncio
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, make_url
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from typer.testing import CliRunner

import exactly_once.alembic
from exactly_once import ConfigurationError, ExactlyOnce, Message, Outcome
from exactly_once.alembic import ready
from exactly_once.cli.db import app as db
from exactly_once.database.url import database_url
from exactly_once.exceptions.words import words_of
from exactly_once.redis.connection import RedisConnection
from exactly_once.redis.url import checked
from exactly_once.transports.urls import parse
from exactly_once.wording.redaction import redacted

ROOT = Path(__file__).parents[3]
PARTS = ("XXone", "YYtwo", "ZZthree")
# what is wrong with them: another @ in the password, with what a reader cuts at behind it
PASSWORDS = ("XXone@YYtwo", "XXone@YYtwo/ZZthree", "XXone@YYtwo:ZZthree", "XXone@YYtwo?ZZthree", "XXone@YYtwo#ZZthree")
DRIVERS = ("postgresql+psycopg", "postgresql", "mysql+pymysql", "mariadb+asyncmy")
ODD = [f"{driver}://me:{password}@127.0.0.1:1/shop" for driver in DRIVERS for password in PASSWORDS] + [
    "postgresql+psycopg://a/b:XXone@127.0.0.1:1/shop",
    "postgresql+psycopg://me@127.0.0.1:1/shop?password=XXone&YYtwo",
    *(
        f"{place}?{name}=XXone&{rest}"
        for place in [*(f"{driver}://me@127.0.0.1:1/shop" for driver in DRIVERS), "sqlite:////no/such/folder/shop.db"]
        for name in ("password", "passwd", "sslpassword")
        for rest in ("YYtwo=ZZthree", "YYtwo=", "YYtwo==", "charset=utf8mb4&YYtwo=ZZthree")
    ),
]


def silent(text: str) -> bool:
    return not [part for part in PARTS if part in text]


@pytest.mark.parametrize("url", ODD)
def test_a_url_whose_password_would_be_cut_in_two_is_refused_with_what_to_write(url: str) -> None:
    eo = ExactlyOnce(url, group="secrets")
    with pytest.raises(ConfigurationError, match="write @ as %40") as refused:
        ready.problem(next(iter(eo.stores.values())))
    assert silent(str(refused.value))
    with pytest.raises(ConfigurationError, match="write @ as %40") as refused:
        exactly_once.alembic.upgrade(url)
    assert silent(str(refused.value))
    told = CliRunner().invoke(db, ["upgrade", "-d", url])
    assert told.exit_code == 2
    assert "%40" in told.output
    assert silent(told.output)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://me:XX%40YY@db:5432/shop?sslmode=require&",
        "postgresql+psycopg://me@db/shop?host=a:1&host=b:2&password=XX%26YY&sslmode=require&application_name=eu&autocommit=1",
        "mysql+pymysql://me@db/shop?password=XX%26YY&charset=utf8mb4&ssl_ca=/ca.pem&ssl_check_hostname=false&read_timeout=5",
        "mariadb+asyncmy://me@db/shop?password=XX&charset=utf8mb4&ssl_ca=/ca.pem&stmt_cache_size=5",
        "sqlite:///file:shop.db?mode=ro&uri=true&key=XX&anything=1",
        "sqlite+aiosqlite:///shop.db?timeout=5",
        "postgresql+psycopg://me@example.org/shop",
        "postgresql+psycopg://@db/shop",
        "postgresql+psycopg:///shop?host=/run/postgresql&user=me@example.org",
        "mysql+pymysql://me:a:b/c#d@db/shop%40eu",
        "sqlite:////home/me@work/shop@eu.db",
        "sqlite:///shop.db",
    ],
)
def test_a_sound_url_is_read(url: str) -> None:
    assert "@" not in (database_url(url).host or "")


@pytest.mark.parametrize("driver", ["postgresql+psycopg", "mysql+pymysql"])
@pytest.mark.parametrize("password", ["XXone@YYtwo", "XXone@YYtwo/ZZthree"])
def test_an_engine_that_was_made_of_such_a_url_prints_no_part_of_it(
    driver: str, password: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    engine = create_engine(f"{driver}://me:{password}@127.0.0.1:1/shop")
    eo = ExactlyOnce(engine, group="secrets")

    @eo.handler("orders", key="no")
    def reserve(session: Session, order: dict[str, Any]) -> None: ...

    problem = ready.problem(next(iter(eo.stores.values())))
    assert problem is not None
    assert silent(problem)
    assert silent(redacted(engine.url))
    assert eo.process(Message("orders", b'{"no": "A"}')) is Outcome.WAITING
    with pytest.raises(Exception) as met:
        engine.connect()
    assert silent(words_of(met.value))
    assert silent("\n".join(caplog.messages))


@pytest.mark.parametrize("driver", ["postgresql+psycopg", "mysql+pymysql", "mariadb+pymysql"])
@pytest.mark.parametrize("rest", ["YYtwo=ZZthree", "charset=utf8mb4&YYtwo=ZZthree"])
def test_an_engine_whose_password_in_the_query_an_ampersand_cuts_prints_no_part_of_it(
    driver: str, rest: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    engine = create_engine(f"{driver}://me@127.0.0.1:1/shop?password=XXone&{rest}")
    eo = ExactlyOnce(engine, group="secrets")

    @eo.handler("orders", key="no")
    def reserve(session: Session, order: dict[str, Any]) -> None: ...

    with pytest.raises(ConfigurationError) as refused:
        ready.problem(next(iter(eo.stores.values())))
    assert silent(str(refused.value))
    assert silent(redacted(engine.url))
    assert silent(eo.config.database.shown)
    assert eo.process(Message("orders", b'{"no": "A"}')) is not Outcome.PROCESSED
    with pytest.raises(Exception) as met:
        engine.connect()
    assert silent(words_of(met.value))
    assert silent("\n".join(caplog.messages))


@pytest.mark.parametrize("driver", ["mysql+pymysql", "mysql+asyncmy", "mariadb+pymysql"])
@pytest.mark.parametrize("made", [False, True])
def test_an_option_that_the_driver_does_not_know_is_named_with_what_to_write_for_tls(driver: str, made: bool) -> None:
    """`?sslmode=require` is PostgreSQL's: the driver raises a TypeError, which was taken for a character set."""
    url = f"{driver}://me:XXone@127.0.0.1:1/shop?sslmode=require"
    eo = ExactlyOnce(create_engine(url) if made and "pymysql" in driver else url, group="secrets")
    refusing = [lambda: ready.problem(next(iter(eo.stores.values())))]
    if not made:
        refusing.append(lambda: exactly_once.alembic.upgrade(url))
    for each in refusing:
        with pytest.raises(ConfigurationError) as refused:
            each()
        assert f"its driver {driver} does not know the option 'sslmode'. For TLS write ssl_ca=/" in str(refused.value)
        assert silent(str(refused.value))
    told = CliRunner().invoke(db, ["upgrade", "-d", url])
    assert (told.exit_code, "'sslmode'" in told.output, silent(told.output)) == (2, True, True)


def test_an_option_that_the_driver_of_the_other_side_does_not_know_is_named() -> None:
    """One URL serves sync and async handlers, each through a driver of its own."""
    store = next(iter(ExactlyOnce("mysql+pymysql://me@127.0.0.1:1/shop?write_timeout=5", group="g").stores.values()))
    assert "does not answer" in (ready.problem(store) or "")
    with pytest.raises(ConfigurationError, match="asyncmy does not know the option 'write_timeout'"):
        _ = store.async_engine


@pytest.mark.parametrize("driver", ["mysql+pymysql", "postgresql+psycopg"])
def test_what_an_engines_own_way_to_connect_raises_is_told_as_it_is(driver: str) -> None:
    def connect() -> Any:
        raise TypeError("no token for XXone")

    engine = create_engine(f"{driver}://me@127.0.0.1:1/shop", creator=connect)
    with pytest.raises(ConfigurationError, match="SQL_ASCII" if "psycopg" in driver else "no token for"):
        ready.problem(next(iter(ExactlyOnce(engine, group="g").stores.values())))


@pytest.mark.parametrize("driver", ["postgresql+psycopg", "mysql+asyncmy"])
def test_an_async_engine_prints_no_part_of_it_either(driver: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    engine = create_async_engine(f"{driver}://me:XXone@YYtwo@127.0.0.1:1/shop")
    eo = ExactlyOnce(engine, group="secrets")

    @eo.handler("orders", key="no")
    async def reserve(session: AsyncSession, order: dict[str, Any]) -> None: ...

    assert asyncio.run(eo.aprocess(Message("orders", b'{"no": "A"}'))) is Outcome.WAITING
    problem = ready.problem(next(iter(eo.stores.values())))
    assert problem is not None
    assert silent(problem)
    assert silent("\n".join(caplog.messages))


def test_the_command_prints_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(
        "from sqlalchemy import create_engine\n"
        "from exactly_once import ExactlyOnce, Message\n"
        "eo = ExactlyOnce(create_engine('postgresql+psycopg://me:XXone@YYtwo@127.0.0.1:1/shop'), group='g')\n"
        "@eo.handler('orders', key='no')\n"
        "def reserve(message: Message) -> None: ...\n"
    )
    for arguments in (["doctor", "-a", "shop:eo", "-t", "sql://"], ["failures", "list", "-a", "shop:eo"]):
        told = subprocess.run(
            [sys.executable, "-m", "exactly_once", *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            text=True,
            capture_output=True,
            timeout=60,
        )
        assert told.returncode != 0
        assert "does not answer" in told.stdout + told.stderr
        assert silent(told.stdout + told.stderr)


@pytest.mark.parametrize(
    "rest", ["YYtwo", "YYtwo=", "YYtwo==", "YYtwo=ZZthree", "namespace=eu&YYtwo=ZZthree", "&YYtwo="]
)
def test_a_secret_of_a_transport_that_an_ampersand_cuts_is_not_repeated(rest: str) -> None:
    url = f"rocketmq://h:8081?access_key=a&secret_key=XXone&{rest}"
    with pytest.raises(ConfigurationError, match="rest of the secret_key: there an & is written %26") as refused:
        parse(url, options=["access_key", "namespace"], secrets=["secret_key"])
    assert silent(str(refused.value))
    assert silent(redacted(url))


@pytest.mark.parametrize("rest", ["YYtwo", "YYtwo=", "YYtwo=ZZthree", "db=1&YYtwo=ZZthree"])
def test_a_password_of_redis_that_an_ampersand_cuts_is_not_repeated(rest: str) -> None:
    with pytest.raises(ConfigurationError, match="rest of the password: there an & is written %26") as refused:
        checked(f"redis://127.0.0.1:6379/0?password=XXone&{rest}")
    assert silent(str(refused.value))


def test_two_redises_that_differ_behind_a_password_have_two_names() -> None:
    """Leases are renewed by that name."""
    names = [RedisConnection(f"redis://127.0.0.1:6379?password=XXone&db={number}").name for number in (0, 1)]
    assert names == [f"redis://127.0.0.1:6379?password=***&db={number}" for number in (0, 1)]


@pytest.mark.parametrize("make", [str, make_url, create_engine])
def test_a_database_from_code_is_shown_without_its_password(make: Any) -> None:
    for url in (
        "postgresql+psycopg://me:XXone@127.0.0.1/shop",
        "postgresql+psycopg://127.0.0.1/shop?password=XXone&sslmode=require",
    ):
        assert silent(ExactlyOnce(make(url), group="g").config.database.shown)
        assert silent(ExactlyOnce({"eu": make(url)}, group="g").config.database.shown)
