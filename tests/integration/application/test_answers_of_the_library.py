"""What a fresh reader mistypes in a program, a test or a worker's start is answered with what happened and what to type."""

import asyncio
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine
from sqlalchemy.orm import Session, sessionmaker

import exactly_once.alembic
from exactly_once import ConfigurationError, ExactlyOnce, Lease, Message, Outcome
from exactly_once.cli.reference import application
from exactly_once.configuration import which_database
from exactly_once.testing import bound
from tests.integration.shop import Shop, order

URL = "sqlite:///{}"


@pytest.fixture(autouse=True)
def said_anew() -> None:
    """Each is said once in a process."""
    which_database._say.cache_clear()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, whose pyproject.toml names a.db."""
    for name in ("a", "b"):
        exactly_once.alembic.upgrade(URL.format(tmp_path / f"{name}.db"))
    settings = f'[tool.exactly_once]\ndatabase = "{URL.format(tmp_path / "a.db")}"\n'
    (tmp_path / "pyproject.toml").write_text(settings)
    monkeypatch.chdir(tmp_path)
    for name in ("DATABASE", "CONFIG"):
        monkeypatch.delenv(f"EXACTLY_ONCE_{name}", raising=False)
    return tmp_path


def told(caplog: pytest.LogCaptureFixture, logger: str = "exactly_once.config") -> list[str]:
    return [
        record.getMessage() for record in caplog.records if record.name == logger and record.levelno >= logging.WARNING
    ]


def processed(eo: ExactlyOnce) -> None:
    @eo.handler("orders", key="no")
    def reserve(session: Session) -> None: ...

    assert eo.process(order()) is Outcome.PROCESSED


# -- which database ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["engine", "sessionmaker", "URL"])
def test_a_database_of_the_code_that_the_file_overrules_is_told_once(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    engine = create_engine(URL.format(folder / "b.db"))
    made: dict[str, Any] = {"engine": engine, "sessionmaker": sessionmaker(engine), "URL": engine.url}
    for _ in range(2):
        processed(ExactlyOnce(made[given], group=given + str(_)))
    (text,) = told(caplog)
    assert text.startswith("The database in the code (")
    assert "b.db" in text.partition("is not used")[0]
    assert f"pyproject.toml, database says sqlite:///{folder}/a.db" in text
    assert "eo.bind(engine), which wins over both" in text
    engine.dispose()


def test_a_database_of_the_code_that_the_environment_overrules_is_told_of_an_engine_alone(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A URL in code is a default; the variable is there to overrule it."""
    monkeypatch.setenv("EXACTLY_ONCE_DATABASE", f"sqlite:///{folder}/a.db?timeout=7")
    processed(ExactlyOnce(f"sqlite:///{folder}/b.db", group="g1"))
    assert [text for text in told(caplog) if not text.startswith("A test uses")] == []
    engine = create_engine(URL.format(folder / "b.db"))
    processed(ExactlyOnce(engine, group="g2"))
    (text,) = [text for text in told(caplog) if not text.startswith("A test uses")]
    assert "environment EXACTLY_ONCE_DATABASE says" in text
    engine.dispose()


def test_no_password_is_told(caplog: pytest.LogCaptureFixture) -> None:
    from exactly_once.configuration.config import Setting

    engine = create_engine("postgresql+psycopg://me:hush1@h/b")
    which_database.say_which("database", engine, Setting("postgresql+psycopg://me:hush2@h/a", "file x.toml, database"))
    assert len(told(caplog)) == 2
    assert "hush" not in caplog.text


