"""What `rocketmq-python-client` gets wrong, shown with the bare client, and that our transport walls it off.

Each test does the same thing twice: with the client as its documentation says, where the fault must still be seen (if
a later version mends it, the test says so and the wall can go), and through `rocketmq://`, where it must not.
"""

import json
import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from exactly_once.message import Message
from exactly_once.outcome import Ack, Redeliver
from exactly_once.transports.contract import Consumer, Delivery, Receipt, Subscription, Surroundings, Transport
from exactly_once.transports.registry import transport_from
from exactly_once.transports.rocketmq5 import wall
from tests.services.need import need
from tests.services.rocketmq import RocketMQ
from tests.services.rocketmq_java import java_sends

ROOT = Path(__file__).parents[2]
SECOND = timedelta(seconds=1)
_names = iter(lambda: os.urandom(4).hex(), "")  # other files import this one, and share its server


@pytest.fixture(autouse=True)
def _client() -> None:
    need(wall.missing())
    wall.build()  # before the first import of the client in this process


TORN = "GOAWAY received"


class Broker:
    """The server, with fresh names, the bare client and our transport on it."""

    def __init__(self, server: RocketMQ) -> None:
        self.server = server

    def names(self, kind: Any = "NORMAL", *, orderly: bool = False, retries: int = 16) -> tuple[str, str]:
        topic, group = f"walls-{next(_names)}", f"walls-group-{next(_names)}"
        self.server.create_topic(topic, kind)
        self.server.create_group(group, orderly=orderly, retries=retries)
        return topic, group

    def ours(self, options: str = "invisible_s=10") -> Transport:
        return transport_from(f"rocketmq://{self.server.grpc}?{options}", Surroundings())

    def configuration(self) -> Any:
        from rocketmq import ClientConfiguration, Credentials

        return ClientConfiguration(self.server.grpc, Credentials())

    @contextmanager
    def bare(self, group: str, *topics: str, await_s: int = 2) -> Iterator[Any]:
        """A SimpleConsumer, used as its documentation says."""
        from rocketmq import FilterExpression, SimpleConsumer

        filters = {topic: FilterExpression() for topic in topics}
        consumer = SimpleConsumer(self.configuration(), group, filters, await_duration=await_s)
        consumer.startup()
        try:
            yield consumer
        finally:
            with suppress(Exception):
                consumer.shutdown()

    @contextmanager
    def consumer(self, group: str, *subscriptions: Subscription, options: str = "invisible_s=10") -> Iterator[Consumer]:
        consumers = self.ours(options).subscribe(group, subscriptions)
        try:
            yield consumers[0]
        finally:
            for consumer in consumers:
                consumer.stop()
                consumer.close()

    def send(self, *messages: Message) -> list[Receipt]:
        for _ in range(3):
            producer = self.ours().producer()
            try:
                answers = producer.send(messages)
            finally:
                producer.close()
            # a proxy under load at times ends a new connection as its first requests come, with one of several texts
            if not all(TORN in str(answer) for answer in answers):
                break
        assert all(isinstance(answer, Receipt) for answer in answers), answers
        return [answer for answer in answers if isinstance(answer, Receipt)]

    def took(self, message: Message) -> bool:
        producer = self.ours().producer()
        try:
            (answer,) = producer.send([message])
        finally:
            producer.close()
        return isinstance(answer, Receipt)


@pytest.fixture
def broker(rocketmq: RocketMQ) -> Broker:
    return Broker(rocketmq)


def until(what: str, found: Callable[[], Any], *, patience_s: float = 90) -> Any:
    deadline = time.monotonic() + patience_s
    while not (answer := found()):
        assert time.monotonic() < deadline, f"{what}: not within {patience_s} s"
    return answer


def bare_receive(consumer: Any, limit: int = 32, invisible_s: int = 10) -> list[Any]:
    """Receive with the bare client until something comes; it may fail while it warms up."""

    def once() -> list[Any]:
        with suppress(Exception):
            return list(consumer.receive(limit, invisible_s))
        return []

    return list(until("a message through the bare client", once))


def receive(consumer: Consumer, limit: int = 32) -> Sequence[Delivery]:
    return list(until("a delivery", lambda: consumer.receive(limit, SECOND)))


def run(program: str, *, home: Path, path: Sequence[Path] = ()) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "HOME": str(home), "PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT]))}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=environ, capture_output=True, text=True, timeout=60
    )


class Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def root_log() -> Iterator[Heard]:
    """What a program would see on its root logger."""
    heard = Heard()
    logging.getLogger().addHandler(heard)
    try:
        yield heard
    finally:
        logging.getLogger().removeHandler(heard)


# -- importing --------------------------------------------------------------------------------------------------------

