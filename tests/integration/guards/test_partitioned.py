"""The claims in a table that PostgreSQL keeps in partitions, by a hash of the business key: nothing else changes."""

import pytest
from sqlalchemy import text

from exactly_once import Message, Outcome
from exactly_once.alembic import check
from tests.integration.batches import effect, handles, orders, outcomes
from tests.integration.shop import Shop, order, shops

PARTITIONS = 8
# as docs/explanation/scaling.md has it
PARTITION = (
    "ALTER TABLE message_idempotent RENAME TO message_idempotent_before",
    """CREATE TABLE message_idempotent (LIKE message_idempotent_before INCLUDING DEFAULTS INCLUDING CONSTRAINTS)
    PARTITION BY HASH (business_key)""",
    "ALTER TABLE message_idempotent ADD PRIMARY KEY (consumer_group, handler, business_key)",
    *(
        f"""CREATE TABLE message_idempotent_{n} PARTITION OF message_idempotent
        FOR VALUES WITH (MODULUS {PARTITIONS}, REMAINDER {n})"""
        for n in range(PARTITIONS)
    ),
    "INSERT INTO message_idempotent SELECT * FROM message_idempotent_before",
    "DROP TABLE message_idempotent_before",
)


@pytest.mark.parametrize("colour", ["sync", "async"])
def test_claims_in_partitions_are_claims(request: pytest.FixtureRequest, colour: str) -> None:
    for shop in shops(request, "postgres", colour):
        handles(shop, effect)
        assert shop.process(order("before")) is Outcome.PROCESSED
        partition(shop)
        assert shop.process(order("before")) is Outcome.DUPLICATE
        assert shop.process(order(1)) is Outcome.PROCESSED
        assert shop.process(order(1)) is Outcome.DUPLICATE
        other = Message("orders", b'{"no": 1, "more": 1}', message_id="other")
        assert shop.process(other) is Outcome.DEAD
        numbers = range(50)
        assert outcomes(shop, orders(*numbers)) == [Outcome.DUPLICATE if n == 1 else Outcome.PROCESSED for n in numbers]
        assert outcomes(shop, orders(*numbers)) == [Outcome.DUPLICATE] * 50
        assert len(shop.effects()) == len(set(shop.effects())) == 51
        with shop.outside.connect() as connection:
            used = connection.scalar(text("SELECT count(DISTINCT tableoid) FROM message_idempotent"))
            assert used == PARTITIONS
            assert check(connection) is None


def partition(shop: Shop) -> None:
    shop.engine.dispose()
    shop.await_(shop.async_engine.dispose())
    with shop.outside.begin() as connection:
        for statement in PARTITION:
            connection.execute(text(statement))
