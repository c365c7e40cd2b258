"""What is particular to the broker in a table: its races, its fences, its index, its errors."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, bindparam, create_engine, func, insert, select, text, update

from exactly_once.database.schema import tables
from exactly_once.database.server_clock import utcnow
from exactly_once.errors import ConfigurationError
from exactly_once.message import Message
from exactly_once.outcome import Ack, Redeliver
from exactly_once.testing.postgres import EmbeddedPostgres
from exactly_once.transports.contract import Consumer, Delivery, Receipt, Subscription, Surroundings, Tidied
from exactly_once.transports.registry import transport_from
from exactly_once.transports.sql.database import Database
from exactly_once.transports.sql.statements import NO_GROUP, WINDOW, Look, statements
from exactly_once.transports.sql.transport import SqlTransport
from tests.services import mariadb
from tests.services.need import require

_names = count()
SECOND = timedelta(seconds=1)
NOW = timedelta(0)


@pytest.fixture(scope="module")
def postgres() -> Iterator[EmbeddedPostgres]:
    with EmbeddedPostgres() as server:
        yield server


@pytest.fixture(scope="module")
def postgres_engine(postgres: EmbeddedPostgres) -> Iterator[Engine]:
    yield from _with_tables(postgres.create_database("queue"))


@pytest.fixture(scope="module", params=["postgresql", "mariadb", "sqlite"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    match request.param:
        case "postgresql":
            yield request.getfixturevalue("postgres_engine")
        case "mariadb":
            require(mariadb)
            with mariadb.MariaDB() as server:
                yield from _with_tables(server.create_database("queue"))
        case _:
            yield from _with_tables(f"sqlite:///{tmp_path_factory.mktemp('queue') / Path('queue.db')}")


def _with_tables(url: str) -> Iterator[Engine]:
    engine = create_engine(url, pool_size=20)
    tables().metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def topic() -> str:
    return f"topic-{next(_names)}"


def transport(engine: Engine, invisible: timedelta = timedelta(seconds=60)) -> SqlTransport:
    return SqlTransport(lambda: engine, invisible=invisible)


def joined(engine: Engine, group: str, subscription: Subscription, invisible: timedelta = 60 * SECOND) -> Consumer:
    [consumer] = transport(engine, invisible).subscribe(group, [subscription])
    return consumer


def sent(engine: Engine, messages: Sequence[Message]) -> None:
    assert all(isinstance(answer, Receipt) for answer in transport(engine).producer().send(messages))


def bodies(deliveries: Sequence[Delivery]) -> list[bytes | None]:
    return [delivery.message.body for delivery in deliveries]


# -- joining and sending ----------------------------------------------------------------------------------------------


def test_what_was_sent_before_any_group_joined_goes_to_the_first_that_joins(engine: Engine, topic: str) -> None:
    sent(engine, [Message(topic, b"early")])
    first = joined(engine, "first", Subscription(topic))
    second = joined(engine, "second", Subscription(topic))
    sent(engine, [Message(topic, b"late")])
    assert bodies(first.receive(5, SECOND)) == [b"early", b"late"]
    assert bodies(second.receive(5, SECOND)) == [b"late"]


def test_a_send_that_saw_no_group_and_a_join_at_the_same_moment_lose_nothing(engine: Engine) -> None:
    """Many sends and two joins at once: the first group gets every message there is, and none is left for nobody."""
    senders, each = 4, 5

    def send(topic: str, start: threading.Barrier, n: int) -> None:
        start.wait()
        for m in range(each):
            sent(engine, [Message(topic, f"{n}.{m}".encode())])

    def join(topic: str, start: threading.Barrier, group: str, after_s: float) -> Consumer:
        start.wait()
        time.sleep(after_s)  # another moment each round; the assertion holds at any
        return joined(engine, group, Subscription(topic))

    for round_ in range(6):
        topic, start = f"race-{next(_names)}", threading.Barrier(senders + 2)
        with ThreadPoolExecutor(senders + 2) as pool:
            jobs = [pool.submit(send, topic, start, n) for n in range(senders)]
            joins = [pool.submit(join, topic, start, group, 0.002 * round_) for group in ("one", "two")]
            consumers = [job.result() for job in joins]
            for job in jobs:
                job.result()
        sent(engine, [Message(topic, b"after")])
        got = [set(bodies(consumer.receive(100, SECOND))) for consumer in consumers]
        everything = {f"{n}.{m}".encode() for n in range(senders) for m in range(each)} | {b"after"}
        # whichever joined first adopted what was there and saw all later sends
        assert everything in got
        assert all(b"after" in part for part in got)


def test_a_join_waits_for_a_send_that_has_read_the_groups(engine: Engine, topic: str) -> None:
    """The race itself, step by step: the send has seen no group and has not committed when the group joins."""
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer: a send and a join cannot overlap there")
    sent(engine, [Message(topic, b"makes the topic's gate row")])
    database = Database(lambda: engine, None)
    sql = database.sql
    with ThreadPoolExecutor(1) as pool:
        with engine.connect() as connection, database.begun(connection):
            connection.execute(sql.gate([topic], alone=False)).all()
            assert connection.execute(sql.groups([topic])).all() == []
            joining = pool.submit(joined, engine, "late", Subscription(topic))
            with pytest.raises(TimeoutError):
                joining.result(0.3)  # it must not have joined while this send is under way
            row = {"topic": topic, "consumer_group": NO_GROUP, "message_id": "m", "properties": "{}", "body": b"raced"}
            connection.execute(sql.put(NOW), [row])
        consumer = joining.result(10)
    assert b"raced" in bodies(consumer.receive(5, SECOND))


def test_a_send_waits_for_a_join_under_way_and_sees_its_group(engine: Engine, topic: str) -> None:
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer: a send and a join cannot overlap there")
    sent(engine, [Message(topic, b"makes the topic's gate row")])
    database = Database(lambda: engine, None)
    sql = database.sql
    with ThreadPoolExecutor(1) as pool:
        with engine.connect() as connection, database.begun(connection):
            connection.execute(sql.gate([topic], alone=True)).all()
            connection.execute(sql.add_group(topic, "g"))
            sending = pool.submit(sent, engine, [Message(topic, b"seen")])
            with pytest.raises(TimeoutError):
                sending.result(0.3)
        sending.result(10)
    consumer = joined(engine, "g", Subscription(topic))
    assert bodies(consumer.receive(5, SECOND)) == [b"seen"]


# -- order ------------------------------------------------------------------------------------------------------------


def test_two_receivers_at_the_same_moment_never_take_two_messages_of_one_key(engine: Engine, topic: str) -> None:
    wanted = Subscription(topic, ordered=True)
    consumers = [joined(engine, "g", wanted) for _ in range(4)]
    each, keys = 12, ["a", "b"]
    sent(engine, [Message(topic, f"{n}".encode(), ordering_key=key) for n in range(each) for key in keys])
    lock = threading.Lock()
    held: Counter[str] = Counter()
    order: dict[str, list[int]] = {key: [] for key in keys}
    broken: list[str] = []

    def receive(consumer: Consumer) -> None:
        while sum(map(len, order.values())) < each * len(keys):
            for delivery in consumer.receive(10, timedelta(milliseconds=50)):
                key = str(delivery.message.ordering_key)
                with lock:
                    held[key] += 1
                    if held[key] > 1:
                        broken.append(key)
                    order[key].append(int(delivery.message.body or b""))
                time.sleep(0.003)
                with lock:
                    held[key] -= 1
                consumer.settle([(delivery, Ack())])

    with ThreadPoolExecutor(len(consumers)) as pool:
        for job in [pool.submit(receive, consumer) for consumer in consumers]:
            job.result(120)
    assert broken == []
    assert order == {key: list(range(each)) for key in keys}


def test_rows_that_appear_while_a_receiver_looks_are_not_taken_behind_a_held_one(engine: Engine, topic: str) -> None:
    """A locking read that sees newer rows than its own subquery would take row 2 while row 1 is held."""
    wanted = Subscription(topic, ordered=True)
    consumers = [joined(engine, "g", wanted) for _ in range(3)]
    done = threading.Event()
    lock = threading.Lock()
    held: Counter[str] = Counter()
    broken: list[str] = []
    received = 0

    def produce() -> None:
        for n in range(40):
            for part in range(3):  # three commits, so that a later row may appear without the earlier
                sent(engine, [Message(topic, str(part).encode(), ordering_key=f"k{n}")])

    def receive(consumer: Consumer) -> None:
        nonlocal received
        while not done.is_set():
            deliveries = consumer.receive(10, timedelta(milliseconds=20))
            with lock:
                held.update(str(d.message.ordering_key) for d in deliveries)
                broken.extend(key for key, n in held.items() if n > 1)
            time.sleep(0.002)
            with lock:
                held.subtract(str(d.message.ordering_key) for d in deliveries)
                received += len(deliveries)
                if received >= 120:
                    done.set()
            consumer.settle([(d, Ack()) for d in deliveries])

    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(receive, consumer) for consumer in consumers] + [pool.submit(produce)]
        assert done.wait(60)
        for job in jobs:
            job.result(10)
    assert broken == []


def test_a_locking_read_that_sees_newer_rows_than_its_subquery_takes_none_of_them(engine: Engine, topic: str) -> None:
    """MariaDB and MySQL: with an old snapshot, "no earlier row exists" is true of row 2 while another holds row 1."""
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer: nothing appears while a receiver looks")
    wanted = Subscription(topic, ordered=True)
    consumer = joined(engine, "g", wanted)
    level = "REPEATABLE READ"
    with engine.connect().execution_options(isolation_level=level) as connection, connection.begin():
        connection.execute(select(func.count()).select_from(tables().queue)).all()  # the snapshot is taken here
        for n in range(2):
            sent(engine, [Message(topic, str(n).encode(), ordering_key="k")])
        assert bodies(consumer.receive(10, SECOND)) == [b"0"]
        assert connection.execute(statements(None, engine.dialect.name).due(Look("g", wanted, 10))).all() == []


def test_a_row_that_another_has_locked_is_passed_over(engine: Engine, topic: str) -> None:
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite locks no rows")
    consumer = joined(engine, "g", Subscription(topic))
    sent(engine, [Message(topic, b"locked"), Message(topic, b"free")])
    queue = tables().queue
    with ThreadPoolExecutor(1) as pool, engine.begin() as connection:
        [first] = connection.execute(select(func.min(queue.c.id)).where(queue.c.topic == topic)).scalars()
        connection.execute(select(queue.c.id).where(queue.c.id == first).with_for_update()).all()
        assert bodies(pool.submit(consumer.receive, 10, SECOND).result(10)) == [b"free"]


def test_a_producer_does_not_wait_for_a_receiver_under_way(engine: Engine, topic: str) -> None:
    """Under REPEATABLE READ the receiver's range scan takes gap locks on MariaDB and MySQL."""
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer")
    joined(engine, "g", Subscription(topic))
    sent(engine, [Message(topic, b"x")])
    database = Database(lambda: engine, None)
    with ThreadPoolExecutor(1) as pool, engine.connect() as connection, database.begun(connection):
        connection.execute(database.sql.due(Look("g", Subscription(topic), 10))).all()
        pool.submit(sent, engine, [Message(topic, b"y")]).result(10)