CLOSED = """
    import logging, sys
    class Mine(logging.FileHandler):
        def close(self):
            print("closed", flush=True)
            super().close()
    handler = Mine(sys.argv[1] if len(sys.argv) > 1 else "/dev/null")
    logging.getLogger("mine").addHandler(handler)
    {imports}
    import os
    print("folder" if os.path.exists(os.path.expanduser("~/logs")) else "no folder")
    print("still open", flush=True)
    os._exit(0)
"""


def test_importing_the_client_makes_no_folder_and_closes_nobodys_log_handlers(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "ours").mkdir()
    bare = run(CLOSED.format(imports="import rocketmq"), home=tmp_path / "bare")
    assert bare.stdout.split("\n")[:2] == ["closed", "folder"], bare.stderr
    ours = run(
        CLOSED.format(
            imports="""
    from exactly_once.transports.contract import Surroundings
    from exactly_once.transports.registry import transport_from
    transport_from("rocketmq://127.0.0.1:1", Surroundings()).producer()
    assert "rocketmq" in sys.modules
"""
        ),
        home=tmp_path / "ours",
    )
    assert ours.stdout.split("\n")[:2] == ["no folder", "still open"], ours.stderr


def test_making_a_transport_does_not_import_the_client(tmp_path: Path) -> None:
    program = """
        import sys
        from exactly_once.transports.contract import Surroundings
        from exactly_once.transports.registry import transport_from
        transport_from("rocketmq://127.0.0.1:1", Surroundings())
        print("rocketmq" in sys.modules, "grpc" in sys.modules)
    """
    assert run(program, home=tmp_path).stdout == "False False\n"


@pytest.mark.parametrize(
    ("package", "error", "words"),
    [
        (None, "MissingExtra", "[rocketmq]'"),
        ("client.py", "ConfigurationError", "environment of its own"),
    ],
)
def test_a_missing_client_and_the_other_client_are_told_apart_without_importing_them(
    tmp_path: Path, package: str | None, error: str, words: str
) -> None:
    if package:
        (tmp_path / "rocketmq").mkdir()
        (tmp_path / "rocketmq" / "__init__.py").write_text("raise SystemExit('imported')")
        (tmp_path / "rocketmq" / package).touch()
    program = f"""
        import sys
        if {package is None}:
            sys.modules["rocketmq"] = None   # what Python does for a package that is not there
        from exactly_once.errors import ConfigurationError
        from exactly_once.transports.contract import Surroundings
        from exactly_once.transports.registry import transport_from
        try:
            transport_from("rocketmq://127.0.0.1:1", Surroundings())
        except ConfigurationError as error:
            print(type(error).__name__, error)
    """
    done = run(program, home=tmp_path, path=[tmp_path])
    assert done.stdout.startswith(error), done
    assert words in done.stdout


def test_a_program_that_consumed_ends_without_a_word_and_without_a_crash(broker: Broker, tmp_path: Path) -> None:
    topic, group = broker.names()
    broker.send(*(Message(topic, b"x") for _ in range(20)))
    program = f"""
        from datetime import timedelta
        from exactly_once.message import Message
        from exactly_once.transports.contract import Subscription, Surroundings
        from exactly_once.transports.registry import transport_from
        from exactly_once.outcome import Ack
        transport = transport_from("rocketmq://{broker.server.grpc}", Surroundings())
        [consumer] = transport.subscribe("{group}", [Subscription("{topic}")])
        found = consumer.receive(4, timedelta(seconds=5))
        consumer.settle([(d, Ack()) for d in found])
        consumer.receive(1, timedelta(0))   # leaves a poll under way
        producer = transport.producer()
        producer.send([Message("{topic}", b"y")])
        CLOSE
        print(len(found))
    """
    for close in ("consumer.stop(); consumer.close(); producer.close()", "pass"):
        done = run(program.replace("CLOSE", close), home=tmp_path)
        assert (done.returncode, done.stderr) == (0, ""), done


# -- starting ---------------------------------------------------------------------------------------------------------


def test_a_client_starts_without_a_server_and_check_says_that_there_is_none() -> None:
    from rocketmq import ClientConfiguration, Credentials, FilterExpression, Producer, SimpleConsumer

    nowhere = ClientConfiguration("127.0.0.1:1", Credentials())
    for client in (Producer(nowhere), SimpleConsumer(nowhere, "some-group", {"some-topic": FilterExpression()})):
        client.startup()
        assert client.is_running
        client.shutdown()
    [problem] = transport_from("rocketmq://127.0.0.1:1", Surroundings()).check("g", [Subscription("t")])
    assert "does not answer" in problem
    assert "127.0.0.1:1" in problem


