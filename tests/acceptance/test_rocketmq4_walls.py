"""Each fault of `rocketmq-client-python` and librocketmq that is walled off: seen without the wall, gone behind it.

What would end or hang a process is shown in one of its own. The broker and the library are real.
"""

import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from threading import Barrier, Event
from time import monotonic, sleep
from types import ModuleType
from typing import Any

import pytest
from sqlalchemy.orm import Session

from exactly_once import ExactlyOnce, keys
from exactly_once.alembic import upgrade
from exactly_once.doctor.looking import Mark, examine
from exactly_once.errors import ConfigurationError, TransportError
from exactly_once.message import Message
from exactly_once.outcome import Ack, Redeliver
from exactly_once.service import worker_service as serving
from exactly_once.service.worker_service import WorkerService
from exactly_once.testing.child import wait_until
from exactly_once.transports.contract import Away, Consumer, Delivery, Receipt, Subscription, Surroundings, Transport
from exactly_once.transports.registry import transport_from
from exactly_once.transports.remoting import Admin
from exactly_once.transports.rocketmq4.checks import fix_starting_points
from exactly_once.transports.rocketmq4.messages import Names
from tests.services.rocketmq import ROOT, RocketMQ
from tests.services.rocketmq4_client import need_client, shares
from tests.services.rocketmq_admin import Admin as ServerAdmin
from tests.services.rocketmq_java import java_sends

ENDLESS = 2147483647
BINARY = b"a\0b\xff\0"
_names = iter(lambda: os.urandom(4).hex(), "")  # other files import this one, and share its server


class Place:
    """A topic and a group of its own."""

    def __init__(self, server: RocketMQ, *, retries: int = ENDLESS, queues: int = 4) -> None:
        self.server = server
        self.topic = f"walls4-{next(_names)}"
        self.group = f"{self.topic}-group"
        server.create_topic(self.topic, queues=queues)
        server.create_group(self.group, retries=retries)

    def transport(self, options: str = "") -> Transport:
        return transport_from(f"rocketmq4://{self.server.name_server}{options}", Surroundings())

    def send(self, *bodies: bytes, **fields: Any) -> list[Receipt]:
        producer = self.transport().producer()
        try:
            answers = producer.send([Message(self.topic, body, **fields) for body in bodies])
        finally:
            producer.close()
        assert all(isinstance(answer, Receipt) for answer in answers), answers
        return [answer for answer in answers if isinstance(answer, Receipt)]

    def bare(self, callback: Callable[[Any], object], *, topic: str = "", orderly: bool = False) -> Any:
        """Return a consumer of the client's own, started; it is never collected, which would crash this process."""
        client = the_client()
        consumer = client.PushConsumer(self.group, orderly=orderly)
        consumer.set_name_server_address(self.server.name_server)
        consumer.set_instance_name(f"bare-{next(_names)}")
        consumer.subscribe(topic or self.topic, callback)
        consumer.start()
        _kept.append(consumer)
        return consumer


_kept: list[Any] = []


def the_client() -> ModuleType:
    from exactly_once.transports.rocketmq4.library import load

    return load().client


def take(consumer: Consumer, wanted: int, patience_s: float = 30) -> list[Delivery]:
    """Receive and acknowledge until so many messages were handed out."""
    got: list[Delivery] = []
    deadline = monotonic() + patience_s
    while len(got) < wanted and monotonic() < deadline:
        fresh = consumer.receive(16, timedelta(seconds=0.5))
        consumer.settle([(delivery, Ack()) for delivery in fresh])
        got += fresh
    return got


def leave(consumers: Sequence[Consumer]) -> None:
    for consumer in consumers:
        consumer.stop()
        consumer.close()


