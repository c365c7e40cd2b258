"""A small shop to break rules in: one table of effects, handlers of both colours, on each database.

`Shop` hides what differs between a thread and a loop, so that a test says once what its handler does with its session. Its
engines have one connection each: whoever leaves something open in it leaves it to the next one, who commits it.
"""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import pytest
from sqlalchemy import (
    Column,
    Engine,
    Integer,
    MetaData,
    NullPool,
    Row,
    String,
    Table,
    create_engine,
    event,
    insert,
    make_url,
    select,
)
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from exactly_once import ExactlyOnce, Message, Outcome, Retry
from exactly_once.database.dialects.contract import State
from exactly_once.database.dialects.registry import dialect_for
from exactly_once.database.schema import tables

GROUP = "shop"
DIALECTS = ("postgres", "mariadb", "sqlite")
COLOURS = ("sync", "async")
ONE_TRY = Retry(immediate=0)

_METADATA = MetaData()
EFFECT = Table(
    "effect",
    _METADATA,
    Column("id", Integer, primary_key=True),
    Column("text", String(300), nullable=False),
    mysql_engine="InnoDB",
    mysql_default_charset="utf8mb4",
    mariadb_engine="InnoDB",
    mariadb_default_charset="utf8mb4",
)
ONLY = Table("only_one", _METADATA, Column("text", String(200), primary_key=True))
STOCK = Table("stock", _METADATA, Column("item", Integer, primary_key=True), Column("amount", Integer, nullable=False))

_ASYNC = {
    "postgresql+psycopg": "postgresql+psycopg",
    "mysql+pymysql": "mysql+asyncmy",
    "sqlite": "sqlite+aiosqlite",
}

Do = Callable[[Session], object]


def on(*dialects: str, colour: str | None = None) -> pytest.MarkDecorator:
    """Collect a test for these databases alone, and for this colour; why is said beside it."""
    return pytest.mark.where(
        lambda ground, **_: (not dialects or ground[0] in dialects) and (colour is None or ground[1] == colour)
    )


def put(session: Session, text: str) -> None:
    """One effect."""
    session.execute(insert(EFFECT).values(text=text))


def order(no: object = "A-1", /, *, attempt: int = 1, **more: Any) -> Message:
    """A message whose business key is `no`."""
    from json import dumps

    given = {"message_id": f"id-{no}"} | more
    return Message("orders", dumps({"no": no}).encode(), attempt=attempt, **given)


@dataclass
class Shop:
    """One database and one colour of handlers."""

    dialect: str
    colour: str
    url: str
    pool_size: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        options = {"pool_size": self.pool_size, "max_overflow": 0, "pool_timeout": 10} | self.options
        url = make_url(self.url)
        self.engine: Engine = create_engine(url, **options)
        self.async_engine: AsyncEngine = create_async_engine(url.set(drivername=_ASYNC[url.drivername]), **options)
        # its connections are kept, for a new one costs more than most tests: what ends them is noticed by a ping
        kept: dict[str, Any] = {"pool_pre_ping": True}
        self.outside: Engine = create_engine(url, **({"poolclass": NullPool} if self.dialect == "sqlite" else kept))
        self.tables = tables()
        self._loop = asyncio.Runner()
        self.fresh_eo()
        _METADATA.create_all(self.outside)

    @property
    def is_async(self) -> bool:
        return self.colour == "async"

    def fresh_eo(self, database: Any = None, async_database: Any = None, **more: Any) -> ExactlyOnce:
        """An application without handlers, which the next `handles` registers at."""
        self.eo = ExactlyOnce(
            database or self.engine, async_database=async_database or self.async_engine, **({"group": GROUP} | more)
        )
        return self.eo

    def handles(self, do: Do, *, topic: str = "orders", name: str = "handler", key: Any = "no", **more: Any) -> None:
        """Register a handler of this colour that does this with its session."""
        options: dict[str, Any] = {"name": name, "key": key, "retry": ONE_TRY} | more
        if self.is_async:

            @self.eo.handler(topic, **options)
            async def awaited(session: AsyncSession) -> None:
                await session.run_sync(do)
        else:

            @self.eo.handler(topic, **options)
            def plain(session: Session) -> None:
                do(session)

    def process(self, message: Message) -> Outcome:
        """Run a message through door 2 of this colour."""
        if self.is_async:
            outcome: Outcome = self.await_(self.eo.aprocess(message))
            return outcome
        return self.eo.process(message)

    def await_(self, coroutine: Any) -> Any:
        """Run a coroutine on this shop's loop."""
        return self._loop.run(coroutine)

    # -- what is there, seen from outside -----------------------------------------------------------------------------

    def rows(self, table: Table) -> list[Row[Any]]:
        with self.outside.connect() as connection:
            return list(connection.execute(select(table)).all())

    def effects(self) -> list[str]:
        """The texts of the effects, oldest first."""
        return [row.text for row in sorted(self.rows(EFFECT), key=lambda row: row.id)]

    def claims(self) -> list[str]:
        """The keys that are claimed."""
        return sorted(row.business_key for row in self.rows(self.tables.idempotent))

    def failures(self) -> list[Row[Any]]:
        """The failure rows, oldest first."""
        return sorted(self.rows(self.tables.failure), key=lambda row: row.id)

    def failure(self) -> Row[Any]:
        """The only failure row."""
        (row,) = self.failures()
        return row

    def clear(self) -> None:
        """Empty every table."""
        with self.outside.begin() as connection:
            for table in (EFFECT, ONLY, STOCK, *self.tables.metadata.sorted_tables):
                connection.execute(table.delete())
        self.fresh_eo()

    def borrow(self) -> None:
        """Take the pool's connection, as a stranger would: it must be idle; write with it and commit."""
        if self.is_async:
            self.await_(self._aborrow())
        else:
            assert self.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
            with Session(self.engine) as session:
                self._write_and_commit(session)

    async def _aborrow(self) -> None:
        assert self.async_engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        async with AsyncSession(self.async_engine) as session:
            await session.run_sync(self._write_and_commit)

    def _write_and_commit(self, session: Session) -> None:
        states: list[State] = []
        engine: Any = self.async_engine.sync_engine if self.is_async else self.engine
        speaker = dialect_for(engine, lambda: None)
        with engine.connect() as connection:
            states.append(speaker.state(connection.connection.dbapi_connection))
        assert states == [State.IDLE]
        put(session, "stranger")
        session.commit()

    def assert_kept(self, *effects: str, claims: list[str]) -> None:
        """These effects and claims are there, and nothing more after a stranger has used the connection."""
        assert (self.effects(), self.claims()) == (list(effects), claims)
        self.borrow()
        assert (self.effects(), self.claims()) == ([*effects, "stranger"], claims)

    def close(self) -> None:
        self.await_(self.async_engine.dispose())
        self._loop.close()
        self.engine.dispose()
        self.outside.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def count_statements(engine: Engine) -> list[str]:
    """A list that fills with the statements sent through SQLAlchemy from now on."""
    seen: list[str] = []

    @event.listens_for(engine, "before_cursor_execute")
    def sent(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        seen.append(statement)

    return seen


def shops(request: Any, dialect: str, colour: str, **more: Any) -> Iterator[Shop]:
    """A shop on a fresh database, to be the body of a fixture of any scope."""
    server = request.getfixturevalue({"postgres": "eo_server"}.get(dialect, f"{dialect}_server"))
    url = server.create()
    try:
        with Shop(dialect, colour, url.render_as_string(hide_password=False), **more) as shop:
            yield shop
    finally:
        server.drop(url)
