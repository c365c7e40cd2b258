"""The failure store: who tries again, who waits for whom, and what closes a row; through workers, on each database."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import count
from json import dumps, loads
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import insert, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util import greenlet_spawn
from zstandard import ZstdCompressor

from exactly_once import Lock, Message, Outcome, Reject, Retry, keys
from exactly_once.errors import BadBody
from exactly_once.failures.decisions import Chosen, discard
from exactly_once.failures.due import DueFailures
from exactly_once.failures.store import FailureStore
from exactly_once.outcome import Ack, Redeliver, Result
from exactly_once.transports import packed_messages
from exactly_once.transports.contract import Delivery, Features
from tests.integration.failing import BROKER, UNSAFE, deliver, own_engines, states
from tests.integration.shop import EFFECT, GROUP, ONLY, Do, Shop, order, put
from tests.integration.threads import Turn, in_thread
from tests.integration.ways import ALONE, requeued

pytestmark = pytest.mark.nightly(meet=2)

SOON = Retry(immediate=0, delays=[0])
LATER = Retry(immediate=0, delays=[3600])
_names = count()


class Flaky:
    """A handler that fails for the messages in `bad`, and else writes which message it ran."""

    def __init__(self, *bad: object) -> None:
        self.bad = set(bad)
        self.ran: list[object] = []

    def register(self, shop: Shop, **more: Any) -> None:
        def plain(session: Session, message: Message) -> None:
            no = loads(message.body or b"")["no"]
            self.ran.append(no)
            put(session, str(no))
            if no in self.bad:
                raise ValueError(no)

        async def awaited(session: Any, message: Message) -> None:
            await session.run_sync(plain, message)

        from sqlalchemy.ext.asyncio import AsyncSession

        awaited.__annotations__["session"] = AsyncSession
        options: dict[str, Any] = {"key": "no", "name": "handler", "retry": SOON} | more
        shop.eo.handler("orders", **options)(awaited if shop.is_async else plain)


def work(shop: Shop, *messages: Message, url: str | None = None) -> None:
    """Send these, and let a worker of the shop's handlers run until nothing is left to do."""
    url = url or f"memory://failures-{next(_names)}"
    with shop.eo.producer(url) as producer:
        for message in messages:
            producer.send(message)
    with shop.eo.worker(url, concurrency=4) as worker:
        worker.drain(timedelta(seconds=60))


# -- who brings it again -----------------------------------------------------------------------------------------------


def test_a_brokers_retry_has_no_time_of_its_own(shop: Shop) -> None:
    Flaky("A-1").register(shop, retry=Retry(immediate=0, delays=[7]))
    assert deliver(shop, order(), BROKER) == Result(Outcome.FAILED, Redeliver(timedelta(seconds=7)))
    assert (shop.failure().state, shop.failure().next_attempt_at) == ("retrying", None)


def test_the_pumps_retry_has_a_time_and_the_broker_is_done_with_it(shop: Shop) -> None:
    Flaky("A-1").register(shop, retry=Retry(immediate=0, delays=[3600]))
    assert deliver(shop, order(), UNSAFE) == Result(Outcome.FAILED, Ack())
    failure = shop.failure()
    assert failure.state == "retrying"
    assert failure.next_attempt_at is not None
    ahead = failure.next_attempt_at - datetime.now(UTC)
    assert timedelta(minutes=59) < ahead < timedelta(minutes=61)
    assert failure.next_attempt_at - failure.last_failed_at > timedelta(minutes=59)


def test_before_the_brokers_limit_the_pump_takes_over(shop: Shop) -> None:
    Flaky("A-1").register(shop, retry=LATER)
    owners = []
    for attempt in (1, 2, 3, 4):
        told = deliver(shop, order(attempt=attempt), BROKER)
        owners.append((type(told.verdict), shop.failure().next_attempt_at is not None))
    assert owners == [(Redeliver, False)] * 3 + [(Ack, True)]
    assert shop.failure().attempts == 4


def test_what_is_in_progress_is_counted_apart_and_kept_waiting_near_the_limit(shop: Shop) -> None:
    if shop.dialect == "sqlite":
        pytest.skip("busy is not in progress there")
    from exactly_once import Transaction

    Flaky().register(shop, guard=Transaction(claim_wait=timedelta(milliseconds=50)))
    with Session(shop.outside) as session:
        shop.eo.claim(session, "handler", "A-1")
        early = deliver(shop, order(attempt=1), BROKER)
        late = deliver(shop, order(attempt=4), BROKER)
    assert early.outcome is late.outcome is Outcome.IN_PROGRESS
    assert isinstance(early.verdict, Redeliver)
    assert late.verdict == Ack()
    failure = shop.failure()
    assert (failure.state, failure.attempts, failure.next_attempt_at is not None) == ("waiting", 0, True)