def test_what_is_used_as_given_is_not_told(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    same, other = create_engine(URL.format(folder / "a.db")), create_engine(URL.format(folder / "b.db"))
    processed(ExactlyOnce(same, group="g1"))
    eo = ExactlyOnce(other, group="g2")
    eo.bind(other)
    processed(eo)
    assert told(caplog) == []
    same.dispose()
    other.dispose()


def test_a_test_that_uses_the_settings_database_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    processed(ExactlyOnce(group="g"))
    (text,) = told(caplog)
    assert text.startswith(f"A test uses sqlite:///{folder}/a.db, the database of file ")
    assert "`with bound(eo, eo_database):`" in text


def test_a_bound_that_is_not_entered_is_told(folder: Path) -> None:
    eo = ExactlyOnce(group="g")
    with pytest.warns(UserWarning, match=r"not entered, so nothing is bound.*`with bound\(eo, engine\):`") as caught:
        bound(eo, "sqlite://")
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with bound(eo, URL.format(folder / "b.db")):
            processed(eo)


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"transport": "sql://"}, "ExactlyOnce takes no transport=. The broker's URL goes to eo.worker(URL)"),
        ({"concurrency": 3}, "ExactlyOnce takes no concurrency=. It goes to eo.worker("),
        ({"db": "sqlite://"}, "ExactlyOnce has no argument db=. Did you mean 'database'?"),
        ({"grup": "g"}, "ExactlyOnce has no argument grup=. Did you mean 'group'?"),
    ],
)
def test_an_argument_that_is_none_is_named(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        ExactlyOnce(**given)
    assert str(caught.value).startswith(words)


def test_a_second_argument_without_a_name_is_named() -> None:
    with pytest.raises(ConfigurationError, match="one argument without a name, the database"):
        ExactlyOnce("sqlite://", "group")  # type: ignore[misc]


def test_a_producer_in_async_with_is_told_how_it_is_used() -> None:
    eo = ExactlyOnce("sqlite://", group="g")

    async def sends() -> None:
        async with eo.producer("memory://async"):  # type: ignore[attr-defined]
            raise AssertionError

    with pytest.raises(
        TypeError, match=r"with eo\.producer\(URL\) as producer.*asyncio\.to_thread\(producer\.send, message\)"
    ):
        asyncio.run(sends())


# -- a worker's start --------------------------------------------------------------------------------------------------


@pytest.fixture
def ground(request: pytest.FixtureRequest) -> Iterator[Shop]:
    from tests.integration.shop import shops

    yield from shops(request, request.param, "sync")


def starts(shop: Shop, *names: str, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Start a worker of handlers with these names, and handle what is sent; return the warnings."""
    eo = shop.fresh_eo()
    for name in names:

        @eo.handler("orders", name=name, tag="created", key="no")
        def reserve(session: Session) -> None: ...

    caplog.clear()
    with caplog.at_level(logging.INFO, logger="exactly_once.worker"), eo.worker(f"memory://{id(eo)}") as worker:
        with eo.producer(f"memory://{id(eo)}") as producer:
            producer.send(Message("orders", b'{"no": 1}', tag="created"))
        worker.drain()
    return told(caplog, "exactly_once.worker")


@pytest.mark.parametrize("ground", ["sqlite", "postgres", "mariadb"], indirect=True)
def test_a_handler_with_another_name_is_told_before_it_receives(ground: Shop, caplog: pytest.LogCaptureFixture) -> None:
    assert starts(ground, "reserve_stock", caplog=caplog) == []
    (text,) = starts(ground, "reserve", caplog=caplog)
    assert text.startswith("There are claims of reserve_stock (not registered), and none of reserve (registered).")
    assert "stop this worker, and type: exactly-once handlers rename reserve_stock reserve --app MODULE:NAME." in text
    assert starts(ground, "reserve", caplog=caplog) == [], "what could be done twice has been: doctor says it"
    assert starts(ground, "reserve", "reserve_stock", caplog=caplog) == []


@pytest.mark.parametrize("ground", ["sqlite"], indirect=True)
def test_the_start_names_topics_with_tags_database_and_broker(ground: Shop, caplog: pytest.LogCaptureFixture) -> None:
    starts(ground, "reserve", caplog=caplog)
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("worker_started")]
    assert " topics=orders:created handlers=reserve " in line
    assert f" database={ground.engine.url.render_as_string()}" in line
    assert " transport=memory://" in line


@pytest.mark.parametrize("ground", ["sqlite"], indirect=True)
def test_a_queue_in_memory_of_several_processes_is_told(
    ground: Shop, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXACTLY_ONCE_SUPERVISED", "1")
    (text,) = starts(ground, "reserve", caplog=caplog)
    assert text.startswith("memory:// is a queue inside this one process")
    assert "Use sql://" in text


def test_a_lease_of_a_number_is_told_how_seconds_are_written() -> None:
    with pytest.raises(ConfigurationError, match=r"For 120 seconds write Lease\(timedelta\(seconds=120\)\)"):
        Lease(120)  # type: ignore[arg-type]


def test_a_file_in_place_of_an_application_is_answered_with_its_module() -> None:
    with pytest.raises(ConfigurationError, match=r"consumers\.py is a file; type its module .* such as consumers:eo"):
        application("consumers.py")


def test_a_test_without_a_database_is_told_how_it_is_lent_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EXACTLY_ONCE_DATABASE", raising=False)
    eo = ExactlyOnce(group="inventory")
    eo.handler("orders", key="no")(takes_nothing)
    with pytest.raises(ConfigurationError, match=r"In a test, lend it one: `with bound\(eo, eo_database\):`"):
        eo.process(Message("orders", b'{"no": 1}'))


def takes_nothing(body: dict[str, int]) -> None:
    """A handler."""
