"""A failure that could not be written down: its message runs again, and the broker's deliveries are not spent on it.

At the broker's last delivery a message is parked without running, as one whose process ended each time: that was said of
messages whose failures had only met a lock, or each other at SERIALIZABLE.
"""

from collections.abc import Iterator
from datetime import timedelta
from time import sleep

import pytest
from sqlalchemy import create_engine, insert, select, text, update
from sqlalchemy.orm import Session

from exactly_once import ExactlyOnce, Outcome, Retry
from exactly_once.outcome import Redeliver, WaitForKey
from exactly_once.processing import recording
from exactly_once.transports.contract import Features
from tests.integration.failing import deliver
from tests.integration.shop import COLOURS, GROUP, ONE_TRY, STOCK, Shop, order, put, shops
from tests.services.proxy import Proxy
from tests.waiting import until

pytestmark = pytest.mark.nightly(meet=2)
BROKER = Features(redelivers=True, counts_attempts=True, max_attempts=3)


@pytest.fixture(params=COLOURS)
def hasty(request: pytest.FixtureRequest) -> Iterator[Shop]:
    """A shop that waits a moment for a lock, and not longer."""
    options = {"connect_args": {"options": "-c lock_timeout=100"}}
    yield from shops(request, "postgres", request.param, options=options)


def fails(session: Session) -> None:
    raise ValueError("no such sku")


def test_it_is_run_again_and_the_brokers_deliveries_are_left_alone(hasty: Shop) -> None:
    hasty.handles(fails, retry=Retry(immediate=0))
    with hasty.outside.begin() as other:
        other.execute(text("LOCK TABLE message_failure IN ACCESS EXCLUSIVE MODE"))
        result = deliver(hasty, order(attempt=2), BROKER)
    assert result.outcome is Outcome.FAILED
    assert result.verdict == WaitForKey(recording.UNRECORDED, timedelta(minutes=2), Redeliver(recording.UNRECORDED))
    # the worker runs the same delivery again
    assert deliver(hasty, order(attempt=2), BROKER).outcome is Outcome.FAILED
    assert (hasty.failure().error_class, hasty.failure().attempts) == ("ValueError", 1)


def test_a_worker_records_the_failure_once_it_can(
    hasty: Shop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recording, "UNRECORDED", timedelta(seconds=0.1))
    hasty.handles(fails, retry=Retry(immediate=0, max_attempts=1))
    url = "sql://?max_attempts=2"
    with hasty.eo.worker(url) as worker, hasty.eo.producer(url) as producer:
        with hasty.outside.begin() as other:
            other.execute(text("LOCK TABLE message_failure IN ACCESS EXCLUSIVE MODE"))
            producer.send(order())
            until(lambda: caplog.text.count("failure_not_recorded") >= 3, "it was run again and again")
        until(lambda: worker.counts.acked == 1, "it is kept for a person")
    row = hasty.failure()
    assert (row.state, row.error_class, row.attempts) == ("dead", "ValueError", 1)
    assert "no such sku" in row.error_text


def test_what_is_said_of_spent_deliveries_is_true_whatever_spent_them(hasty: Shop) -> None:
    hasty.handles(fails, retry=ONE_TRY)
    assert deliver(hasty, order(attempt=3), BROKER).outcome is Outcome.DEAD
    assert "no end of it was written down" in hasty.failure().error_text
    assert "failure_not_recorded" in hasty.failure().error_text


@pytest.fixture
def shop(request: pytest.FixtureRequest) -> Iterator[Shop]:
    yield from shops(request, "postgres", "sync")


def test_at_serializable_over_one_row_no_message_is_parked(shop: Shop) -> None:
    with shop.outside.begin() as connection:
        connection.execute(insert(STOCK).values(item=1, amount=0))
    engine = create_engine(shop.engine.url, isolation_level="SERIALIZABLE", pool_size=20)
    shop.eo = ExactlyOnce(engine, group=GROUP)

    def do(session: Session) -> None:
        left = session.execute(select(STOCK.c.amount).where(STOCK.c.item == 1)).scalar_one()
        sleep(0.005)
        session.execute(update(STOCK).where(STOCK.c.item == 1).values(amount=left + 1))
        put(session, "done")

    shop.handles(do, retry=Retry(immediate=0, delays=[0.2], max_attempts=99))
    url = "sql://?max_attempts=3"
    with shop.eo.producer(url) as producer, shop.eo.worker(url, concurrency=6):
        producer.send_all([order(number) for number in range(30)])
        until(lambda: len(shop.effects()) == 30, lambda: [row.error_text for row in shop.failures()])
    assert {row.state for row in shop.failures()} <= {"resolved"}
    with shop.outside.connect() as connection:
        assert connection.execute(select(STOCK.c.amount)).scalar_one() == 30
    engine.dispose()


class Vanishes(Proxy):
    """The server carries a COMMIT out, and is away before its answer."""

    def _was_cut(self) -> None:
        super()._was_cut()
        self.go_down()


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("dialect", ["postgres", "mariadb"])
def test_a_failure_whose_commit_was_never_answered_is_closed_by_the_run_that_succeeds(
    request: pytest.FixtureRequest, dialect: str, colour: str
) -> None:
    """In a loop that tells no number of deliveries, only this process knows that there may be a row."""
    for shop in shops(request, dialect, colour):
        with Vanishes(shop.url) as proxy, Shop(dialect, colour, proxy.url, pool_size=2) as near:
            runs: list[int] = []

            def do(session: Session, runs: list[int] = runs, proxy: Proxy = proxy) -> None:
                runs.append(1)
                put(session, "done")
                if len(runs) == 1:
                    proxy.cut_after_commit()
                    raise ValueError("fails once")

            near.handles(do, retry=Retry(immediate=0, delays=[0.01]))
            assert near.process(order(1)) is Outcome.WAITING
            proxy.come_up()
            until(lambda near=near: near.process(order(1)).acknowledge, "it is done")
            assert [row.state for row in shop.failures()] == ["resolved"]
            assert shop.effects() == ["done"]
