"""Batches of messages: one claim, one transaction, one commit; whatever happens to one message is nothing to the others.

On each database in each colour, with a pool of one connection: what a group leaves open, the next test would find.
"""

import json
import threading
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from time import monotonic
from typing import Any

import pytest
from sqlalchemy import event, insert, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from exactly_once import ExactlyOnce, Message, Outcome, Reject, Retry
from exactly_once.database.schema import CONSUMING
from exactly_once.outcome import Ack, Redeliver, WaitForStore
from exactly_once.processing.work import BatchResults
from tests.integration.batches import effect, handles, orders, outcomes, own_engines, told
from tests.integration.guards.test_claims import KEYS
from tests.integration.shop import EFFECT, GROUP, ONE_TRY, ONLY, STOCK, Shop, order, put, shops

P, D, F, DEAD = Outcome.PROCESSED, Outcome.DUPLICATE, Outcome.FAILED, Outcome.DEAD


def commits(shop: Shop) -> list[str]:
    """A list that fills with the handlers' commits from now on."""
    seen: list[str] = []
    engine = shop.async_engine.sync_engine if shop.is_async else shop.engine

    @event.listens_for(engine, "commit")
    def committed(connection: Any) -> None:
        seen.append("commit")

    return seen


def test_a_group_is_one_transaction_and_each_message_a_call_of_its_own(shop: Shop) -> None:
    handles(shop, effect)
    seen = commits(shop)
    assert outcomes(shop, orders(3, 1, 2)) == [P, P, P]
    assert len(seen) == 1
    shop.assert_kept("3", "1", "2", claims=["1", "2", "3"])


def test_what_was_done_before_is_a_duplicate_and_the_rest_is_processed(shop: Shop) -> None:
    handles(shop, effect)
    assert shop.process(order(1)) is P  # alone, by another door
    assert outcomes(shop, orders(1, 2)) == [D, P]
    assert outcomes(shop, orders(2, 1)) == [D, D]
    shop.assert_kept("1", "2", claims=["1", "2"])


def test_of_two_copies_in_a_group_the_first_wins(shop: Shop) -> None:
    handles(shop, effect)
    assert outcomes(shop, orders(1, 2, 1, 1)) == [P, P, D, D]
    shop.assert_kept("1", "2", claims=["1", "2"])


def test_a_copy_of_one_that_failed_is_no_duplicate(shop: Shop) -> None:
    def do(session: Session, no: object) -> None:
        put(session, str(no))
        if no == 1:
            raise ValueError("this one")

    handles(shop, do, retry=Retry(immediate=0, delays=[60]))
    found = told(shop, orders(1, 1, 2))
    assert [each.outcome for each in found.results] == [F, F, P]
    assert [type(each.verdict) for each in found.results] == [Redeliver, Redeliver, Ack]


def test_another_payload_under_one_key_is_parked_and_the_first_stands(shop: Shop) -> None:
    handles(shop, effect)
    other = Message("orders", json.dumps({"no": 1, "more": 2}).encode(), message_id="other")
    assert outcomes(shop, [order(1), other, order(2)]) == [P, DEAD, P]
    assert "more" in shop.failure().error_text
    again = Message("orders", json.dumps({"no": 2, "more": 3}).encode(), message_id="again")
    assert outcomes(shop, [again, order(3)]) == [DEAD, P]
    assert shop.effects() == ["1", "2", "3"]


@pytest.mark.parametrize("number", [3, 30])
def test_one_that_fails_is_recorded_alone_and_changes_nothing_for_the_rest(shop: Shop, number: int) -> None:
    calls: list[object] = []

    def do(session: Session, no: object) -> None:
        calls.append(no)
        put(session, str(no))
        if no == 2:
            raise ValueError("this one")

    handles(shop, do, retry=Retry(immediate=0, delays=[60]))
    found = told(shop, orders(*range(number)))
    assert [each.outcome for each in found.results] == [F if n == 2 else P for n in range(number)]
    assert [type(each.verdict) for each in found.results] == [Redeliver if n == 2 else Ack for n in range(number)]
    assert sorted(shop.effects()) == sorted(str(n) for n in range(number) if n != 2)
    assert (shop.failure().business_key, shop.failure().attempts) == ("2", 1)
    assert calls.count(2) > 1  # in its group, and then alone: at least once, as any call
    assert not found.deadlocked


