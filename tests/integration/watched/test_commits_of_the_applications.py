"""A session whose `commit()` is the application's own: that it came back proves nothing, and only our COMMIT's answer does.

The kind: a class of the application's logs what COMMIT met and rolls back, or sends none while somebody is inside. And what goes
past SQLAlchemy: `eo.claim` on the handler's own session, inside a step's callback.
"""

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.util import greenlet_spawn

from exactly_once import AsyncSteps, ConfigurationError, Lease, Outcome, Steps
from tests.integration.shop import COLOURS, DIALECTS, ONE_TRY, Shop, on, order, put, shops
from tests.integration.ways import WAYS, Way

P, D, F = Outcome.PROCESSED, Outcome.DUPLICATE, Outcome.FAILED
pytestmark = pytest.mark.nightly(meet=2)
each_way = pytest.mark.parametrize("way", WAYS, ids=str)
GROUNDS = [(dialect, colour) for dialect in DIALECTS for colour in COLOURS]


@pytest.fixture(scope="module", params=GROUNDS, ids="-".join)
def ground(request: pytest.FixtureRequest) -> Iterator[Shop]:
    """With room for a step's connection."""
    yield from shops(request, *request.param, pool_size=3)


@pytest.fixture
def shop(ground: Shop) -> Shop:
    ground.clear()
    return ground


class Logging(Session):
    """What fails at COMMIT is logged, and rolled back."""

    def commit(self) -> None:
        try:
            super().commit()
        except Exception:
            self.rollback()


class Inside(Session):
    """Whoever is inside may call it; committed is by whoever began."""

    def commit(self) -> None:
        self.flush()


class Publishing(Session):
    """Does something behind the COMMIT."""

    def commit(self) -> None:
        super().commit()
        self.info["published"]()


def with_class(shop: Shop, cls: type[Session], **more: Any) -> None:
    shop.fresh_eo(
        sessionmaker(shop.engine, class_=cls, **more),
        async_sessionmaker(shop.async_engine, sync_session_class=cls, **more),
    )


@each_way
def test_a_hooks_error_that_commit_swallows_is_a_failure_and_costs_no_neighbour(shop: Shop, way: Way) -> None:
    with_class(shop, Logging)
    fails = [True]

    def do(session: Session, no: Any) -> None:
        put(session, f"{no}")

        def hook(session: Session) -> None:
            if no == 3 and fails:
                raise ZeroDivisionError

        event.listen(session, "before_commit", hook)

    way.handles(shop, do)
    numbers = [1, 2, 3, 4] if way.together else [3]
    said = way.deliver(shop, [order(no) for no in numbers])
    assert said == [F if no == 3 else P for no in numbers]
    assert sorted(shop.effects()) == [f"{no}" for no in numbers if no != 3]
    assert "nothing was committed" in shop.failure().error_text
    fails.clear()
    assert way.deliver(shop, [order(3, attempt=2)]) == [P]
    assert way.deliver(shop, [order(3, attempt=3)]) == [D]
    assert sorted(shop.effects()) == [f"{no}" for no in numbers]
    shop.borrow()


@on("postgres")
@each_way
def test_what_the_server_refuses_at_such_a_commit_is_told_as_it_is(shop: Shop, way: Way) -> None:
    with shop.outside.begin() as connection:
        connection.execute(
            text(
                "CREATE TABLE IF NOT EXISTS kid (parent int CONSTRAINT of_stock REFERENCES stock (item)"
                " DEFERRABLE INITIALLY DEFERRED)"
            )
        )
    with_class(shop, Logging)

    def do(session: Session, no: Any) -> None:
        put(session, f"{no}")
        session.execute(text("INSERT INTO kid VALUES (4711)"))

    way.handles(shop, do)
    try:
        assert way.deliver(shop, [order(3)]) == [F]
        assert (shop.effects(), "of_stock" in shop.failure().error_text) == ([], True)
    finally:
        with shop.outside.begin() as connection:
            connection.execute(text("DROP TABLE kid"))


@each_way
def test_a_commit_that_sends_none_is_a_failure_with_the_line_to_change(shop: Shop, way: Way) -> None:
    with_class(shop, Inside)
    way.handles(shop, lambda session, no: put(session, f"{no}"))
    assert way.deliver(shop, [order(3)]) == [F]
    assert shop.effects() == []
    assert "overrides commit()" in shop.failure().error_text
    shop.borrow()


@each_way
def test_a_handler_that_keeps_a_librarys_commit_from_its_session_is_committed_all_the_same(
    shop: Shop, way: Way
) -> None:
    def do(session: Session, no: Any) -> None:
        session.commit = session.flush  # type: ignore[method-assign]
        put(session, f"{no}")
        session.commit()

    way.handles(shop, do)
    assert way.deliver(shop, [order(3)]) == [P]
    assert way.deliver(shop, [order(3, attempt=2)]) == [D]
    assert shop.effects() == ["3"]
    shop.borrow()


@each_way
def test_what_a_class_does_behind_its_commit_is_done(shop: Shop, way: Way) -> None:
    published: list[int] = []
    with_class(shop, Publishing, info={"published": lambda: published.append(1)})
    way.handles(shop, lambda session, no: put(session, f"{no}"))
    assert way.deliver(shop, [order(3)]) == [P]
    assert (shop.effects(), bool(published)) == (["3"], True)


@pytest.mark.parametrize("begun", [True, False])
def test_a_claim_in_the_handlers_session_is_refused_inside_a_steps_callback(shop: Shop, begun: bool) -> None:
    """The step's record would stand while the claim is rolled back with the handler, and nobody would ask for it again."""
    fails, options = [True], {"name": "handler", "key": "no", "retry": ONE_TRY, "guard": Lease(timedelta(seconds=30))}

    def step(session: Session) -> str:
        return str(shop.eo.claim(session, "pay", "part"))

    def end() -> None:
        if fails:
            raise ZeroDivisionError

    handler: Callable[..., Any] = shop.eo.handler("orders", **options)  # type: ignore[arg-type]
    if shop.is_async:

        @handler
        async def awaited(session: AsyncSession, steps: AsyncSteps) -> None:
            async def call(key: str) -> str:
                return await greenlet_spawn(step, session.sync_session)

            if begun:
                await session.execute(text("SELECT 1"))
            await steps.run("write", call)
            end()
    else:

        @handler
        def plain(session: Session, steps: Steps) -> None:
            if begun:
                session.execute(text("SELECT 1"))
            steps.run("write", lambda key: step(session))
            end()

    # for a person: the callback may have called somebody already
    assert shop.process(order()) is Outcome.DEAD
    assert shop.failure().error_class == "StepError"
    fails.clear()
    assert shop.process(order(attempt=2)) is Outcome.DEAD
    assert "part" not in shop.claims()


def test_a_connection_of_the_callers_is_refused_with_what_to_give_instead(shop: Shop) -> None:
    """Its transaction is another one's to commit."""

    async def awaited() -> None:
        async with shop.async_engine.connect() as connection:
            shop.fresh_eo(None, async_sessionmaker(bind=connection))
            shop.handles(lambda session: put(session, "never"))
            await shop.eo.aprocess(order())

    def plain() -> None:
        with shop.engine.connect() as connection:
            shop.fresh_eo(sessionmaker(bind=connection, join_transaction_mode="create_savepoint"))
            shop.handles(lambda session: put(session, "never"))
            shop.process(order())

    with pytest.raises(ConfigurationError, match="Give it an engine, or a sessionmaker of one"):
        shop.await_(awaited()) if shop.is_async else plain()
    assert shop.effects() == []
