"""Apache's clients for Java beside `rocketmq://`: what one side sends the other hears, and a group may have members of both."""

import json
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Row, create_engine, select, text, update
from sqlalchemy.orm import Session

from exactly_once import ExactlyOnce, Retry
from exactly_once.clients.packed import MOST_BYTES
from exactly_once.database.server_clock import utcnow
from exactly_once.failures import decisions
from exactly_once.maintenance import sweeps
from exactly_once.message import Message
from exactly_once.outcome import Ack
from exactly_once.transports.contract import Subscription
from exactly_once.transports.rocketmq5 import wall
from exactly_once.transports.rocketmq5.group_client import Grip
from tests.acceptance.java_hears import check_what_java_hears
from tests.acceptance.test_rocketmq5_walls import Broker, bare_receive, receive, until
from tests.services import java_producer
from tests.services.java_consumer import JavaListener, JavaTaker
from tests.services.need import need, require
from tests.services.rocketmq import ROOT, RocketMQ

LZ4, ZSTD = b"\x04\x22\x4d\x18", b"\x28\xb5\x2f\xfd"


@pytest.fixture(autouse=True)
def _java() -> None:
    require(java_producer)
    need(wall.missing())
    wall.build()


@pytest.fixture
def broker(rocketmq: RocketMQ) -> Broker:
    return Broker(rocketmq)


def test_several_keys_of_a_java_producer_are_one_key_through_both_doors(broker: Broker) -> None:
    topic, group = broker.names()
    _, other = broker.names()
    java_producer.send(broker.server, topic, keys="order-7 buyer-3 order-7", tag="created")
    with broker.bare(other, topic) as bare:
        [received] = bare_receive(bare)
        assert Message.from_rocketmq(received).key == "buyer-3 order-7"
    with broker.consumer(group, Subscription(topic)) as ours:
        [delivery] = receive(ours)
        assert (delivery.message.key, delivery.message.tag) == ("buyer-3 order-7", "created")
        assert delivery.message.former == {"key": "order-7 buyer-3 order-7"}
        ours.settle([(delivery, Ack())])


def test_java_hears_what_our_producer_sends_field_by_field(broker: Broker) -> None:
    names = {kind: broker.names(kind) for kind in ("NORMAL", "FIFO", "DELAY")}
    topics = {kind: topic for kind, (topic, _) in names.items()}
    check_what_java_hears(broker.server, broker.ours(), names["NORMAL"][1], topics)


# -- bodies that Java's client has packed -----------------------------------------------------------------------------


class Shop:
    """An application with one handler on a topic of its own, and what it did."""

    def __init__(self, broker: Broker, database: str) -> None:
        self.topic, self.group = broker.names()
        self.url = f"rocketmq://{broker.server.grpc}?invisible_s=10"
        self.eo = ExactlyOnce(database, group=self.group)
        self.handled: list[dict[str, str]] = []
        self.wrong = False
        retry = Retry(immediate=0, delays=[2.0], max_attempts=9)
        self.eo.handler(self.topic, key="no", retry=retry)(self.reserve)

    def reserve(self, session: Session, order: dict[str, str]) -> None:
        if self.wrong:
            raise ValueError("not today")
        self.handled.append(order)

    def work_until(self, condition: Callable[[], object]) -> Mapping[str, int]:
        with self.eo.worker(self.url) as worker:
            until("done", condition)
            return worker.drain()

    def failures(self) -> Sequence[Row[Any]]:
        store = self.eo.stores["default"]
        with store.engine.connect() as connection:
            return connection.execute(select(store.tables.failure)).all()


@pytest.fixture
def shop(broker: Broker, sqlite_url: str) -> Shop:
    return Shop(broker, sqlite_url)