def test_a_group_made_after_the_start_is_joined(broker: Broker) -> None:
    topic, _ = broker.names()
    late = f"walls-late-{next(_names)}"
    broker.send(Message(topic, b"x"))
    with broker.bare(late, topic, await_s=1) as bare, broker.consumer(late, Subscription(topic)) as ours:
        with pytest.raises(Exception, match="settings"):
            bare.receive(1, 10)
        assert list(ours.receive(1, SECOND)) == []
        broker.server.create_group(late)
        [delivery] = receive(ours, 1)
        ours.settle([(delivery, Ack())])
        with pytest.raises(Exception, match="settings"):  # for good
            bare.receive(1, 10)


def test_check_names_each_thing_that_is_wrong_with_the_command_that_mends_it(broker: Broker) -> None:
    topic, group = broker.names(retries=3)
    absent = f"walls-absent-{next(_names)}"
    wrong = broker.ours().check(group, [Subscription(topic, ordered=True), Subscription(absent, ordered=True)])
    assert [problem.split("Type: ")[1].split(" or ")[0] for problem in wrong] == [
        f"mqadmin updateTopic -n NAMESERVER:9876 -c CLUSTER -t {topic}-fifo -a +message.type=FIFO",
        f"mqadmin updateTopic -n NAMESERVER:9876 -c CLUSTER -t {absent} -a +message.type=FIFO",
        f"mqadmin updateSubGroup -n NAMESERVER:9876 -c CLUSTER -g {group} -o true",
        f"mqadmin updateSubGroup -n NAMESERVER:9876 -c CLUSTER -g {group} -r 16",
    ]
    assert list(broker.ours("max_attempts=3").check(group, [Subscription(topic)])) == []
    fifo, orderly = broker.names("FIFO", orderly=True)
    assert list(broker.ours().check(orderly, [Subscription(fifo, ordered=True)])) == []


def test_a_missing_topic_is_told_in_any_thread(broker: Broker) -> None:
    """A worker's start asks in a thread, where the client finds no event loop: it logs that alone, and goes on with None."""
    _, group = broker.names()
    absent, unknown = f"walls-absent-{next(_names)}", f"walls-unknown-{next(_names)}"
    told: dict[str, list[str] | BaseException] = {}

    def ask(group: str) -> None:
        try:
            told[group] = list(broker.ours().check(group, [Subscription(absent)]))
        except BaseException as error:
            told[group] = error

    for each in (group, unknown):
        thread = threading.Thread(target=ask, args=(each,))
        thread.start()
        thread.join(60)
    missing = (
        f"Topic {absent} does not exist at {broker.server.grpc}."
        f" Type: mqadmin updateTopic -n NAMESERVER:9876 -c CLUSTER -t {absent} -a +message.type=NORMAL"
    )
    assert told[group] == [missing]
    of_topic, of_group = told[unknown]  # type: ignore[misc]
    assert of_topic == missing
    assert f"Group {unknown} does not exist" in of_group


def test_a_group_gives_one_delivery_more_than_its_retries_and_check_keeps_that_one_for_parking(broker: Broker) -> None:
    topic, group = broker.names(retries=1)
    [problem] = broker.ours("max_attempts=2").check(group, [Subscription(topic)])
    assert "after 2 deliveries" in problem
    broker.send(Message(topic, b"poison"))
    with broker.consumer(group, Subscription(topic)) as ours:
        for attempt in (1, 2):
            [delivery] = receive(ours)
            assert delivery.message.attempt == attempt
            ours.settle([(delivery, Redeliver())])
        # it is in %DLQ% now, where none of our handlers sees it
        assert list(ours.receive(1, 6 * SECOND)) == []


# -- outages ----------------------------------------------------------------------------------------------------------


@pytest.mark.alone  # each receive of half a second is held to a second and a half
def test_a_restarted_proxy_is_joined_again_within_seconds_and_the_log_stays_readable(broker: Broker) -> None:
    topic, group = broker.names()
    _, other = broker.names()
    errors: list[BaseException] = []
    answers: list[tuple[float, float, int]] = []  # begun, ended, deliveries
    stop = threading.Event()

    with (
        broker.bare(other, topic, await_s=1) as bare,
        broker.consumer(group, Subscription(topic)) as ours,
        root_log() as heard,
    ):
        broker.send(Message(topic, b"before"))
        assert [m.body for m in bare_receive(bare)] == [b"before"]
        [held] = receive(ours)

        def listen() -> None:
            try:
                while not stop.is_set():
                    begun = time.monotonic()
                    found = ours.receive(8, SECOND / 2)
                    answers.append((begun, time.monotonic(), len(found)))
                    ours.settle([(d, Ack()) for d in found])
            except BaseException as error:
                errors.append(error)

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        broker.server.kill_proxy()
        try:
            down = time.monotonic()
            until("an outage of 12 s, longer than the client's heartbeat", lambda: time.monotonic() > down + 12)
            ours.settle([(held, Ack())])  # cannot be carried out, and is no error
        finally:
            broker.server.start()
        up = time.monotonic()
        # one try each, as the contract says; a proxy that is just back may miss the first
        until("a message taken by the proxy that is back", lambda: broker.took(Message(topic, b"after")))
        until("the message sent afterwards", lambda: any(begun > down and n for begun, _, n in answers))
        back = next(ended for begun, ended, n in answers if begun > down and n)
        with pytest.raises(Exception, match=r"settings|UNAVAILABLE|Connect"):
            bare.receive(8, 10)  # the bare client never recovers
        # what could not be settled comes again by itself
        until("the held message", lambda: sum(n for begun, _, n in answers if begun > down) >= 2, patience_s=30)
        stop.set()
        listener.join()

    assert errors == []
    assert back - up < 5
    quiet = [(begun, ended) for begun, ended, n in answers if down < begun and ended < up and n == 0]
    assert quiet, "receive did not return during the outage"
    assert all(ended - begun < 1.5 for begun, ended in quiet)
    traced = [r for r in heard.records if r.exc_info and r.name == "concurrent.futures"]
    assert traced == []
    assert [r for r in heard.records if r.name == wall.CLIENT_LOGGER] == []
    told = [r.getMessage() for r in heard.records if r.name.startswith("exactly_once")]
    assert 1 <= sum("gives nothing of" in line for line in told) <= 6, told  # once per reason, not once per try
    assert sum("could not be" in line for line in told) >= 1


