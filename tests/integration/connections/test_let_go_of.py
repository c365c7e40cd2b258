"""Engines and applications of a request, a tenant or a test are let go of: nothing of ours keeps one when its program does not.

The kind: something is remembered of an engine or of its connections, and what is remembered refers back to the engine, or to the
`ExactlyOnce` that asked. A server's connections are ended with their engine, and memory does not grow with the number of them.
"""

import gc
from collections.abc import Iterator
from datetime import timedelta
from time import monotonic
from typing import Any, ClassVar
from weakref import ref

import pytest
from sqlalchemy import Engine, create_engine, event, make_url
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from exactly_once import ExactlyOnce, InProgress, Lease, Outcome
from exactly_once.database.store import Store
from exactly_once.guards.lease import renewal
from tests.integration.shop import _ASYNC, COLOURS, DIALECTS, GROUP, Shop, order, put, shops
from tests.integration.ways import WAYS, Way
from tests.services.mariadb import MYSQLD
from tests.waiting import until

pytestmark = pytest.mark.nightly(meet=2)

P, F = Outcome.PROCESSED, Outcome.FAILED
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


@pytest.mark.parametrize("dialect", DIALECTS)
def test_options_of_each_request_cost_no_connection_and_no_memory(request: pytest.FixtureRequest, dialect: str) -> None:
    """`Session(engine.execution_options(...))`: the engine is another one each time, and its pool the same."""
    for shop in shops(request, dialect, "sync", pool_size=3):
        eo, made, listeners = ExactlyOnce(group=GROUP), [], set()
        known: list[ref[Any]] = []
        event.listen(shop.engine, "connect", lambda *_, made=made: made.append(1))
        for no in range(MANY):
            engine = shop.engine.execution_options(request=no)
            known.append(ref(engine))
            with Session(engine) as session, session.begin():
                assert eo.claim(session, "handler", f"A-{no}")
            listeners.add(len(list(shop.engine.pool.dispatch.connect)))
            del engine, session
        gc.collect()
        assert [each() for each in known[:-1]] == [None] * (MANY - 1)
        assert len(made) <= 2  # its own, and the one that finds the place of our tables
        assert len(listeners) == 1


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
        # a server notices in its own time that its client is gone
        until(lambda shop=shop, before=before: open_now(shop) - before <= 1, "their connections are ended")  # type: ignore[misc]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_an_application_of_each_request_is_let_go_of(shop: Shop, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    # what renews leases looks again after a third of one, and ends by itself once there are none for a while
    monkeypatch.setattr(renewal, "_IDLE_S", 0.05)
    short = {"guard": Lease(timedelta(seconds=3))} if way.lease else {}
    known: list[ref[Any]] = []
    sizes = []
    for no in range(MANY):
        eo = shop.fresh_eo()
        way.handles(shop, lambda session, no: put(session, str(no)), **short)
        assert way.deliver(shop, [order(no)]) == [P]
        known += [ref(eo), ref(the_store(eo)), ref(the_store(eo).dialect)]
        sizes.append(len(remembered(shop)))
        del eo
    shop.fresh_eo()

    def kept() -> list[Any]:
        gc.collect()
        return [found for each in known if (found := each()) is not None]

    until(lambda: not kept(), "they are let go of")
    assert sizes == sizes[:1] * MANY


def the_store(eo: ExactlyOnce) -> Store:
    (store,) = eo.stores.values()
    return store


def remembered(shop: Shop) -> list[Any]:
    """The names under which something is kept of the pool's connection."""
    if not shop.is_async:
        with shop.engine.connect() as connection:
            return list(connection.info)

    async def aremembered() -> list[Any]:
        async with shop.async_engine.connect() as connection:
            return list((await connection.get_raw_connection()).info)

    found: list[Any] = shop.await_(aremembered())
    return found


class Routing(Session):
    """Sends each session where the class says, whichever engine its maker was given."""

    to: ClassVar[Engine]

    def get_bind(self, *_: Any, **__: Any) -> Engine:
        return self.to


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_connection_that_another_application_has_claimed_on_is_not_taken_for_ones_own(
    request: pytest.FixtureRequest, dialect: str, way: Way
) -> None:
    for here in shops(request, dialect, "sync"):
        for there in shops(request, dialect, "sync"):
            way.handles(there, lambda session, no: put(session, str(no)))
            assert way.deliver(there, [order(1)]) == [P]
            Routing.to = there.engine
            here.fresh_eo(sessionmaker(here.engine, class_=Routing))
            way.handles(here, lambda session, no: put(session, str(no)))
            assert way.deliver(here, [order(2)]) == [F]
            assert (here.effects(), there.effects(), there.claims()) == ([], ["1"], ["1"])


@pytest.mark.skipif(bool(MYSQLD), reason="MySQL bounds the session: its first claim decides")
def test_each_claim_of_mariadb_waits_as_long_as_it_says(request: pytest.FixtureRequest) -> None:
    for shop in shops(request, "mariadb", "sync"):
        waited = []
        with shop.outside.connect() as other:
            assert ExactlyOnce(group=GROUP).claim(Session(other), "handler", "A-1")
            eo = ExactlyOnce(group=GROUP)
            for wait in (1, 3, 1):
                began = monotonic()
                with Session(shop.engine) as session, pytest.raises(InProgress):
                    eo.claim(session, "handler", "A-1", claim_wait=timedelta(seconds=wait))
                waited.append(round(monotonic() - began))
        assert waited == [1, 3, 1]