def test_keys_behind_a_long_backlog_of_held_back_ones_flow(engine: Engine, topic: str) -> None:
    wanted = Subscription(topic, ordered=True)
    consumer = joined(engine, "g", wanted)
    backlog = [Message(topic, b"x", ordering_key="busy") for _ in range(WINDOW + 200)]
    sent(engine, [*backlog, Message(topic, b"other", ordering_key="other"), Message(topic, b"without")])
    [held] = consumer.receive(10, SECOND)
    assert held.message.ordering_key == "busy"
    assert sorted(map(str, bodies(consumer.receive(10, SECOND)))) == ["b'other'", "b'without'"]
    assert list(consumer.receive(10, timedelta(0))) == []
    consumer.settle([(held, Ack())])
    assert bodies(consumer.receive(10, SECOND)) == [b"x"]


@pytest.mark.parametrize("keys", [10, 3 * WINDOW])
@pytest.mark.parametrize("tags", [(), ("wanted",)])
def test_new_keys_are_found_past_any_number_of_stuck_ones(
    engine: Engine, topic: str, keys: int, tags: tuple[str, ...]
) -> None:
    consumer = joined(engine, "g", Subscription(topic, tags=tags, ordered=True))
    for of_a_key in range(2 if keys > WINDOW else 300):
        stuff(engine, topic, [f"stuck-{key:05}" for key in range(keys)], late=of_a_key == 0, tag="wanted")
    new = [f"a-{n}" for n in range(10)] + [f"z-{n}" for n in range(10)] + ["stuck-00005-new", ""]
    stuff(engine, topic, new, tag="wanted")
    q = tables().queue
    with engine.begin() as connection:
        connection.execute(update(q).where(q.c.topic == topic, q.c.ordering_key == "z-9").values(ordering_key=None))
    found: list[str] = []
    for _ in range(keys // WINDOW + 3):
        got = consumer.receive(len(new), NOW)
        found += [delivery.message.ordering_key or "none" for delivery in got]
        consumer.settle([(delivery, Ack()) for delivery in got])
    assert sorted(found) == sorted("none" if key in ("z-9", "") else key for key in new)


def stuff(engine: Engine, topic: str, keys: Sequence[str], *, late: bool = False, tag: str | None = None) -> None:
    """Write one row for each key, all with one time, as a statement of many rows does."""
    q = statements(None, engine.dialect.name).queue
    row = {
        "consumer_group": "g",
        "topic": topic,
        "tag": tag,
        "body": b"",
        "properties": "{}",
        "attempts": 0,
    }
    with engine.begin() as connection:
        now = connection.execute(select(utcnow(3600 if late else -3600))).scalar_one()
        connection.execute(
            insert(q), [row | {"ordering_key": key, "message_id": key, "deliver_at": now} for key in keys]
        )


def test_a_row_of_an_unwanted_tag_does_not_hold_its_key_back(engine: Engine, topic: str) -> None:
    consumer = joined(engine, "g", Subscription(topic, ("created",), ordered=True))
    sent(
        engine,
        [Message(topic, b"1", tag="paid", ordering_key="a"), Message(topic, b"2", tag="created", ordering_key="a")],
    )
    assert bodies(consumer.receive(5, SECOND)) == [b"2"]


def test_what_looks_like_a_slip_of_its_sender_is_counted(engine: Engine) -> None:
    topic = "zebra"  # no other test's looks like it
    wanted = [Subscription(topic, ("created", "paid"))]
    broker = transport(engine)
    broker.subscribe("slips", wanted)
    assert broker.concerns("slips", wanted) == []
    sent(engine, [Message(topic, b"1"), Message(topic, b"2", tag="created"), Message(f"{topic}s", b"3")])
    untagged, misspelled = broker.concerns("slips", wanted)
    assert f"1 message(s) of topic {topic} have no tag" in untagged
    assert f"take {topic}:created|paid." in untagged
    assert f"1 message(s) of topic '{topic}s' wait for a group" in misspelled
    assert f"Did you mean '{topic}'?" in misspelled
    assert broker.concerns("slips", [Subscription(topic)]) == [misspelled]


def test_a_tag_that_looks_like_one_of_ours_is_counted_and_another_programs_is_not(engine: Engine) -> None:
    topic = "quagga"  # no other test's looks like it
    wanted = [Subscription(topic, ("created", "paid"))]
    broker = transport(engine)
    broker.subscribe("slips", wanted)
    tags = ["create", "create", "crated", "created", "paid", "shipped", "PAID"]
    sent(engine, [Message(topic, b"x", tag=tag) for tag in tags])
    told = [concern for concern in broker.concerns("slips", wanted) if topic in concern]
    assert told == [
        f"sql://: {number} message(s) of topic {topic} have the tag {tag!r}, which no handler of group slips takes (they take"
        f" {topic}:created|paid); deleted after a day. Did you mean {meant!r}?"
        for number, tag, meant in [(1, "PAID", "paid"), (1, "crated", "created"), (2, "create", "created")]
    ]
    assert not [concern for concern in broker.concerns("slips", [Subscription(topic)]) if topic in concern]
    assert not [concern for concern in broker.concerns("others", wanted) if topic in concern]


# -- holding and settling ---------------------------------------------------------------------------------------------


def test_an_expired_holder_settles_and_extends_nothing(engine: Engine, topic: str) -> None:
    consumer = joined(engine, "g", Subscription(topic), timedelta(milliseconds=300))
    sent(engine, [Message(topic, b"x")])
    [late] = consumer.receive(1, SECOND)
    [current] = consumer.receive(1, 2 * SECOND)
    assert (late.message.attempt, current.message.attempt) == (1, 2)
    consumer.settle([(late, Ack())])
    consumer.settle([(late, Redeliver())])
    consumer.extend([late])
    [third] = consumer.receive(1, 2 * SECOND)
    assert third.message.attempt == 3
    consumer.settle([(third, Ack())])
    assert rows(engine, topic) == 0


def test_one_settle_may_hold_both_deliveries_of_one_row(engine: Engine, topic: str) -> None:
    consumer = joined(engine, "g", Subscription(topic), timedelta(milliseconds=300))
    sent(engine, [Message(topic, b"x")])
    [late] = consumer.receive(1, SECOND)
    [current] = consumer.receive(1, 2 * SECOND)
    consumer.settle([(late, Ack()), (current, Redeliver(60 * SECOND))])
    assert rows(engine, topic) == 1


def test_acknowledging_many_deletes_them_and_nothing_else(engine: Engine, topic: str) -> None:
    consumer = joined(engine, "g", Subscription(topic))
    sent(engine, [Message(topic, str(n).encode()) for n in range(50)])
    deliveries = consumer.receive(40, SECOND)
    assert len(deliveries) == 40
    consumer.settle([(delivery, Ack()) for delivery in deliveries])
    assert rows(engine, topic) == 10


def test_what_nobody_of_the_group_wants_is_dropped_after_a_day(
    engine: Engine, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    joined(engine, "g", Subscription(topic, ("created",)))
    sent(engine, [Message(topic, b"old", tag="paid"), Message(topic, b"wanted", tag="created")])
    queue = tables().queue
    with engine.begin() as connection:
        connection.execute(update(queue).where(queue.c.topic == topic).values(deliver_at=utcnow(-90000)))
    sent(engine, [Message(topic, b"young", tag="paid")])
    consumer = joined(engine, "g", Subscription(topic, ("created",)))
    assert isinstance(consumer, Tidied)
    with caplog.at_level(logging.INFO, "exactly_once.transports.sql"):
        consumer.tidy()
    assert bodies(consumer.receive(5, SECOND)) == [b"wanted"]
    [told] = caplog.messages
    assert told == (
        f"topic {topic}: deleted 1 message(s) that waited for a day with a tag, or without one, that no handler of group g takes"
        f" (they take {topic}:created)"
    )
    with engine.connect() as connection:
        left = connection.execute(select(queue.c.body).where(queue.c.topic == topic)).scalars().all()
    assert sorted(left) == [b"wanted", b"young"]


def test_a_topic_named_like_a_pattern_and_a_key_that_differs_in_case_are_kept_apart(engine: Engine, topic: str) -> None:
    wanted = Subscription(topic, ordered=True)
    consumer = joined(engine, "g", wanted)
    sent(engine, [Message(topic, key.encode(), ordering_key=key) for key in ("a", "A", "a ", "á")])
    assert len(consumer.receive(5, SECOND)) == 4


# -- refusing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        Message("", b""),
        Message("t\x00", b""),
        Message("t" * 256, b""),
        Message("t", b"", tag="ä" * 128),
        Message("t", b"", key="k" * 1025),
        Message("t", b"", ordering_key="\ud800"),
    ],
    ids=lambda value: repr(value).partition(" at 0x")[0],
)
def test_a_message_no_column_can_hold_is_refused_and_the_others_are_sent(
    postgres_engine: Engine, message: Message
) -> None:
    good = Message("t", b"fine")
    answers = transport(postgres_engine).producer().send([good, message, good])
    assert isinstance(answers[0], Receipt)
    assert isinstance(answers[1], ValueError)
    assert isinstance(answers[2], Receipt)