def test_each_of_several_that_fail_is_recorded(shop: Shop) -> None:
    def do(session: Session, no: Any) -> None:
        put(session, str(no))
        if no % 10 == 3:
            raise Reject(f"number {no}")

    handles(shop, do)
    assert outcomes(shop, orders(*range(40))) == [DEAD if n % 10 == 3 else P for n in range(40)]
    assert sorted(int(row.business_key) for row in shop.failures()) == [3, 13, 23, 33]
    assert len(shop.effects()) == len(set(shop.effects())) == 36


def test_a_unique_row_of_the_handlers_own_is_no_duplicate(shop: Shop) -> None:
    def do(session: Session, no: Any) -> None:
        session.execute(insert(ONLY).values(text="same" if no < 2 else str(no)))

    handles(shop, do)
    assert outcomes(shop, orders(0, 1, 2)) == [P, F, P]
    assert shop.claims() == ["0", "2"]


def test_a_bad_body_and_a_missing_key_are_parked_beside_a_good_group(shop: Shop) -> None:
    handles(shop, effect)
    bad = [Message("orders", b"{", message_id="bad"), Message("orders", b"{}", message_id="no key")]
    assert outcomes(shop, [order(1), *bad, order(2)]) == [P, DEAD, DEAD, P]
    shop.assert_kept("1", "2", claims=["1", "2"])


def test_a_handler_that_commits_is_stopped_and_only_its_message_is_to_blame(shop: Shop) -> None:
    def do(session: Session, no: object) -> None:
        put(session, str(no))
        if no == 2:
            session.commit()

    handles(shop, do)
    assert outcomes(shop, orders(1, 2, 3)) == [P, F, P]
    assert "commit" in shop.failure().error_text
    shop.assert_kept("1", "3", claims=["1", "3"])


def test_what_was_committed_behind_our_back_is_for_a_person_all_of_it(shop: Shop) -> None:
    def do(session: Session, no: object) -> None:
        put(session, str(no))
        if no == 2:
            session.connection().connection.dbapi_connection.commit()  # type: ignore[union-attr]

    handles(shop, do)
    assert outcomes(shop, orders(1, 2, 3)) == [DEAD, DEAD, DEAD]
    assert {row.state for row in shop.failures()} == {"broken"}
    assert [row.business_key for row in shop.failures()] == ["1", "2", "3"]
    for row, company in zip(
        shop.failures(), ("was called: look", "was called: look", "was not called: requeue"), strict=True
    ):
        assert "found at '2', call 2 of a batch" in row.error_text
        assert f"this message {company}" in row.error_text
    # what a copy finds: a duplicate, and never a second effect
    assert outcomes(shop, orders(1, 2)) == [D, D]


def test_a_rollback_of_sqlites_that_was_swallowed_is_one_messages_fault(shop: Shop) -> None:
    if shop.dialect != "sqlite":
        pytest.skip("only SQLite has statements that roll all back")

    def do(session: Session, no: object) -> None:
        put(session, str(no))
        if no == 2:
            session.execute(text("INSERT INTO only_one VALUES ('one')"))
            with suppress(IntegrityError):
                session.execute(text("INSERT OR ROLLBACK INTO only_one VALUES ('one')"))

    handles(shop, do)
    assert outcomes(shop, orders(1, 2, 3, 4)) == [P, F, P, P]
    assert "swallowed" in shop.failure().error_text or "IntegrityError" in shop.failure().error_class
    shop.assert_kept("1", "3", "4", claims=["1", "3", "4"])


