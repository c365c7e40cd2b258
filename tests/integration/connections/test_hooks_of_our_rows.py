"""Hooks of the application's sessions do not run where rows of ours are written beside a handler: what happened is counted.

Such a hook is written for what handlers do: one that refuses a commit without a user in `session.info` refused ours, too, and
the message came again for ever.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import Session, registry, sessionmaker

from exactly_once import Outcome, Retry
from tests.integration.shop import EFFECT, Shop, order, put
from tests.integration.ways import IN_A_STEP, WAYS, Way, each_way, thrice
from tests.waiting import until

pytestmark = pytest.mark.nightly(meet=2)

P, D, F, DEAD = Outcome.PROCESSED, Outcome.DUPLICATE, Outcome.FAILED, Outcome.DEAD
THREE = Retry(immediate=0, delays=[0.01], max_attempts=3)


class Audited:
    """The class of the sessions that `hooked` made last."""

    made: type[Session] = Session


class Effect(registry().generate_base()):  # type: ignore[misc]
    """An effect, written with the flush."""

    __table__ = EFFECT


_names = count(1)


@contextmanager
def hooked(shop: Shop, on: str, name: str, hook: Callable[..., object]) -> Iterator[None]:
    """An application whose sessions have this hook: on their own class, or on that of all sessions."""
    made = Audited.made = type("Audited", (Session,), {})
    target = made if on == "their class" else Session
    event.listen(target, name, hook)
    try:
        shop.fresh_eo(
            sessionmaker(shop.engine, class_=made), async_sessionmaker(shop.async_engine, sync_session_class=made)
        )
        yield
    finally:
        event.remove(target, name, hook)


def wants_a_user(session: Session, *_: object) -> None:
    if "user" not in session.info:
        raise RuntimeError("no user to audit")


each_target = pytest.mark.parametrize("on", ["their class", "Session"])


@each_way
@each_target
def test_a_hook_that_wants_what_handlers_set_refuses_none_of_our_rows(shop: Shop, way: Way, on: str) -> None:
    bad = [True]

    def do(session: Session, no: Any) -> None:
        session.info["user"] = "worker"
        put(session, str(no))
        if bad:
            raise ValueError("no")

    with hooked(shop, on, "before_commit", wants_a_user):
        way.handles(shop, do, retry=THREE)
        assert thrice(shop, way) == [F, F, DEAD]
        assert (shop.failure().attempts, shop.failure().error_class) == (3, "ValueError")
        bad.clear()
        assert thrice(shop, way, 7) == [P, D, D]
    assert shop.effects() == ["7"]
    shop.borrow()


def refuses(*_: object) -> None:
    raise RuntimeError("the hook refuses")


@each_way
@pytest.mark.parametrize("name", ["after_begin", "after_transaction_create", "do_orm_execute", "before_commit"])
def test_a_hook_that_always_refuses_is_a_failure_that_counts(shop: Shop, way: Way, name: str) -> None:
    def do(session: Session, no: Any) -> None:
        put(session, str(no))

    with hooked(shop, "Session", name, refuses):
        way.handles(shop, do, retry=THREE)
        assert thrice(shop, way) == [F, F, DEAD]
        assert shop.failure().attempts == 3
    assert shop.effects() == []
    shop.borrow()


@pytest.mark.parametrize("way", [way for way in WAYS if way.lease], ids=str)
@pytest.mark.parametrize("name", ["after_begin", "after_commit", "after_rollback", "after_soft_rollback"])
def test_a_session_that_a_handler_under_a_lease_did_not_use_tells_no_hook_of_its_end(
    shop: Shop, way: Way, name: str
) -> None:
    told: list[str] = []

    with hooked(shop, "their class", name, lambda *_: told.append(name)):
        way.handles(shop, lambda session, no: None)
        assert way.deliver(shop, [order(1), order(2)]) == [Outcome.PROCESSED] * 2
    # a step's is used for its record
    assert told == ([name] * 2 if way is IN_A_STEP and "rollback" not in name else [])


class Panic(BaseException):
    """As a Rust extension raises it."""


@each_way
@pytest.mark.parametrize(
    "name",
    ["after_begin", "before_commit", "after_flush", "after_rollback", "after_soft_rollback", "after_transaction_end"],
)
def test_what_a_hook_raises_that_is_no_exception_counts_as_that_of_a_handler_does(
    shop: Shop, way: Way, name: str
) -> None:
    """Raised while the transaction was begun or rolled back, it came out of `process`, and nothing was written down."""

    def panics(*_: object) -> None:
        raise Panic("the hook")

    def do(session: Session, no: Any) -> None:
        put(session, str(no))
        session.flush()
        raise ValueError("the handler")

    def does(session: Session, no: Any) -> None:
        session.add(Effect(text=str(no)))

    with hooked(shop, "their class", name, panics):
        ends = "rollback" in name or name == "after_transaction_end"
        way.handles(shop, do if ends else does, retry=THREE)
        found = thrice(shop, way)
        assert found[-1] is DEAD
        assert all(end is F or isinstance(end, Panic) for end in found[:-1])
        assert (shop.failure().state, shop.failure().attempts) == ("dead", 3)
        assert ("ValueError" if ends else "Panic") in f"{shop.failure().error_class} {shop.failure().error_text}"
    assert shop.effects() == []
    shop.borrow()


@each_way
@pytest.mark.parametrize("name", ["after_begin", "before_commit", "after_rollback"])
def test_a_hook_that_exits_in_a_worker_is_counted(shop: Shop, way: Way, name: str) -> None:
    def exits(*_: object) -> None:
        raise SystemExit(3)

    def do(session: Session, no: Any) -> None:
        put(session, str(no))
        if name == "after_rollback":
            raise ValueError("the handler")

    with hooked(shop, "their class", name, exits):
        way.handles(shop, do, retry=THREE)
        url = f"memory://hooks-that-exit-{next(_names)}"
        try:
            event.remove(Audited.made, name, exits)
            with shop.eo.worker(url, concurrency=1, drain_timeout=timedelta(seconds=2)) as worker:
                event.listen(Audited.made, name, exits)
                with shop.eo.producer(url) as producer:
                    producer.send(order(1))
                until(lambda: worker.counts.acked == 1, "it is acknowledged")
        finally:
            if not event.contains(Audited.made, name, exits):
                event.listen(Audited.made, name, exits)
    assert (shop.failure().state, shop.failure().attempts) == ("dead", 3)
    assert shop.effects() == []