def python(program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(autouse=True)
def _client() -> None:
    need_client()


@pytest.fixture
def place(rocketmq: RocketMQ) -> Place:
    return Place(rocketmq)


@pytest.fixture
def bare_library() -> Path:
    """The folder of the client's package, with a library too old for it beside."""
    from exactly_once.transports.rocketmq4.library import load

    path = Path(load().path)
    import ctypes

    if hasattr(ctypes.CDLL(str(path)), "CreateTransactionProducer"):
        pytest.skip("librocketmq is 2.0 or newer here, and has everything the client binds")
    return path.parent


# -- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("bare_library")
def test_without_the_wall_the_client_cannot_be_imported_over_an_old_library() -> None:
    ended = python("import rocketmq.client")
    assert "undefined symbol" in ended.stderr
    assert python("from exactly_once.transports.rocketmq4.library import load; load()").returncode == 0


def test_a_function_the_old_library_lacks_says_so_and_does_not_crash(bare_library: Path) -> None:
    assert bare_library.is_dir()
    client = the_client()
    with pytest.raises(sys.modules["rocketmq.exceptions"].NullPointerException):
        client.Producer("group", orderly=True)


def test_importing_the_client_through_us_changes_ctypes_for_nobody_else() -> None:
    program = """
        import ctypes, ctypes.util
        before = ctypes.util.find_library, ctypes.cdll.LoadLibrary
        from exactly_once.transports.rocketmq4.library import load
        load()
        assert before == (ctypes.util.find_library, ctypes.cdll.LoadLibrary)
    """
    assert python(program).stderr == ""


def test_a_missing_library_is_one_sentence_with_what_to_type(tmp_path: Path) -> None:
    ended = python(
        """
        from exactly_once.transports.registry import transport_from
        from exactly_once.transports.contract import Surroundings
        transport_from("rocketmq4://127.0.0.1:1", Surroundings()).producer()
        """,
        EXACTLY_ONCE_LIBROCKETMQ=str(tmp_path / "absent.so"),
    )
    assert "ConfigurationError" in ended.stderr
    assert "there is no such file" in ended.stderr


def test_a_library_that_is_none_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "librocketmq.so").write_text("this is no library")
    ended = python(
        "from exactly_once.transports.rocketmq4.library import load; load()",
        EXACTLY_ONCE_LIBROCKETMQ=str(tmp_path / "librocketmq.so"),
    )
    assert "ConfigurationError" in ended.stderr
    assert "pip install" in ended.stderr


@pytest.mark.parametrize(
    ("files", "error", "says"),
    [([], "MissingExtra", "[rocketmq4]'"), (["v5/__init__.py"], "ConfigurationError", "two environments")],
)
def test_the_other_client_in_its_place_is_named(tmp_path: Path, files: list[str], error: str, says: str) -> None:
    for name in files:
        (tmp_path / "rocketmq" / name).parent.mkdir(parents=True)
        (tmp_path / "rocketmq" / name).touch()
        (tmp_path / "rocketmq" / "__init__.py").touch()
    # in front of the real one; or the real one hidden
    ended = python(
        """
        import sys
        if sys.argv[2] == "hide":
            from importlib import util
            find, util.find_spec = util.find_spec, lambda name, *more: None if name == "rocketmq" else find(name, *more)
        else:
            sys.path.insert(0, sys.argv[1])
        from exactly_once.transports.rocketmq4.library import load
        load()
        """,
        str(tmp_path),
        "" if files else "hide",
    )
    assert error in ended.stderr
    assert says in ended.stderr


def test_log_files_go_where_we_say_and_not_into_the_home(tmp_path: Path, place: Place) -> None:
    program = """
        import sys
        if sys.argv[2] == "walled":
            from exactly_once.transports.rocketmq4.library import load, _send_logs_to
        else:
            import exactly_once.transports.rocketmq4.library as library
            library._send_logs_to = lambda *_: None
            from exactly_once.transports.rocketmq4.library import load
        producer = load().client.Producer("log-test")
        producer.set_name_server_address(sys.argv[1])
        producer.start()
        producer.shutdown()
    """
    homes = {kind: tmp_path / kind for kind in ("bare", "walled")}
    for kind, home in homes.items():
        home.mkdir()
        ended = python(program, place.server.name_server, kind, HOME=str(home))
        assert ended.returncode == 0, ended.stderr
    assert list(homes["bare"].rglob("*.log*")), "without the wall"
    assert not list(homes["walled"].rglob("*"))


# -- bodies ----------------------------------------------------------------------------------------------------------


def test_without_the_wall_a_body_ends_at_its_first_nul_both_ways(place: Place) -> None:
    client = the_client()
    heard: list[tuple[bytes, bytes | None]] = []

    def callback(received: Any) -> object:
        heard.append((received.body, Message.from_rocketmq4(received).body))
        return client.ConsumeStatus.CONSUME_SUCCESS

    consumer = place.bare(callback)
    place.send(BINARY)
    wait_until(lambda: len(heard) == 1, what="one heard", patience_s=30)
    assert heard[0] == (b"a", BINARY), "the client's own body, and ours"
    producer = client.Producer(f"{place.group}-producer")
    producer.set_name_server_address(place.server.name_server)
    producer.start()
    message = client.Message(place.topic)
    message.set_body(BINARY)
    producer.send_sync(message)
    wait_until(lambda: len(heard) == 2, what="two heard", patience_s=30)
    producer.shutdown()
    consumer.shutdown()
    assert heard[1][1] == b"a", "cut on its way out"