def test_of_one_ordering_key_none_is_sent_after_a_refused_one(postgres_engine: Engine, topic: str) -> None:
    messages = [Message(topic, b"1", ordering_key="a"), Message(topic, b"2", ordering_key="a", key="\x00")]
    messages += [Message(topic, b"3", ordering_key="a"), Message(topic, b"4", ordering_key="b")]
    answers = transport(postgres_engine).producer().send(messages)
    assert [isinstance(answer, Receipt) for answer in answers] == [True, False, False, True]
    assert not isinstance(answers[2], ValueError)


def test_a_missing_schema_is_reported_with_the_command_that_makes_it(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'empty.db'}")
    problems = transport(engine).check("g", [Subscription("t")])
    assert len(problems) == 2
    assert all("exactly-once db upgrade" in problem for problem in problems)


def test_a_database_that_does_not_answer_is_reported_without_its_password() -> None:
    engine = create_engine("postgresql+psycopg://shop:secret@127.0.0.1:1/shop")
    [problem] = transport(engine).check("g", [Subscription("t")])
    assert "does not answer" in problem
    assert "secret" not in problem


def test_a_database_in_memory_is_refused() -> None:
    engine = create_engine("sqlite://")
    tables().metadata.create_all(engine)
    assert any("in memory" in problem for problem in transport(engine).check("g", [Subscription("t")]))


