"""A handler claims keys of its own with `eo.claim`, for the parts of its message, and another run has one of them.

The kind: what `eo.claim` says to a handler is about another run. That is no failure of its message, and a deadlock's victim
runs again at once, whatever the handler makes of the error.
"""

from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import insert, text
from sqlalchemy.orm import Session

from exactly_once import ExactlyOnce, InProgress, Outcome
from tests.integration.shop import GROUP, ONE_TRY, STOCK, Shop, on, order, put
from tests.integration.threads import Turn, in_thread
from tests.integration.ways import WAYS, Way

pytestmark = pytest.mark.nightly(meet=2)

P, D, IN_PROGRESS = Outcome.PROCESSED, Outcome.DUPLICATE, Outcome.IN_PROGRESS


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("makes", ["lets it out", "goes on"])
@on("postgres", "mariadb")  # SQLite has one writer
def test_a_deadlock_of_claims_runs_its_victim_again_at_once(shop: Shop, way: Way, makes: str) -> None:
    eo = ExactlyOnce(group=GROUP)
    ours, theirs = Turn(), Turn()
    runs: list[Any] = []

    def other() -> None:
        with Session(shop.outside) as session, session.begin():
            if shop.dialect == "postgres":
                session.execute(text("SET LOCAL deadlock_timeout = '60s'"))
            # more work than ours, so that ours is the victim
            session.execute(insert(STOCK), [{"item": item, "amount": 0} for item in range(100, 400)])
            assert eo.claim(session, "part", "2")
            theirs.come()
            ours.wait()
            with suppress(InProgress):
                eo.claim(session, "part", "1")

    def do(session: Session, no: Any) -> None:
        runs.append(no)
        put(session, f"{no} before")
        if len(runs) == 1:
            theirs.wait()
        for part in ("1", "2"):
            try:
                shop.eo.claim(session, "part", part)
            except InProgress:
                if makes == "lets it out":
                    raise
            if len(runs) == 1 and part == "1":
                ours.come()
        put(session, f"{no} after")

    way.handles(shop, do, retry=ONE_TRY)
    with in_thread(other):
        ends = way.deliver(shop, [order(1)])
    # the other one is done by now
    while ends[-1] is IN_PROGRESS:
        ends = way.deliver(shop, [order(1)])
    assert ends == [P]
    assert shop.failures() == []
    assert shop.effects() == ["1 before", "1 after"]
    assert way.deliver(shop, [order(1, attempt=2)]) == [D]
    shop.borrow()


@pytest.mark.parametrize("way", WAYS, ids=str)
@on("postgres", "mariadb")  # SQLite has one writer
def test_a_part_that_another_run_holds_is_no_failure(shop: Shop, way: Way) -> None:
    eo = ExactlyOnce(group=GROUP)
    held, done = Turn(), Turn()

    def other() -> None:
        with Session(shop.outside) as session, session.begin():
            assert eo.claim(session, "part", "1")
            held.come()
            done.wait()

    def do(session: Session, no: Any) -> None:
        put(session, str(no))
        shop.eo.claim(session, "part", "1", claim_wait=timedelta(seconds=0.2))

    way.handles(shop, do, retry=ONE_TRY)
    with in_thread(other):
        held.wait()
        try:
            ends = [end for attempt in (1, 2, 3) for end in way.deliver(shop, [order(1, attempt=attempt)])]
        finally:
            done.come()
    assert ends == [IN_PROGRESS] * 3
    assert shop.failures() == []
    assert way.deliver(shop, [order(1, attempt=4)]) == [P]
    assert shop.effects() == ["1"]
    shop.borrow()
