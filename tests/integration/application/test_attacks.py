"""What an attacker of the promises found: each of these lost, doubled, spent or held something once."""

import json
import re
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, Row, create_engine, select, text
from sqlalchemy.orm import Session

from exactly_once import ExactlyOnce, Message, Outcome, Reject, Retry
from exactly_once.database.schema import tables
from exactly_once.failures.decisions import Chosen, requeue
from exactly_once.failures.due import DueFailures
from exactly_once.testing.databases import DatabaseServer
from exactly_once.transports.memory import forget
from tests.integration.shop import ONE_TRY
from tests.services import mariadb as mariadb_service
from tests.services.need import require
from tests.services.proxy import Proxy
from tests.waiting import until

GROUP = "attacked"
URL = "memory://attacks"
PATIENCE_S = 30.0


@pytest.fixture(autouse=True)
def _a_broker_of_its_own() -> Iterator[None]:
    forget("attacks")
    yield
    forget("attacks")


def order(no: str = "A", *, attempt: int = 1, ordering_key: str | None = None, **more: object) -> Message:
    body = json.dumps({"no": no} | more).encode()
    return Message("orders", body, key=no, message_id=f"id-{no}", attempt=attempt, ordering_key=ordering_key)


def failures(engine: Engine) -> list[Row[Any]]:
    with engine.connect() as connection:
        failure = tables().failure
        return list(connection.execute(select(failure).order_by(failure.c.id)).all())


def states(engine: Engine) -> list[str]:
    return [row.state for row in failures(engine)]


def requeue_all(engine: Engine) -> None:
    with engine.begin() as connection:
        requeue(connection, tables(), Chosen(group=GROUP), by="test", why=None, per_second=None)


def put(session: Session, text_: str) -> None:
    session.execute(text("INSERT INTO attack_effect (text) VALUES (:text)"), {"text": text_})