def test_a_message_whose_attempts_are_spent_is_looked_up_first(shop: Shop) -> None:
    flaky = Flaky()
    flaky.register(shop)
    assert deliver(shop, order("done"), BROKER).outcome is Outcome.PROCESSED
    # its acknowledgements were lost, all of them
    assert deliver(shop, order("done", attempt=5), BROKER) == Result(Outcome.DUPLICATE, Ack())
    assert shop.failures() == []
    # and this one ended the process each time
    assert deliver(shop, order("poison", attempt=5), BROKER) == Result(Outcome.DEAD, Ack())
    assert flaky.ran == ["done"]
    assert shop.failure().state == "dead"
    assert "attempts spent, never finished" in shop.failure().error_text


def test_spent_attempts_park_only_the_handlers_that_never_finished(shop: Shop) -> None:
    first, second = Flaky(), Flaky("A-1")
    first.register(shop, name="first")
    second.register(shop, name="second")
    deliver(shop, order(), BROKER)
    assert deliver(shop, order(attempt=5), BROKER).verdict == Ack()
    assert [(row.handler, row.state) for row in shop.failures()] == [("second", "dead")]
    assert (first.ran, second.ran) == (["A-1"], ["A-1"])


# -- what closes a row -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["memory://", "sql://"])
def test_a_success_on_the_brokers_path_closes_the_row(shop: Shop, url: str) -> None:
    with own_engines(shop):
        flaky = Flaky("A-1")
        flaky.register(shop)

        class Heals(set[object]):
            def __contains__(self, no: object) -> bool:
                return super().__contains__(no) and flaky.ran.count(no) < 3

        flaky.bad = Heals(flaky.bad)
        work(shop, order(), order("A-2"), url=url if url == "sql://" else None)
    assert (flaky.ran.count("A-1"), flaky.ran.count("A-2")) == (3, 1)
    assert (shop.failure().state, shop.failure().attempts, shop.failure().next_attempt_at) == ("resolved", 2, None)
    assert sorted(shop.effects()) == ["A-1", "A-2"]


def test_a_success_on_the_pumps_path_closes_the_row(shop: Shop) -> None:
    with own_engines(shop):
        flaky = Flaky("A-1")
        flaky.register(shop)
        for_sync_only(shop, lambda: deliver(shop, order(), UNSAFE))
        if shop.is_async:
            due(shop, "A-1")
        flaky.bad.clear()
        work(shop)
    assert shop.effects() == ["A-1"]
    assert states(shop) == ["resolved"]


def for_sync_only(shop: Shop, do: Any) -> None:
    if not shop.is_async:
        do()


def due(shop: Shop, *nos: str, ordering_key: str | None = None, state: str = "retrying", **more: Any) -> None:
    """Rows that are due now, as an earlier worker left them."""
    from exactly_once.database.server_clock import utcnow
    from exactly_once.handlers.fingerprint import maker

    rule = maker("body")
    with shop.outside.begin() as connection:
        for no in nos:
            message = order(no)
            values = {
                "consumer_group": GROUP,
                "handler": "handler",
                "failure_key": f"k:{no}",
                "fingerprint": rule.of(message, loads(message.body or b"")),
                "business_key": no,
                "topic": "orders",
                "ordering_key": ordering_key,
                "body": message.body,
                "properties": "{}",
                "error_class": "ValueError",
                "error_text": "as before",
                "attempts": 1,
                "first_failed_at": utcnow(),
                "last_failed_at": utcnow(),
                "next_attempt_at": utcnow(),
                "state": state,
            } | more
            connection.execute(insert(shop.tables.failure).values(**values))


def test_the_pump_counts_on_until_a_person_is_asked(shop: Shop) -> None:
    with own_engines(shop):
        flaky = Flaky("A-1")
        flaky.register(shop, retry=Retry(immediate=0, delays=[0], max_attempts=4))
        due(shop, "A-1")
        work(shop)
    assert (flaky.ran, shop.failure().attempts, shop.failure().state) == (["A-1"] * 3, 4, "dead")
    shop.assert_kept(claims=[])


def test_a_requeued_message_is_run_by_the_pump(shop: Shop) -> None:
    with own_engines(shop):
        Flaky().register(shop)
        due(shop, "A-1", state="requeued")
        work(shop)
    assert (shop.effects(), states(shop)) == (["A-1"], ["resolved"])


def a_record(message: Message) -> Message:
    """The message as Kafka's consumer hands it out."""
    headers = [(name, text.encode()) for name, text in message.properties.items()]
    record = {"topic": "orders", "partition": 3, "offset": 17, "timestamp": -1, "key": None, "headers": headers}
    return Message.from_kafka(SimpleNamespace(value=message.body, **record))


