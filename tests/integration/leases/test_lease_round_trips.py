"""What a lease and a step cost on PostgreSQL, counted on the wire: a round trip is the unit of cost."""

from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
from sqlalchemy import create_engine, event
from sqlalchemy.orm import Session

from exactly_once import ExactlyOnce, Lease, Outcome, Steps
from tests.integration.shop import GROUP, Shop, order, put, shops
from tests.services.proxy import Proxy

LEASE = Lease(timedelta(minutes=10))


@pytest.fixture
def shop(request: pytest.FixtureRequest) -> Iterator[Shop]:
    yield from shops(request, "postgres", "sync")


def trips(shop: Shop, register: Callable[[ExactlyOnce], object]) -> int:
    """Round trips of one message, connections made and statements known."""
    with Proxy(shop.url) as proxy:
        engine = create_engine(proxy.url, pool_size=3)
        eo = ExactlyOnce(engine, group=GROUP)
        register(eo)
        for n in range(10):  # the driver prepares what it has sent some times
            assert eo.process(order(f"warm-{n}")) is Outcome.PROCESSED
        before = proxy.round_trips
        assert eo.process(order()) is Outcome.PROCESSED
        after = proxy.round_trips
        engine.dispose()
    return after - before


def test_a_lease_costs_two_round_trips_more_than_the_handlers_own_work(shop: Shop) -> None:
    def own_work() -> int:
        with Proxy(shop.url) as proxy:
            engine = create_engine(proxy.url)
            for n in range(11):
                before = proxy.round_trips
                with Session(engine) as session, session.begin():
                    put(session, f"by hand {n}")
            engine.dispose()
            return proxy.round_trips - before

    def register(eo: ExactlyOnce) -> None:
        @eo.handler("orders", key="no", guard=LEASE)
        def handler(session: Session) -> None:
            put(session, "done")

    assert trips(shop, register) - own_work() <= 2


def test_a_lease_without_a_session_costs_two_round_trips(shop: Shop) -> None:
    def register(eo: ExactlyOnce) -> None:
        @eo.handler("orders", key="no", guard=LEASE)
        def handler(order: dict[str, str]) -> None: ...

    assert trips(shop, register) == 2


def test_a_duplicate_takes_one_connection_and_one_round_trip(shop: Shop) -> None:
    with Proxy(shop.url) as proxy:
        engine = create_engine(proxy.url, pool_size=3)
        eo = ExactlyOnce(engine, group=GROUP)

        @eo.handler("orders", key="no", guard=LEASE)
        def handler(session: Session) -> None:
            put(session, "done")

        assert [eo.process(order()) for _ in range(10)][-1] is Outcome.DUPLICATE
        taken: list[object] = []
        event.listen(engine, "checkout", lambda *given: taken.append(given))
        before = proxy.round_trips
        assert eo.process(order()) is Outcome.DUPLICATE
        assert (len(taken), proxy.round_trips - before) == (1, 1)
        engine.dispose()


def test_a_step_costs_one_round_trip_and_one_at_most_once_two(shop: Shop) -> None:
    def with_steps(plain: int, at_most_once: int) -> int:
        def register(eo: ExactlyOnce) -> None:
            @eo.handler("orders", key="no", name=f"{plain} and {at_most_once}", guard=LEASE)
            def handler(steps: Steps) -> None:
                for n in range(plain):
                    steps.run(f"plain {n}", lambda key: key)
                for n in range(at_most_once):
                    steps.run(f"once {n}", lambda key: key, at_most_once=True)

        return trips(shop, register)

    none = with_steps(0, 0)
    assert none == 2
    assert with_steps(5, 0) - none == 5
    assert with_steps(0, 5) - none == 10
