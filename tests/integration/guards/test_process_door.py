"""`eo.process` and `eo.aprocess`: one message in a loop of the caller's, on three databases in both colours."""

import asyncio
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from json import dumps
from typing import Any

import pytest
from sqlalchemy import Table, create_engine, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from exactly_once import ConfigurationError, ExactlyOnce, Lease, Message, Outcome, Reject, Retry, RetryLater, keys
from exactly_once.errors import SchemaError
from exactly_once.failures.due import message_of
from tests.integration.shop import ONE_TRY, Do, Shop, order, put

pytestmark = pytest.mark.nightly(meet=2)

NOON = datetime(2026, 5, 1, 12, 0, 0, 123456, tzinfo=UTC)


@dataclass
class Order:
    no: str
    amount: int = 1


def fails(error: BaseException | type[BaseException]) -> Do:
    """A handler that writes, then raises."""

    def do(session: Session) -> None:
        put(session, "effect")
        raise error

    return do


def effect(session: Session) -> None:
    put(session, "effect")


# -- outcomes ----------------------------------------------------------------------------------------------------------


def test_a_message_is_processed_once_and_every_copy_is_a_duplicate(shop: Shop) -> None:
    shop.handles(effect)
    assert shop.process(order()) is Outcome.PROCESSED
    for attempt, message_id in ((1, "other"), (2, "id-A-1"), (3, None)):
        assert shop.process(order(attempt=attempt, message_id=message_id)) is Outcome.DUPLICATE
    assert shop.failures() == []
    shop.assert_kept("effect", claims=["A-1"])


def test_the_claim_says_where_its_message_came_from(shop: Shop) -> None:
    shop.handles(effect)
    shop.process(order(attempt=3, born_at=NOON))
    (row,) = shop.rows(shop.tables.idempotent)
    assert (row.consumer_group, row.handler, row.business_key) == ("shop", "handler", "A-1")
    assert (row.status, row.message_id, row.retry_times, row.born_at) == (1, "id-A-1", 2, NOON)
    assert row.created_at == row.consumed_at or row.created_at < row.consumed_at
    assert row.message_content is None


def test_what_no_handler_wants_is_not_mine(shop: Shop) -> None:
    shop.handles(effect, tag=["created", "paid"])
    assert shop.process(order(tag="cancelled")) is Outcome.NOT_MINE
    assert shop.process(order()) is Outcome.NOT_MINE
    assert shop.process(Message("stock", b"not even JSON")) is Outcome.NOT_MINE
    assert shop.process(order(tag="paid")) is Outcome.PROCESSED
    assert Outcome.NOT_MINE.acknowledge