def test_only_tracebacks_of_the_client_are_filtered() -> None:
    from concurrent.futures import Future

    def mine(_: Future[None]) -> None:
        raise RuntimeError("mine")

    with root_log() as heard:
        future: Future[None] = Future()
        future.add_done_callback(mine)
        future.set_result(None)
    assert [r.name for r in heard.records] == ["concurrent.futures"]
    with root_log() as heard:
        future = Future()
        from rocketmq.v5.util import Misc

        future.add_done_callback(lambda _: Misc.crc32_checksum(None))  # raises inside the client
        future.set_result(None)
    assert heard.records == []


# -- receiving and settling -------------------------------------------------------------------------------------------


def test_a_refused_renewal_does_not_erase_the_receipt_handle(broker: Broker) -> None:
    topic, group = broker.names()
    _, other = broker.names()
    broker.send(Message(topic, b"x"))
    with broker.bare(group, topic) as bare, broker.consumer(other, Subscription(topic)) as ours:
        [message] = bare_receive(bare, invisible_s=30)
        with pytest.raises(Exception, match=r"\d{5}"):
            bare.change_invisible_duration(message, 24 * 3600)  # over the limit of 12 h
        assert not message.receipt_handle  # and it can be neither acknowledged nor renewed any more
        [delivery] = receive(ours)
        grip = delivery.receipt_handle
        before = grip.handle
        session = ours._member.session  # type: ignore[attr-defined]
        from exactly_once.transports.rocketmq5.answers import refused_renewals

        refused = refused_renewals([(grip, session.hide(topic, grip, 24 * 3600))])
        assert refused
        assert grip.handle == before
        ours.extend([delivery])
        assert grip.handle != before  # a granted one renews it in place
        ours.settle([(delivery, Ack())])
        assert list(ours.receive(1, SECOND)) == []


def test_settling_from_a_plain_thread_works(broker: Broker) -> None:
    topic, group = broker.names()
    broker.send(Message(topic, b"x"))
    with broker.bare(group, topic) as bare:
        [message] = bare_receive(bare, invisible_s=2)
        raised: list[BaseException] = []

        def asynchronously() -> None:
            try:
                bare.ack_async(message)
            except RuntimeError as error:  # there is no current event loop in this thread
                raised.append(error)

        thread = threading.Thread(target=asynchronously)
        thread.start()
        thread.join()
        assert raised
    _, other = broker.names()
    with broker.consumer(other, Subscription(topic), options="invisible_s=3") as ours:
        [delivery] = receive(ours)
        thread = threading.Thread(target=ours.settle, args=([(delivery, Ack())],))
        thread.start()
        thread.join()
        assert list(ours.receive(1, 7 * SECOND)) == []


def test_stopping_a_waiting_receive_is_no_error(broker: Broker) -> None:
    topic, group = broker.names()
    ended: list[object] = []

    def waiting(receive_: Callable[[], object]) -> threading.Thread:
        def listen() -> None:
            try:
                ended.append(receive_())
            except BaseException as error:
                ended.append(error)

        thread = threading.Thread(target=listen)
        thread.start()
        thread.join(1)  # it is waiting by now
        return thread

    with broker.bare(group, topic, await_s=20) as bare:
        thread = waiting(lambda: bare.receive(1, 10))
    thread.join(20)
    assert isinstance(ended.pop(), BaseException)
    with broker.consumer(group, Subscription(topic)) as ours:
        thread = waiting(lambda: list(ours.receive(1, 20 * SECOND)))
    thread.join(5)
    assert ended == [[]]