@pytest.fixture
def nothing_unpacks(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("lz4", "lz4.frame", "zstandard"):
        monkeypatch.setitem(sys.modules, name, None)
    return monkeypatch


@pytest.mark.parametrize(("compression", "magic"), [("LZ4", LZ4), ("ZSTD", ZSTD)])
def test_a_body_that_nothing_here_unpacks_is_a_dead_letter_whole_and_runs_once_it_can(
    broker: Broker, shop: Shop, nothing_unpacks: pytest.MonkeyPatch, compression: str, magic: bytes
) -> None:
    id_, body = java_producer.send(broker.server, shop.topic, keys="A-1", size=6000, compression=compression)
    outcomes = shop.work_until(shop.failures)
    assert {name: count for name, count in outcomes.items() if count} == {"dead": 1}
    (row,) = shop.failures()
    assert (row.state, row.error_class, row.message_id, row.message_key) == ("dead", "BadBody", id_, "A-1")
    assert row.body.startswith(magic)
    assert len(row.body) < len(body)
    assert json.loads(row.properties) == [compression.lower(), {}]
    assert "[compression]" in row.error_text
    assert shop.handled == []
    nothing_unpacks.undo()
    with shop.eo.stores["default"].engine.begin() as connection:
        chosen = decisions.Chosen(group=shop.group)
        decisions.requeue(connection, shop.eo.stores["default"].tables, chosen, by="me", why=None, per_second=None)
    shop.work_until(lambda: shop.handled)
    assert shop.handled == [json.loads(body)]
    assert [row.state for row in shop.failures()] == ["resolved"]


@pytest.mark.parametrize("compression", ["LZ4", "ZSTD", "ZLIB"])
def test_a_body_that_java_has_packed_is_read(broker: Broker, shop: Shop, compression: str) -> None:
    _, body = java_producer.send(broker.server, shop.topic, keys="A-1", size=6000, compression=compression)
    shop.work_until(lambda: shop.handled or shop.failures())
    assert shop.handled == [json.loads(body)]
    assert shop.failures() == []


def test_a_body_that_is_damaged_is_a_dead_letter_and_stays_one(broker: Broker, shop: Shop) -> None:
    sent = {"producerGroup": "walls", "topic": shop.topic, "defaultTopic": "TBW102", "defaultTopicQueueNums": 4}
    sent |= {"queueId": 0, "flag": 0, "reconsumeTimes": 0, "unitMode": "false", "batch": "false"}
    with broker.server.admin() as remoting:
        for packed, body in ((1, LZ4 + b"and no frame"), (0x101, ZSTD), (1, b"not packed at all")):
            remoting.demand(10, sent | {"sysFlag": packed, "bornTimestamp": 1, "properties": ""}, body)
    shop.work_until(lambda: len(shop.failures()) == 3)
    bodies = sorted(row.body for row in shop.failures())
    assert bodies == sorted([LZ4 + b"and no frame", ZSTD, b"not packed at all"])
    with shop.eo.stores["default"].engine.begin() as connection:
        chosen = decisions.Chosen(group=shop.group)
        decisions.requeue(connection, shop.eo.stores["default"].tables, chosen, by="me", why=None, per_second=None)
    shop.work_until(lambda: [row.state for row in shop.failures()] == ["dead"] * 3)
    assert (shop.handled, sorted(row.body for row in shop.failures())) == ([], bodies)


def test_a_body_that_grows_beyond_what_memory_takes_is_a_dead_letter_as_it_came(broker: Broker, shop: Shop) -> None:
    """132 KiB by zlib, which the client itself would unpack to any length."""
    sent = {"producerGroup": "walls", "topic": shop.topic, "defaultTopic": "TBW102", "defaultTopicQueueNums": 4}
    sent |= {"queueId": 0, "flag": 0, "reconsumeTimes": 0, "unitMode": "false", "batch": "false"}
    body = zlib.compress(b" " * (MOST_BYTES + 1) + b'{"no": "A"}')
    with broker.server.admin() as remoting:
        remoting.demand(10, sent | {"sysFlag": 1, "bornTimestamp": 1, "properties": "KEYS\1A\2"}, body)
    shop.work_until(lambda: shop.failures() or shop.handled)
    [row] = shop.failures()
    assert (row.state, row.error_class, row.message_key, row.body) == ("dead", "BadBody", "A", body)
    assert f"more than {MOST_BYTES} bytes" in row.error_text


def test_a_packed_body_whose_sum_is_wrong_is_not_read_later_either() -> None:
    """It may well be unpacked, and is not what was sent."""
    from rocketmq.grpc_protocol import DigestType, Encoding, SendMessageRequest

    from exactly_once.transports.rocketmq5.reading import delivery  # brings the client

    raw = SendMessageRequest().messages.add()
    raw.body = zlib.compress(b'{"no": "A"}')
    raw.system_properties.body_encoding = Encoding.GZIP
    raw.system_properties.body_digest.type = DigestType.CRC32
    raw.system_properties.body_digest.checksum = f"{zlib.crc32(raw.body):X}"
    sound = delivery(raw, "orders", Grip("id-1", "handle", None, 0.0))
    assert (sound.message.body, sound.unread) == (b'{"no": "A"}', None)
    raw.system_properties.body_digest.checksum = "0"
    wrong = delivery(raw, "orders", Grip("id-1", "handle", None, 0.0))
    assert (wrong.message.body, wrong.message.unread) == (raw.body, "damaged")
    assert wrong.unread is not None


# -- a group with members of both sides, as docs/how-to/java-listeners.md has it ---------------------------------------


PAGE = ROOT / "docs" / "how-to" / "java-listeners.md"
A = b'{"no": "A"}'


def overdue(shop: Shop) -> Sequence[Row[Any]]:
    store = shop.eo.stores["default"]
    with store.engine.connect() as connection:
        return decisions.listed(connection, store.tables, decisions.Chosen(group=shop.group, overdue=True), limit=10)


def test_what_java_took_after_our_failure_stays_and_is_overdue_after_thirteen_hours(broker: Broker, shop: Shop) -> None:
    shop.wrong = True
    broker.send(Message(shop.topic, A))
    shop.work_until(shop.failures)
    with JavaTaker(broker.server, shop.group, shop.topic) as java:
        assert java.wait_for(1) == [A], "the proxy has brought it to the other member"
    [row] = shop.failures()
    assert (row.state, row.next_attempt_at) == ("retrying", None)
    assert overdue(shop) == []
    store = shop.eo.stores["default"]
    with store.engine.begin() as connection:
        connection.execute(update(store.tables.failure).values(last_failed_at=utcnow(-13.1 * 3600)))
    assert [row.business_key for row in overdue(shop)] == ["A"]


def test_a_listener_that_asks_the_broker_is_not_brought_what_we_had_failed_on(broker: Broker, shop: Shop) -> None:
    shop.wrong = True
    broker.send(Message(shop.topic, A))
    shop.work_until(shop.failures)
    shop.wrong = False
    with JavaListener(broker.server, shop.group, shop.topic) as java:
        for number in range(
            8
        ):  # into all queues: it has some of them, for the worker's member is remembered for a while
            broker.send(Message(shop.topic, json.dumps({"no": str(number)}).encode()))
        java.wait_for(1)
        shop.work_until(lambda: {"no": "A"} in shop.handled)
        assert A not in {one.body for one in java.heard()}, "the worker alone was"


def test_in_a_group_shared_with_a_listener_each_message_takes_effect_once_where_both_claim(
    broker: Broker, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeps, "FAILURES_EVERY", timedelta(seconds=1))
    topic, group = broker.names()
    engine = create_engine(postgres_url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE effect (no text, side text)"))  # what is doubled is there twice
    eo = ExactlyOnce(postgres_url, group=group)
    failed: set[str] = set()

    def reserve(session: Session, order: dict[str, str]) -> None:
        no = order["no"]
        if no.endswith("5") and no not in failed:
            failed.add(no)
            raise ValueError("once")
        session.execute(text("INSERT INTO effect VALUES (:no, 'python')"), {"no": no})

    eo.handler(topic, key="no", retry=Retry(immediate=0, delays=[2.0], max_attempts=9))(reserve)
    claim = PAGE.read_text().split("```sql\n")[1].partition("```")[0]
    for name, value in ((":group", f"'{group}'"), (":handler", "'reserve'"), (":key", "?")):
        claim = claim.replace(name, value)
    url = engine.url
    jdbc = f"jdbc:postgresql://{url.host}:{url.port}/{url.database}?user={url.username}&password={url.password or ''}"

    def seen(query: str) -> list[Any]:
        with engine.connect() as connection:
            return list(connection.execute(text(query)).scalars())

    numbers = [str(number) for number in range(40)]
    messages = [Message(topic, json.dumps({"no": no}).encode(), key=no) for no in numbers]
    with JavaListener(broker.server, group, topic, database=jdbc, claim=claim) as java:
        broker.send(messages[0])
        java.wait_for(1)  # it has its queues
        with eo.worker(f"rocketmq://{broker.server.grpc}?invisible_s=10") as worker:
            broker.send(*messages[1:])
            until("all have taken effect", lambda: set(seen("SELECT no FROM effect")) == set(numbers))
            until("what failed is closed", lambda: set(seen("SELECT state FROM message_failure")) <= {"resolved"})
            worker.drain()
        heard = java.heard()
    assert any(one.claimed for one in heard), "both sides did some"
    assert "python" in seen("SELECT side FROM effect")
    assert Counter(seen("SELECT no FROM effect")) == Counter(numbers)
    engine.dispose()
