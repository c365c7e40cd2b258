"""The first use of this package on an engine that other threads of the program are using: it takes nothing from them.

The kind: SQLAlchemy walks its listeners without a lock, and a listener that is added meanwhile ends the walk with an error, in
the thread that connects, or that gives a connection back, which the pool then has lost.
"""

import sys
from collections.abc import Callable
from threading import Barrier, Event, Thread
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.orm import Session

from exactly_once import Outcome
from exactly_once.database.listeners import listen
from tests.integration.shop import DIALECTS, Shop, order, put, shops
from tests.integration.threads import PATIENCE_S


def processes(shop: Shop, engine: Engine) -> None:
    shop.handles(lambda session: put(session, "effect"))
    assert shop.process(order(1)) is Outcome.PROCESSED


def claims(shop: Shop, engine: Engine) -> None:
    with Session(engine) as session, session.begin():
        assert shop.eo.claim(session, "job", "1")


def sends(shop: Shop, engine: Engine) -> None:
    with shop.eo.producer("sql://") as producer:
        producer.send(order(1))


DOORS = {"process": processes, "claim": claims, "send": sends}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", ["connect", "checkout", "checkin", "handle_error"])
def test_a_thread_in_the_midst_of_its_listeners_goes_on(
    request: pytest.FixtureRequest, dialect: str, door: str, name: str
) -> None:
    use: Callable[[Shop, Engine], None] = DOORS[door]
    for shop in shops(request, dialect, "sync"):
        engine = create_engine(shop.url, pool_size=4)
        inside, used = Event(), Event()
        neighbours: list[Thread] = []

        def listener(
            *_: Any, neighbours: list[Thread] = neighbours, inside: Event = inside, used: Event = used
        ) -> None:
            import threading

            if threading.current_thread() in neighbours:
                inside.set()
                used.wait(PATIENCE_S)

        event.listen(engine, name, listener)
        with engine.connect():
            pass  # the program has used its engine before
        # of a pool that has none to give, the next connection is made; its first is made under a lock, by which others wait
        taken = [engine.connect()] if name == "connect" else []
        raised: list[BaseException] = []

        def works(engine: Engine = engine, raised: list[BaseException] = raised) -> None:
            try:
                with engine.connect() as connection:
                    connection.exec_driver_sql("SELECT 1" if name != "handle_error" else "SELECT nothing_of_the_kind")
            except BaseException as error:
                raised.append(error)

        neighbour = Thread(target=works)
        neighbours.append(neighbour)
        neighbour.start()
        try:
            assert inside.wait(PATIENCE_S)
            shop.fresh_eo(engine)
            use(shop, engine)
        finally:
            used.set()
            neighbour.join(PATIENCE_S)
        assert "mutated" not in str(raised)
        assert len(raised) == (1 if name == "handle_error" else 0)
        pool: Any = engine.pool
        assert pool.checkedout() == len(taken)
        for connection in taken:
            connection.close()
        engine.dispose()


def test_no_listener_is_lost_that_the_program_adds_at_the_same_moment() -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(40):
            engine = create_engine("sqlite://")
            listen(engine, "connect", lambda *_: None)
            before = len(tuple(engine.pool.dispatch.connect))
            ours, theirs = _adding(engine, listen), _adding(engine, event.listen)
            threads = [Thread(target=each, args=(together,)) for together in [Barrier(2)] for each in (ours, theirs)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(PATIENCE_S)
            assert len(tuple(engine.pool.dispatch.connect)) == before + 2 * ADDED
    finally:
        sys.setswitchinterval(interval)


ADDED = 30


def _adding(engine: Engine, add: Callable[..., Any]) -> Callable[[Barrier], None]:
    def adding(together: Barrier) -> None:
        together.wait(PATIENCE_S)
        for _ in range(ADDED):
            add(engine, "connect", lambda *_: None)

    return adding