def test_an_idle_topic_does_not_keep_a_busy_one_waiting(broker: Broker) -> None:
    (idle, group), (busy, other) = broker.names(), broker.names()
    messages = [Message(busy, str(n).encode()) for n in range(4)]
    broker.send(*messages)
    with broker.bare(group, busy, idle, await_s=3) as bare:
        begun, found = time.monotonic(), 0
        while found < 4:
            found += len(bare_receive(bare, 1))
        assert time.monotonic() - begun > 6  # three turns of the idle topic
    transport = broker.ours()
    consumers = transport.subscribe(other, [Subscription(busy), Subscription(idle)])
    assert len(consumers) == 2
    begun, found = time.monotonic(), 0
    while found < 4:
        found += len(receive(consumers[0], 1))
    assert time.monotonic() - begun < 3
    for consumer in consumers:
        consumer.stop()
        consumer.close()


def test_one_message_that_cannot_be_unpacked_does_not_take_the_others_along(broker: Broker) -> None:
    topic, group = broker.names()
    _, other = broker.names()
    sent = {"producerGroup": "walls", "topic": topic, "defaultTopic": "TBW102", "defaultTopicQueueNums": 4}
    sent |= {"queueId": 0, "flag": 0, "reconsumeTimes": 0, "unitMode": "false", "batch": "false"}
    with broker.server.admin() as remoting:
        for body, packed in ((zlib.compress(b"good"), 1), (b"not packed at all", 1), (b"plain", 0)):
            fields = sent | {"sysFlag": packed, "bornTimestamp": int(time.time() * 1000), "properties": ""}
            remoting.demand(10, fields, body)
    with broker.bare(group, topic) as bare:
        found: list[object] = []
        until_ = time.monotonic() + 6
        while time.monotonic() < until_:
            with suppress(Exception):
                found += bare.receive(32, 30)
        assert found == []  # all three are lost to it, each time they come
    with broker.consumer(other, Subscription(topic)) as ours:
        found_: dict[bytes | None, bool] = {}
        while len(found_) < 3:
            found_ |= {d.message.body: d.unread is None for d in receive(ours)}
        assert found_ == {b"good": True, b"plain": True, b"not packed at all": False}


def test_several_keys_are_spelled_alike_through_every_door(broker: Broker) -> None:
    topic, group = broker.names()
    _, other = broker.names()
    broker.send(Message(topic, b"x", key="zeta alpha 7"))
    with broker.bare(group, topic) as bare:
        [message] = bare_receive(bare)
        assert message.keys == {"zeta", "alpha", "7"}
        assert Message.from_rocketmq(message).key == "7 alpha zeta"  # what can be known of it
    with broker.consumer(other, Subscription(topic)) as ours:
        assert receive(ours)[0].message.key == "7 alpha zeta"


def test_a_received_message_of_the_bare_client_becomes_ours(broker: Broker) -> None:
    topic, group = broker.names()
    properties = {"eo-id": "7", "eo-unread": "zstd", "city": "Köln"}
    [receipt] = broker.send(Message(topic, b"\x00\xff", tag="t", key="k", properties=properties))
    with broker.bare(group, topic) as bare:
        [received] = bare_receive(bare)
        message = Message.from_rocketmq(received)
    assert message.born_at is not None
    assert message.born_at.utcoffset() == timedelta(0)
    assert (message.topic, message.body, message.tag, message.key) == (topic, b"\x00\xff", "t", "k")
    assert (dict(message.properties), message.message_id, message.attempt) == (properties, receipt.message_id, 1)


def test_properties_come_as_they_were_sent_and_the_broker_s_own_do_not(broker: Broker) -> None:
    """RocketMQ drops a property with an empty value, and hands out its ordering key among the properties."""
    (topic, group), (fifo, ordered) = broker.names(), broker.names("FIFO", orderly=True)
    properties = {"empty": "", "blank": " ", "around": " a ", "city": "Köln"}
    with broker.consumer(group, Subscription(topic)) as ours:
        broker.send(Message(topic, b"x", properties=properties), Message(topic, b"y", properties={"n": "1"}))
        found: dict[bytes | None, Message] = {}
        while len(found) < 2:
            found |= {delivery.message.body: delivery.message for delivery in receive(ours)}
    with broker.consumer(ordered, Subscription(fifo, ordered=True)) as ours:
        broker.send(Message(fifo, b"z", ordering_key="A", properties={"empty": ""}))
        [delivery] = receive(ours, 1)
    assert dict(found[b"x"].properties) == properties
    assert dict(found[b"y"].properties) == {"n": "1"}
    assert (delivery.message.ordering_key, dict(delivery.message.properties)) == ("A", {"empty": ""})


def test_properties_of_a_java_producer_come_without_those_of_its_client(broker: Broker) -> None:
    topic, group = broker.names()
    java_sends(broker.server, topic)
    with broker.consumer(group, Subscription(topic)) as ours:
        [delivery] = receive(ours)
    assert (delivery.message.ordering_key, dict(delivery.message.properties)) == ("A", {"city": "Köln", "blank": " "})