@pytest.mark.parametrize("value", ["", "zstd", "damaged"])
@pytest.mark.parametrize("door", ["sql", "kafka"])
def test_no_property_of_a_senders_makes_a_message_one_that_cannot_be_read(shop: Shop, door: str, value: str) -> None:
    came: list[tuple[bytes | None, dict[str, str]]] = []

    def plain(session: Session, message: Message) -> None:
        came.append((message.body, dict(message.properties)))
        put(session, "A-1")
        if len(came) == 1:
            raise ValueError("once")

    async def awaited(session: AsyncSession, message: Message) -> None:
        await session.run_sync(plain, message)

    sent = order(properties={"eo-unread": value, "city": "Köln"})
    with own_engines(shop):
        register = shop.eo.handler("orders", key="no", retry=Retry(immediate=0, max_attempts=1))
        register(awaited if shop.is_async else plain)
        if door == "sql":
            work(shop, sent, url="sql://")
        elif shop.is_async:
            shop.await_(shop.eo.aprocess(a_record(sent)))
        else:
            shop.eo.process(a_record(sent))
        assert states(shop) == ["dead"]
        requeued(shop, [shop.failure().id])
        work(shop)
    assert came == [(sent.body, dict(sent.properties))] * 2
    assert (shop.effects(), states(shop)) == (["A-1"], ["resolved"])


def test_a_body_that_could_not_be_read_is_kept_beside_the_senders_properties_and_read_later(shop: Shop) -> None:
    came: list[Message] = []

    def plain(session: Session, message: Message) -> None:
        came.append(message)
        put(session, "A-1")

    async def awaited(session: AsyncSession, message: Message) -> None:
        await session.run_sync(plain, message)

    sent = order(properties={"eo-unread": "damaged", "city": "Köln"})
    as_it_came = replace(sent, body=ZstdCompressor().compress(sent.body or b""))
    with own_engines(shop):
        shop.eo.handler("orders", key="no")(awaited if shop.is_async else plain)
        delivery = Delivery(
            packed_messages.mark_unread(as_it_came, "zstd"), None, unread=BadBody("nothing unpacks it here")
        )
        [keeping] = shop.eo._router.find(delivery)
        told = (
            shop.await_(greenlet_spawn(keeping.run, delivery.message, BROKER))
            if shop.is_async
            else keeping.run(delivery.message, BROKER)
        )
        assert told.outcome is Outcome.DEAD
        assert (shop.failure().body, shop.failure().business_key) == (as_it_came.body, None)
        requeued(shop, [shop.failure().id])
        work(shop)
    [message] = came
    assert (message.body, message.properties) == (sent.body, sent.properties)
    assert (shop.effects(), states(shop)) == (["A-1"], ["resolved"])


@pytest.mark.parametrize("state", ["dead", "broken", "resolved", "discarded"])
def test_what_a_person_decides_is_never_run_by_the_pump(shop: Shop, state: str) -> None:
    with own_engines(shop):
        flaky = Flaky()
        flaky.register(shop)
        due(shop, "A-1", state=state)
        work(shop)
    assert (flaky.ran, states(shop)) == ([], [state])


def test_a_resend_that_succeeds_closes_the_dead_row(shop: Shop) -> None:
    flaky = Flaky("A-1", "A-2")
    flaky.register(shop, retry=Retry(immediate=0, max_attempts=1))
    for no in ("A-1", "A-2"):
        assert shop.process(order(no)) is Outcome.DEAD
    flaky.bad.clear()
    assert shop.process(order("A-1", message_id="resent")) is Outcome.PROCESSED
    other_payload = Message("orders", b'{"no": "A-1", "more": 1}', message_id="3")
    assert shop.process(other_payload) is Outcome.DEAD  # a conflict, which the success of the first does not settle
    due(shop, "A-3", state="broken")
    assert shop.process(order("A-3")) is Outcome.PROCESSED
    failures = DueFailures(lambda: shop.tables)
    closed = failures.sweep(shop.outside.begin, GROUP)
    assert failures.sweep(shop.outside.begin, "Shop") == 0
    assert closed == 1
    assert states(shop) == ["resolved", "dead", "dead", "broken"]


def test_a_discarded_message_stays_discarded(shop: Shop) -> None:
    flaky = Flaky("A-1")
    flaky.register(shop)
    assert shop.process(order()) is Outcome.FAILED
    with shop.outside.begin() as connection:
        connection.execute(update(shop.tables.failure).values(state="discarded"))
    assert shop.process(order(attempt=2)) is Outcome.DEAD
    assert (shop.failure().state, shop.failure().attempts) == ("discarded", 1)


def test_copies_that_fail_at_the_same_moment_are_all_counted(shop: Shop) -> None:
    if shop.is_async or shop.dialect == "sqlite":
        pytest.skip("threads, and more than one writer")
    with own_engines(shop):
        Flaky("A-1").register(shop, retry=Retry(immediate=0, max_attempts=99))
        shop.process(order("warm"))
        with ThreadPoolExecutor(8) as pool:
            outcomes = list(pool.map(lambda _: shop.process(order()), range(8)))
    # those who found another copy running are in progress, not failed
    failed = outcomes.count(Outcome.FAILED)
    assert failed >= 1
    assert shop.failure().attempts == failed


# -- pumps -------------------------------------------------------------------------------------------------------------