def test_a_handler_that_calls_exit_ends_no_worker(shop: Shop) -> None:
    def do(session: Session, no: object) -> None:
        put(session, str(no))
        if no == 1:
            raise SystemExit(3)

    handles(shop, do)
    assert outcomes(shop, orders(1, 2)) == [F, P]
    assert "sys.exit" in shop.failure().error_text


def test_a_key_that_another_run_holds_does_not_hold_the_others(request: pytest.FixtureRequest) -> None:
    for dialect in ("postgres", "mariadb"):
        for shop in shops(request, dialect, "sync"):
            handles(shop, effect)
            row = shop.tables.idempotent
            with shop.outside.begin() as other:
                values = {"consumer_group": GROUP, "handler": "handler", "business_key": "2", "status": 1}
                other.execute(insert(row).values(**values, fingerprint=b"", retry_times=0, created_at=_later()))
                began = monotonic()
                found = told(shop, orders(1, 2, 3))
                assert monotonic() - began < 8
                assert [each.outcome for each in found.results] == [P, Outcome.IN_PROGRESS, P]
                other.rollback()
            assert outcomes(shop, orders(2)) == [P]
            shop.assert_kept("1", "3", "2", claims=["1", "2", "3"])


def test_a_lease_that_stands_under_a_key_is_in_progress(shop: Shop) -> None:
    handles(shop, effect)
    with shop.outside.begin() as connection:
        values = {"consumer_group": GROUP, "handler": "handler", "business_key": "2", "status": CONSUMING}
        connection.execute(
            insert(shop.tables.idempotent).values(
                **values, fingerprint=b"", retry_times=0, token="t", lease_until=_later(), created_at=_later()
            )
        )
    assert outcomes(shop, orders(1, 2)) == [P, Outcome.IN_PROGRESS]


def _later() -> Any:
    from datetime import UTC, datetime

    return datetime.now(UTC) + timedelta(hours=1)


def test_two_groups_that_lock_rows_in_opposite_order_both_end_processed(request: pytest.FixtureRequest) -> None:
    """A deadlock of the handlers' own rows: one group is thrown away, its messages run alone at once, nobody fails."""
    for dialect in ("postgres", "mariadb"):
        for shop in shops(request, dialect, "sync", pool_size=2):
            meet = threading.Barrier(2, timeout=20)
            met: set[int] = set()

            def do(session: Session, no: Any, met: set[int] = met, meet: threading.Barrier = meet) -> None:
                # 0 locks item 1 then 2, and 10 the other way round; they meet between their two messages
                session.execute(update(STOCK).where(STOCK.c.item == no % 10 + 1).values(amount=STOCK.c.amount + 1))
                if no in (0, 11) and no not in met:
                    met.add(no)
                    meet.wait()

            handles(shop, do)
            with shop.outside.begin() as connection:
                connection.execute(insert(STOCK), [{"item": 1, "amount": 0}, {"item": 2, "amount": 0}])
            found: list[BatchResults] = []
            groups = [orders(0, 1), orders(11, 10)]
            shop.eo._router  # noqa: B018  (made once, before the threads)

            def run(group: list[Message], shop: Shop = shop, found: list[BatchResults] = found) -> None:
                found.append(told(shop, group))

            threads = [threading.Thread(target=run, args=(group,)) for group in groups]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
            assert [each.outcome for group in found for each in group.results] == [P] * 4
            assert sorted(group.deadlocked for group in found) == [False, True]
            assert {row.item: row.amount for row in shop.rows(STOCK)} == {1: 2, 2: 2}
            assert not shop.failures()


def test_a_database_that_does_not_answer_holds_the_whole_group(shop: Shop) -> None:
    if shop.dialect == "sqlite":
        pytest.skip("a file always answers")
    shop.fresh_eo(_nowhere(shop.engine), _nowhere(shop.async_engine))
    handles(shop, effect)
    tried: list[object] = []
    store = shop.eo.stores["default"]
    engine = store.async_engine.sync_engine if shop.is_async else store.engine
    event.listen(engine, "do_connect", lambda *_: tried.append(1))
    found = told(shop, orders(*range(30)))
    assert {each.outcome for each in found.results} == {Outcome.WAITING}
    assert len(tried) < 5, "not each of a group asks a server that is away"
    assert all(isinstance(each.verdict, WaitForStore) for each in found.results)
    assert not shop.claims()
    assert not shop.failures()


