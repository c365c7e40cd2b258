"""Engines and applications of a request, a tenant or a test are let go of: nothing of ours keeps one when its program does not.

The kind: something is remembered of an engine or of its connections, and what is remembered refers back to the engine, or to the
`ExactlyOnce` that asked. A server's connections are ended with their engine, and memory does not grow with the number of them.
"""

import gc
from collections.abc import Iterator
from typing import Any
from weakref import ref

import pytest
from sqlalchemy import Engine, create_engine, make_url
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from exactly_once import ExactlyOnce, Outcome
from tests.integration.shop import _ASYNC, COLOURS, DIALECTS, GROUP, Shop, order, put, shops

P = Outcome.PROCESSED
MANY = 6


@pytest.fixture(params=[(dialect, colour) for dialect in DIALECTS for colour in COLOURS], ids=" ".join)
def shop(request: pytest.FixtureRequest) -> Iterator[Shop]:
    yield from shops(request, *request.param, pool_size=3)


def handled(eo: ExactlyOnce, shop: Shop) -> ExactlyOnce:
    """With a handler of this shop's colour."""
    options: dict[str, Any] = {"name": "handler", "key": "no"}
    if shop.is_async:

        @eo.handler("orders", **options)
        async def awaited(session: AsyncSession) -> None:
            await session.run_sync(put, "effect")
    else:

        @eo.handler("orders", **options)
        def plain(session: Session) -> None:
            put(session, "effect")

    return eo


def takes_one(shop: Shop, eo: ExactlyOnce, engine: Any, door: str, no: int) -> None:
    """One message, or one claim, on this engine."""

    def claims(session: Session) -> None:
        assert eo.claim(session, "handler", f"A-{no}")

    async def aclaims() -> None:
        async with AsyncSession(engine) as session, session.begin():
            await session.run_sync(claims)

    match door:
        case "claim" if shop.is_async:
            shop.await_(aclaims())
        case "claim":
            with Session(engine) as session, session.begin():
                claims(session)
        case _:
            shop.eo = handled(ExactlyOnce(engine, group=GROUP), shop)
            assert shop.process(order(no)) is P
            shop.fresh_eo()


@pytest.mark.parametrize("door", ["claim", "process"])
def test_an_engine_of_each_tenant_is_let_go_of(shop: Shop, door: str) -> None:
    eo = handled(ExactlyOnce(group=GROUP), shop)  # the module's
    known: list[ref[Any]] = []
    for no in range(MANY):
        url = make_url(shop.url)
        if shop.is_async:
            engine: Any = create_async_engine(url.set(drivername=_ASYNC[url.drivername]))
            known.append(ref(engine.sync_engine))
        else:
            engine = create_engine(url)
            known.append(ref(engine))
        takes_one(shop, eo, engine, door, no)
        if shop.is_async:
            shop.await_(engine.dispose())
        else:
            engine.dispose()
        del engine
    gc.collect()
    assert [each() for each in known[:-1]] == [None] * (MANY - 1)


@pytest.mark.filterwarnings("ignore")  # of connections that nobody closed: that is the story
@pytest.mark.parametrize("door", ["claim", "process"])
@pytest.mark.parametrize("dialect", ["postgres", "mariadb"])
def test_the_connections_of_an_engine_that_was_dropped_are_ended(
    request: pytest.FixtureRequest, dialect: str, door: str
) -> None:
    look = {
        "postgres": "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()",
        "mariadb": "SELECT count(*) FROM information_schema.processlist WHERE db = DATABASE()",
    }[dialect]

    def open_now(shop: Shop) -> int:
        with shop.outside.connect() as connection:
            return int(connection.exec_driver_sql(look).scalar_one())

    for shop in shops(request, dialect, "sync"):
        eo = ExactlyOnce(group=GROUP)
        before = open_now(shop)
        for no in range(MANY):
            engine: Engine = create_engine(shop.url)
            takes_one(shop, eo, engine, door, no)
            del engine
        gc.collect()
        assert open_now(shop) - before <= 1