def test_without_a_database_the_check_says_what_to_set() -> None:
    [problem] = transport_from("sql://", Surroundings()).check("g", [Subscription("t")])
    assert "EXACTLY_ONCE_DATABASE" in problem


@pytest.mark.parametrize("url", ["sql://localhost/shop", "sql://?colour=red", "sql://?invisible_s=soon", "sqll://"])
def test_a_wrong_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError):
        transport_from(url, Surroundings())


@pytest.mark.parametrize("group", ["", "g" * 65, "g\x00"])
def test_a_group_no_column_can_hold_is_refused(group: str) -> None:
    with pytest.raises(ConfigurationError):
        transport(create_engine("sqlite:///never.db")).subscribe(group, [Subscription("t")])


# -- cost -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full(postgres: EmbeddedPostgres) -> Iterator[Engine]:
    """100,000 rows waiting, 20,000 delayed, another group's and another topic's beside them; four ordering keys in ten."""
    for engine in _with_tables(postgres.create_database("full")):
        with engine.begin() as connection:
            connection.execute(
                text(
                    "INSERT INTO message_queue (consumer_group, topic, ordering_key, body, properties, message_id,"
                    " deliver_at) SELECT g, t, CASE WHEN n % 10 < 4 THEN 'key' || n % 1000 END, 'x', '{}', n::text,"
                    " now() + (CASE WHEN n > 100000 THEN interval '1 day' ELSE interval '-1 hour' END)"
                    " + n * interval '1 microsecond'"
                    " FROM generate_series(1, 120000) AS n, (VALUES ('g', 't'), ('g', 'u'), ('h', 't')) AS v (g, t)"
                )
            )
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("ANALYZE message_queue"))
        yield engine