def test_a_topic_that_no_handler_names_is_told_once(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """A topic misspelled: every message is acknowledged unread, and nobody would know."""
    shop.handles(effect, tag="created")
    for topic in ("order", "order", "invoices", "order"):
        assert shop.process(Message(topic, b"{}")) is Outcome.NOT_MINE
    assert shop.process(order(tag="cancelled")) is Outcome.NOT_MINE  # another tag of its topic, as a group gets it
    told = [record.getMessage() for record in caplog.records if record.name == "exactly_once.routing"]
    assert told == [
        f"No handler takes topic '{topic}'; its messages are acknowledged unread. Handlers take: orders."
        for topic in ("order", "invoices")
    ]
    for number in range(2000):
        shop.process(Message(f"topic-{number}", b"{}"))
    told = [record.getMessage() for record in caplog.records if record.name == "exactly_once.routing"]
    assert len(told) < 1000


def test_without_any_handler_no_message_is_acknowledged(shop: Shop) -> None:
    """The module that registers them was not imported."""
    with pytest.raises(ConfigurationError, match=r"No handlers are registered\. Import the module.*imports=\["):
        shop.process(order())
    shop.handles(effect)
    assert shop.process(order()) is Outcome.PROCESSED


def test_a_failure_keeps_nothing_but_its_record_and_asks_to_come_again(shop: Shop) -> None:
    shop.handles(fails(ValueError("stock is -1")))
    outcome = shop.process(order())
    assert (outcome, outcome.acknowledge) == (Outcome.FAILED, False)
    failure = shop.failure()
    assert (failure.state, failure.attempts, failure.error_class) == ("retrying", 1, "ValueError")
    assert failure.error_text.startswith("stock is -1 (at guards/test_process_door.py:")
    assert failure.next_attempt_at is None  # the loop that called brings it again; the pump would run it beside
    shop.assert_kept(claims=[])


def test_after_max_attempts_it_is_kept_for_a_person_and_acknowledged(shop: Shop) -> None:
    shop.handles(fails(ValueError), retry=Retry(immediate=0, max_attempts=3))
    outcomes = [shop.process(order(attempt=attempt)) for attempt in (1, 2, 3)]
    assert outcomes == [Outcome.FAILED, Outcome.FAILED, Outcome.DEAD]
    failure = shop.failure()
    assert (failure.state, failure.attempts) == ("dead", 3)
    assert failure.first_failed_at < failure.last_failed_at
    shop.assert_kept(claims=[])


def test_a_bare_reject_parks_too(shop: Shop) -> None:
    """`raise Reject`: a TypeError of its own would be retried."""

    def handler(session: Session) -> None:
        effect(session)
        raise Reject

    shop.handles(handler)
    assert shop.process(order()) is Outcome.DEAD
    failure = shop.failure()
    assert (failure.state, failure.attempts, failure.error_class) == ("dead", 1, "Reject")
    assert failure.error_text == "rejected by the handler, which gave no reason"
    shop.assert_kept(claims=[])


def test_immediate_tries_are_not_counted(shop: Shop) -> None:
    runs: list[int] = []

    def do(session: Session) -> None:
        put(session, "effect")
        runs.append(1)
        if len(runs) < 6:
            raise ValueError

    shop.handles(do, retry=Retry(immediate=2, max_attempts=9))
    assert shop.process(order()) is Outcome.FAILED
    assert (len(runs), shop.failure().attempts) == (3, 1)
    assert shop.process(order(attempt=2)) is Outcome.PROCESSED
    assert len(runs) == 6
    assert (shop.failure().state, shop.failure().attempts) == ("resolved", 1)
    shop.assert_kept("effect", claims=["A-1"])


def test_a_success_closes_the_failure_in_a_loop_that_counts_no_deliveries(shop: Shop) -> None:
    wrong = [True]

    def do(session: Session) -> None:
        put(session, "effect")
        if wrong:
            raise ValueError

    shop.handles(do)
    assert shop.process(order()) is Outcome.FAILED
    wrong.clear()
    assert shop.process(order()) is Outcome.PROCESSED
    assert shop.failure().state == "resolved"
    shop.assert_kept("effect", claims=["A-1"])


def test_reject_parks_at_once_and_runs_once(shop: Shop) -> None:
    runs: list[int] = []

    def do(session: Session) -> None:
        runs.append(1)
        put(session, "effect")
        raise Reject("no such sku: 7")

    shop.handles(do, retry=Retry(immediate=5))
    assert shop.process(order()) is Outcome.DEAD
    assert (shop.failure().state, shop.failure().error_text, runs) == ("dead", "no such sku: 7", [1])
    shop.assert_kept(claims=[])


def test_retry_later_is_counted_and_not_tried_at_once(shop: Shop) -> None:
    runs: list[int] = []

    def do(session: Session) -> None:
        runs.append(1)
        raise RetryLater(timedelta(hours=1))

    shop.handles(do, retry=Retry(immediate=5, max_attempts=2))
    assert shop.process(order()) is Outcome.FAILED
    assert (runs, shop.failure().attempts, shop.failure().next_attempt_at) == ([1], 1, None)
    assert shop.process(order()) is Outcome.DEAD


def test_the_policy_is_chosen_by_the_error(shop: Shop) -> None:
    raised: list[type[Exception]] = [TimeoutError, OSError, ValueError]

    def do(session: Session) -> None:
        runs.append(1)
        raise raised[0]

    shop.handles(
        do,
        retry={
            OSError: Retry(immediate=1, max_attempts=5),
            TimeoutError: Retry(immediate=3, max_attempts=5),
            Exception: Retry(immediate=0, max_attempts=1),
        },
    )
    seen = []
    while raised:
        runs: list[int] = []
        seen.append((shop.process(order(raised[0].__name__)), len(runs)))
        raised.pop(0)
    assert seen == [(Outcome.FAILED, 4), (Outcome.FAILED, 2), (Outcome.DEAD, 1)]


# -- several handlers --------------------------------------------------------------------------------------------------


def test_each_handler_has_its_own_claim_and_only_the_failed_one_runs_again(shop: Shop) -> None:
    runs: list[str] = []

    def does(name: str) -> Do:
        def do(session: Session) -> None:
            runs.append(name)
            put(session, name)
            if name == "second" and runs.count(name) == 1:
                raise ValueError(name)

        return do

    for name in ("first", "second", "third"):
        shop.handles(does(name), name=name)
    assert shop.process(order()) is Outcome.FAILED
    assert runs == ["first", "second", "third"]  # one that fails stops no other
    assert sorted(row.handler for row in shop.rows(shop.tables.idempotent)) == ["first", "third"]
    assert shop.process(order(attempt=2)) is Outcome.PROCESSED
    assert runs == ["first", "second", "third", "second"]
    assert shop.process(order(attempt=3)) is Outcome.DUPLICATE
    assert (shop.failure().handler, shop.failure().state) == ("second", "resolved")
    shop.assert_kept("first", "third", "second", claims=["A-1"] * 3)


def test_one_parked_and_one_processed_is_acknowledged_as_dead(shop: Shop) -> None:
    shop.handles(fails(Reject("no")), name="first")
    shop.handles(effect, name="second")
    assert shop.process(order()) is Outcome.DEAD
    shop.assert_kept("effect", claims=["A-1"])


def test_sync_and_async_handlers_share_a_message(shop: Shop) -> None:
    if not shop.is_async:
        pytest.skip("aprocess only")

    @shop.eo.handler("orders", key="no")
    def plain(session: Session) -> None:
        put(session, "plain")

    @shop.eo.handler("orders", key="no")
    async def awaited(session: AsyncSession) -> None:
        await session.run_sync(put, "awaited")

    assert shop.process(order()) is Outcome.PROCESSED
    assert shop.process(order()) is Outcome.DUPLICATE
    assert shop.effects() == ["plain", "awaited"]
    with pytest.raises(ConfigurationError, match="use `await eo"):
        shop.eo.process(order("A-2"))
    assert shop.effects() == ["plain", "awaited"]


# -- looking before trusting -------------------------------------------------------------------------------------------


def test_without_enforcing_duplicates_run_and_are_said(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    shop.fresh_eo(enforce=False)
    shop.handles(effect)
    assert [shop.process(order()) for _ in range(3)] == [Outcome.PROCESSED] * 3
    assert sum("duplicate_ran" in line for line in caplog.messages) == 2
    shop.assert_kept("effect", "effect", "effect", claims=["A-1"])


def test_without_enforcing_a_failing_duplicate_still_fails(shop: Shop) -> None:
    runs: list[int] = []

    def do(session: Session) -> None:
        runs.append(1)
        put(session, "effect")
        if len(runs) == 2:
            raise ValueError

    shop.fresh_eo(enforce=False)
    shop.handles(do)
    assert [shop.process(order()) for _ in range(2)] == [Outcome.PROCESSED, Outcome.FAILED]
    shop.assert_kept("effect", claims=["A-1"])


# -- several databases -------------------------------------------------------------------------------------------------


def test_messages_are_routed_and_what_cannot_be_is_parked_in_the_first_database(shop: Shop) -> None:
    if shop.dialect != "sqlite" or shop.is_async:
        pytest.skip("the route is the application's, the same on every database")
    from exactly_once.alembic import upgrade
    from tests.integration.shop import EFFECT

    other = create_engine(shop.url + "-other")
    with other.begin() as connection:
        upgrade(connection)
        EFFECT.create(connection)

    def route(message: Message) -> str:
        return {"eu": "eu", "us": "us", "mars": "mars"}[message.properties["region"]]

    shop.eo = ExactlyOnce({"eu": shop.engine, "us": other}, route=route, group="shop")
    shop.handles(effect, retry=Retry(immediate=0))

    def kept(table: Table) -> int:
        with other.connect() as connection:
            return len(connection.execute(table.select()).all())

    assert shop.process(order("A-1", properties={"region": "eu"})) is Outcome.PROCESSED
    assert shop.process(order("A-2", properties={"region": "us"})) is Outcome.PROCESSED
    assert shop.process(order("A-2", properties={"region": "us"})) is Outcome.DUPLICATE
    assert (shop.effects(), kept(EFFECT), shop.claims(), kept(shop.tables.idempotent)) == (["effect"], 1, ["A-1"], 1)
    assert shop.process(order("A-3", properties={"region": "mars"})) is Outcome.DEAD
    assert shop.process(order("A-4", properties={})) is Outcome.DEAD
    mars, lost = shop.failures()
    assert "route= named the database 'mars'" in mars.error_text
    assert "eu, us" in mars.error_text
    assert "KeyError" in lost.error_text
    assert kept(shop.tables.failure) == 0
    other.dispose()


# -- not failures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_rolls_back_is_raised_and_is_no_failure(shop: Shop, interrupt: type[BaseException]) -> None:
    shop.handles(fails(interrupt))
    with pytest.raises(interrupt):
        shop.process(order())
    assert shop.failures() == []
    shop.assert_kept(claims=[])


@pytest.mark.parametrize("guard", [None, Lease(timedelta(seconds=30))], ids=["alone", "under a lease"])
def test_an_exit_in_a_thread_beside_the_callers_loop_is_counted_and_raised_on(shop: Shop, guard: Any) -> None:
    """The thread is ours, where no signal of the caller's arrives: it came again for ever."""
    if not shop.is_async:
        pytest.skip("aprocess only")
    more: dict[str, Any] = {} if guard is None else {"guard": guard}

    @shop.eo.handler("orders", key="no", retry=Retry(immediate=0, max_attempts=3), **more)
    def reserve(session: Session) -> None:
        put(session, "effect")
        sys.exit(3)

    for attempt in (1, 2):
        with pytest.raises(SystemExit):
            asyncio.run(shop.eo.aprocess(order(1, attempt=attempt)))
        assert shop.failure().attempts == attempt
    assert asyncio.run(shop.eo.aprocess(order(1, attempt=3))) is Outcome.DEAD
    assert "sys.exit(3)" in shop.failure().error_text
    assert shop.effects() == []


def test_a_cancelled_aprocess_rolls_back_and_records_nothing(shop: Shop) -> None:
    if not shop.is_async:
        pytest.skip("aprocess only")
    started = asyncio.Event()

    @shop.eo.handler("orders", key="no")
    async def reserve(session: AsyncSession) -> None:
        await session.run_sync(put, "effect")
        started.set()
        await asyncio.Event().wait()

    async def cancel() -> None:
        task = asyncio.create_task(shop.eo.aprocess(order()))
        await asyncio.wait_for(started.wait(), 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    shop.await_(cancel())
    assert shop.failures() == []
    shop.assert_kept(claims=[])


async def _nothing() -> None: ...


def _generator() -> Iterator[int]:
    yield 1


@pytest.mark.parametrize("returned", [_nothing, _generator])
def test_a_result_that_shows_that_nothing_ran_is_a_failure(shop: Shop, returned: Callable[[], Any]) -> None:
    if shop.is_async:

        @shop.eo.handler("orders", key="no", retry=ONE_TRY)
        async def awaited(session: AsyncSession) -> object:
            await session.run_sync(put, "effect")
            return returned()
    else:

        @shop.eo.handler("orders", key="no", retry=ONE_TRY)
        def plain(session: Session) -> object:
            put(session, "effect")
            return returned()

    assert shop.process(order()) is Outcome.FAILED
    assert "nothing in it ran" in shop.failure().error_text
    shop.assert_kept(claims=[])


# -- messages that cannot be handled -----------------------------------------------------------------------------------


def body(**members: Any) -> bytes:
    return dumps(members).encode()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        pytest.param(None, "no body", id="no body"),
        pytest.param(b"", "JSON", id="empty body"),
        pytest.param(b"no=1", "JSON", id="not JSON"),
        pytest.param(b"\xff\xfe\x00", "", id="not text"),
        pytest.param(b"[1]", "'no'", id="a list"),
        pytest.param(b"{}", "'no'", id="key missing"),
        pytest.param(body(no=None), "null", id="key null"),
        pytest.param(body(no=""), "empty", id="key empty"),
        pytest.param(body(no="x" * 256), "256 bytes", id="key too long"),
        pytest.param(body(no="é" * 128), "256 bytes", id="key too long in bytes"),
        pytest.param(body(no=True), "bool", id="key bool"),
        pytest.param(body(no=1.5), "float", id="key float"),
        pytest.param(body(no=["A-1"]), "list", id="key list"),
        pytest.param(body(no="A\0"), "NUL", id="key with NUL"),
        pytest.param(b'{"no": "\\ud800"}', "surrogate", id="key with half a surrogate pair"),
        pytest.param(body(no="A-1", amount="many"), "amount", id="another type than the handler's"),
    ],
)
def test_a_message_that_cannot_be_handled_is_kept_whole_with_its_reason(
    shop: Shop, wrong: bytes | None, says: str
) -> None:
    if shop.is_async:

        @shop.eo.handler("orders", key="no")
        async def awaited(session: AsyncSession, order: Order) -> None:
            await session.run_sync(put, "effect")
    else:

        @shop.eo.handler("orders", key="no")
        def plain(session: Session, order: Order) -> None:
            put(session, "effect")

    message = Message("orders", wrong, message_id="id-1")
    assert shop.process(message) is Outcome.DEAD
    failure = shop.failure()
    assert (failure.state, failure.body, failure.attempts) == ("dead", wrong, 1)
    assert says in failure.error_text
    assert failure.business_key == ("A-1" if says == "amount" else None)
    shop.assert_kept(claims=[])


def test_a_dead_letter_is_the_message_as_it_was(shop: Shop) -> None:
    shop.handles(effect)
    message = Message(
        "orders",
        bytes(range(256)) * 1000,
        tag="created",
        key="order A-1 \N{PARTY POPPER}",
        ordering_key="customer 7",
        properties={"nul": "a\0b", "half": "\ud83d", "quotes": "\"'\\", "party": "\N{PARTY POPPER}", "": ""},
        message_id="id-1",
        born_at=NOON,
        attempt=4,
    )
    assert shop.process(message) is Outcome.DEAD
    kept = message_of(shop.failure())
    assert (kept.body, dict(kept.properties)) == (message.body, dict(message.properties))
    for name in ("topic", "tag", "key", "ordering_key", "message_id", "born_at"):
        assert getattr(kept, name) == getattr(message, name), name


def test_texts_no_server_stores_are_kept_escaped(shop: Shop) -> None:
    shop.handles(effect)
    message = Message("orders", b"?", key="a\0b\ud800" + "x" * 3000, tag="t\0", message_id="id\0\ud800" + "y" * 300)
    assert shop.process(message) is Outcome.DEAD
    failure = shop.failure()
    assert failure.message_key.startswith("a\\0b\\ud800xxx")
    assert failure.message_id.startswith("id\\0\\ud800yyy")
    assert failure.tag == "t\\0"


def test_a_message_id_no_server_stores_does_not_keep_a_message_from_running(shop: Shop) -> None:
    shop.handles(effect)
    assert shop.process(order(message_id="id\0\ud800" + "y" * 300)) is Outcome.PROCESSED
    assert shop.process(order(message_id=None)) is Outcome.DUPLICATE


def test_messages_without_key_and_id_are_never_taken_for_one(shop: Shop) -> None:
    shop.handles(effect)
    for _ in range(2):
        assert shop.process(Message("orders", b"?")) is Outcome.DEAD
    assert len(shop.failures()) == 2


def test_a_broker_key_is_a_business_key_where_one_asks_for_it(shop: Shop) -> None:
    shop.handles(effect, key=(keys.tag(), keys.message_key()))
    assert shop.process(Message("orders", b"any", key="7", tag="paid")) is Outcome.PROCESSED
    assert shop.claims() == ['["paid","7"]']
    assert shop.process(Message("orders", b"any", tag="paid", message_id="1")) is Outcome.DEAD


# -- our own tables fail -----------------------------------------------------------------------------------------------


@contextmanager
def away(shop: Shop, table: str) -> Iterator[None]:
    """The block runs without this table."""
    with shop.outside.begin() as connection:
        connection.execute(text(f"ALTER TABLE {table} RENAME TO {table}_away"))
    try:
        yield
    finally:
        with shop.outside.begin() as connection:
            connection.execute(text(f"ALTER TABLE {table}_away RENAME TO {table}"))


def test_what_cannot_be_recorded_is_not_acknowledged(shop: Shop) -> None:
    shop.handles(fails(Reject("no")))
    with away(shop, "message_failure"):
        outcome = shop.process(order())
        assert not outcome.acknowledge
    assert shop.process(order()) is Outcome.DEAD
    shop.assert_kept(claims=[])


def test_without_claims_nothing_runs_and_nothing_is_acknowledged(shop: Shop) -> None:
    runs: list[int] = []
    shop.handles(lambda session: runs.append(1))
    with away(shop, "message_idempotent"), pytest.raises(SchemaError, match="exactly-once db upgrade"):
        shop.process(order())
    assert runs == []
    assert shop.failures() == []
    assert shop.process(order()) is Outcome.PROCESSED


def test_a_duplicate_whose_failure_cannot_be_closed_is_no_error_of_the_callers(shop: Shop) -> None:
    shop.handles(effect)
    assert shop.process(order()) is Outcome.PROCESSED
    with away(shop, "message_failure"):
        assert not shop.process(order(attempt=2)).acknowledge
    assert shop.process(order(attempt=2)) is Outcome.DUPLICATE
    shop.assert_kept("effect", claims=["A-1"])


def test_a_retry_that_cannot_close_its_failure_keeps_nothing(shop: Shop) -> None:
    shop.handles(effect)
    with away(shop, "message_failure"):
        assert not shop.process(order(attempt=2)).acknowledge
    shop.assert_kept(claims=[])