def _nowhere(engine: Any) -> Any:
    from sqlalchemy import create_engine
    from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

    url = engine.url.set(host="127.0.0.1", port=1, query={})
    return create_async_engine(url) if isinstance(engine, AsyncEngine) else create_engine(url)


def test_every_key_is_claimed_as_it_is(shop: Shop) -> None:
    handles(shop, effect)
    distinct = {json.dumps(key) if isinstance(key, list) else str(key): key for key in KEYS}
    messages = [order(key, message_id="id") for key in distinct.values() if not isinstance(key, list)]
    first = outcomes(shop, messages)
    assert first == [P] * len(messages)
    assert outcomes(shop, messages) == [D] * len(messages)
    assert len(shop.claims()) == len(messages)


def test_the_claims_of_a_group_are_those_of_single_messages(shop: Shop) -> None:
    handles(shop, effect)
    born = _later()
    shop.process(order(1, message_id='with "quotes" and \\', born_at=born))
    outcomes(shop, orders(2, 3, message_id='with "quotes" and \\', born_at=born))
    outcomes(shop, [order(4), Message("orders", b'{"no": 5}')])
    rows = {row.business_key: row for row in shop.rows(shop.tables.idempotent)}
    for column in ("consumer_group", "handler", "status", "message_id", "message_content", "retry_times", "born_at"):
        assert getattr(rows["1"], column) == getattr(rows["2"], column) == getattr(rows["3"], column), column
    assert rows["5"].message_id is rows["5"].born_at is None
    assert len(rows["1"].fingerprint) == len(rows["2"].fingerprint)
    assert all(row.created_at and row.consumed_at and row.owner for row in rows.values())


def test_a_message_that_came_before_runs_alone_and_closes_its_failure(shop: Shop) -> None:
    fail = [True]

    def do(session: Session, no: object) -> None:
        put(session, str(no))
        if no == 2 and fail[0]:
            raise ValueError("the first time")

    handles(shop, do, retry=Retry(immediate=0, delays=[60]))
    assert outcomes(shop, orders(1, 2)) == [P, F]
    fail.clear()
    fail.append(False)
    seen = commits(shop)
    assert outcomes(shop, [order(2, attempt=2), order(3), order(4)]) == [P, P, P]
    assert len(seen) == 2
    assert shop.failure().state == "resolved"


def test_a_group_is_handled_in_the_order_of_the_rows_it_locks(shop: Shop) -> None:
    handles(shop, effect, batch_order="no")
    assert outcomes(shop, orders("c", "a", "b")) == [P, P, P]
    assert shop.effects() == ["a", "b", "c"]


def test_messages_of_a_blocked_ordering_key_wait_and_the_others_do_not(shop: Shop) -> None:
    def do(session: Session, no: object) -> None:
        put(session, str(no))
        if no == 1:
            raise ValueError("blocks its key")

    handles(shop, do, ordered=True, retry=Retry(immediate=0, delays=[60]))
    assert outcomes(shop, [order(1, ordering_key="x"), order(10, ordering_key="y")]) == [F, P]
    second = [order(2, ordering_key="x"), order(11, ordering_key="y"), order(12)]
    assert outcomes(shop, second) == [Outcome.WAITING, P, P]
    assert sorted(shop.effects()) == ["10", "11", "12"]


