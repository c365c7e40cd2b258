"""With enforce=False a duplicate runs, and its end is told as that of any other message: a team looks at its own traffic."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from exactly_once import Message, Outcome, Retry
from tests.integration.failing import Panic
from tests.integration.grounds import ground_on
from tests.integration.outside import column, run
from tests.integration.shop import COLOURS, Shop, order, put
from tests.integration.ways import ALONE, IN_A_BATCH, IN_A_LIST, Way, one_by_one

pytestmark = pytest.mark.nightly(meet=2)

P, F, DEAD, WAITING = Outcome.PROCESSED, Outcome.FAILED, Outcome.DEAD, Outcome.WAITING
THREE = Retry(immediate=0, delays=[0.01], max_attempts=3)
RAISED: dict[str, Callable[[], BaseException]] = {
    "Panic": lambda: Panic("attempt to subtract with overflow"),
    "CancelledError": asyncio.CancelledError,
    "a group": lambda: BaseExceptionGroup("g", [Panic("x")]),
    "ValueError": lambda: ValueError("no"),
}
each_way = pytest.mark.parametrize("way", [ALONE, IN_A_BATCH, IN_A_LIST], ids=str)  # a lease refuses enforce=False


def ended(shop: Shop, message: Message) -> Outcome:
    """How a message ended, also where `process` raises on what failed it."""
    try:
        return shop.process(message)
    except (Panic, BaseExceptionGroup):
        return F


@each_way
@pytest.mark.parametrize("raised", RAISED)
def test_a_duplicate_that_ends_badly_is_counted_and_its_row_closed_when_it_ends_well(
    shop: Shop, way: Way, raised: str
) -> None:
    bad: list[int] = []

    def do(session: Session, no: Any) -> None:
        put(session, str(no))
        if bad:
            raise RAISED[raised]()

    shop.fresh_eo(enforce=False)
    way.handles(shop, do, retry=THREE)
    assert shop.process(order(1)) is P
    bad.append(1)
    assert ended(shop, order(1, attempt=2)) is F
    assert (shop.failure().state, shop.failure().attempts) == ("retrying", 1)
    bad.clear()
    assert shop.process(order(1, attempt=3)) is P
    assert shop.failure().state == "resolved"
    bad.append(1)
    # it ended well in between: what fails from here on is counted from one
    assert [ended(shop, order(1, attempt=attempt)) for attempt in (4, 5, 6)] == [F, F, DEAD]
    assert shop.effects() == ["1", "1"]
    shop.borrow()


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(1)], ids=["KeyboardInterrupt", "SystemExit"])
def test_what_stops_a_duplicate_is_raised_on(shop: Shop, stop: BaseException) -> None:
    bad: list[int] = []

    def do(session: Session) -> None:
        put(session, "x")
        if bad:
            raise stop

    shop.fresh_eo(enforce=False)
    shop.handles(do)
    assert shop.process(order()) is P
    bad.append(1)
    with pytest.raises(type(stop)):
        shop.process(order())
    assert shop.failures() == []
    shop.assert_kept("x", claims=["A-1"])


def test_an_answer_of_a_duplicate_holds_the_handler_as_that_of_any_other(shop: Shop) -> None:
    bad: list[int] = []
    shop.fresh_eo(enforce=False)
    if shop.is_async:

        @shop.eo.handler("orders", name="handler", key="no", retry=THREE)
        async def awaited(session: AsyncSession):  # type: ignore[no-untyped-def]
            await session.run_sync(put, "x")
            return False if bad else None
    else:

        @shop.eo.handler("orders", name="handler", key="no", retry=THREE)
        def plain(session: Session):  # type: ignore[no-untyped-def]
            put(session, "x")
            return False if bad else None

    assert shop.process(order()) is P
    bad.append(1)
    assert shop.process(order()) is WAITING
    assert shop.failures() == []
    assert shop.effects() == ["x"]


LEAVES = {
    "postgres": ("SET search_path TO other, public", "SELECT pg_advisory_lock(7)", "SET ROLE other"),
    "mariadb": ("USE mysql", "SELECT GET_LOCK('seven', 1)", "SET ROLE other"),
}
FREE = {"postgres": "SELECT pg_try_advisory_lock(7)", "mariadb": "SELECT IS_FREE_LOCK('seven')"}


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("leaves", [(name, each) for name, some in LEAVES.items() for each in some], ids=" ".join)
def test_what_a_duplicate_leaves_in_its_session_reaches_no_neighbour(
    request: pytest.FixtureRequest, leaves: tuple[str, str], colour: str
) -> None:
    dialect, statement = leaves
    for shop in ground_on(request, dialect, colour):
        name = shop.engine.url.database
        effect = f"`{name}`.effect" if dialect == "mariadb" else "public.effect"
        run(shop, "CREATE ROLE other", f"GRANT INSERT, SELECT ON {effect} TO other")
        run(
            shop, *(["GRANT other TO CURRENT_USER"] if dialect == "mariadb" else ["CREATE SCHEMA other", _OTHER, _USES])
        )
        shop.fresh_eo(enforce=False)

        def do(session: Session, no: Any, effect: str = effect, statement: str = statement) -> None:
            if no == 1:
                session.execute(text(statement))
                session.execute(text(f"INSERT INTO {effect} (text) VALUES ('1')"))
            else:
                put(session, str(no))

        ALONE.handles(shop, do)
        assert one_by_one(shop, ALONE, [1, 2, 1, 3, 1, 4]) == [P] * 6
        assert shop.effects() == ["1", "2", "1", "3", "1", "4"]
        assert [bool(each) for each in column(shop, FREE[dialect])] == [True]
        shop.engine.dispose()
        shop.await_(shop.async_engine.dispose())
        run(shop, *(["DROP OWNED BY other", "DROP ROLE other"] if dialect == "postgres" else ["DROP ROLE other"]))


def test_a_duplicate_that_ends_its_transaction_is_told_which_line_to_delete(shop: Shop) -> None:
    def do(session: Session, no: Any) -> None:
        put(session, str(no))
        if len(ran) == 1:
            session.commit()
        ran.append(no)

    ran: list[Any] = []
    shop.fresh_eo(enforce=False)
    ALONE.handles(shop, do, retry=THREE)
    assert [shop.process(order(1)), shop.process(order(1, attempt=2))] == [P, F]
    assert "commit()" in shop.failure().error_text
    shop.assert_kept("1", claims=["1"])


_OTHER = "CREATE TABLE other.effect (id serial PRIMARY KEY, text varchar(300))"
_USES = "GRANT USAGE ON SEQUENCE effect_id_seq TO other"