@pytest.mark.parametrize("ordered", [False, True])
def test_receiving_reads_the_index_and_not_the_table(full: Engine, ordered: bool) -> None:
    wanted = Subscription("t", ordered=ordered)
    statement = statements(None, "postgresql").take(Look("g", wanted, 32), "token", SECOND)
    with full.connect() as connection, connection.begin() as transaction:
        plan = explain(connection, statement)
        transaction.rollback()
    assert "Seq Scan" not in plan, plan
    assert "ix_message_queue_due" in plan
    assert buffers(plan) < 3000, plan


def test_a_backlog_of_few_keys_without_statistics_is_looked_through_quickly(postgres: EmbeddedPostgres) -> None:
    for engine in _with_tables(postgres.create_database("young")):
        with engine.begin() as connection:
            connection.execute(text("ALTER TABLE message_queue SET (autovacuum_enabled = off)"))
            connection.execute(
                text(
                    "INSERT INTO message_queue (consumer_group, topic, ordering_key, body, properties, message_id,"
                    " deliver_at) SELECT 'g', 't', 'key' || n % 2, 'x', '{}', n::text,"
                    " now() + n * interval '1 microsecond' FROM generate_series(1, 100000) AS n"
                )
            )
        consumer = joined(engine, "g", Subscription("t", ordered=True))
        assert len(consumer.receive(10, SECOND)) == 2
        wanted = Subscription("t", ordered=True)
        with engine.connect() as connection:
            edge = tuple(connection.execute(statements(None, "postgresql").edge("g", wanted)).one())
            plan = explain(
                connection, statements(None, "postgresql").take(Look("g", wanted, 9, until=edge), "t", SECOND)
            )
        assert buffers(plan) < 10 * WINDOW, plan