def _take(shop: Shop, connection: Any, *, limit: int = 5, ordered: bool = False, wait: bool = True) -> list[str]:
    rows = DueFailures(lambda: shop.tables).take(
        connection,
        GROUP,
        ["handler"],
        ["handler"] if ordered else [],
        ["handler"] if ordered and wait else [],
        limit=limit,
        lease=timedelta(seconds=60),
    )
    return sorted(row.business_key for row in rows)


def test_a_row_taken_is_leased_and_two_pumps_take_different_ones(shop: Shop) -> None:
    nos = [f"A-{n}" for n in range(8)]
    due(shop, *nos)
    if shop.dialect == "sqlite":  # one writer: the second looks after the first has committed
        with shop.outside.begin() as one:
            first = _take(shop, one)
        with shop.outside.begin() as two:
            second = _take(shop, two)
    else:
        with shop.outside.begin() as one, shop.outside.begin() as two:
            first, second = _take(shop, one), _take(shop, two)
    assert len(first) == 5
    if shop.dialect == "mariadb" and not second:
        # InnoDB locks every row it looks at to sort them, until the first has committed: later, but never the same
        with shop.outside.begin() as two:
            second = _take(shop, two)
    assert sorted(first + second) == nos
    with shop.outside.begin() as connection:
        assert _take(shop, connection, limit=99) == []


def test_two_workers_pumps_run_each_message_once(shop: Shop) -> None:
    if shop.is_async:
        pytest.skip("told once")
    nos = [f"A-{n}" for n in range(30)]
    due(shop, *nos)
    both_started = Turn()
    name = f"memory://two-{next(_names)}"

    def other() -> None:
        with Shop(shop.dialect, shop.colour, shop.url) as another, own_engines(another) as eo:
            Flaky().register(another)
            with eo.worker(name, concurrency=4) as worker:
                both_started.come()
                worker.drain()

    with own_engines(shop):
        Flaky().register(shop)
        with in_thread(other), shop.eo.worker(name, concurrency=4) as worker:
            both_started.wait()
            worker.drain()
    assert sorted(shop.effects()) == sorted(nos)
    assert states(shop) == ["resolved"] * 30


def test_what_is_put_back_leaves_decided_rows_alone(shop: Shop) -> None:
    due(shop, "A-1", "A-2")
    one, two = shop.failures()
    with shop.outside.begin() as connection:
        connection.execute(
            update(shop.tables.failure)
            .where(shop.tables.failure.c.id == two.id)
            .values(state="dead", next_attempt_at=None)
        )
        DueFailures(lambda: shop.tables).postpone(connection, [one.id, two.id], timedelta(hours=1))
    assert [row.next_attempt_at is None for row in shop.failures()] == [False, True]


# -- order -------------------------------------------------------------------------------------------------------------


def test_followers_of_a_failed_message_wait_in_the_store_and_run_in_order(shop: Shop) -> None:
    flaky = Flaky("A-1")
    flaky.register(shop, ordered=True, retry=LATER)

    def outcome(no: str, key: str | None) -> Outcome:
        return deliver(shop, order(no, ordering_key=key), UNSAFE).outcome

    assert outcome("A-1", "customer") is Outcome.FAILED
    assert [outcome(no, "customer") for no in ("A-2", "A-3")] == [Outcome.WAITING] * 2
    assert [outcome(no, key) for no, key in (("B-1", "Customer"), ("C-1", None))] == [Outcome.PROCESSED] * 2
    assert flaky.ran == ["A-1", "B-1", "C-1"]
    assert [(row.state, row.attempts) for row in shop.failures()] == [("retrying", 1), ("waiting", 0), ("waiting", 0)]

    with own_engines(shop):
        healed = Flaky()
        healed.register(shop, ordered=True)
        with shop.outside.begin() as connection:  # an hour later; the youngest is due first
            for row, seconds in zip(shop.failures(), (1, 2, 3), strict=True):
                connection.execute(
                    update(shop.tables.failure)
                    .where(shop.tables.failure.c.id == row.id)
                    .values(next_attempt_at=datetime.now(UTC) - timedelta(seconds=seconds))
                )
        work(shop)
    assert healed.ran == ["A-1", "A-2", "A-3"]
    assert states(shop) == ["resolved"] * 3


@pytest.mark.parametrize("letter", ["x", "é", "中"])
def test_two_ordering_keys_longer_than_their_column_that_begin_alike_are_two(shop: Shop, letter: str) -> None:
    """Cut to the column they were one: the messages of the other key waited behind a dead one, for ever."""
    a, b = ("tenant/" + letter * 255 + end for end in "ab")
    flaky = Flaky("A-1")
    flaky.register(shop, ordered=True, retry=Retry(immediate=0, max_attempts=1))

    def outcome(no: str, key: str) -> Outcome:
        return deliver(shop, order(no, ordering_key=key), UNSAFE).outcome

    assert outcome("A-1", a) is Outcome.DEAD
    assert outcome("B-1", b) is Outcome.PROCESSED
    assert outcome("A-2", a) is Outcome.WAITING

    with own_engines(shop):  # brought by the pump, whose messages have the key as the row has it
        healed = Flaky()
        healed.register(shop, ordered=True)
        requeued(shop, [shop.failures()[0].id])
        work(shop)
    assert healed.ran == ["A-1", "A-2"]
    assert states(shop) == ["resolved"] * 2


