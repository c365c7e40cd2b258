"""The store cannot be reached, and no driver says so: the application's own way to connect raised. No message is to blame.

`creator=` and listeners of `do_connect`, `connect` and `checkout` are code of the application's; one that asks a service for a
token raises what that raises. Where it was raised tells, and not what it is: the same error of a handler counts.
"""

from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import count
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

from exactly_once import Outcome, Retry
from exactly_once.errors import StoreUnavailable
from tests.integration.outages.test_other_databases import asked
from tests.integration.shop import COLOURS, Shop, order, put, shops
from tests.integration.ways import ALONE, IN_A_STEP, UNDER_A_LEASE, WAYS, Way, each_way, thrice
from tests.waiting import until

pytestmark = pytest.mark.nightly(meet=2)
P, F, DEAD, WAITING = Outcome.PROCESSED, Outcome.FAILED, Outcome.DEAD, Outcome.WAITING
THREE = Retry(immediate=0, delays=[0.01], max_attempts=3)
_names = count(1)


class TokenServiceAway(Exception):
    """As a client of a cloud's raises it."""


# the ways differ in where they ask for a connection, and no longer in what is raised there
each_way_and_error = pytest.mark.parametrize(
    ("way", "error"),
    [*((way, OSError) for way in WAYS), *((ALONE, error) for error in (TokenServiceAway, TimeoutError, ValueError))],
    ids=lambda value: getattr(value, "name", None) or value.__name__,
)


class Door:
    """The application's own way to connect, to both kinds of engine; `shut` says what it raises."""

    def __init__(self, shop: Shop) -> None:
        self.shop = shop
        self.shut: type[Exception] | None = None

    def asks(self, *_: Any) -> None:
        if self.shut is not None:
            raise self.shut("the token service does not answer")

    def closes(self, error: type[Exception] | None) -> None:
        """From now on nobody gets a connection but those who have one; None: anybody does."""
        for engine in (self.shop.engine, self.shop.async_engine.sync_engine):
            engine.dispose(close=False)
        self.shut = error


def guarded(shop: Shop, where: str = "do_connect") -> Door:
    """A shop whose engines connect in the application's own way."""
    door = Door(shop)
    for engine in (shop.engine, shop.async_engine.sync_engine):
        event.listen(engine, where, door.asks)
    return door


@pytest.fixture(
    params=[(dialect, colour) for dialect in ("postgres", "mariadb", "sqlite") for colour in COLOURS], ids="-".join
)
def own(request: pytest.FixtureRequest) -> Iterator[Shop]:
    """A shop of this test alone, whose engines it may listen to; a second connection can be had."""
    yield from shops(request, *request.param, pool_size=3)


@each_way_and_error
def test_a_claim_that_has_no_connection_blames_no_message(own: Shop, way: Way, error: type[Exception]) -> None:
    door = guarded(own)
    way.handles(own, lambda session, no: put(session, str(no)), retry=THREE)
    assert thrice(own, way, 0)[0] is P
    door.closes(error)
    assert [end for n in (1, 2, 3, 4) for end in way.attempted(own, [order(1, attempt=n), order(2, attempt=n)])] == [
        WAITING
    ] * 8
    door.closes(None)
    assert own.failures() == []
    assert way.attempted(own, [order(1, attempt=2)]) == [P]
    assert own.effects() == ["0", "1"]
    own.borrow()


@each_way
def test_a_failure_that_cannot_be_recorded_counts_nothing(own: Shop, way: Way) -> None:
    door = guarded(own)
    runs: list[Any] = []

    def do(session: Session, no: Any) -> None:
        put(session, "undone")
        runs.append(no)
        door.closes(OSError)
        raise KeyError("the handler's own")

    way.handles(own, do, retry=THREE)
    for no in (1, 2):  # a lease of the first goes on for a while
        door.closes(None)
        assert way.attempted(own, [order(no)]) == [WAITING]
    door.closes(None)
    assert (len(runs) >= 2, own.failures(), own.effects()) == (True, [], [])


@pytest.mark.parametrize("way", [ALONE, UNDER_A_LEASE, IN_A_STEP], ids=str)
def test_a_second_connection_to_the_store_is_the_stores_matter(own: Shop, way: Way) -> None:
    door = guarded(own)
    engine = own.async_engine if own.is_async else own.engine

    def do(session: Session, no: Any) -> None:
        put(session, "undone")
        door.shut = OSError
        asked(engine)

    way.handles(own, do, retry=THREE)
    ends = []
    for attempt in (1, 2, 3):
        door.closes(None)
        ends += way.attempted(own, [order(1, attempt=attempt)])
    door.closes(None)
    assert ends == [WAITING] * 3
    assert own.failures() == []


@each_way_and_error
def test_the_same_error_of_a_handler_counts(own: Shop, way: Way, error: type[Exception]) -> None:
    guarded(own)

    def do(session: Session, no: Any) -> None:
        put(session, "undone")
        raise error("the price service does not answer")

    way.handles(own, do, retry=THREE)
    assert thrice(own, way) == [F, F, DEAD]
    assert (own.failure().attempts, own.effects()) == (3, [])


