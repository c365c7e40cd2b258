"""A session's transaction could not begin, and the handler swallowed that and went on: under a lease, in a step, behind a lock.

SQLAlchemy has given the session its connection by then, and asks no hook again. What is sent on it then would be in no
transaction of ours: lost behind a message that is done, or kept and done again.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.orm import Session

from exactly_once import Lock, Outcome
from tests.integration.shop import COLOURS, DIALECTS, Shop, on, order, put, shops
from tests.integration.ways import ALONE, IN_A_STEP, UNDER_A_LEASE, Way

pytestmark = pytest.mark.nightly(meet=2)
P, F, DUPLICATE = Outcome.PROCESSED, Outcome.FAILED, Outcome.DUPLICATE
LATE = pytest.mark.parametrize("way", [UNDER_A_LEASE, IN_A_STEP, "locked"], ids=str)
BEHIND = pytest.mark.parametrize("behind", ["returns", "raises", "commits", "rolls back"])
_GROUNDS = [(dialect, colour) for dialect in DIALECTS for colour in COLOURS]


@pytest.fixture(scope="module", params=_GROUNDS, ids=["-".join(each) for each in _GROUNDS])
def ground(request: pytest.FixtureRequest) -> Iterator[Shop]:
    # the connection used last is the next one: a handler meets it as the one before left it
    yield from shops(request, *request.param, pool_size=3, options={"pool_use_lifo": True})


def handles(request: pytest.FixtureRequest, shop: Shop, way: Way | str, do: Callable[..., None]) -> None:
    if isinstance(way, Way):
        way.handles(shop, do)
    else:
        shop.fresh_eo(redis=request.getfixturevalue("redis_url"))
        ALONE.handles(shop, do, guard=Lock())


def goes_on(session: Session, behind: str) -> None:
    put(session, "effect")
    if behind == "commits":
        session.commit()
    elif behind == "rolls back":
        session.rollback()
        put(session, "effect")
        session.commit()
    elif behind == "raises":
        raise OSError("the other service is away")


@LATE
@BEHIND
@pytest.mark.parametrize("fresh", [True, False], ids=["a new connection", "a used one"])
def test_autocommit_is_refused_and_what_comes_behind_it_is_not_sent(
    request: pytest.FixtureRequest, shop: Shop, way: Way | str, behind: str, fresh: bool
) -> None:
    def do(session: Session, no: Any) -> None:
        with suppress(Exception):
            session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        goes_on(session, behind)

    handles(request, shop, way, do)
    if fresh:
        shop.engine.dispose()
        shop.async_engine.sync_engine.dispose(close=False)
    ends = [shop.process(order(3, attempt=n)) for n in (1, 2, 3)]
    # a server that is told BEGIN anew is in no autocommit; a lock remembers nothing
    assert shop.effects() == ["effect"] * ends.count(P), ends
    assert set(ends) in ({F}, {P}, {P, DUPLICATE})


@LATE
@BEHIND
def test_a_hook_that_raised_and_was_swallowed_loses_and_doubles_nothing(
    request: pytest.FixtureRequest, shop: Shop, way: Way | str, behind: str
) -> None:
    """It wants a tenant; the handler catches that, names one and goes on."""
    tenants: list[str] = ["of what the store does for itself"]

    def hook(session: Session, *_: Any) -> None:
        if not tenants:
            raise LookupError("no tenant")

    def do(session: Session, no: Any) -> None:
        tenants.clear()
        try:
            put(session, "effect")
        except LookupError:
            tenants.append("a")
        finally:
            tenants.append("b")
        goes_on(session, behind)

    event.listen(Session, "after_begin", hook)
    try:
        shop.fresh_eo()
        handles(request, shop, way, do)
        ends = [shop.process(order(3, attempt=n)) for n in (1, 2, 3)]
    finally:
        event.remove(Session, "after_begin", hook)
    assert ends in ([P, DUPLICATE, DUPLICATE], [P, P, P], [F, F, F])  # a lock remembers nothing
    assert shop.effects() == ["effect"] * ends.count(P)


@on("mariadb")
@LATE
@BEHIND
def test_a_transaction_whose_first_rows_are_locked_by_others(
    request: pytest.FixtureRequest, shop: Shop, way: Way | str, behind: str
) -> None:
    """As a DELETE of old steps has them: the server undoes the statement alone, and the transaction is open."""
    ends: list[Any] = []

    def do(session: Session, no: Any) -> None:
        if ends:
            return
        with shop.outside.connect() as other:
            other.execute(text(f"SELECT * FROM {shop.tables.step.name} FOR UPDATE")).all()
            with suppress(Exception):
                put(session, "effect")
            other.rollback()
        goes_on(session, behind)

    handles(request, shop, way, do)
    ends += [shop.process(order(3))]
    # behind a lock nothing is written that others could hold
    assert shop.effects() == (["effect"] * 2 if ends == [P] else [])
    assert shop.process(order(3, attempt=2)) in (P, DUPLICATE)
