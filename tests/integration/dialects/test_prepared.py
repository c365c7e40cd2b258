"""The claim as a statement prepared by name: names get lost, and behind a pooler they are another client's."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.orm import Session

from exactly_once import Outcome
from tests.integration.shop import COLOURS, Shop, order, put, shops
from tests.services import pgbouncer
from tests.services.need import require

NAMES = "SELECT count(*) FROM pg_prepared_statements WHERE name LIKE 'exactly\\_once\\_%'"
NEVER = 1_000_000  # psycopg's own statements are not what is tested


def effect(session: Session) -> None:
    put(session, "effect")


@pytest.fixture(params=COLOURS)
def shop(request: pytest.FixtureRequest) -> Iterator[Shop]:
    yield from shops(request, "postgres", request.param)


@pytest.fixture
def sync_shop(request: pytest.FixtureRequest) -> Iterator[Shop]:
    yield from shops(request, "postgres", "sync")


def names_seen(shop: Shop) -> list[int]:
    """Handle a message that counts the prepared claims of its connection."""
    seen: list[int] = []

    def look(session: Session) -> None:
        seen.append(session.execute(text(NAMES)).scalar_one())

    shop.handles(look, name="look")
    assert shop.process(order("look")) is Outcome.PROCESSED
    return seen


def test_a_connection_prepares_its_claim_once(shop: Shop) -> None:
    shop.handles(effect)
    for number in range(3):
        assert shop.process(order(number)) is Outcome.PROCESSED
    assert names_seen(shop) == [1]


@pytest.mark.parametrize("lost_by", ["DEALLOCATE ALL", "DISCARD PLANS; DEALLOCATE ALL"])
def test_a_lost_name_is_made_good_within_the_same_delivery(shop: Shop, lost_by: str) -> None:
    def loses(session: Session) -> None:
        put(session, "effect")
        session.connection().exec_driver_sql(lost_by)

    shop.handles(loses)
    for number in range(3):
        assert shop.process(order(number)) is Outcome.PROCESSED
        assert shop.process(order(number)) is Outcome.DUPLICATE
    assert len(shop.effects()) == 3
    assert shop.failures() == []


def test_a_lost_name_does_not_abort_the_callers_open_transaction(sync_shop: Shop) -> None:
    shop = sync_shop
    with Session(shop.engine) as session:
        assert shop.eo.claim(session, "handler", "A-1")
        session.commit()
    with Session(shop.engine) as session:
        put(session, "earlier")
        session.execute(text("DEALLOCATE ALL"))
        assert shop.eo.claim(session, "handler", "A-2")
        assert not shop.eo.claim(session, "handler", "A-1")
        session.commit()
    with Session(shop.engine) as session:
        assert shop.eo.claim(session, "handler", "A-3")  # begins the transaction: here the name is used, and missing
        assert not shop.eo.claim(session, "handler", "A-2")
        session.commit()
    assert (shop.effects(), shop.claims()) == (["earlier"], ["A-1", "A-2", "A-3"])


@pytest.mark.parametrize("colour", COLOURS)
def test_who_wants_nothing_prepared_gets_nothing_prepared(request: pytest.FixtureRequest, colour: str) -> None:
    for shop in shops(request, "postgres", colour, options={"connect_args": {"prepare_threshold": None}}):
        shop.handles(effect)
        assert shop.process(order()) is Outcome.PROCESSED
        assert shop.process(order()) is Outcome.DUPLICATE
        assert names_seen(shop) == [0]


def test_a_lock_timeout_set_when_the_connection_was_made_is_the_handlers(sync_shop: Shop) -> None:
    shop = sync_shop

    def sets(dbapi: Any, _: Any) -> None:
        dbapi.cursor().execute("SET lock_timeout = '3s'")
        dbapi.commit()

    event.listen(shop.engine, "connect", sets)
    seen: list[str] = []
    shop.handles(lambda session: seen.append(session.execute(text("SHOW lock_timeout")).scalar_one()))
    assert [shop.process(order(n)) for n in range(2)] == [Outcome.PROCESSED] * 2
    assert seen == ["3s", "3s"]


# `None` is what psycopg tells users of a pooler to set. With a threshold the claim's name is prepared on one server
# connection and asked for on another, found there already by a second client, or missing
@pytest.mark.parametrize("threshold", [None, NEVER])
def test_through_a_pooler_each_message_takes_effect_once(request: pytest.FixtureRequest, threshold: int | None) -> None:
    require(pgbouncer)
    for direct in shops(request, "postgres", "sync"):
        with pgbouncer.PgBouncer(direct.url, server_connections=3) as pooler:
            arguments = {"connect_args": {"prepare_threshold": threshold}}
            with Shop("postgres", "sync", pooler.url, pool_size=8, options=arguments) as shop:
                shop.handles(effect)
                copies = [number % 100 for number in range(300)]
                with ThreadPoolExecutor(8) as pool:
                    outcomes = Counter(pool.map(lambda number: shop.process(order(number)), copies))
        assert outcomes[Outcome.PROCESSED] == 100, outcomes
        assert set(outcomes) <= {Outcome.PROCESSED, Outcome.DUPLICATE, Outcome.IN_PROGRESS}
        assert len(direct.effects()) == len(direct.claims()) == 100
        assert direct.failures() == []
