"""A procedure rolls its caller back, writes what went wrong and commits that alone: no claim stands, a copy would repeat it."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only, greenlet_spawn

from tests.integration.shop import COLOURS, Shop, order, shops
from tests.integration.ways import WAYS, Way, mariadb_procedures

pytestmark = pytest.mark.nightly(meet=2)

_LOG = "ROLLBACK; INSERT INTO effect (text) VALUES ('log'); COMMIT;"
PROCEDURES = {
    "pays": (
        f"() BEGIN DECLARE EXIT HANDLER FOR SQLEXCEPTION BEGIN {_LOG} RESIGNAL; END;"
        " INSERT INTO only_one VALUES ('one'); INSERT INTO only_one VALUES ('one'); END"
    ),
    "logs_and_dies": f"() BEGIN {_LOG} KILL CONNECTION_ID(); END",
    "logs_and_sleeps": f"() BEGIN {_LOG} DO SLEEP(2); END",
}

each_way = pytest.mark.parametrize("way", WAYS, ids=str)


@pytest.fixture(scope="module", params=COLOURS)
def ground(request: pytest.FixtureRequest) -> Iterator[Shop]:
    for shop in shops(request, "mariadb", request.param, pool_size=3):
        mariadb_procedures(shop, **PROCEDURES)
        yield shop


def is_broken_at_once(shop: Shop, way: Way, do: Callable[[Session], object]) -> None:
    runs = []

    def counted(session: Session, no: str) -> None:
        runs.append(no)
        do(session)

    way.handles(shop, counted)
    for n in (1, 2, 3):
        way.attempted(shop, [order(3, attempt=n)])
    assert len(runs) == 1
    assert shop.effects() == ["log"]
    assert "broken" in [each.state for each in shop.failures()]


@each_way
@pytest.mark.parametrize(
    "then", ["raises", "swallows", "rolls back and raises", "rolls back and swallows", "in a savepoint"]
)
def test_the_procedures_error_is_met_by_the_handler(shop: Shop, way: Way, then: str) -> None:
    def do(session: Session) -> None:
        call = text("CALL pays()")
        if then == "in a savepoint":
            with suppress(Exception), session.begin_nested():
                session.execute(call)
            return
        try:
            session.execute(call)
        except DBAPIError:
            if then.startswith("rolls back"):
                session.rollback()
            if then.endswith("raises"):
                raise

    is_broken_at_once(shop, way, do)


@each_way
def test_its_connection_is_killed_behind_it(shop: Shop, way: Way) -> None:
    is_broken_at_once(shop, way, lambda session: session.execute(text("CALL logs_and_dies()")))


@each_way
def test_its_caller_is_timed_out_behind_it(shop: Shop, way: Way) -> None:
    if not shop.is_async:
        pytest.skip("a thread is not cancelled")

    def do(session: Session) -> None:
        async def timed() -> None:
            async with asyncio.timeout(0.4):  # the procedure has committed by then, and sleeps
                await greenlet_spawn(session.execute, text("CALL logs_and_sleeps()"))

        await_only(timed())

    is_broken_at_once(shop, way, do)
