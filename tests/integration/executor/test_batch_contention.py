"""Batches of several processes over the same keys and rows, in different orders: nobody is failed by a deadlock, nothing twice.

Seconds on each server; a minute in `make nightly`.
"""

import random
import threading
from collections import Counter
from collections.abc import Callable
from time import monotonic
from typing import Any

import pytest
from sqlalchemy import insert, update
from sqlalchemy.orm import Session

from exactly_once import ExactlyOnce, Outcome
from exactly_once.processing.batch import BatchProcessor
from tests import length
from tests.integration.batches import FEATURES
from tests.integration.shop import GROUP, STOCK, Shop, order, put, shops

SECONDS = 60 if length.WHOLE else 8
MEMBERS = 4
ROWS = 7


@pytest.mark.nightly
@pytest.mark.parametrize("dialect", ["postgres", "mariadb", "sqlite"])
def test_batches_over_the_same_keys_and_rows_in_different_orders(
    request: pytest.FixtureRequest, dialect: str, figure: Callable[[str], None]
) -> None:
    for shop in shops(request, dialect, "sync"):
        figure(contend(shop))


def contend(shop: Shop) -> str:
    """Have several members work for a while; says what became of it."""
    with shop.outside.begin() as connection:
        connection.execute(insert(STOCK), [{"item": item, "amount": 0} for item in range(1, ROWS + 1)])
    outcomes: Counter[Outcome] = Counter()
    deadlocks: list[bool] = []
    offered: set[int] = set()
    errors: list[BaseException] = []
    end = monotonic() + SECONDS

    def member(seed: int) -> None:
        """One process of the group, as far as the database can tell: an application and connections of its own."""
        eo = ExactlyOnce(shop.url, group=GROUP)

        @eo.handler("orders", key="no", name="handler", batch=20)
        def handler(session: Session, body: dict[str, Any]) -> None:
            put(session, str(body["no"]))
            row = STOCK.c.item == body["no"] % ROWS + 1
            session.execute(update(STOCK).where(row).values(amount=STOCK.c.amount + 1))

        draw = random.Random(seed)
        (groups,) = eo._router.matching(order(0))
        assert isinstance(groups, BatchProcessor)
        try:
            while monotonic() < end:
                newest = max(offered, default=0)
                numbers = [draw.randrange(max(0, newest - 30), newest + 20) for _ in range(20)]
                offered.update(numbers)
                told = groups.run_batch([groups.member(order(number), FEATURES) for number in numbers])
                outcomes.update(each.outcome for each in told.results)
                deadlocks.append(told.deadlocked)
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=member, args=(seed,)) for seed in range(MEMBERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS + 60)
    assert not errors
    counts = ", ".join(f"{count} {outcome.value}" for outcome, count in outcomes.items())
    told = f"{SECONDS} s: {counts}; {sum(deadlocks)} of {len(deadlocks)} groups met a deadlock"
    print(told)
    # a key that another member holds just now is asked for again; nobody is failed
    assert set(outcomes) <= {Outcome.PROCESSED, Outcome.DUPLICATE, Outcome.IN_PROGRESS}
    assert not shop.failures()
    effects = shop.effects()
    assert len(effects) == len(set(effects)) == outcomes[Outcome.PROCESSED] > 100
    assert sum(row.amount for row in shop.rows(STOCK)) == len(effects)
    return told
