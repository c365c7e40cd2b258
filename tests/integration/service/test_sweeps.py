"""What a worker sweeps by the clock, beside its messages: on each database, and in a queue that keeps what nobody takes."""

from datetime import timedelta

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from exactly_once import ExactlyOnce, Message, Outcome, Retry
from exactly_once.database.schema import CONSUMED
from exactly_once.database.server_clock import utcnow
from exactly_once.transports.sql import transport
from tests.integration.shop import GROUP, Shop, order
from tests.waiting import until

pytestmark = pytest.mark.nightly(meet=2)


def test_a_failure_whose_message_was_processed_on_another_path_is_closed_by_a_worker_that_has_nothing_to_do(
    shop: Shop,
) -> None:
    def do(session: Session) -> None:
        raise ValueError("no stock")

    shop.handles(do, retry=Retry(immediate=0, delays=[3600]))
    assert shop.process(order("A-1")) is Outcome.FAILED
    with shop.outside.begin() as connection:  # by a program of another version, which knows nothing of the failure
        fingerprint = connection.execute(select(shop.tables.failure.c.fingerprint)).scalar_one()
        claim = {"consumer_group": GROUP, "handler": "handler", "business_key": "A-1", "fingerprint": fingerprint}
        connection.execute(
            shop.tables.idempotent.insert().values(
                **claim, status=CONSUMED, owner="other", created_at=utcnow(), consumed_at=utcnow()
            )
        )
    eo = ExactlyOnce(shop.url, group=GROUP)

    @eo.handler("orders", key="no", name="handler")
    def handler(session: Session) -> None: ...

    with eo.worker("memory://sweeps"):
        until(lambda: shop.failure().state == "resolved", "it is closed")


def test_what_no_handler_takes_leaves_the_queue_while_a_worker_runs(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "_UNWANTED_AGE", timedelta(0))
    monkeypatch.setattr(transport, "_TIDY_EVERY", timedelta(seconds=0.05))
    eo = ExactlyOnce(shop.url, group=GROUP)

    @eo.handler("orders", key="no", tag="created")
    def handler(session: Session) -> None: ...

    def left() -> int:
        with shop.outside.connect() as connection:
            return connection.execute(select(func.count()).select_from(shop.tables.queue)).scalar_one()

    with eo.worker("sql://"), eo.producer("sql://") as producer:
        producer.send(Message("orders", b'{"no": 1}', tag="paid"))
        until(lambda: not left(), "it is deleted")