@pytest.mark.nightly(only=True)  # the server is a slow one for all tests behind it
def test_properties_of_a_message_sent_in_a_transaction_come_without_those_of_javas_client(broker: Broker) -> None:
    topic, _ = broker.names()
    transactions, group = broker.names("TRANSACTION")
    java_sends(broker.server, topic, transactions)
    with broker.consumer(group, Subscription(transactions)) as ours:
        [committed] = receive(ours)
    assert dict(committed.message.properties) == {"city": "Köln", "blank": " "}


def test_a_property_that_rocketmq_would_take_for_its_own_is_refused(broker: Broker) -> None:
    topic, _ = broker.names()
    producer = broker.ours().producer()
    names = ["", "eo-names", "__SHARDINGKEY", "__transactionId__", "KEYS"]
    answers = producer.send([Message(topic, b"x", properties={name: "v"}) for name in names])
    producer.close()
    assert ["RocketMQ's own" in str(answer) for answer in answers] == [True] * len(names)


def test_a_group_that_is_new_to_a_young_topic_begins_at_its_first_message(broker: Broker) -> None:
    topic, group = broker.names()
    broker.send(*[Message(topic, b"%d" % n) for n in range(5)])
    with broker.consumer(group, Subscription(topic)) as ours:
        found: list[Delivery] = []
        while len(found) < 5:
            found += receive(ours)
    assert sorted(delivery.message.body or b"" for delivery in found) == [b"0", b"1", b"2", b"3", b"4"]


# -- order ------------------------------------------------------------------------------------------------------------


def test_followers_of_a_failed_message_are_not_counted_as_delivered(broker: Broker) -> None:
    topic, group = broker.names("FIFO", orderly=True)
    _, other = broker.names(orderly=True)
    broker.send(*(Message(topic, str(n).encode(), ordering_key="one") for n in range(4)))
    with broker.bare(group, topic) as bare:
        first = bare_receive(bare, 8, invisible_s=2)
        assert len(first) == 4
        for message in first[1:]:
            bare.ack(message)  # all but the first
        again = bare_receive(bare, 8, invisible_s=2)
        assert len(again) == 4  # the acknowledged come again, and count
        assert {message.delivery_attempt for message in again} == {2}
    told: list[tuple[bytes | None, int]] = []
    with broker.consumer(other, Subscription(topic, ordered=True)) as ours:
        while len(told) < 6:
            for delivery in receive(ours, 8):
                told.append((delivery.message.body, delivery.message.attempt))
                failing = delivery.message.body == b"0" and delivery.message.attempt < 3
                ours.settle([(delivery, Redeliver() if failing else Ack())])
        assert list(ours.receive(8, SECOND)) == []
    assert told == [(b"0", 1), (b"0", 2), (b"0", 3), (b"1", 1), (b"2", 1), (b"3", 1)]


def test_a_slow_message_is_extended_and_its_followers_wait(broker: Broker) -> None:
    topic, group = broker.names("FIFO", orderly=True)
    broker.send(*(Message(topic, str(n).encode(), ordering_key="one") for n in range(2)))
    with broker.consumer(group, Subscription(topic, ordered=True), options="invisible_s=2") as ours:
        [slow] = receive(ours, 8)
        begun = time.monotonic()
        while time.monotonic() < begun + 7:
            ours.extend([slow])
            assert list(ours.receive(8, SECOND / 2)) == []
        ours.settle([(slow, Ack())])
        [follower] = receive(ours, 8)
        assert (follower.message.body, follower.message.attempt) == (b"1", 1)
        ours.settle([(follower, Ack())])


def test_a_member_that_wants_other_tags_is_seen_where_the_url_names_name_servers(broker: Broker) -> None:
    """A proxy tells nobody's subscription; the broker behind it knows the last one of the group."""
    (topic, group), (second, _) = broker.names(), broker.names()
    also = Subscription(second)
    mine, other = [Subscription(topic, ("created",)), also], Subscription(topic, ("paid",))
    asking = broker.ours(f"name_servers={broker.server.name_server}")
    alone = asking.concerns(group, mine)
    with broker.consumer(group, other, also):
        [text] = until("the other is seen", lambda: asking.concerns(group, mine))
        alike = asking.concerns(group, [other, also])
        without = broker.ours().concerns(group, mine)
    assert (alone, alike, without) == ((), (), ())
    assert "LOSES MESSAGES" in text
    told = ", ".join(sorted([f"{topic} (paid)", f"{second} (*)"]))  # the names are drawn by chance
    assert f"the last member that joined wants {told}" in text


# -- sending ----------------------------------------------------------------------------------------------------------