def test_only_the_oldest_open_row_of_an_ordering_key_is_taken(shop: Shop) -> None:
    due(shop, "A-1", "A-2", ordering_key="a")
    due(shop, "B-1", ordering_key="b")
    with shop.outside.begin() as connection:
        assert _take(shop, connection, ordered=True) == ["A-1", "B-1"]
    with shop.outside.begin() as connection:  # leased, not closed: still the oldest
        assert _take(shop, connection, ordered=True) == []
        connection.execute(
            update(shop.tables.failure).where(shop.tables.failure.c.business_key == "A-1").values(state="resolved")
        )
    with shop.outside.begin() as connection:
        assert _take(shop, connection, ordered=True) == ["A-2"]


@pytest.mark.parametrize(("after_dead", "runs"), [("wait", []), ("go on", ["A-2"])])
@pytest.mark.parametrize("state", ["dead", "broken"])
def test_behind_a_dead_message_the_handler_waits_or_goes_on(
    shop: Shop, after_dead: Any, runs: list[str], state: str
) -> None:
    due(shop, "A-1", ordering_key="a", state=state, next_attempt_at=None)
    due(shop, "A-2", ordering_key="a", state="waiting", attempts=0)
    flaky = Flaky()
    flaky.register(shop, ordered=True, after_dead=after_dead)
    with shop.outside.begin() as connection:
        assert _take(shop, connection, ordered=True, wait=after_dead == "wait") == runs
    # and one the broker brings
    told = deliver(shop, order("A-3", ordering_key="a"), BROKER)
    assert told.outcome is Outcome.WAITING  # behind A-2 in any case
    with shop.outside.begin() as connection:
        connection.execute(
            update(shop.tables.failure).where(shop.tables.failure.c.business_key == "A-2").values(state="resolved")
        )
    told = deliver(shop, order("A-3", ordering_key="a"), BROKER)
    assert told.outcome is (Outcome.WAITING if after_dead == "wait" else Outcome.PROCESSED)
    assert flaky.ran == ([] if after_dead == "wait" else ["A-3"])


def test_a_message_is_not_blocked_by_its_own_row(shop: Shop) -> None:
    flaky = Flaky("A-1")
    flaky.register(shop, ordered=True)
    message = order(ordering_key="a")
    assert deliver(shop, message, BROKER).outcome is Outcome.FAILED
    flaky.bad.clear()
    assert deliver(shop, order(ordering_key="a", attempt=2), BROKER).outcome is Outcome.PROCESSED


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "key": ({"key": "no"}, {"key": (keys.tag(), "no")}),
    "fingerprint": ({}, {"fingerprint": ["no"]}),
    "no fingerprint": ({}, {"fingerprint": None}),
    "a fingerprint again": ({"fingerprint": None}, {}),
    "both": ({"key": "no"}, {"key": (keys.tag(), "no"), "fingerprint": None}),
}