KEYS, ROWS_OF_A_KEY = 500, 200


@pytest.fixture(scope="module")
def stuck(engine: Engine) -> Engine:
    """500 keys whose first message waits for its next try, with 199 due ones behind each, all of one moment."""
    numbers = {
        "postgresql": "generate_series(0, {last}) AS n",
        "mysql": "(SELECT seq AS n FROM seq_0_to_{last}) AS numbers",
        "sqlite": "(WITH RECURSIVE c(n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM c WHERE n < {last}) SELECT n FROM c) AS c",
    }[engine.dialect.name].format(last=KEYS * ROWS_OF_A_KEY - 1)
    with engine.begin() as connection:
        due, later = (connection.execute(select(utcnow(seconds))).scalar_one() for seconds in (-3600, 3600))
        connection.execute(
            text(
                "INSERT INTO message_queue (consumer_group, topic, ordering_key, body, properties, message_id, deliver_at)"
                f" SELECT 'g', 'stuck', CAST(1000 + n % {KEYS} AS CHAR(4)), 'x', '{{}}', CAST(n AS CHAR(9)),"
                f" CASE WHEN n < {KEYS} THEN :later ELSE :due END FROM {numbers}"
            ).bindparams(bindparam("due", due, utcnow.type), bindparam("later", later, utcnow.type))
        )
    return engine