def effects(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        return list(connection.execute(text("SELECT text FROM attack_effect ORDER BY text")).scalars())


def make_effects(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE attack_effect (text VARCHAR(100))"))


def test_a_conflict_requeued_after_fingerprint_was_mended_as_advised_is_settled(database: Engine) -> None:
    eo = ExactlyOnce(database, group=GROUP)
    eo.handler("orders", key="no", name="reserve", retry=ONE_TRY)(_nothing)
    assert eo.process(order()) is Outcome.PROCESSED
    assert eo.process(order(amount=2)) is Outcome.DEAD
    requeue_all(database)
    mended = ExactlyOnce(database, group=GROUP)
    mended.handler("orders", key="no", name="reserve", fingerprint=None)(_nothing)
    with mended.worker(URL, concurrency=1):
        until(lambda: states(database) == ["resolved"], lambda: failures(database))


def test_a_message_without_a_key_requeued_after_key_was_mended_runs_once_and_is_settled(database: Engine) -> None:
    eo = ExactlyOnce(database, group=GROUP)
    eo.handler("orders", key="number", name="reserve", retry=ONE_TRY)(_nothing)
    assert eo.process(order()) is Outcome.DEAD
    requeue_all(database)
    make_effects(database)
    mended = ExactlyOnce(database, group=GROUP)

    @mended.handler("orders", key="no", name="reserve")
    def reserve(session: Session) -> None:
        put(session, "A")

    with mended.worker(URL, concurrency=1):
        until(lambda: states(database) == ["resolved"], lambda: failures(database))
    assert effects(database) == ["A"]


def test_a_message_that_fails_again_under_its_mended_key_is_kept_once(database: Engine) -> None:
    eo = ExactlyOnce(database, group=GROUP)
    eo.handler("orders", key="number", name="reserve", retry=ONE_TRY)(_nothing)
    assert eo.process(order()) is Outcome.DEAD
    requeue_all(database)
    mended = ExactlyOnce(database, group=GROUP)

    @mended.handler("orders", key="no", name="reserve", retry=ONE_TRY)
    def reserve(session: Session) -> None:
        raise Reject("still not")

    with mended.worker(URL, concurrency=1):
        until(lambda: sorted(states(database)) == ["dead", "resolved"], lambda: failures(database))
    [kept] = [row for row in failures(database) if row.state == "dead"]
    assert (kept.failure_key, json.loads(kept.body)) == ("k:A", {"no": "A"})


def test_an_ordered_message_does_not_wait_for_itself_after_its_fingerprint_was_changed(database: Engine) -> None:
    failing = True

    def reserve(session: Session, message: Message) -> None:
        if failing:
            raise ValueError("not now")

    def application(fingerprint: Any) -> ExactlyOnce:
        eo = ExactlyOnce(database, group=GROUP)
        eo.handler("orders", key="no", name="reserve", ordered=True, retry=ONE_TRY, fingerprint=fingerprint)(reserve)
        return eo

    assert application("body").process(order(ordering_key="x")) is Outcome.FAILED
    failing = False
    mended = application(None)
    assert mended.process(order("B", ordering_key="x")) is Outcome.WAITING
    assert mended.process(order(ordering_key="x", attempt=2)) is Outcome.PROCESSED
    assert states(database) == ["resolved"]
    assert mended.process(order("B", ordering_key="x", attempt=2)) is Outcome.PROCESSED


def test_what_could_not_be_routed_runs_once_in_the_right_database_once_route_is_mended(
    eo_server: DatabaseServer,
) -> None:
    with eo_server.fresh() as first, eo_server.fresh() as second:
        ends = ["typo", "typo", "second"]
        for engine in (first, second):
            make_effects(engine)

        def application(end: str) -> ExactlyOnce:
            eo = ExactlyOnce({"first": first, "second": second}, group=GROUP, route=lambda message: end)

            @eo.handler("orders", key="no", name="reserve")
            def reserve(session: Session) -> None:
                put(session, "A")

            return eo

        assert application(ends[0]).process(order()) is Outcome.DEAD
        requeue_all(first)
        with application(ends[1]).worker(URL, concurrency=1):
            until(lambda: states(first) == ["dead"], lambda: failures(first))  # requeued too early: kept once more
        requeue_all(first)
        with application(ends[2]).worker(URL, concurrency=1):
            until(lambda: states(first) == ["resolved"], lambda: failures(first))
        assert application(ends[2]).process(order()) is Outcome.DUPLICATE  # the broker's other copy
        assert (effects(first), effects(second)) == ([], ["A"])


def test_an_impatient_handler_spends_no_attempts_of_the_others_and_does_not_wake_a_parked_one(database: Engine) -> None:
    eo, ran = ExactlyOnce(database, group=GROUP), []

    @eo.handler("orders", key="no", name="patient", retry=Retry(immediate=0, delays=[3600], max_attempts=3))
    def patient(session: Session) -> None:
        ran.append("patient")
        raise ValueError

    @eo.handler("orders", key="no", name="parked")
    def parked(session: Session) -> None:
        ran.append("parked")
        raise Reject("never")

    @eo.handler("orders", key="no", name="impatient", retry=Retry(immediate=0, delays=[0.01], max_attempts=4))
    def impatient(session: Session) -> None:
        ran.append("impatient")
        raise ValueError

    with eo.producer(URL) as producer:
        producer.send(order())
    with eo.worker(URL, concurrency=1):
        until(lambda: ran.count("impatient") == 4, lambda: ran)
        until(lambda: sorted(states(database)) == ["dead", "dead", "retrying"], lambda: failures(database))
    assert (ran.count("patient"), ran.count("parked")) == (1, 1)


def test_a_connection_lost_while_a_duplicate_is_looked_up_counts_no_failure(mariadb_url: str) -> None:
    engine = create_engine(mariadb_url)
    with Proxy(mariadb_url) as proxy:
        through = create_engine(proxy.url)
        eo = ExactlyOnce(through, group=GROUP)
        eo.handler("orders", key="no", name="reserve", retry=ONE_TRY)(_nothing)
        assert eo.process(order()) is Outcome.PROCESSED
        proxy.cut_at(re.compile(rb"LOCK IN SHARE MODE"), "before")
        assert eo.process(order(attempt=2)) is Outcome.WAITING
        proxy.wait_for_cut()
        assert failures(engine) == []
        assert eo.process(order(attempt=3)) is Outcome.DUPLICATE
        through.dispose()
    engine.dispose()


def test_the_sweep_neither_waits_for_a_running_handler_nor_deadlocks_with_it(mariadb_url: str) -> None:
    engine = create_engine(mariadb_url)
    eo = ExactlyOnce(engine, group=GROUP)
    inside, go, outcomes = threading.Event(), threading.Event(), []

    @eo.handler("orders", key="no", name="reserve", retry=ONE_TRY)
    def reserve(session: Session, message: Message) -> None:
        if message.attempt == 1:
            raise ValueError
        inside.set()
        go.wait(PATIENCE_S)

    assert eo.process(order("A")) is Outcome.FAILED
    thread = threading.Thread(target=lambda: outcomes.append(eo.process(order("A", attempt=2))))
    thread.start()
    try:
        assert inside.wait(PATIENCE_S)
        (store,) = eo.stores.values()
        impatient = create_engine(mariadb_url, connect_args={"init_command": "SET innodb_lock_wait_timeout = 1"})
        assert DueFailures(lambda: store.tables).sweep(impatient.begin, GROUP) == 0
        impatient.dispose()
    finally:
        go.set()
        thread.join()
    assert (outcomes, states(engine)) == ([Outcome.PROCESSED], ["resolved"])
    engine.dispose()


def test_a_failed_message_too_large_for_the_server_does_not_stop_the_worker() -> None:
    require(mariadb_service)
    with mariadb_service.MariaDB(settings={"max-allowed-packet": "1M"}) as mariadb:
        server = DatabaseServer(mariadb.url, source="url")
        with server.fresh() as engine:
            eo = ExactlyOnce(engine, group=GROUP)

            @eo.handler("orders", key="no", name="reserve", retry=ONE_TRY)
            def reserve(session: Session, message: Message) -> None:
                if message.key == "large":
                    raise ValueError

            with eo.producer(URL) as producer:
                producer.send(order("large", filling="x" * 1_500_000))
            with eo.worker(URL, concurrency=1, drain_timeout=timedelta(seconds=1)) as worker:
                until(lambda: bool(worker.counts.redelivered or worker.counts.outages), lambda: worker.counts)
                assert worker.counts.outages == ()
                with eo.producer(URL) as producer:
                    producer.send(order("small"))
                until(lambda: worker.counts.outcomes["processed"] == 1, lambda: worker.counts)
                assert worker.counts.outcomes["waiting"] == 0


def _nothing(session: Session) -> None: ...
