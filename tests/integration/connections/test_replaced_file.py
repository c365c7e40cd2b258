"""A SQLite file that is deleted or replaced while a program has it open: effects in it would be nobody's."""

import asyncio
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

import exactly_once.alembic
from exactly_once import ExactlyOnce, Message, Outcome
from tests.waiting import until


def application(database: Any) -> tuple[ExactlyOnce, list[str]]:
    eo, seen = ExactlyOnce(database, group="files"), list[str]()

    @eo.handler("orders", key="no")
    def reserve(session: Session, order: dict[str, Any]) -> None:
        session.execute(text("INSERT INTO effect VALUES (:no)"), order)
        seen.append(order["no"])

    return eo, seen


def made(file: Path) -> None:
    exactly_once.alembic.upgrade(f"sqlite:///{file}")
    engine = create_engine(f"sqlite:///{file}")
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE effect (no TEXT)"))
    engine.dispose()


def effects(file: Path) -> list[str]:
    engine = create_engine(f"sqlite:///{file}")
    with engine.connect() as connection:
        found = list(connection.execute(text("SELECT no FROM effect ORDER BY no")).scalars())
    engine.dispose()
    return found


def replaced(file: Path, how: str) -> None:
    if how == "deleted and made again":
        file.unlink()
        made(file)
    else:
        other = file.with_suffix(".new")
        made(other)
        other.replace(file)


@pytest.mark.parametrize("how", ["deleted and made again", "another moved over it"])
@pytest.mark.parametrize("given", ["url", "engine"])
def test_effects_go_into_the_file_that_stands_there_now(
    given: str, how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "shop.db"
    made(file)
    url = f"sqlite:///{file}"
    eo, _ = application(url if given == "url" else create_engine(url))
    assert eo.process(Message("orders", b'{"no": "A-1"}')) is Outcome.PROCESSED
    replaced(file, how)
    with caplog.at_level(logging.WARNING, "exactly_once"):
        assert eo.process(Message("orders", b'{"no": "A-2"}')) is Outcome.PROCESSED
    assert effects(file) == ["A-2"]
    assert f"{file} was deleted or replaced" in caplog.text
    caplog.clear()
    assert eo.process(Message("orders", b'{"no": "A-3"}')) is Outcome.PROCESSED
    assert "replaced" not in caplog.text


def test_so_do_those_of_asyncio(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "shop.db"
    made(file)
    eo = ExactlyOnce(create_async_engine(f"sqlite+aiosqlite:///{file}"), group="files")

    @eo.handler("orders", key="no")
    async def reserve(session: AsyncSession, order: dict[str, Any]) -> None:
        await session.execute(text("INSERT INTO effect VALUES (:no)"), order)

    async def both() -> None:
        assert await eo.aprocess(Message("orders", b'{"no": "A-1"}')) is Outcome.PROCESSED
        replaced(file, "another moved over it")
        assert await eo.aprocess(Message("orders", b'{"no": "A-2"}')) is Outcome.PROCESSED

    asyncio.run(both())
    assert effects(file) == ["A-2"]


def test_a_file_that_is_gone_is_not_made_and_its_messages_wait(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "shop.db"
    made(file)
    eo, _ = application(f"sqlite:///{file}")
    assert eo.process(Message("orders", b'{"no": "A-1"}')) is Outcome.PROCESSED
    kept = file.rename(tmp_path / "away.db")
    with caplog.at_level(logging.WARNING, "exactly_once"):
        assert eo.process(Message("orders", b'{"no": "A-2"}')) is Outcome.WAITING
    assert f"{file} was deleted or moved while it was open. Put it back;" in caplog.text
    assert not file.exists()
    shutil.copy(kept, file)
    assert eo.process(Message("orders", b'{"no": "A-2"}')) is Outcome.PROCESSED
    assert effects(file) == ["A-1", "A-2"]
    assert effects(kept) == ["A-1"]


def test_a_worker_goes_on_with_the_new_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "shop.db"
    made(file)
    eo, seen = application(f"sqlite:///{file}")
    with caplog.at_level(logging.WARNING, "exactly_once"), eo.worker("sql://") as worker:
        with eo.producer("sql://") as producer:
            producer.send(Message("orders", b'{"no": "A-1"}'))
        until(lambda: seen == ["A-1"], "the first message is handled")
        worker.drain()  # SQLite itself meets the journal of a transaction whose file is gone
        replaced(file, "another moved over it")
        elsewhere = ExactlyOnce(f"sqlite:///{file}", group="files")
        with elsewhere.producer("sql://") as producer:
            producer.send(Message("orders", b'{"no": "A-2"}'))
        until(lambda: seen == ["A-1", "A-2"], "the second message, which is in the new file, is handled")
    assert effects(file) == ["A-2"]
    assert f"{file} was deleted or replaced" in caplog.text