def test_a_batch_handler_gets_the_winners_in_lists(shop: Shop) -> None:
    lists: list[list[Any]] = []

    def do(session: Session, numbers: list[Any], messages: list[Message]) -> None:
        assert [json.loads(message.body or b"")["no"] for message in messages] == numbers
        lists.append(numbers)
        if 7 in numbers:
            raise ValueError("with seven")
        session.execute(insert(EFFECT), [{"text": str(number)} for number in numbers])

    options: dict[str, Any] = {"name": "handler", "key": "no", "retry": ONE_TRY, "batch_order": "no"}
    if shop.is_async:

        @shop.eo.batch_handler("orders", **options)
        async def awaited(session: AsyncSession, bodies: list[dict[str, Any]], messages: list[Message]) -> None:
            await session.run_sync(do, [body["no"] for body in bodies], messages)
    else:

        @shop.eo.batch_handler("orders", **options)
        def plain(session: Session, bodies: Sequence[dict[str, Any]], messages: list[Message]) -> None:
            do(session, [body["no"] for body in bodies], messages)

    assert shop.process(order(1)) is P
    assert outcomes(shop, orders(3, 1, 2)) == [P, D, P]
    assert lists == [[1], [2, 3]]
    assert outcomes(shop, orders(*range(10))) == [F if n == 7 else D if n in (1, 2, 3) else P for n in range(10)]
    assert sorted(shop.effects()) == sorted(str(n) for n in range(10) if n != 7)


def test_what_a_batch_handler_returns_is_no_way_to_fail_some(shop: Shop) -> None:
    def do(session: Session, numbers: list[Any]) -> list[Any]:
        if sound := [{"text": str(number)} for number in numbers if number != 2]:
            session.execute(insert(EFFECT), sound)
        return [number for number in numbers if number == 2]

    if shop.is_async:

        @shop.eo.batch_handler("orders", name="handler", key="no", retry=ONE_TRY)
        async def awaited(session: AsyncSession, bodies: list[dict[str, Any]]) -> object:
            return await session.run_sync(do, [body["no"] for body in bodies])
    else:

        @shop.eo.batch_handler("orders", name="handler", key="no", retry=ONE_TRY)
        def plain(session: Session, bodies: list[dict[str, Any]]) -> object:
            return do(session, [body["no"] for body in bodies])

    assert outcomes(shop, orders(1, 2)) == [F, F]
    assert shop.process(order(3)) is F
    assert {"returned a list, which nobody reads" in row.error_text for row in shop.failures()} == {True}
    shop.assert_kept(claims=[])