def test_of_one_ordering_key_none_is_sent_after_a_refused_one(broker: Broker) -> None:
    topic, group = broker.names("FIFO", orderly=True)
    producer = broker.ours().producer()
    answers = producer.send(
        [Message(topic, body, ordering_key=key) for key, body in (("a", b"1"), ("a", b""), ("b", b"1"), ("a", b"2"))]
    )
    producer.close()
    producer.close()
    assert [type(a).__name__ for a in answers] == ["Receipt", "ValueError", "Receipt", "TransportError"]
    assert "ordering key 'a'" in str(answers[3])
    with broker.consumer(group, Subscription(topic, ordered=True)) as ours:
        found: list[str] = []
        while len(found) < 2:
            got = receive(ours, 8)
            found += [f"{d.message.ordering_key}{(d.message.body or b'').decode()}" for d in got]
            ours.settle([(d, Ack()) for d in got])
        assert sorted(found) == ["a1", "b1"]


def test_what_can_never_be_sent_is_refused_with_the_way_out(broker: Broker) -> None:
    topic, _ = broker.names()
    producer = broker.ours().producer()
    day = timedelta(days=1)
    [empty] = producer.send([Message(topic, None)])
    [wrong_type] = producer.send([Message(topic, b"x", ordering_key="k")])
    [too_late] = producer.send([Message(topic, b"x")], delay=2 * day)
    [both] = producer.send([Message(topic, b"x", ordering_key="k")], delay=SECOND)
    [unknown] = producer.send([Message("walls-nowhere", b"x")])
    producer.close()
    [closed] = producer.send([Message(topic, b"x")])
    refusals = [empty, wrong_type, too_late, both]
    assert all(isinstance(refusal, ValueError) for refusal in refusals), refusals
    assert "+message.type=" in str(wrong_type)
    assert not isinstance(unknown, ValueError)  # somebody may make the topic
    assert "mqadmin updateTopic" in str(unknown)
    assert "closed" in str(closed)


