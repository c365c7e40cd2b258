"""A worker inside an API: its servers may be away while the API serves, and no start outlives the API's own end."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from textwrap import dedent
from time import monotonic
from typing import Any

import pytest
from sqlalchemy.orm import Session

from exactly_once import ExactlyOnce, Message
from exactly_once.errors import StoreUnavailable
from exactly_once.testing.child import free_ports, wait_until
from exactly_once.transports.contract import Away, Transport

ROOT = Path(__file__).parents[3]
SECOND = timedelta(seconds=1)


def program(database: str) -> ExactlyOnce:
    eo = ExactlyOnce(database, group="lifespan")

    @eo.handler("orders", key="no")
    def reserve(session: Session, order: dict[str, Any]) -> None: ...

    return eo


@pytest.fixture
def nowhere() -> str:
    (port,) = free_ports()
    return f"postgresql+psycopg://nobody@127.0.0.1:{port}/nothing"


def starting() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "worker's start"]


class Late:
    """A broker that does not answer until it is told to."""

    def __init__(self, real: Transport) -> None:
        self._real, self.answers = real, False

    def check(self, group: str, subscriptions: Any) -> Sequence[str]:
        return [] if self.answers else [Away("the broker does not answer")]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


@pytest.mark.parametrize("is_async", [False, True], ids=["with", "async with"])
def test_an_api_starts_and_ends_while_the_workers_database_is_away(is_async: bool, nowhere: str) -> None:
    worker = program(nowhere).worker("sql://", background=True)

    async def lifespan() -> str | None:
        async with worker:
            await asyncio.sleep(0.5)
            return worker.unready()

    began = monotonic()
    if is_async:
        said = asyncio.run(lifespan())
    else:
        with worker:
            said = worker.unready()
    assert said == "not started"
    assert monotonic() - began < 5
    wait_until(lambda: not starting(), what="the start has ended", patience_s=10)


@pytest.mark.parametrize("is_async", [False, True], ids=["with", "async with"])
def test_a_worker_in_the_background_begins_when_its_servers_answer(
    is_async: bool, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    eo = program(sqlite_url)
    late: Any = Late(eo.transport("memory://background"))
    with eo.producer("memory://background") as producer:
        producer.send(Message("orders", b'{"no": 1}'))
    monkeypatch.setattr(eo, "transport", lambda url: late)
    worker = eo.worker("memory://background", background=True)

    def goes_on() -> None:
        assert worker.unready() == "not started"
        late.answers = True
        wait_until(lambda: worker.unready() is None, what="it has started", patience_s=30)
        assert worker.drain(30 * SECOND)["processed"] == 1

    async def lifespan() -> None:
        async with worker:
            await asyncio.to_thread(goes_on)

    if is_async:
        asyncio.run(lifespan())
    else:
        with worker:
            goes_on()
    assert worker.unready() == "stopped"


def test_what_keeps_a_worker_in_the_background_from_starting_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with program(f"sqlite:///{tmp_path / 'new.db'}").worker("sql://", background=True) as worker:
        wait_until(lambda: worker.unready() != "not started", what="it has given up", patience_s=30)
        assert "exactly-once db upgrade" in (worker.unready() or "")
    assert "worker_not_started: nothing is received, and nothing tries again. There is no file" in caplog.text


def test_a_start_waits_as_long_as_it_is_told_to(nowhere: str) -> None:
    began = monotonic()
    with pytest.raises(StoreUnavailable, match="Waited in vain for the database 'default'"):
        program(nowhere).worker("sql://", patience=SECOND / 2).start()
    assert monotonic() - began < 8


def test_a_start_that_is_cancelled_ends_and_keeps_no_process_alive(nowhere: str) -> None:
    script = f"""
        import asyncio
        from exactly_once import ExactlyOnce
        from sqlalchemy.orm import Session
        eo = ExactlyOnce({nowhere!r}, group="lifespan")

        @eo.handler("orders", key="no")
        def reserve(session: Session, order: dict) -> None: ...

        async def lifespan() -> None:
            async with asyncio.timeout(1):
                async with eo.worker("sql://"):
                    print("started")

        try:
            asyncio.run(lifespan())
        except TimeoutError:
            print("cancelled")
    """
    ended = subprocess.run(
        [sys.executable, "-c", dedent(script)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.stdout, ended.returncode) == ("cancelled\n", 0), ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_start_that_gets_through_as_it_is_cancelled_is_stopped_again(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    eo = program(sqlite_url)
    late: Any = Late(eo.transport("memory://cancelled"))
    reached, goes_on = threading.Event(), threading.Event()

    def check(group: str, subscriptions: Any) -> Sequence[str]:
        reached.set()
        goes_on.wait(30)
        return []

    late.check = check
    monkeypatch.setattr(eo, "transport", lambda url: late)
    worker = eo.worker("memory://cancelled")

    async def lifespan() -> None:
        task = asyncio.create_task(worker.__aenter__())
        await asyncio.to_thread(reached.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(lifespan())
    goes_on.set()
    wait_until(lambda: worker.unready() == "stopped", what="it is stopped", patience_s=30)