def test_a_library_that_does_not_tell_a_body_s_length_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from exactly_once.clients import rocketmq4 as rocketmq4_body
    from exactly_once.transports.rocketmq4.library import load

    path = load().path
    rocketmq4_body.body_reader.cache_clear()
    monkeypatch.setattr(rocketmq4_body, "_LENGTH_BEFORE_TEXT", 16)  # as another kind of string would have it
    with pytest.raises(ConfigurationError, match="does not tell how long"):
        rocketmq4_body.body_reader(path)
    rocketmq4_body.body_reader.cache_clear()


def test_every_field_is_read_alike_in_a_user_s_own_callback_and_in_the_transport(place: Place) -> None:
    client = the_client()
    heard: list[Message] = []

    def callback(received: Any) -> object:
        heard.append(Message.from_rocketmq4(received))
        return client.ConsumeStatus.CONSUME_SUCCESS

    consumer = place.bare(callback)
    fields = {"tag": "T", "key": "K-ü", "ordering_key": "o-1", "properties": {"eo-unread": "ä", "empty": "", "n": "7"}}
    place.send(BINARY, **fields)
    wait_until(lambda: len(heard) == 1, what="one heard", patience_s=30)
    consumer.shutdown()
    other = Place(place.server)
    other.topic = place.topic
    with other.server.admin() as broker:
        for queue in range(4):
            broker.demand(15, {"consumerGroup": other.group, "topic": other.topic, "queueId": queue, "commitOffset": 0})
    consumers = other.transport().subscribe(other.group, [Subscription(other.topic)])
    [delivery] = take(consumers[0], 1)
    leave(consumers)
    assert delivery.message == heard[0]
    assert {name: getattr(heard[0], name) for name in fields} == fields


def test_sent_messages_are_freed(place: Place) -> None:
    program = """
        import os, sys
        from exactly_once.message import Message
        from exactly_once.transports.contract import Surroundings
        from exactly_once.transports.registry import transport_from
        producer = transport_from(sys.argv[1], Surroundings()).producer()
        if sys.argv[3] == "leak":
            producer._library.call.DestroyMessage = lambda handle: 0
        body = os.urandom(100_000)
        def send(n):
            for _ in range(n):
                producer.send([Message(sys.argv[2], body)])
        def resident_kib():
            with open("/proc/self/statm") as numbers:
                return int(numbers.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
        send(100)
        before = resident_kib()
        send(400)
        print(resident_kib() - before)
        producer.close()
    """
    url = f"rocketmq4://{place.server.name_server}"
    grown_kib = {kind: int(python(program, url, place.topic, kind).stdout) for kind in ("leak", "free")}
    assert grown_kib["leak"] > 30_000, "without the wall the 400 bodies stay"
    assert grown_kib["free"] < 10_000


# -- retry -----------------------------------------------------------------------------------------------------------


def test_without_the_wall_one_later_sends_back_the_whole_list(rocketmq: RocketMQ) -> None:
    place = Place(rocketmq, queues=1)
    client = the_client()
    counts: dict[bytes, list[int]] = {}
    ready = Event()

    def callback(received: Any) -> object:
        ready.wait(30)
        counts.setdefault(received.body, []).append(received.reconsume_times)
        later = received.body == b"5" and received.reconsume_times == 0
        return client.ConsumeStatus.RECONSUME_LATER if later else client.ConsumeStatus.CONSUME_SUCCESS

    with rocketmq.admin() as broker:
        broker.demand(15, {"consumerGroup": place.group, "topic": place.topic, "queueId": 0, "commitOffset": 0})
    place.send(*(str(n).encode() for n in range(10)))
    consumer = place.bare(callback)
    ready.set()
    wait_until(lambda: len(counts.get(b"5", [])) == 2, what="5 came again", patience_s=60)
    wait_until(lambda: len(counts.get(b"9", [])) >= 1, what="9 was called", patience_s=60)
    consumer.shutdown()
    assert counts[b"0"] == [0, 1], "it had succeeded, and came again all the same"
    assert counts[b"9"] == [1], "it had not been called, and is counted as failed all the same"