def test_messages_without_a_key_or_a_delay_share_requests_and_each_is_received_as_it_was_sent(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = requests_of(monkeypatch)
    (topic, group), (other, _) = broker.names(), broker.names()
    sent = [
        Message(topic, b"body-%d\0\xff" % n, tag=f"T{n % 3}", key=f"K-{n} buyer", properties={"n": str(n), "ü": "ö"})
        for n in range(70)
    ]
    with broker.consumer(group, Subscription(topic)) as ours:
        until("joined", lambda: broker.took(Message(topic, b"first", key="first")) and receive(ours))
        sizes.clear()
        mixed = broker.send(*sent[:40], Message(other, b"x"), *sent[40:])
        receipts = mixed[:40] + mixed[41:]
        found: dict[str, Message] = {}
        while len(found) < len(sent):
            got = receive(ours)
            ours.settle([(delivery, Ack()) for delivery in got])
            found |= {d.message.message_id or "": d.message for d in got if (d.message.body or b"").startswith(b"body")}
    assert sorted(sizes) == [1, 6, 32, 32]
    assert mixed[40].topic == other
    for receipt, message in zip(receipts, sent, strict=True):
        came = found[receipt.message_id]
        assert (came.body, came.tag, came.properties) == (message.body, message.tag, message.properties)
        assert set((came.key or "").split()) == set((message.key or "").split())


def test_large_messages_do_not_make_a_request_that_the_broker_refuses(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = requests_of(monkeypatch)
    topic, _ = broker.names()
    broker.send(*[Message(topic, b"x" * 300_000) for _ in range(32)], Message(topic, b"y" * 4_000_000))
    assert sum(sizes) == 33
    assert max(sizes) <= 3


def test_of_messages_in_one_request_only_the_refused_one_fails(broker: Broker) -> None:
    topic, _ = broker.names()
    producer = broker.ours().producer()
    answers = producer.send([Message(topic, b"x", tag="a|b" if n == 5 else "fine") for n in range(10)])
    nowhere = producer.send([Message("walls-nowhere", b"x") for _ in range(3)])
    producer.close()
    assert [isinstance(answer, Receipt) for answer in answers] == [n != 5 for n in range(10)]
    assert isinstance(answers[5], ValueError)
    assert "tag" in str(answers[5])
    assert ["mqadmin updateTopic" in str(answer) for answer in nowhere] == [True] * 3


def test_a_broker_that_takes_smaller_bodies_than_usual_takes_each_message_alone(broker: Broker) -> None:
    topic, _ = broker.names()
    with broker.server.admin() as admin:
        admin.configure(maxMessageSize=100_000)
    try:
        receipts = broker.send(*[Message(topic, b"x" * 20_000) for _ in range(12)])
    finally:
        with broker.server.admin() as admin:
            admin.configure(maxMessageSize=4 * 1024 * 1024)
    assert len({receipt.message_id for receipt in receipts}) == 12


def requests_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many messages each request carried, as they are sent; they are sent all the same."""
    from rocketmq.grpc_protocol import MessagingServiceStub

    sizes: list[int] = []
    plain = MessagingServiceStub.__init__

    def counting(stub: Any, channel: Any) -> None:
        plain(stub, channel)
        send = stub.SendMessage

        def counted(request: Any, **more: Any) -> Any:
            sizes.append(len(request.messages))
            return send(request, **more)

        stub.SendMessage = counted

    monkeypatch.setattr(MessagingServiceStub, "__init__", counting)
    return sizes


# -- a server as it comes ---------------------------------------------------------------------------------------------

USER = {"username": "shop", "password": "12345678"}
PRODUCTION = {
    # the proxy's defaults, which the other tests' server shortens
    "grpcClientConsumerMinLongPollingTimeoutMillis": 5000,
    "minInvisibleTimeMillsForRecv": 10000,
    "authenticationEnabled": True,
    "authenticationProvider": "org.apache.rocketmq.auth.authentication.provider.DefaultAuthenticationProvider",
    "authenticationMetadataProvider": "org.apache.rocketmq.proxy.auth.ProxyAuthenticationMetadataProvider",
    "innerClientAuthenticationCredentials": json.dumps({"accessKey": "shop", "secretKey": "12345678"}),
}
KNOWS_USER = {
    "authenticationMetadataProvider": (
        "org.apache.rocketmq.auth.authentication.provider.LocalAuthenticationMetadataProvider"
    ),
    "initAuthenticationUser": json.dumps(USER),
}


def test_access_keys_namespaces_and_the_default_polling_time(rocketmq: RocketMQ, tmp_path: Path) -> None:
    """`rocketmq` is asked for only because this machine may not be able to run one."""
    from rocketmq import ClientConfiguration, Credentials, FilterExpression, SimpleConsumer

    secret = tmp_path / "secret"
    secret.write_text("12345678\n")
    with RocketMQ(proxy=PRODUCTION, broker=KNOWS_USER, heap_mb=384) as server:
        for name in ("orders", "red%orders"):
            server.create_topic(name)
        for name in ("inventory", "red%inventory"):
            server.create_group(name)

        def ours(options: str) -> Transport:
            return transport_from(f"rocketmq://{server.grpc}?{options}", Surroundings())

        wanted = [Subscription("orders")]
        good = f"access_key=shop&secret_key_file={secret}"
        [refused] = ours("invisible_s=10").check("inventory", wanted)
        assert "access_key=" in refused
        [refused] = ours("access_key=shop&secret_key=wrong-secret").check("inventory", wanted)
        assert "wrong-secret" not in refused
        until("the user is known", lambda: not ours(good).check("inventory", wanted))
        [missing, group] = ours(f"{good}&namespace=blue").check("inventory", wanted)
        assert "-g blue%inventory" in group
        assert "-t blue%orders" in missing  # a stock proxy would ignore the client's namespace and use plain `orders`

        producer = ours(f"{good}&namespace=red").producer()
        until("sent", lambda: isinstance(producer.send([Message("orders", b"red")])[0], Receipt))
        producer.close()
        [plain] = ours(good).subscribe("inventory", wanted)
        [red] = ours(f"{good}&namespace=red").subscribe("inventory", wanted)
        found = receive(red)
        assert {(d.message.topic, d.message.body) for d in found} == {("orders", b"red")}
        red.settle([(d, Ack()) for d in found])
        assert list(plain.receive(1, SECOND)) == []

        configuration = ClientConfiguration(server.grpc, Credentials("shop", "12345678"))
        bare = SimpleConsumer(configuration, "inventory", {"orders": FilterExpression()}, await_duration=1)
        bare.startup()

        def refusal() -> str:
            try:
                bare.receive(1, 10)
            except Exception as error:
                return str(error) if "40018" in str(error) else ""  # it fails otherwise while it warms up
            return ""

        # a short wait is refused: the client's deadline of 4 s is under the proxy's least polling time
        assert "deadline" in until("a refusal", refusal)
        bare.shutdown()
        begun = time.monotonic()
        assert list(plain.receive(1, SECOND / 2)) == []
        assert time.monotonic() - begun < 1.5
        for consumer in (plain, red):
            consumer.stop()
            consumer.close()


def test_a_child_of_a_process_that_used_grpc_is_refused_in_a_sentence_and_does_not_hang(broker: Broker) -> None:
    topic, _ = broker.names()
    program = Path(__file__).parent / "forking_producer.py"
    command = [sys.executable, str(program), f"rocketmq://{broker.server.grpc}", topic]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=90, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    told = ["before: sent", "after: refused", "its own: refused", "a consumer: refused", "closed: sent", "parent: True"]
    assert done.stdout.splitlines() == told, done.stderr
    assert done.returncode == 0, done.stderr
