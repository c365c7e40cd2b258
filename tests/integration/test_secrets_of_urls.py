"""A password that was not escaped is printed nowhere: not by us, and not in what the driver says of the rest of it."""

import asyncio
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from typer.testing import CliRunner

import exactly_once.alembic
from exactly_once import ConfigurationError, ExactlyOnce, Message, Outcome
from exactly_once.cli.db import app as db
from exactly_once.database_url import database_url
from exactly_once.error_words import words_of
from exactly_once.redaction import redacted
from exactly_once.transports.urls import parse

ROOT = Path(__file__).parents[2]
PARTS = ("XXone", "YYtwo", "ZZthree")
# what is wrong with them: another @ in the password, with what a reader cuts at behind it
PASSWORDS = ("XXone@YYtwo", "XXone@YYtwo/ZZthree", "XXone@YYtwo:ZZthree", "XXone@YYtwo?ZZthree", "XXone@YYtwo#ZZthree")
DRIVERS = ("postgresql+psycopg", "postgresql", "mysql+pymysql", "mariadb+asyncmy")
ODD = [f"{driver}://me:{password}@127.0.0.1:1/shop" for driver in DRIVERS for password in PASSWORDS] + [
    "postgresql+psycopg://a/b:XXone@127.0.0.1:1/shop",
    "postgresql+psycopg://me@127.0.0.1:1/shop?password=XXone&YYtwo",
]


def silent(text: str) -> bool:
    return not [part for part in PARTS if part in text]


@pytest.mark.parametrize("url", ODD)
def test_a_url_whose_password_would_be_cut_in_two_is_refused_with_what_to_write(url: str) -> None:
    eo = ExactlyOnce(url, group="secrets")
    with pytest.raises(ConfigurationError, match="write @ as %40") as refused:
        next(iter(eo.stores.values())).problem()
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

    problem = next(iter(eo.stores.values())).problem()
    assert problem is not None
    assert silent(problem)
    assert silent(redacted(engine.url))
    assert eo.process(Message("orders", b'{"no": "A"}')) is Outcome.WAITING
    with pytest.raises(Exception) as met:
        engine.connect()
    assert silent(words_of(met.value))
    assert silent("\n".join(caplog.messages))


@pytest.mark.parametrize("driver", ["postgresql+psycopg", "mysql+asyncmy"])
def test_an_async_engine_prints_no_part_of_it_either(driver: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    engine = create_async_engine(f"{driver}://me:XXone@YYtwo@127.0.0.1:1/shop")
    eo = ExactlyOnce(engine, group="secrets")

    @eo.handler("orders", key="no")
    async def reserve(session: AsyncSession, order: dict[str, Any]) -> None: ...

    assert asyncio.run(eo.aprocess(Message("orders", b'{"no": "A"}'))) is Outcome.WAITING
    problem = next(iter(eo.stores.values())).problem()
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


def test_a_secret_of_a_transport_that_an_ampersand_cuts_is_not_repeated() -> None:
    with pytest.raises(ConfigurationError, match="%26") as refused:
        parse("rocketmq://h:8081?secret_key=XXone&YYtwo", secrets=["secret_key"])
    assert silent(str(refused.value))