def test_a_redelivered_message_waits_here_and_its_neighbours_neither_come_again_nor_are_counted(
    rocketmq: RocketMQ,
) -> None:
    place = Place(rocketmq, queues=1)
    consumers = place.transport().subscribe(place.group, [Subscription(place.topic)])
    place.send(*(str(n).encode() for n in range(10)))
    heard: list[bytes | None] = []
    deadline = monotonic() + 40
    while len(heard) < 11 and monotonic() < deadline:
        for delivery in consumers[0].receive(16, timedelta(seconds=0.5)):
            heard.append(delivery.message.body)
            later = delivery.message.body == b"5" and heard.count(b"5") == 1
            consumers[0].settle([(delivery, Redeliver(timedelta(seconds=0.2)) if later else Ack())])
    leave(consumers)
    assert sorted(body or b"" for body in heard) == sorted([b"5", *(str(n).encode() for n in range(10))])
    with rocketmq.admin() as broker:
        assert broker.offsets(f"%RETRY%{place.group}", 0) == (0, 0)


def test_without_the_wall_a_message_past_the_last_retry_vanishes(rocketmq: RocketMQ) -> None:
    place = Place(rocketmq, retries=1)
    client = the_client()
    heard: list[int] = []

    def callback(received: Any) -> object:
        heard.append(received.reconsume_times)
        return client.ConsumeStatus.RECONSUME_LATER

    consumer = place.bare(callback)
    place.send(b"lost")
    wait_until(lambda: len(heard) == 2, what="tried twice", patience_s=60)
    sleep(3)  # the levels are 1 s here: a third try, or the dead letter, would be there by now
    consumer.shutdown()
    assert heard == [0, 1]
    with rocketmq.admin() as broker:
        reply = broker.ask(30, {"topic": f"%DLQ%{place.group}", "queueId": 0})
        assert reply.code != 0 or int(reply.fields["offset"]) == 0, "and it is in no dead-letter queue"
    [problem] = place.transport().check(place.group, [Subscription(place.topic)])
    assert f"-r {ENDLESS}" in problem


