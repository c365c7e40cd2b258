"""A message whose large body fails is written down: in parts where no statement carries it, or with a word for it."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.orm import Session

from exactly_once import Message, Outcome, Retry
from tests.integration.outside import column, run
from tests.integration.shop import COLOURS, Shop, order, put, shops
from tests.integration.ways import ALONE, IN_A_BATCH, UNDER_A_LEASE, Way
from tests.waiting import until

F, DEAD, P = Outcome.FAILED, Outcome.DEAD, Outcome.PROCESSED
MIB = 1024 * 1024


@pytest.fixture(params=COLOURS)
def mariadb(request: pytest.FixtureRequest) -> Iterator[Shop]:
    """Whose server takes 4 MiB."""
    for shop in shops(request, "mariadb", request.param, pool_size=4):
        was = column(shop, "SELECT @@GLOBAL.max_allowed_packet")[0]
        run(shop, f"SET GLOBAL max_allowed_packet = {4 * MIB}")
        yield shop
        run(shop, f"SET GLOBAL max_allowed_packet = {was}")


def large(size: float, attempt: int = 1) -> Message:
    body = json.dumps({"no": 1, "text": "中🎉x" * int(size * MIB / 8)}, ensure_ascii=False).encode()
    return Message("orders", body, message_id="m", attempt=attempt, properties={"who": "中"})


def fails(shop: Shop, *, tries: int) -> list[bool]:
    failing = [True]

    def do(session: Session, no: Any) -> None:
        if failing:
            raise ZeroDivisionError
        put(session, str(no))

    ALONE.handles(shop, do, retry=Retry(immediate=0, max_attempts=tries))
    return failing


@pytest.mark.parametrize("size", [0.2, 1.5, 2.1, 3.8])
def test_a_large_body_is_kept_whole_and_runs_again(mariadb: Shop, size: float) -> None:
    failing = fails(mariadb, tries=2)
    assert [mariadb.process(large(size, attempt)) for attempt in (1, 2)] == [F, DEAD]
    row = mariadb.failure()
    assert (row.state, row.attempts, row.body == large(size).body) == ("dead", 2, True)
    failing.clear()
    with mariadb.eo.worker(f"memory://large-{mariadb.colour}-{size}", concurrency=1):
        run(mariadb, "UPDATE message_failure SET state = 'requeued', next_attempt_at = UTC_TIMESTAMP(6)")
        until(lambda: mariadb.effects() == ["1"], "it has run")


@pytest.mark.parametrize("size", [4.1, 9])
def test_a_body_that_no_row_can_hold_is_told_and_stays_with_its_broker(mariadb: Shop, size: float) -> None:
    failing = fails(mariadb, tries=2)
    assert [mariadb.process(large(size, attempt)) for attempt in (1, 2, 3)] == [F, F, F]
    row = mariadb.failure()
    assert (row.state, row.attempts, row.body, row.next_attempt_at) == ("retrying", 3, None, None)
    assert f"The body of {len(large(size).body or b'')} bytes" in row.error_text
    assert "ZeroDivisionError" in row.error_class
    run(mariadb, f"SET GLOBAL max_allowed_packet = {64 * MIB}")
    for engine in (mariadb.engine, mariadb.async_engine.sync_engine):
        engine.dispose(close=False)
    assert mariadb.process(large(size, 4)) is DEAD
    assert (mariadb.failure().body == large(size).body, json.loads(mariadb.failure().properties)) == (
        True,
        {"who": "中"},
    )
    failing.clear()
    assert mariadb.process(large(size, 5)) is P


def test_nobody_runs_a_row_without_its_body(mariadb: Shop, caplog: pytest.LogCaptureFixture) -> None:
    failing = fails(mariadb, tries=2)
    assert mariadb.process(large(5)) is F
    failing.clear()
    with mariadb.eo.worker(f"memory://bodiless-{mariadb.colour}", concurrency=1):
        run(mariadb, "UPDATE message_failure SET state = 'requeued', next_attempt_at = UTC_TIMESTAMP(6)")
        until(lambda: "failure_not_read" in caplog.text, "it is said")
    assert mariadb.effects() == []


def test_properties_that_no_statement_carries_are_told(mariadb: Shop) -> None:
    fails(mariadb, tries=2)
    message = Message("orders", b'{"no": 1}', message_id="m", properties={"large": "x" * 3 * MIB})
    assert mariadb.process(message) is F
    assert "properties are not in this row" in mariadb.failure().error_text


@pytest.mark.parametrize("way", [ALONE, IN_A_BATCH, UNDER_A_LEASE], ids=str)
def test_a_large_message_waits_behind_a_failed_one_and_no_server_refuses_the_look(mariadb: Shop, way: Way) -> None:
    errors: list[Any] = []
    for engine in (mariadb.engine, mariadb.async_engine.sync_engine):
        event.listen(engine, "handle_error", lambda context: errors.append(context.original_exception))

    def do(session: Session, no: Any) -> None:
        put(session, str(no))
        if no == 1:
            raise ZeroDivisionError

    way.handles(mariadb, do, ordered=True, retry=Retry(immediate=0, max_attempts=1))
    assert way.deliver(mariadb, [order(1, ordering_key="k")]) == [DEAD]
    body = json.dumps({"no": 2, "text": "x" * 3 * MIB}).encode()
    assert way.deliver(mariadb, [Message("orders", body, message_id="2", ordering_key="k")]) == [Outcome.WAITING]
    assert way.deliver(mariadb, [order(3, ordering_key="other")]) == [P]
    assert errors == []