@pytest.mark.parametrize("attempt", [1, 2], ids=["deliveries not counted", "second delivery"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_message_and_its_followers_do_not_wait_for_its_row_under_a_former_identity(
    shop: Shop, change: str, attempt: int
) -> None:
    before, after = CHANGES[change]
    flaky = Flaky("A-1")
    flaky.register(shop, ordered=True, **before)
    more: dict[str, Any] = {"ordering_key": "a", "tag": "created"}
    assert deliver(shop, order("A-1", **more), BROKER).outcome is Outcome.FAILED
    for failing in (True, False):  # once more under its new identity: it has two rows then
        shop.fresh_eo()
        flaky = Flaky(*["A-1"] * failing)
        flaky.register(shop, ordered=True, **after)
        told = deliver(shop, order("A-1", attempt=attempt, **more), BROKER)
        assert told.outcome is (Outcome.FAILED if failing else Outcome.PROCESSED)
    assert states(shop) == ["resolved"] * 2
    assert deliver(shop, order("A-2", **more), BROKER).outcome is Outcome.PROCESSED


def test_a_message_without_an_id_does_not_wait_for_its_row_under_a_former_fingerprint(shop: Shop) -> None:
    more: dict[str, Any] = {"ordering_key": "a", "message_id": None}
    Flaky("A-1").register(shop, ordered=True)
    assert deliver(shop, order("A-1", **more), BROKER).outcome is Outcome.FAILED
    shop.fresh_eo()
    Flaky().register(shop, ordered=True, fingerprint=None)
    assert deliver(shop, order("A-1", attempt=2, **more), BROKER).outcome is Outcome.PROCESSED
    assert states(shop) == ["resolved"]
    assert deliver(shop, order("A-2", **more), BROKER).outcome is Outcome.PROCESSED


def test_another_payload_under_the_same_key_waits_all_the_same(shop: Shop) -> None:
    Flaky("A-1").register(shop, ordered=True)
    message = order("A-1", ordering_key="a")
    assert deliver(shop, message, BROKER).outcome is Outcome.FAILED
    other = Message("orders", b'{"no": "A-1", "amount": 2}', message_id="another", ordering_key="a")
    assert deliver(shop, other, BROKER).outcome is Outcome.WAITING


def test_a_row_of_a_former_identity_is_closed_for_its_own_message_only(shop: Shop) -> None:
    Flaky("A-1", "A-2").register(shop, ordered=True)
    for no in ("A-1", "B-1"):
        key = no[0].lower()
        assert deliver(shop, order(no, ordering_key=key), BROKER).outcome is (
            Outcome.FAILED if no == "A-1" else Outcome.PROCESSED
        )
    shop.fresh_eo()
    Flaky().register(shop, ordered=True, key=(keys.tag(), "no"))
    assert deliver(shop, order("A-1", tag="t", ordering_key="b", attempt=2), BROKER).outcome is Outcome.PROCESSED
    assert states(shop) == ["retrying"]
    assert deliver(shop, order("A-2", tag="t", ordering_key="a"), BROKER).outcome is Outcome.WAITING


def test_the_pump_takes_a_message_past_its_own_row_under_a_former_identity(shop: Shop) -> None:
    mine: dict[str, Any] = {"ordering_key": "a", "message_id": "one", "body": order("A-1").body}
    due(shop, "A-1", **mine | {"next_attempt_at": None})  # the broker was to bring it again
    due(shop, "x-A-1", **mine)  # and did, and is done with it
    due(shop, "A-2", ordering_key="a", message_id="two")
    with shop.outside.begin() as connection:
        assert _take(shop, connection, ordered=True) == ["x-A-1"]


SHARED: dict[str, tuple[dict[str, Any], Callable[[str], Message]]] = {
    "the id of what it is about": ({}, lambda no: order(no, message_id="order-7", ordering_key="a")),
    "one id and one body": (
        {"key": lambda message: message.properties["event"]},
        lambda no: Message(
            "orders", b'{"no": 7}', message_id="order-7", ordering_key="a", properties={"event": no, "no": no}
        ),
    ),
    "one id and one body, told apart by the tag": (
        {"key": (keys.tag(), "no")},
        lambda no: Message("orders", b'{"no": 7}', tag=no, message_id="order-7", ordering_key="a"),
    ),
}


@pytest.mark.parametrize("how", SHARED)
@pytest.mark.parametrize("features", [BROKER, UNSAFE], ids=["broker", "pump"])
def test_messages_that_share_an_id_keep_their_order(shop: Shop, how: str, features: Features) -> None:
    """Brokers' ids are not unique for each event: many producers give that of the order, of the request, of the batch."""
    options, made = SHARED[how]
    fails = [True]
    ran: list[str] = []

    def do(session: Session, message: Message) -> None:
        ran.append(message.tag or message.properties.get("no") or loads(message.body or b"")["no"])
        if fails[0]:
            raise ValueError("not yet")

    def plain(session: Session, message: Message) -> None:
        do(session, message)

    async def awaited(session: AsyncSession, message: Message) -> None:
        await session.run_sync(do, message)

    shop.eo.handler("orders", **{"key": "no", "name": "handler", "retry": LATER, "ordered": True} | options)(
        awaited if shop.is_async else plain
    )
    assert deliver(shop, made("created"), features).outcome is Outcome.FAILED
    for _ in range(2):
        assert deliver(shop, made("paid"), features).outcome is Outcome.WAITING
    assert ran == ["created"]
    fails[0] = False
    again = [replace(made(no), attempt=2) for no in ("created", "paid")]
    assert [deliver(shop, message, features).outcome for message in again] == [Outcome.PROCESSED] * 2
    assert ran == ["created", "created", "paid"]
    assert set(states(shop)) == {"resolved"}


def test_the_pump_takes_one_of_two_due_messages_that_share_an_id(shop: Shop) -> None:
    due(shop, "A-1", "A-2", ordering_key="a", message_id="order-7")
    with shop.outside.begin() as connection:
        assert _take(shop, connection, ordered=True) == ["A-1"]


def test_a_message_is_not_held_back_by_a_younger_row_of_its_own(shop: Shop) -> None:
    """Its key= was changed and changed back; and the row from between is closed with it."""
    more: dict[str, Any] = {"ordering_key": "a", "tag": "created"}
    for key in ("no", (keys.tag(), "no")):
        shop.fresh_eo()
        Flaky("A-1").register(shop, ordered=True, key=key)
        assert deliver(shop, order("A-1", **more), BROKER).outcome is Outcome.FAILED
    shop.fresh_eo()
    Flaky().register(shop, ordered=True)
    assert deliver(shop, order("A-1", attempt=2, **more), BROKER).outcome is Outcome.PROCESSED
    assert states(shop) == ["resolved"] * 2
    assert deliver(shop, order("A-2", **more), BROKER).outcome is Outcome.PROCESSED


@pytest.mark.parametrize(
    ("fingerprint", "bodies"),
    [(None, [b"one", b"two"]), (["x"], [b'{"y": 1}', b'{"y": 2}']), (lambda message: "same", [b"1", b"2"])],
    ids=["none", "paths", "function"],
)
def test_messages_without_a_key_that_share_an_id_are_kept_each(
    shop: Shop, fingerprint: Any, bodies: list[bytes]
) -> None:
    """They are known by their id and what they say: taken for one, the second would be acknowledged and gone."""
    Flaky().register(shop, fingerprint=fingerprint)
    for body in bodies:
        assert deliver(shop, Message("orders", body, message_id="order-7"), BROKER).outcome is Outcome.DEAD
    assert [row.body for row in shop.failures()] == bodies
    assert deliver(shop, Message("orders", bodies[0], message_id="order-7"), BROKER).outcome is Outcome.DEAD
    assert [row.attempts for row in shop.failures()] == [2, 1]


@pytest.mark.parametrize(("after_dead", "runs"), [("wait", []), ("go on", ["A-2"])])
def test_behind_a_message_whose_commit_is_unknown_for_good_the_handler_waits_or_goes_on(
    shop: Shop, after_dead: Any, runs: list[str]
) -> None:
    due(shop, "A-1", ordering_key="a", state="waiting", next_attempt_at=None)
    due(shop, "A-2", ordering_key="a")
    flaky = Flaky()
    flaky.register(shop, ordered=True, after_dead=after_dead)
    with shop.outside.begin() as connection:
        assert _take(shop, connection, ordered=True, wait=after_dead == "wait") == runs
        connection.execute(
            update(shop.tables.failure).where(shop.tables.failure.c.business_key == "A-2").values(state="resolved")
        )
    told = deliver(shop, order("A-3", ordering_key="a"), BROKER)
    assert told.outcome is (Outcome.WAITING if after_dead == "wait" else Outcome.PROCESSED)
    with shop.outside.connect() as connection, Session(connection) as session:
        failures = FailureStore(lambda: shop.tables)
        wait = after_dead == "wait"
        assert failures.any_blocking(session, GROUP, "handler", after_dead_wait=wait) is wait


def test_order_is_kept_through_a_worker_while_messages_fail(shop: Shop) -> None:
    with own_engines(shop):
        flaky = Flaky()

        class FailsTwice(set[object]):
            def __contains__(self, no: object) -> bool:
                return str(no).endswith(("-2", "-5")) and flaky.ran.count(no) < 3

        flaky.bad = FailsTwice()
        flaky.register(shop, ordered=True)
        work(shop, *(order(f"{key}-{n}", ordering_key=key) for n in range(8) for key in ("a", "b")))
    for key in ("a", "b"):
        assert [text for text in shop.effects() if text.startswith(key)] == [f"{key}-{n}" for n in range(8)]
    assert set(states(shop)) == {"resolved"}


def test_rejects_of_handlers_park_with_the_reason_a_person_reads(shop: Shop) -> None:
    with own_engines(shop):

        def do(session: Session) -> None:
            session.execute(insert(ONLY).values(text="half"))
            raise Reject("no such sku: 7")

        rejecting: Do = do
        shop.handles(rejecting)
        work(shop, order())
    assert (shop.failure().state, shop.failure().error_text) == ("dead", "no such sku: 7")
    assert shop.rows(ONLY) == []


@pytest.mark.parametrize("guard", ["lock", "none", "purged claim"])
def test_a_failure_of_a_key_that_ended_well_before_is_another_life(shop: Shop, redis_url: str, guard: str) -> None:
    """It is counted from one, and the row keeps the message that failed: an acknowledged one is nowhere else."""
    if guard == "none":
        shop.fresh_eo(enforce=False)
    more: dict[str, Any] = {"guard": Lock(timedelta(seconds=30), store=redis_url)} if guard == "lock" else {}
    bad = [True]

    def do(session: Session) -> None:
        if bad:
            raise ValueError
        put(session, "done")

    name = f"handler-{next(_names)}-{shop.dialect}"
    shop.handles(do, name=name, fingerprint=None, retry=Retry(immediate=0, delays=[0.01], max_attempts=2), **more)

    def version(number: int, attempt: int = 1) -> Message:
        body = dumps({"no": 1, "version": number}).encode()
        return replace(order(1, attempt=attempt), body=body, message_id=f"m-{number}")

    for number in (1, 2, 3):
        assert shop.process(version(number)) is Outcome.FAILED, number
        bad.clear()
        assert shop.process(version(number, attempt=2)) is Outcome.PROCESSED
        bad.append(True)
        (row,) = shop.failures()
        assert (row.state, row.attempts, row.message_id) == ("resolved", 1, f"m-{number}")
        if guard == "purged claim":
            with shop.outside.begin() as connection:
                connection.execute(shop.tables.idempotent.delete())
    assert [shop.process(version(4, attempt)) for attempt in (1, 2)] == [Outcome.FAILED, Outcome.DEAD]
    (row,) = shop.failures()
    assert (row.message_id, loads(row.body)["version"], row.attempts) == ("m-4", 4, 2)
    bad.clear()
    requeued(shop, [row.id])
    assert shop.process(version(4, attempt=3)) is Outcome.PROCESSED
    assert shop.failure().state == "resolved"


@pytest.mark.parametrize("guard", ["lock", "purged claim"])
def test_what_a_person_discarded_swallows_no_message_of_another_day(shop: Shop, redis_url: str, guard: str) -> None:
    bad = [True]

    def do(session: Session) -> None:
        if bad:
            raise ValueError
        put(session, "done")

    more: dict[str, Any] = {"guard": Lock(timedelta(seconds=30), store=redis_url)} if guard == "lock" else {}
    retry = Retry(immediate=0, delays=[0.01], max_attempts=2)
    shop.handles(do, name=f"handler-{next(_names)}-{shop.dialect}", retry=retry, **more)
    assert [shop.process(order(1, attempt=n)) for n in (1, 2)] == [Outcome.FAILED, Outcome.DEAD]
    with shop.outside.begin() as connection:
        assert discard(connection, shop.tables, Chosen(group=GROUP), by="me", why="not today") == 1
        connection.execute(shop.tables.idempotent.delete())
    # the broker brings the very same one once more, in the middle of whose run it may have been discarded
    assert shop.process(order(1, attempt=3)) is Outcome.DEAD
    assert shop.failure().state == "discarded"
    assert shop.process(order(1, message_id="of-another-day")) is Outcome.FAILED
    row = shop.failure()
    assert (row.state, row.attempts, row.message_id, row.decided_by) == ("retrying", 1, "of-another-day", None)
    bad.clear()
    assert shop.process(order(1, attempt=2, message_id="of-another-day")) is Outcome.PROCESSED
    assert shop.effects() == ["done"]


def test_what_a_person_discarded_stays_discarded_for_a_producers_resend(shop: Shop) -> None:
    """Under another id. Its key was consumed with another payload, so that nothing but this row knows of the decision."""
    shop.handles(lambda session: put(session, "done"), key=keys.message_key())
    assert shop.process(Message("orders", b'{"no": 1}', key="A-1", message_id="id-0")) is Outcome.PROCESSED
    bad = Message("orders", b'{"no": 2}', key="A-1", message_id="id-1")
    assert shop.process(bad) is Outcome.DEAD
    with shop.outside.begin() as connection:
        assert discard(connection, shop.tables, Chosen(group=GROUP), by="me", why="wrong") == 1
    shop.process(replace(bad, message_id="id-2"))
    row = shop.failure()
    assert (row.state, row.message_id, row.decided_by) == ("discarded", "id-1", "me")


@pytest.mark.parametrize("guard", ["lock", "purged claim"])
def test_a_key_that_ended_well_before_has_no_place_in_the_order_from_then(
    shop: Shop, redis_url: str, guard: str
) -> None:
    failing = {1}

    def do(session: Session, no: Any) -> None:
        put(session, str(no))
        if no in failing:
            raise ValueError(no)

    def of(no: int, attempt: int = 1) -> Message:
        return order(no, attempt=attempt, ordering_key="item 7")

    more: dict[str, Any] = {"guard": Lock(timedelta(seconds=30), store=redis_url)} if guard == "lock" else {}
    retry = Retry(immediate=0, delays=[0.01], max_attempts=2)
    name = f"handler-{next(_names)}-{shop.dialect}"
    ALONE.handles(shop, do, name=name, ordered=True, retry=retry, **more)
    assert deliver(shop, of(1), BROKER).outcome is Outcome.FAILED
    failing.clear()
    assert deliver(shop, of(1, 2), BROKER).outcome is Outcome.PROCESSED
    with shop.outside.begin() as connection:
        connection.execute(shop.tables.idempotent.delete())
        connection.execute(EFFECT.delete())
    failing.add(2)
    assert [deliver(shop, of(2, n), BROKER).outcome for n in (1, 2)] == [Outcome.FAILED, Outcome.DEAD]
    # the first one's text comes another day: it is behind the second, which a person must decide
    assert [deliver(shop, of(1, n), BROKER).outcome for n in (1, 2, 3, 4)] == [Outcome.WAITING] * 4
    assert sorted(row.state for row in shop.failures()) == ["dead", "waiting"]
    failing.clear()
    (dead,) = (row for row in shop.failures() if row.state == "dead")
    requeued(shop, [dead.id])
    assert deliver(shop, of(2, 1), BROKER).outcome is Outcome.PROCESSED
    assert deliver(shop, of(1, 1), BROKER).outcome is Outcome.PROCESSED
    assert shop.effects() == ["2", "1"]
