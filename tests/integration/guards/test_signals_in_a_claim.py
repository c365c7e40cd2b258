"""A signal's handler raises while a claim waits for the server: Celery's soft time limit, or one of the program's own.

It is no error of the connection, whoever had that one before. The attempt ends: were the claim asked for again, the handler would
run without its limit, for that is spent.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from exactly_once import Lease, Outcome, Retry, Steps
from tests.integration.shop import Shop, order, put, shops
from tests.integration.ways import ALONE, IN_A_STEP, UNDER_A_LEASE, Way
from tests.waiting import until

P, D, F, WAITING = Outcome.PROCESSED, Outcome.DUPLICATE, Outcome.FAILED, Outcome.WAITING
THREE = Retry(immediate=0, delays=[0.01], max_attempts=3)
_STOPS_S, _LOCKED_S = 0.4, 1.2


class SoftTimeLimit(Exception):
    """As Celery's."""


@pytest.fixture(params=["postgres", "mariadb", "sqlite"])
def own(request: pytest.FixtureRequest) -> Iterator[Shop]:
    """A shop whose handlers are plain, in the main thread, where signals are."""
    yield from shops(request, request.param, "sync")


@contextmanager
def locked(shop: Shop, table: str) -> Iterator[None]:
    """Nobody else gets at this table, for a while that ends behind the signal."""
    lock = {
        "postgres": f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE",
        "mariadb": f"LOCK TABLES {table} WRITE",
        "sqlite": "BEGIN IMMEDIATE",
    }[shop.dialect]
    held, free = threading.Event(), threading.Event()

    def hold() -> None:
        with shop.outside.connect() as other:
            other.execute(text(lock))
            held.set()
            free.wait(_LOCKED_S)
            if shop.dialect == "mariadb":
                other.execute(text("UNLOCK TABLES"))

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    try:
        yield
    finally:
        free.set()
        holder.join()


@contextmanager
def stopped(error: type[Exception]) -> Iterator[None]:
    """A signal comes soon, and its handler raises this."""

    def over(*_: object) -> None:
        raise error("the time is over")

    was = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, _STOPS_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, was)


@pytest.mark.parametrize("way", [ALONE, UNDER_A_LEASE, IN_A_STEP], ids=str)
@pytest.mark.parametrize("error", [SoftTimeLimit, TimeoutError], ids=lambda error: error.__name__)
def test_the_attempt_ends_and_the_handler_does_not_run(own: Shop, way: Way, error: type[Exception]) -> None:
    runs: list[Any] = []

    def do(session: Session, no: Any) -> None:
        runs.append(no)
        put(session, str(no))

    way.handles(own, do, retry=THREE, **({"guard": Lease(timedelta(seconds=2))} if way.lease else {}))
    assert own.process(order(0)) is P
    with locked(own, own.tables.idempotent.name), stopped(error):
        end = own.process(order(1))
    assert runs == [0]
    # PyMySQL takes a TimeoutError for one of its socket's, and says that the connection is lost
    assert end is (WAITING if error is TimeoutError and own.dialect == "mariadb" else F)
    assert {row.error_class for row in own.failures()} == ({error.__name__} if end is F else set())
    # PostgreSQL goes on with what it was asked for, and so a lease may have been taken for the attempt that is over
    until(lambda: own.process(order(1, attempt=2)) is P, "it is run")
    assert own.process(order(1, attempt=3)) is D
    own.borrow()


def test_a_step_that_waits_to_be_recorded_ends_too(own: Shop) -> None:
    went_on: list[bool] = []
    with ExitStack() as until_then:

        @own.eo.handler("orders", key="no", name="handler", retry=THREE, guard=Lease(timedelta(seconds=30)))
        def with_steps(session: Session, steps: Steps) -> None:
            def call(key: str) -> None:
                until_then.enter_context(locked(own, own.tables.step.name))
                until_then.enter_context(stopped(SoftTimeLimit))

            steps.run("first", lambda key: None)
            steps.run("second", call)
            went_on.append(True)

        assert own.process(order(1)) is F
    assert went_on == []
    assert {row.error_class for row in own.failures()} == {"SoftTimeLimit"}
    own.borrow()
