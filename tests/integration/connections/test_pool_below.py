"""A pool of psycopg's below SQLAlchemy's: what one handler left in its session, the next one does not find."""

from collections.abc import Iterator
from typing import Any

import pytest
from psycopg_pool import AsyncConnectionPool, ConnectionPool
from sqlalchemy import NullPool, create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

from exactly_once import Outcome
from tests.integration.shop import COLOURS, Shop, order, shops
from tests.integration.ways import WAYS, Way

pytestmark = pytest.mark.nightly(meet=2)
P, F, DUPLICATE = Outcome.PROCESSED, Outcome.FAILED, Outcome.DUPLICATE

LEAVES = {
    "path": ("SET search_path TO staging, public", "SHOW search_path"),
    "tenant": ("SET app.tenant = 'seven'", "SELECT current_setting('app.tenant', true)"),
    "lock": ("SELECT pg_advisory_lock(7)", "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"),
    "role": ("SET ROLE tenant_below", "SELECT current_user"),
    "table": ("CREATE TEMP TABLE kept (a int)", "SELECT to_regclass('pg_temp.kept')::text"),
}


@pytest.fixture(scope="module", params=COLOURS)
def ground(request: pytest.FixtureRequest) -> Iterator[Shop]:
    for shop in shops(request, "postgres", request.param):
        with shop.outside.begin() as connection:
            for statement in (
                "CREATE SCHEMA staging",
                "DROP ROLE IF EXISTS tenant_below",
                "CREATE ROLE tenant_below NOLOGIN",
                "GRANT ALL ON effect TO tenant_below",
                "GRANT ALL ON SEQUENCE effect_id_seq TO tenant_below",
            ):
                connection.execute(text(statement))
        yield shop
        with shop.outside.begin() as connection:
            connection.execute(text("DROP OWNED BY tenant_below"))
            connection.execute(text("DROP ROLE tenant_below"))


@pytest.fixture(params=[2, 4], ids=["two connections", "four"])
def shop(request: pytest.FixtureRequest, ground: Shop) -> Iterator[Shop]:
    """That shop, on engines that draw on psycopg's pools."""
    info = ground.url.replace("+psycopg", "")
    options: dict[str, Any] = {"min_size": 1, "max_size": request.param, "close_returns": True, "open": False}
    pool, async_pool = ConnectionPool(info, **options), AsyncConnectionPool(info, **options)
    given = ground.engine, ground.async_engine
    pool.open()
    ground.await_(async_pool.open())
    ground.engine = create_engine("postgresql+psycopg://", creator=pool.getconn, poolclass=NullPool)
    ground.async_engine = create_async_engine(
        "postgresql+psycopg://", async_creator=async_pool.getconn, poolclass=NullPool
    )
    ground.fresh_eo()
    ground.clear()
    yield ground
    ground.engine, ground.async_engine = given
    ground.fresh_eo()
    pool.close()
    ground.await_(async_pool.close())


@pytest.mark.parametrize("ends", ["returns", "raises"])
@pytest.mark.parametrize("left", list(LEAVES))
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_what_a_handler_left_is_not_found_by_the_next_one(shop: Shop, way: Way, left: str, ends: str) -> None:
    found: list[str] = []
    statement, asks = LEAVES[left]

    def do(session: Session, no: Any) -> None:
        found.append(str(session.execute(text(asks)).scalar()))
        session.execute(text("INSERT INTO public.effect (text) VALUES (:t)"), {"t": f"{no}"})
        if no == 1 and len(found) < 3:
            session.execute(text(statement))
            if ends == "raises":
                raise OSError("the other service is away")

    way.handles(shop, do)
    seen = [end for no in (0, 1, 2, 3, 2) for end in way.deliver(shop, [order(no)])]
    assert seen == [P, F if ends == "raises" else P, P, P, DUPLICATE]
    assert sorted(shop.effects()) == ["0", *(["1"] if ends == "returns" else []), "2", "3"]
    assert len(set(found)) == 1, found


def test_what_is_left_clean_stays_in_the_pool_below(shop: Shop) -> None:
    pids: set[int] = set()
    shop.handles(lambda session: pids.add(session.execute(text("SELECT pg_backend_pid()")).scalar_one()))
    assert [shop.process(order(no)) for no in range(8)] == [P] * 8
    assert len(pids) <= 4