def test_looking_past_stuck_keys_takes_a_step_a_key_and_none_for_the_rows_behind_it(stuck: Engine) -> None:
    wanted = Subscription("stuck", ordered=True)
    sql = statements(None, stuck.dialect.name)
    with stuck.connect() as connection:
        edge = connection.execute(sql.edge("g", wanted)).one()
        assert connection.execute(sql.due(Look("g", wanted, 9, until=(edge.deliver_at, edge.id)))).all() == []
        found = connection.execute(sql.heads("g", wanted, None)).all()
        assert [(row.ordering_key, row.id) for row in found] == [(str(1000 + key), None) for key in range(KEYS)]
        match stuck.dialect.name:
            case "postgresql":
                plan = explain(connection, sql.heads("g", wanted, None))
                assert "Seq Scan" not in plan, plan
                assert plan.count("ix_message_queue_order") == 3, plan
                assert buffers(plan) < 20 * KEYS, plan
                assert "ix_message_queue_order" in explain(connection, sql.keyless("g", wanted, 9))
                assert buffers(explain(connection, sql.keyless("g", wanted, 9))) < 50
            case "mysql":
                # the server counts what it reads: of each key two rows of the index, and its first message
                before = handler_reads(connection)
                connection.execute(sql.heads("g", wanted, None)).all()
                connection.execute(sql.keyless("g", wanted, 9)).all()
                assert handler_reads(connection) - before < 10 * KEYS
            case _:
                compiled = sql.heads("g", wanted, None).compile(connection, compile_kwargs={"literal_binds": True})
                plan = str(connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {compiled}").all())
                assert plan.count("ix_message_queue_order") == 3, plan
                assert "SCAN message_queue" not in plan, plan


def handler_reads(connection: Any) -> int:
    counted = connection.execute(text("SHOW SESSION STATUS LIKE 'Handler_read%'")).all()
    return sum(int(value) for _, value in counted)


def test_looking_for_nothing_does_not_walk_over_what_is_delayed(full: Engine) -> None:
    queue = tables().queue
    with full.connect() as connection, connection.begin() as transaction:
        connection.execute(update(queue).where(queue.c.consumer_group == "h").values(deliver_at=utcnow(86400)))
        # a fresh look in the same transaction; the rows are all there, none is due
        plan = explain(
            connection, statements(None, "postgresql").take(Look("h", Subscription("t"), 32), "token", SECOND)
        )
        transaction.rollback()
    assert "Rows Removed by Filter" not in plan, plan


def explain(connection: Any, statement: Any) -> str:
    compiled = statement.compile(connection, compile_kwargs={"literal_binds": True})
    return "\n".join(connection.execute(text(f"EXPLAIN (ANALYZE, BUFFERS) {compiled}".replace(":", "\\:"))).scalars())


def buffers(plan: str) -> int:
    """Pages the whole statement touched, by the first (topmost) line that says so."""
    line = next(line for line in plan.splitlines() if "Buffers:" in line)
    return sum(int(part.partition("=")[2]) for part in line.split() if part.startswith(("hit=", "read=")))


def rows(engine: Engine, topic: str) -> int:
    queue = tables().queue
    with engine.connect() as connection:
        return connection.execute(select(func.count()).where(queue.c.topic == topic)).scalar_one()