def test_a_group_that_cannot_be_sorted_says_so_once(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    handles(shop, lambda session, no: put(session, str(no)), batch_order=lambda message: message.properties["row"])
    mixed = [order(1, properties={"row": "b"}), order(2), order(3, properties={"row": "a"})]
    for group in (mixed, orders(4, 5)):
        assert outcomes(shop, group) == [P] * len(group)
    assert shop.effects() == ["2", "3", "1", "4", "5"]  # what has no place comes first
    assert [record.levelname for record in caplog.records if "no_batch_order" in record.message] == ["WARNING"]


def test_each_database_has_a_transaction_of_its_own(request: pytest.FixtureRequest) -> None:
    for one in shops(request, "postgres", "sync"):
        for other in shops(request, "sqlite", "sync"):
            eo = ExactlyOnce(
                {"eu": one.engine, "us": other.engine}, group=GROUP, route=lambda message: message.tag or "eu"
            )

            transactions: set[Any] = set()

            @eo.handler("orders", key="no", name="handler", batch=10, linger=timedelta(milliseconds=200))
            def handler(session: Session, body: dict[str, Any], transactions: set[Any] = transactions) -> None:
                transactions.add(session.get_transaction())
                put(session, str(body["no"]))

            with eo.producer("memory://two-databases") as producer:
                for number in range(10):
                    producer.send(order(number, tag="eu" if number % 2 else "us"))
            with eo.worker("memory://two-databases", concurrency=4) as worker:
                worker.drain(timedelta(seconds=20))
            assert sorted(one.effects()) == ["1", "3", "5", "7", "9"]
            assert sorted(other.effects()) == ["0", "2", "4", "6", "8"]
            assert len(transactions) == 2


def test_a_worker_forms_groups_of_what_waits_beside_another_handler(ground: Shop) -> None:
    ground.clear()
    own_engines(ground)
    calls: list[int] = []

    def do(session: Session, number: object) -> None:
        calls.append(id(session))
        put(session, str(number))

    handles(ground, do, batch=50, linger=timedelta(milliseconds=200))
    ground.handles(lambda session: put(session, "single"), name="another")
    name = f"memory://groups-{ground.dialect}-{ground.colour}"
    with ground.eo.producer(name) as producer:
        for number in [*range(40), *range(10)]:
            producer.send(order(number))
    with ground.eo.worker(name, concurrency=2) as worker:
        worker.drain(timedelta(seconds=60))
        assert worker.counts.acked == 50
    effects = ground.effects()
    assert sorted(each for each in effects if each != "single") == sorted(str(n) for n in range(40))
    assert effects.count("single") == 40
    assert len(set(calls)) < len(calls) / 2  # far fewer sessions than messages
    assert not ground.failures()


def test_a_message_that_is_not_acknowledged_is_not_lost_where_two_handlers_want_it(shop: Shop) -> None:
    """One handler in groups fails: the delivery waits for it, and the other one has run once."""
    tries: list[object] = []
    own_engines(shop)

    def do(session: Session, no: object) -> None:
        tries.append(no)
        put(session, f"group {no}")
        if len(tries) < 3:
            raise ValueError("twice")

    handles(shop, do, retry=Retry(immediate=0, delays=[0.01], max_attempts=9))
    shop.handles(lambda session: put(session, "single"), name="another")
    name = f"memory://two-{shop.dialect}-{shop.colour}"
    with shop.eo.producer(name) as producer:
        producer.send(order(1))
    with shop.eo.worker(name, concurrency=2) as worker:
        worker.drain(timedelta(seconds=60))
    assert sorted(shop.effects()) == ["group 1", "single"]
    with shop.outside.connect() as connection:
        states = connection.execute(select(shop.tables.failure.c.state)).scalars().all()
    assert set(states) <= {"resolved"}


def test_a_group_costs_one_claim_and_one_commit(request: pytest.FixtureRequest, eo_server: Any) -> None:
    from tests.services.proxy import Proxy

    for shop in shops(request, "postgres", "sync"):
        with Proxy(shop.url) as proxy:
            from sqlalchemy import create_engine

            engine = create_engine(proxy.url, pool_size=1)
            shop.fresh_eo(engine)
            handles(shop, lambda session, no: session.execute(text("SELECT 1")))
            told(shop, orders(*range(10)))
            before = proxy.round_trips
            told(shop, orders(*range(10, 30)))
            assert proxy.round_trips - before == 1 + 20 + 1
            before = proxy.round_trips
            told(shop, orders(*range(10, 30)))
            assert proxy.round_trips - before == 2  # the claim; a look at what stands there, which ends the transaction
            engine.dispose()


@pytest.mark.parametrize("committed", [True, False])
def test_a_commit_without_an_answer_is_looked_up_once_for_all(request: pytest.FixtureRequest, committed: bool) -> None:
    from sqlalchemy import create_engine

    from tests.services.proxy import Proxy

    for shop in shops(request, "postgres", "sync"):
        with Proxy(shop.url) as proxy:
            engine = create_engine(proxy.url, pool_size=1)
            shop.fresh_eo(engine)
            handles(shop, effect)
            assert outcomes(shop, orders(0)) == [P]
            if committed:
                proxy.cut_after_commit()
                assert outcomes(shop, orders(0, 1, 2, 3)) == [D, P, P, P]
            else:
                proxy.cut_before_commit()
                # the claim of 0 is there, and proves nothing for the others
                found = told(shop, orders(0, 1, 2, 3))
                assert [each.outcome for each in found.results] == [D] + [Outcome.UNKNOWN] * 3
                assert [isinstance(each.verdict, Ack) for each in found.results] == [True, False, False, False]
                assert not shop.failures()
                assert outcomes(shop, orders(1, 2, 3)) == [P, P, P]
            assert proxy.cuts == 1
            assert sorted(shop.effects()) == ["0", "1", "2", "3"]
            engine.dispose()
