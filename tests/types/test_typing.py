"""What a user's type checker sees: programs that use every door pass `mypy --strict`, and a wrong use is an error."""

import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).parents[2]

EVERY_DOOR = """
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import Engine, create_engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from exactly_once import (
    ConfigurationError, ExactlyOnce, InProgress, Message, Outcome, PayloadConflict, Reject, Retry, RetryLater,
    Transaction, keys,
)


@dataclass
class OrderCreated:
    order_no: str
    amount: int = 1


eo = ExactlyOnce(group="inventory")


@eo.handler("orders", tag="created", key="order_no")
def reserve_stock(session: Session, order: OrderCreated, message: Message) -> None:
    if order.amount < 0:
        raise Reject("negative amount")
    if message.attempt > 3:
        raise RetryLater(timedelta(minutes=5))


@eo.handler(
    "orders",
    tag=["created", "paid"],
    key=(keys.tag(), keys.path("order_no"), keys.message_key(), keys.property("region"), keys.call(lambda m: m.topic)),
    name="send_mail",
    guard=Transaction(claim_wait=timedelta(seconds=1)),
    retry={TimeoutError: Retry(immediate=0, delays=[1, timedelta(seconds=5)]), Exception: Retry(max_attempts=3)},
    fingerprint=["order_no"],
    ordered=True,
    after_dead="go on",
    concurrency=2,
)
async def mail(session: AsyncSession, body: dict[str, str]) -> None: ...


# the decorated functions are what they were
reveal_type(reserve_stock)
reveal_type(mail)
reserve_stock(Session(), OrderCreated("A-1"), Message("orders", b"{}"))


def claim(engine: Engine, no: str) -> bool:
    with Session(engine) as session, session.begin():
        first: bool = eo.claim(session, "reserve_stock", no, payload=b"{}", claim_wait=timedelta(seconds=1))
        return first and eo.claim(session, "reserve_stock", ("created", 12))


async def claim_async(engine: AsyncEngine) -> bool:
    async with AsyncSession(engine) as session, session.begin():
        try:
            return await session.run_sync(eo.claim, "reserve_stock", "A-1")
        except (InProgress, PayloadConflict):
            return False


def loop(message: Message) -> bool:
    outcome: Outcome = eo.process(message)
    return outcome.acknowledge


async def loop_async(message: Message) -> bool:
    return (await eo.aprocess(message)).acknowledge


def worker() -> int:
    with eo.worker("memory://test", concurrency=4) as serving:
        serving.drain(timedelta(seconds=10))
    with eo.producer("memory://test") as producer:
        producer.send(Message("orders", b"{}", tag="created"))
    return eo.run("memory://test")


async def worker_async() -> None:
    async with eo.worker("memory://test"):
        ...


def lock(order_no: str) -> None:
    with eo.lock(("rebuild", order_no), expires=timedelta(minutes=1), wait=timedelta(0), store="redis://127.0.0.1"):
        ...


async def lock_async() -> None:
    async with eo.lock("rebuild"):
        ...


def several() -> ExactlyOnce:
    eu, us = create_engine("sqlite:///eu.db"), sessionmaker(create_engine("sqlite:///us.db"))
    made = ExactlyOnce({"eu": eu, "us": us}, route=lambda message: message.properties["region"], enforce=False)
    try:
        made.bind(eu, async_database=create_async_engine("sqlite+aiosqlite:///eu.db"))
    except ConfigurationError:
        raise
    return made
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What mypy remembers of SQLAlchemy and of us: both programs are checked against the same."""
    return tmp_path_factory.mktemp("cache")


def check(tmp_path: Path, cache: Path, program: str) -> tuple[int, str]:
    """Check a user's program as it stands in a folder of its own, against the package as installed."""
    file = tmp_path / "consumers.py"
    file.write_text(program)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--config-file=",
        f"--cache-dir={cache}",
        file.name,
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env={"MYPYPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout + done.stderr


def test_a_program_that_uses_every_door_is_typed(tmp_path: Path, cache: Path) -> None:
    code, told = check(tmp_path, cache, EVERY_DOOR)
    assert code == 0, told
    plain, awaited = [line for line in told.splitlines() if "Revealed type" in line]
    assert "def (session: sqlalchemy.orm.session.Session, order: consumers.OrderCreated" in plain
    assert "message: exactly_once.message.Message)" in plain
    assert "-> typing.Coroutine[Any, Any, None]" in awaited.replace("types.CoroutineType", "typing.Coroutine")


def test_wrong_uses_are_errors_where_they_are_written(tmp_path: Path, cache: Path) -> None:
    wrong = {
        '@eo.handler("orders")\ndef a(session: Session) -> None: ...': 'Missing named argument "key"',
        '@eo.handler("orders", "created", key="no")\ndef b(session: Session) -> None: ...': 'for keyword argument "key"',
        '@eo.handler("orders", key="no", retry=3)\ndef c(session: Session) -> None: ...': 'Argument "retry"',
        '@eo.handler("orders", key="no", after_dead="stop")\ndef d(session: Session) -> None: ...': 'Argument "after_dead"',
        '@eo.handler("orders", key=12)\ndef e(session: Session) -> None: ...': 'Argument "key"',
        "reserve(Session(), 5)": 'Argument 2 to "reserve"',
        'eo.claim("session", "reserve", "A-1")': 'Argument 1 to "claim"',
        'bool(eo.process(b"{}"))': 'Argument 1 to "process"',
        'Message("orders", "text")': 'Argument 2 to "Message"',
        'Message("orders", b"", "created")': "Too many positional",
        'x: str = eo.process(Message("orders", b""))': "Incompatible types in assignment",
        'eo.process(Message("orders", b"")).acknowledged': 'has no attribute "acknowledged"',
    }
    start = dedent("""\
        from sqlalchemy.orm import Session
        from exactly_once import ExactlyOnce, Message
        eo = ExactlyOnce(group="inventory")
        @eo.handler("orders", key="no")
        def reserve(session: Session, order: dict[str, str]) -> None: ...
        """)
    code, told = check(tmp_path, cache, start + "\n".join(wrong))
    assert code == 1, told
    line = start.count("\n") + 1
    for each, error in wrong.items():
        said = [text for text in told.splitlines() if text.startswith(f"consumers.py:{line}: error")]
        assert any(error in text for text in said), (each, error, told)
        line += each.count("\n") + 1


def test_the_package_says_that_it_is_typed() -> None:
    pytest.importorskip("mypy")
    assert (ROOT / "exactly_once" / "py.typed").exists()