@each_way
@pytest.mark.parametrize("where", ["connect", "checkout"])
def test_listeners_that_prepare_a_connection_are_a_part_of_connecting(own: Shop, way: Way, where: str) -> None:
    door = guarded(own, where)
    way.handles(own, lambda session, no: put(session, str(no)), retry=THREE)
    assert thrice(own, way, 0)[0] is P
    door.closes(RuntimeError)
    assert thrice(own, way) == [WAITING] * 3
    door.closes(None)
    assert own.failures() == []


def test_a_creator_of_the_applications_own_is_a_part_of_connecting_too(own: Shop) -> None:
    door = Door(own)

    def through(connect: Callable[..., Any]) -> Callable[..., Any]:
        def creator() -> Any:
            door.asks()
            return connect()

        return creator

    def dialect_of(engine: Engine) -> Callable[[], Any]:
        args, options = engine.dialect.create_connect_args(engine.url)
        return lambda: engine.dialect.connect(*args, **options)

    own.fresh_eo(
        create_engine(own.engine.url, creator=through(dialect_of(own.engine)), pool_size=1),
        create_async_engine(
            own.async_engine.url, creator=through(dialect_of(own.async_engine.sync_engine)), pool_size=1
        ),
    )
    own.handles(lambda session: put(session, "x"), retry=THREE)
    door.shut = TokenServiceAway
    assert [own.process(order(1, attempt=attempt)) for attempt in (1, 2, 3)] == [WAITING] * 3
    door.shut = None
    assert own.failures() == []
    assert own.process(order(1, attempt=4)) is P


def test_eo_claim_says_that_the_store_cannot_be_reached(own: Shop) -> None:
    door = guarded(own)
    door.closes(OSError)
    with Session(own.engine) as session, pytest.raises(StoreUnavailable):
        own.eo.claim(session, "report", "A-1")


def test_a_claim_of_the_handlers_own_on_the_store_is_the_stores_matter(own: Shop) -> None:
    if own.is_async:
        return  # eo.claim is given a session of threads there, too
    door = guarded(own)

    def do(session: Session) -> None:
        put(session, "undone")
        door.shut = OSError
        with Session(own.engine) as other:
            own.eo.claim(other, "report", "A-1")

    own.handles(do, retry=THREE)
    assert own.process(order(1)) is WAITING
    door.closes(None)
    assert own.failures() == []


@pytest.mark.parametrize("batch", [None, 10])
def test_a_worker_holds_what_it_has_and_spends_no_attempt(own: Shop, batch: int | None) -> None:
    door = guarded(own)
    own.fresh_eo(own.engine, own.async_engine)
    own.handles(lambda session: put(session, "x"), retry=THREE, batch=batch)
    url = f"memory://unreached-{next(_names)}"
    with (
        own.eo.worker(url, concurrency=2, drain_timeout=timedelta(seconds=1)) as worker,
        own.eo.producer(url) as producer,
    ):
        producer.send(order(0))
        until(lambda: own.effects() == ["x"], "the first is handled")
        door.closes(TokenServiceAway)
        producer.send_all([order(1), order(2)])
        until(lambda: worker.counts.held, "the others are held")
        assert worker.unready() is not None
        door.shut = None
        until(lambda: len(own.effects()) == 3, "they are handled")
    assert own.failures() == []
    assert worker.counts.outcomes.get("failed", 0) == 0


def test_a_worker_waits_for_it_at_its_start(own: Shop) -> None:
    door = guarded(own)
    own.handles(lambda session: put(session, "x"))
    door.closes(TokenServiceAway)
    url = f"memory://unreached-{next(_names)}"
    serving = own.eo.worker(url, concurrency=1, drain_timeout=timedelta(seconds=1))
    with pytest.raises(StoreUnavailable, match="token service"):
        serving.start(patience=timedelta(seconds=0.2))
    door.closes(None)


# -- the pool that somebody waits in is not the engine's any more ------------------------------------------------------


@pytest.fixture(params=[("postgres", colour) for colour in COLOURS], ids="-".join)
def small(request: pytest.FixtureRequest) -> Iterator[Shop]:
    yield from shops(request, *request.param, options={"pool_timeout": 0.3})


@pytest.mark.parametrize("way", [ALONE, UNDER_A_LEASE], ids=str)
@pytest.mark.parametrize("what", ["disposed", "replaced"])
def test_a_pool_that_is_disposed_while_a_handler_waits_in_it_is_still_the_stores(
    small: Shop, way: Way, what: str
) -> None:
    from threading import Timer

    engine = small.async_engine if small.is_async else small.engine
    inner = small.async_engine.sync_engine if small.is_async else small.engine

    def replace() -> None:
        if what == "disposed":
            inner.dispose(close=False)
        else:
            inner.pool = inner.pool.recreate()

    def do(session: Session, no: Any) -> None:
        put(session, "undone")
        timer = Timer(0.05, replace)
        timer.start()
        try:
            asked(engine)
        finally:
            timer.join()

    way.handles(small, do, retry=THREE)
    assert thrice(small, way) == [WAITING] * 3
    assert small.failures() == []
