"""Hooks and listeners of the user's, on the session and the engine: what they do within our COMMIT keeps no half."""

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event, insert, select, text
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from exactly_once import Outcome
from tests.integration.shop import EFFECT, Shop, order, put
from tests.integration.ways import ALONE, IN_A_BATCH, IN_A_STEP, UNDER_A_LEASE, Way, accounted

pytestmark = pytest.mark.nightly(meet=2)

some_ways = pytest.mark.parametrize("way", [ALONE, IN_A_BATCH, UNDER_A_LEASE, IN_A_STEP], ids=str)


def brought(shop: Shop, way: Way, numbers: list[int], *, says: int | None = 3) -> Counter[str]:
    """Deliver until each is acknowledged or a person has it; account for each; then a copy of each changes nothing."""
    left, attempt = list(numbers), 1
    while left and attempt < 7:
        ends = way.attempted(shop, [order(no, attempt=attempt) for no in left])
        left = [no for no, end in zip(left, ends, strict=True) if not (isinstance(end, Outcome) and end.acknowledge)]
        attempt += 1
    there = Counter(shop.effects())
    twice = {effect: times for effect, times in there.items() if times > 1}
    assert not twice, f"effects that are there more than once: {twice}; left: {left}"
    told = {row.business_key for row in shop.failures()}
    assert not [no for no in left if str(no) not in told], f"never acknowledged, and nobody is told: {left}"
    assert not [effect for effect in there if int(effect.split()[0]) in left], (
        f"of what failed something is kept: {there}"
    )
    accounted(shop, [no for no in numbers if no not in left], effects_of_each=("before", "after"))
    way.attempted(shop, [order(no, attempt=attempt) for no in numbers])
    assert Counter(shop.effects()) == there, "a copy changed something"
    if says is not None and there[f"{says} before"] and not there[f"{says} after"]:
        assert str(says) in {row.business_key for row in shop.failures() if row.state == "broken"}
    return there


def _root_commit(session: Session) -> None:
    transaction = session.connection().get_transaction()
    assert transaction is not None
    transaction.commit()


COMMITTING: dict[str, Callable[[Session], object]] = {
    "root transaction": _root_commit,
    "connection": lambda session: session.connection().commit(),
    "session": lambda session: session.commit(),
    "text": lambda session: session.execute(text("COMMIT")),
}


@some_ways
@pytest.mark.parametrize("how", COMMITTING)
@pytest.mark.parametrize("swallow", [False, True], ids=["raised", "swallowed"])
def test_a_hook_that_commits_keeps_no_half(shop: Shop, way: Way, how: str, swallow: bool) -> None:
    """The session's own hooks run within our COMMIT; what they do behind a commit of theirs is lost, or a second one."""

    def do(session: Session, no: Any) -> None:
        put(session, f"{no} before")
        done: list[int] = []

        def hook(session: Session, *_: Any) -> None:
            if done:
                return
            done.append(1)
            with suppress(Exception) if swallow else nullcontext():
                COMMITTING[how](session)
            with suppress(Exception) if swallow else nullcontext():
                put(session, f"{no} after")

        if no == 3:
            event.listen(session, "before_commit", hook)
        else:
            put(session, f"{no} after")

    way.handles(shop, do)
    brought(shop, way, [1, 2, 3, 4] if way.together else [3], says=3)


@some_ways
def test_a_listener_of_the_users_that_runs_the_statements_itself_hides_nothing(shop: Shop, way: Way) -> None:
    engine: Any = shop.async_engine.sync_engine if shop.is_async else shop.engine

    def mine(cursor: Any, statement: str, parameters: Any, context: Any) -> bool:
        cursor.execute(statement, parameters)
        return True

    def do(session: Session, no: Any) -> None:
        put(session, f"{no} before")
        if no == 3:
            session.execute(text("COMMIT"))
        put(session, f"{no} after")

    way.handles(shop, do)
    way.attempted(shop, [order(99)])
    event.listen(engine, "do_execute", mine, insert=True)
    try:
        brought(shop, way, [1, 2, 3, 4] if way.together else [3], says=3)
    finally:
        event.remove(engine, "do_execute", mine)


def _writes(connection: Connection, no: str) -> None:
    connection.execute(insert(EFFECT).values(text=no))


def _writes_behind_a_look(connection: Connection, no: str) -> None:
    connection.execute(select(EFFECT.c.id)).all()
    _writes(connection, no)


def _writes_on_the_driver(connection: Connection, no: str) -> None:
    cursor = connection.connection.cursor()
    cursor.execute(f"INSERT INTO effect (text) VALUES ('{no}')")
    cursor.close()


@some_ways
@pytest.mark.parametrize("of", ["session", "engine"])
@pytest.mark.parametrize("write", [_writes, _writes_behind_a_look, _writes_on_the_driver])
def test_what_a_hook_writes_as_the_transaction_begins_stands_or_falls_with_the_message(
    shop: Shop, way: Way, of: str, write: Callable[[Connection, str], None]
) -> None:
    """The kind: our BEGIN comes behind the hook's first statement, and some servers commit at a BEGIN what is open already."""
    engine: Engine = shop.async_engine.sync_engine if shop.is_async else shop.engine
    began: list[str] = []

    def hook(connection: Connection) -> None:
        began.append(f"hook {len(began)}")
        connection.info["hook"] = began[-1]
        write(connection, began[-1])

    class Theirs(Session):
        pass

    mine: list[str] = []

    def do(session: Session, no: Any) -> None:
        put(session, f"{no}")
        mine.append(session.connection().info["hook"])
        if no == "fails":
            raise ZeroDivisionError

    event.listen(Theirs, "after_begin", lambda session, transaction, connection: hook(connection))
    made = sessionmaker(shop.engine, class_=Theirs), async_sessionmaker(shop.async_engine, sync_session_class=Theirs)
    shop.fresh_eo(*(made if of == "session" else ()))
    way.handles(shop, do)
    if of == "engine":
        event.listen(engine, "begin", hook)
    try:
        assert way.attempted(shop, [order("fails")]) == [Outcome.FAILED], shop.failures()
        assert shop.failure().error_class == "ZeroDivisionError"
        there = set(shop.effects())
        assert not there & {*mine, "fails"}, (mine, there)
        mine.clear()
        assert way.attempted(shop, [order("works"), order("as well")]) == [Outcome.PROCESSED] * 2, shop.failures()
        there = set(shop.effects())
        assert there >= {*mine, "works", "as well"}, (mine, there)
    finally:
        if of == "engine":
            event.remove(engine, "begin", hook)
    assert shop.claims() == (["as well", "fails", "works"] if way.lease else ["as well", "works"])
    shop.borrow()
