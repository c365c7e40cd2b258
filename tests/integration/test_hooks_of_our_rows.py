"""Hooks of the application's sessions do not run where rows of ours are written beside a handler: what happened is counted.

Such a hook is written for what handlers do: one that refuses a commit without a user in `session.info` refused ours, too, and
the message came again for ever.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from exactly_once import Outcome, Retry
from tests.integration.shop import Shop, put
from tests.integration.test_ends_badly import each_way, thrice
from tests.integration.ways import Way

pytestmark = pytest.mark.nightly(meet=2)

P, D, F, DEAD = Outcome.PROCESSED, Outcome.DUPLICATE, Outcome.FAILED, Outcome.DEAD
THREE = Retry(immediate=0, delays=[0.01], max_attempts=3)


@contextmanager
def hooked(shop: Shop, on: str, name: str, hook: Callable[..., object]) -> Iterator[None]:
    """An application whose sessions have this hook: on their own class, or on that of all sessions."""
    made = type("Audited", (Session,), {})
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