def test_an_exception_while_reading_a_message_is_held_and_never_an_acknowledgement(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    consumers = place.transport().subscribe(place.group, [Subscription(place.topic)])
    [consumer] = consumers

    def broken(handle: int) -> Message:
        raise RuntimeError(f"cannot read {handle}")

    monkeypatch.setattr(consumer, "_read", broken)
    place.send(b"kept")
    wait_until(lambda: "could not be read" in caplog.text, what="logged", patience_s=30)
    assert consumer.receive(1, timedelta(seconds=0.2)) == []
    leave(consumers)
    again = place.transport().subscribe(place.group, [Subscription(place.topic)])
    assert [delivery.message.body for delivery in take(again[0], 1)] == [b"kept"]
    leave(again)


# -- the group -------------------------------------------------------------------------------------------------------


def test_without_the_wall_two_clients_of_one_group_with_two_topics_leave_queues_unread(rocketmq: RocketMQ) -> None:
    place, other = Place(rocketmq), Place(rocketmq)
    client = the_client()
    consumers = [
        place.bare(lambda _: client.ConsumeStatus.CONSUME_SUCCESS, topic=topic) for topic in (place.topic, other.topic)
    ]

    def read() -> int:
        return sum(len(queues) for queues in shares(rocketmq, place.group))

    wait_until(lambda: len(shares(rocketmq, place.group)) == 2, what="both joined", patience_s=30)
    wait_until(lambda: 0 < read() < 8, what="fewer than all 8 queues are read", patience_s=30)
    for consumer in consumers:
        consumer.shutdown()
    fresh = Place(rocketmq)
    both = fresh.transport().subscribe(fresh.group, [Subscription(place.topic), Subscription(other.topic)])
    wait_until(lambda: sum(len(queues) for queues in shares(rocketmq, fresh.group)) == 8, what="all are", patience_s=30)
    leave(both)


def test_a_group_without_a_place_is_put_at_the_end_and_one_with_a_place_stays(rocketmq: RocketMQ) -> None:
    """Killed before its first stored offset, a new group would start behind what it had received."""
    place = Place(rocketmq, queues=1)
    place.send(b"1", b"2", b"3")
    admin = Admin([rocketmq.name_server])
    [queue] = admin.queues(place.topic)
    wait_until(lambda: admin.end(queue) == 3, what="the broker has counted what it stored", patience_s=30)
    admin.put_at_end(place.group, queue)
    place.send(b"4")
    fix_starting_points(admin, Names(), place.group, [Subscription(place.topic)])
    assert admin.offset(place.group, queue) == 3
    consumers = place.transport().subscribe(place.group, [Subscription(place.topic)])
    assert [delivery.message.body for delivery in take(consumers[0], 1)] == [b"4"]
    leave(consumers)


def test_an_ordered_member_that_left_keeps_no_lock(rocketmq: RocketMQ) -> None:
    """The client forgets to unlock one queue of each broker, and a lock lasts a minute."""
    place = Place(rocketmq)
    ordered = [Subscription(place.topic, ordered=True)]
    for number in range(2):
        consumers = place.transport().subscribe(place.group, ordered)
        for queue in range(8):
            place.send(str(queue).encode(), ordering_key=f"key-{number}-{queue}")
        begun = monotonic()
        assert len(take(consumers[0], 8)) == 8
        assert monotonic() - begun < 30
        leave(consumers)


# -- leaving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("walled", [False, True], ids=["without the wall", "walled"])
def test_leaving_with_unsettled_messages_sends_them_back_unless_walled(
    rocketmq: RocketMQ, walled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sent back, they are lost if a send fails, and count as failed towards the end where messages vanish."""
    from exactly_once.transports.rocketmq4.library import load

    place = Place(rocketmq, queues=1)
    consumers = place.transport().subscribe(place.group, [Subscription(place.topic)])
    place.send(*(str(n).encode() for n in range(10)))
    wait_until(lambda: bool(consumers[0].receive(1, timedelta(seconds=0.5))), what="one in hand", patience_s=30)
    if not walled:
        monkeypatch.setattr(load().call, "SetPushConsumerMessageModel", lambda *_: 0)
    leave(consumers)
    monkeypatch.undo()

    def sent_back() -> int:
        with rocketmq.admin() as broker:
            reply = broker.ask(30, {"topic": f"%RETRY%{place.group}", "queueId": 0})
            return int(reply.fields["offset"]) if reply.code == 0 else 0

    if not walled:
        wait_until(lambda: sent_back() > 0, what="sent back", patience_s=10)
        return
    again = place.transport().subscribe(place.group, [Subscription(place.topic)])
    assert len({delivery.message.body for delivery in take(again[0], 10)}) == 10
    leave(again)
    assert sent_back() == 0


def test_without_the_wall_a_collected_consumer_crashes_the_process(place: Place) -> None:
    program = """
        import gc, sys, time
        from exactly_once.transports.rocketmq4.library import load
        client = load().client
        def join():
            consumer = client.PushConsumer(sys.argv[2])
            consumer.set_name_server_address(sys.argv[1])
            consumer.subscribe(sys.argv[3], lambda m: client.ConsumeStatus.CONSUME_SUCCESS)
            consumer.start()
        join()
        gc.collect()
        producer = client.Producer("crash-producer")
        producer.set_name_server_address(sys.argv[1])
        producer.start()
        for _ in range(50):
            message = client.Message(sys.argv[3])
            message.set_body("x")
            producer.send_sync(message)
            time.sleep(0.1)
    """
    ended = python(program, place.server.name_server, place.group, place.topic)
    assert ended.returncode < 0, "it ended by itself, in good order"


def test_consumers_that_nobody_refers_to_go_on_without_a_crash(place: Place) -> None:
    program = """
        import gc, sys
        from datetime import timedelta
        from exactly_once.message import Message
        from exactly_once.transports.contract import Subscription, Surroundings
        from exactly_once.transports.registry import transport_from
        transport = transport_from(sys.argv[1], Surroundings())
        for _ in range(3):
            [consumer] = transport.subscribe(sys.argv[2], [Subscription(sys.argv[3])])
            consumer.stop()
            consumer.close()
            del consumer
            gc.collect()
        transport.subscribe(sys.argv[2], [Subscription(sys.argv[3])])
        gc.collect()
        producer = transport.producer()
        print(len(producer.send([Message(sys.argv[3], b"x")] * 50)))
        sys.exit(5)
    """
    ended = python(program, f"rocketmq4://{place.server.name_server}", place.group, place.topic)
    assert ended.returncode == 5, ended.stderr


def test_without_the_wall_a_forgotten_producer_hangs_the_exit(place: Place) -> None:
    program = """
        import sys
        from exactly_once.transports.rocketmq4.library import load
        producer = load().client.Producer("forgotten")
        producer.set_name_server_address(sys.argv[1])
        producer.start()
        message = load().client.Message(sys.argv[2])
        message.set_body("x")
        producer.send_sync(message)
        print("done", flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), place.server.name_server, place.topic]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"done\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(5)
        process.kill()


# -- sending ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_carried_is_refused_for_good_and_costs_no_other_message(place: Place) -> None:
    producer = place.transport().producer()
    place.send(b"known now")
    refused = [
        Message(place.topic, b""),
        Message(place.topic, None),
        Message(place.topic, b"x", key="a\0b"),
        Message(place.topic, b"x", tag="a\1"),
        Message(place.topic, b"x", properties={"KEYS": "mine"}),
        Message(place.topic, b"x", properties={"a": "b\2c"}),
        Message(place.topic, b"x", properties={"a": "b" * 40_000}),
    ]
    answers = producer.send([*refused, Message(place.topic, b"good")])
    producer.close()
    assert [type(answer) for answer in answers] == [ValueError] * len(refused) + [Receipt]


def test_nothing_of_an_ordering_key_is_sent_after_a_failed_one(place: Place) -> None:
    producer = place.transport().producer()
    place.send(b"known now")
    answers = producer.send(
        [
            Message(place.topic, b"1", ordering_key="a"),
            Message(place.topic, b"", ordering_key="a"),
            Message(place.topic, b"2", ordering_key="b"),
            Message(place.topic, b"3", ordering_key="a"),
        ]
    )
    producer.close()
    assert [type(answer) for answer in answers] == [Receipt, ValueError, Receipt, TransportError]


def test_a_closed_producer_says_so(place: Place) -> None:
    producer = place.transport().producer()
    producer.close()
    [answer] = producer.send([Message(place.topic, b"x")])
    assert isinstance(answer, TransportError)
    assert "closed" in str(answer)


def test_a_namespace_keeps_topics_and_groups_apart_and_is_not_seen(rocketmq: RocketMQ) -> None:
    plain = Place(rocketmq)
    rocketmq.create_topic(f"shop%{plain.topic}")
    rocketmq.create_group(f"shop%{plain.group}", retries=ENDLESS)
    transport = plain.transport("?namespace=shop")
    assert list(transport.check(plain.group, [Subscription(plain.topic)])) == []
    consumers = transport.subscribe(plain.group, [Subscription(plain.topic)])
    producer = transport.producer()
    plain.send(b"outside")
    [answer] = producer.send([Message(plain.topic, b"inside")])
    got = take(consumers[0], 1)
    producer.close()
    leave(consumers)
    assert isinstance(answer, Receipt)
    assert [(d.message.topic, d.message.body) for d in got] == [(plain.topic, b"inside")]


def test_the_second_name_server_is_asked_when_the_first_does_not_answer(place: Place) -> None:
    transport = transport_from(f"rocketmq4://127.0.0.1:1,{place.server.name_server}", Surroundings())
    assert list(transport.check(place.group, [Subscription(place.topic)])) == []
    consumers = transport.subscribe(place.group, [Subscription(place.topic)])
    producer = transport.producer()
    deadline = monotonic() + 30
    while not isinstance(producer.send([Message(place.topic, b"x")])[0], Receipt):
        assert monotonic() < deadline
    assert len(take(consumers[0], 1)) == 1
    producer.close()
    leave(consumers)


def test_a_topic_without_a_route_is_an_outage_until_a_broker_has_said_that_it_has_none(place: Place) -> None:
    """A name server forgets the topics of a broker that restarts: whoever starts then must wait, and stop for nothing."""
    server, subscription = place.server, [Subscription(place.topic)]
    server.kill_proxy()
    try:
        names = Admin([server.name_server])
        wait_until(lambda: not names.queues(place.topic), what="the name server forgets the topic", patience_s=30)
        away = list(place.transport().check(place.group, subscription))
    finally:
        server.start()
    back = list(place.transport().check(place.group, subscription))
    missing = list(place.transport().check(place.group, [Subscription("never-made")]))
    assert [type(problem) for problem in away] == [Away]
    assert "no broker" in away[0]
    assert "mqadmin clusterList" in away[0]
    assert back == []
    assert [type(problem) for problem in missing] == [str]
    assert "topic never-made does not exist" in missing[0]


def test_a_name_server_that_has_just_started_does_not_speak_for_the_others(place: Place) -> None:
    """Each name server hears from each broker every 30 s: a new one knows no topic for so long."""
    young = RocketMQ()
    try:
        young.start_name_server()
        both = f"rocketmq4://{young.name_server},{place.server.name_server}"
        together = list(transport_from(both, Surroundings()).check(place.group, [Subscription(place.topic)]))
        alone = transport_from(f"rocketmq4://{young.name_server}", Surroundings())
        [problem] = alone.check(place.group, [Subscription(place.topic)])
    finally:
        young.stop()
    assert together == []
    assert isinstance(problem, Away)


def test_a_topic_that_only_the_broker_knows_yet_is_waited_for(place: Place) -> None:
    with ServerAdmin(place.server.name_server) as names:
        names.delete_route(place.topic)
    [problem] = place.transport().check(place.group, [Subscription(place.topic)])
    assert isinstance(problem, Away)
    assert f"broker-a has the topic {place.topic}" in problem


def test_a_worker_started_while_the_only_broker_restarts_waits_and_then_works(place: Place, tmp_path: Path) -> None:
    server, done = place.server, Event()
    database = f"sqlite:///{tmp_path / 'shop.db'}"
    upgrade(database)
    eo = ExactlyOnce(database, group=place.group)

    @eo.handler(place.topic, key=keys.message_key())
    def handle(session: Session, message: Message) -> None:
        done.set()

    server.kill_proxy()
    try:
        names = Admin([server.name_server])
        wait_until(lambda: not names.queues(place.topic), what="the name server forgets the topic", patience_s=30)
        with ThreadPoolExecutor(1) as pool:
            worker = eo.worker(f"rocketmq4://{server.name_server}")
            starting = pool.submit(worker.start)
            sleep(12)  # longer than what a server that is up and refuses is given
            assert not starting.done()
            server.start()
            starting.result(60)
    finally:
        server.start()
    try:
        place.send(b"{}", key="K-1")
        assert done.wait(60)
    finally:
        worker.stop()


def test_a_foreign_producer_s_properties_are_read_by_name(place: Place) -> None:
    client = the_client()
    consumers = place.transport("?properties=trace,absent").subscribe(place.group, [Subscription(place.topic)])
    producer = client.Producer(f"{place.group}-producer")
    producer.set_name_server_address(place.server.name_server)
    producer.start()
    message = client.Message(place.topic)
    message.set_body("x")
    message.set_property("trace", "t-1")
    message.set_property("other", "not asked for")
    producer.send_sync(message)
    [delivery] = take(consumers[0], 1)
    producer.shutdown()
    leave(consumers)
    assert dict(delivery.message.properties) == {"trace": "t-1"}


def test_properties_of_a_java_producer_come_as_they_were_sent_where_they_are_named(rocketmq: RocketMQ) -> None:
    place = Place(rocketmq)
    named = "?properties=city,blank,empty,absent"
    consumers = place.transport(named).subscribe(place.group, [Subscription(place.topic)])
    java_sends(rocketmq, place.topic)
    [delivery] = take(consumers[0], 1)
    leave(consumers)
    assert (delivery.message.ordering_key, dict(delivery.message.properties)) == ("A", {"city": "Köln", "blank": " "})


def test_a_group_that_is_new_to_a_young_topic_begins_at_its_first_message(place: Place) -> None:
    place.send(*[b"%d" % n for n in range(5)])
    consumers = place.transport().subscribe(place.group, [Subscription(place.topic)])
    found = take(consumers[0], 5)
    leave(consumers)
    assert sorted(delivery.message.body or b"" for delivery in found) == [b"0", b"1", b"2", b"3", b"4"]


def test_a_member_that_wants_other_tags_is_told_at_the_start_by_doctor_and_again(
    place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a group loses messages: what the member that reads a queue does not want is skipped for all of it."""
    url = f"rocketmq4://{place.server.name_server}"
    mine = [Subscription(place.topic, ("created",))]
    assert _of_others(place, mine) == []
    database = f"sqlite:///{tmp_path / 'shop.db'}"
    upgrade(database)
    eo = ExactlyOnce(database, group=place.group)
    eo.handler(place.topic, tag="created", key=keys.message_key(), name="first")(_nothing)
    monkeypatch.setattr(serving, "_CONCERNED_S", 1.0)
    others = place.transport().subscribe(place.group, [Subscription(place.topic, ("paid", "cancelled"))])
    try:
        found = [finding for finding in examine(eo, eo.transport(url)) if "LOSES MESSAGES" in finding.text]
        with eo.worker(url):
            told = [record.getMessage() for record in caplog.records if "LOSES MESSAGES" in record.getMessage()]
            wait_until(
                lambda: len([r for r in caplog.records if "LOSES MESSAGES" in r.getMessage()]) > 2,
                what="told again",
                patience_s=30,
            )
    finally:
        leave(others)
    assert [finding.mark for finding in found] == [Mark.WARN]
    [text] = told
    assert f"This program wants {place.topic} (created)" in text
    assert f"wants {place.topic} (cancelled || paid)" in text
    assert "group of its own" in text
    wait_until(lambda: _of_others(place, mine) == [], what="nobody is there", patience_s=30)


def test_two_programs_that_start_at_one_moment_and_subscribe_differently_are_told_soon(
    place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each asks before either has joined, so the start tells nobody."""
    monkeypatch.setattr(serving, "_CONCERNED_SOON_S", 5.0)
    begun = Barrier(2)
    asks = WorkerService._concerns

    def ask_together(
        self: WorkerService, subscriptions: Sequence[Subscription], told: Sequence[str] = ()
    ) -> Sequence[str]:
        found = asks(self, subscriptions, told)
        if self._worker is None:
            begun.wait(60)  # neither goes on to join before both have asked
        return found

    monkeypatch.setattr(WorkerService, "_concerns", ask_together)
    workers = []
    for tag in ("created", "paid"):
        database = f"sqlite:///{tmp_path / tag}.db"
        upgrade(database)
        eo = ExactlyOnce(database, group=place.group)
        eo.handler(place.topic, tag=tag, key=keys.message_key(), name="first")(_nothing)
        workers.append(eo.worker(f"rocketmq4://{place.server.name_server}?state_dir={tmp_path / 'journals'}"))
    try:
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(WorkerService.start, workers))
        wait_until(
            lambda: [r for r in caplog.records if "LOSES MESSAGES" in r.getMessage()] != [], what="told", patience_s=60
        )
    finally:
        for worker in workers:
            worker.stop()


def test_members_that_subscribe_alike_are_no_concern_and_an_older_one_is_seen_behind_a_later(place: Place) -> None:
    mine, other = Subscription(place.topic, ("b", "a")), Subscription(place.topic)
    transport = place.transport()
    members = [transport.subscribe(place.group, [mine]), transport.subscribe(place.group, [mine])]
    try:
        wait_until(lambda: _members_of(place) == 2, what="both joined", patience_s=30)
        alike = _of_others(place, [mine])
        members.append(transport.subscribe(place.group, [other]))
        wait_until(lambda: _members_of(place) == 3, what="the third joined", patience_s=30)
        [of_the_first] = _of_others(place, [mine])
        # the broker keeps the last subscription of the group: the members themselves tell theirs
        [of_the_last] = _of_others(place, [other])
    finally:
        for each in members:
            leave(each)
    assert alike == []
    assert f"wants {place.topic} (*)" in of_the_first
    assert of_the_last.count(f"wants {place.topic} (a || b)") == 2


@pytest.mark.parametrize("stays", [False, True])
def test_journals_that_go_are_told_at_the_start_and_by_doctor(
    place: Place,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    stays: bool,
) -> None:
    """Where they are gone after each start, a message that kills its process is never known for one."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    memory = Path(mkdtemp(dir="/dev/shm"))  # a file system of its own, as a volume is
    request.addfinalizer(partial(rmtree, memory))
    directory = memory / "given" if stays else tmp_path / f"exactly-once-{os.geteuid()}" / "given"
    url = f"rocketmq4://{place.server.name_server}?state_dir={directory}"
    database = f"sqlite:///{tmp_path / 'shop.db'}"
    upgrade(database)
    eo = ExactlyOnce(database, group=place.group)
    eo.handler(place.topic, key=keys.message_key(), name="first")(_nothing)
    found = [finding.mark for finding in examine(eo, eo.transport(url)) if str(directory) in finding.text]
    with eo.worker(url):
        told = [record for record in caplog.records if str(directory) in record.getMessage()]
    assert found == ([] if stays else [Mark.WARN])
    assert [record.levelname for record in told] == ([] if stays else ["WARNING"])


def _nothing(session: Session, message: Message) -> None: ...


def _of_others(place: Place, wanted: Sequence[Subscription]) -> list[str]:
    return [text for text in place.transport().concerns(place.group, wanted) if "LOSES MESSAGES" in text]


def _members_of(place: Place) -> int:
    admin = Admin([place.server.name_server])
    return len(admin.members(place.server.broker, place.group)[0])


def test_a_child_of_a_process_that_used_librocketmq_is_refused_in_a_sentence_and_does_not_hang(place: Place) -> None:
    program = Path(__file__).parent / "forking_producer.py"
    command = [sys.executable, str(program), f"rocketmq4://{place.server.name_server}", place.topic]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    told = ["before: sent", "after: refused", "its own: refused", "a consumer: refused", "closed: sent", "parent: True"]
    assert done.stdout.splitlines() == told, done.stderr
    assert done.returncode == 0, done.stderr
