"""What Apache's client for Java sends, through `rocketmq4://`: the same message as through any other door."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Row, create_engine, select

from exactly_once.database.schema import tables
from exactly_once.message import Message
from exactly_once.testing.child import wait_until
from exactly_once.transports.contract import Subscription
from exactly_once.transports.remoting import Admin
from exactly_once.transports.rocketmq4.checks import fix_starting_points
from exactly_once.transports.rocketmq4.messages import Names
from tests.acceptance.java_hears import check_what_java_hears
from tests.acceptance.test_rocketmq4_walls import Place, leave, take, the_client
from tests.services import java_producer
from tests.services.need import require
from tests.services.rocketmq import ROOT, RocketMQ
from tests.services.rocketmq4_client import need_client

LZ4, ZSTD = b"\x04\x22\x4d\x18", b"\x28\xb5\x2f\xfd"


@pytest.fixture(autouse=True)
def _java() -> None:
    require(java_producer)
    need_client()


@pytest.fixture
def place(rocketmq: RocketMQ) -> Place:
    return Place(rocketmq)


def test_several_keys_of_a_java_producer_are_one_key_through_both_doors(place: Place) -> None:
    heard: list[Message] = []

    def callback(received: Any) -> object:
        heard.append(Message.from_rocketmq4(received))
        return the_client().ConsumeStatus.CONSUME_SUCCESS

    other = Place(place.server)
    bare = other.bare(callback)
    java_producer.send(place.server, other.topic, keys="order-7 buyer-3 order-7")
    consumers = place.transport().subscribe(place.group, [Subscription(place.topic)])
    try:
        java_producer.send(place.server, place.topic, keys="order-7 buyer-3 order-7", tag="created")
        (delivery,) = take(consumers[0], 1)
        assert (delivery.message.key, delivery.message.tag) == ("buyer-3 order-7", "created")
        assert delivery.message.former == {"key": "order-7 buyer-3 order-7"}
        wait_until(lambda: heard, what="heard", patience_s=30)
        assert heard[0].key == "buyer-3 order-7"
    finally:
        leave(consumers)
        bare.shutdown()


def test_java_hears_what_our_producer_sends_field_by_field(place: Place) -> None:
    topics = dict.fromkeys(("NORMAL", "FIFO", "DELAY"), place.topic)
    check_what_java_hears(place.server, place.transport(), place.group, topics)


# -- bodies that librocketmq cannot unpack: it ends its process, before anybody is called ------------------------------


class Shop:
    """A group with a handler, run by processes of their own."""

    def __init__(self, place: Place, database: str, folder: Path) -> None:
        self.place, self.database, self.folder = place, database, folder
        self.ledger = folder / "ledger"
        self.ledger.touch()
        self.path = ""
        self.tag = ""
        self.child: subprocess.Popen[bytes] | None = None
        # it stands at the end of each queue: what is sent from now on is the group's
        admin = Admin([place.server.name_server])
        fix_starting_points(admin, Names(), place.group, [Subscription(place.topic)])

    def start(self, *, processes: int = 1) -> "subprocess.Popen[bytes]":
        environment = {
            **os.environ,
            "SHOP_DATABASE": self.database,
            "SHOP_GROUP": self.place.group,
            "SHOP_TOPIC": self.place.topic,
            "SHOP_TAG": self.tag,
            "SHOP_LEDGER": str(self.ledger),
            "PYTHONPATH": os.pathsep.join(filter(None, [self.path, str(ROOT), os.environ.get("PYTHONPATH", "")])),
        }
        where = f"rocketmq4://{self.place.server.name_server}?state_dir={self.folder / 'state'}"
        command = [sys.executable, "-m", "exactly_once", "run", "tests.acceptance.rocketmq4_java_shop:eo"]
        command += ["--transport", where, "--processes", str(processes)]
        with (self.folder / "output").open("ab") as output:
            self.child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
        return self.child

    def stop(self) -> None:
        if self.child is not None:
            self.child.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.child.wait(60)
            self.child.kill()
            self.child.wait()

    def without_packages(self) -> None:
        hidden = self.folder / "hidden"
        for name in ("lz4", "zstandard"):
            (hidden / name).mkdir(parents=True)
            (hidden / name / "__init__.py").write_text("raise ImportError\n")
        self.path = str(hidden)

    def send(self, no: str, **more: Any) -> None:
        """Send one as any producer does."""
        self.place.send(json.dumps({"no": no}).encode(), key=no, **more)

    def send_packed(self, no: str, compression: str, **more: Any) -> str:
        """Send one that Java's client packs; return its id."""
        sent = java_producer.send(
            self.place.server, self.place.topic, keys=no, size=6000, compression=compression, **more
        )
        return sent[0]

    def handled(self) -> set[str]:
        return set(self.ledger.read_text().split())

    def failures(self) -> Sequence[Row[Any]]:
        engine = create_engine(self.database)
        with engine.connect() as connection:
            found = connection.execute(select(tables().failure)).all()
        engine.dispose()
        return found

    def printed(self) -> str:
        return (self.folder / "output").read_text()

    def wait(self, condition: Callable[[], object], what: str) -> None:
        try:
            wait_until(condition, what=what, patience_s=120)
        except TimeoutError as error:
            raise AssertionError(f"{error}; {self.handled()}; {self.printed()[-4000:]}") from None


@pytest.fixture
def shop(place: Place, sqlite_url: str, tmp_path: Path) -> Iterator[Shop]:
    tmp_path.chmod(0o700)
    shop = Shop(place, sqlite_url, tmp_path)
    yield shop
    shop.stop()


def test_what_the_library_dies_of_is_kept_before_it_joins_and_the_group_goes_on(shop: Shop) -> None:
    shop.without_packages()
    shop.send("before")
    kept = {shop.send_packed(f"packed-{name}", name): magic for name, magic in (("LZ4", LZ4), ("ZSTD", ZSTD))}
    shop.send_packed("read", "ZLIB")
    shop.send("behind")
    child = shop.start()
    shop.wait(lambda: shop.handled() >= {"before", "read", "behind"} and len(shop.failures()) == 2, "all are done")
    assert child.poll() is None, "nothing has ended it"
    for row in shop.failures():
        assert (row.state, row.error_class) == ("dead", "BadBody")
        assert row.body.startswith(kept[row.message_id]), "whole, under the id that the producer was told"
        assert json.loads(row.properties) == [row.message_key.removeprefix("packed-").lower(), {}]
    assert "it would end this process" in shop.printed()
    shop.send("later")
    shop.wait(lambda: "later" in shop.handled(), "the client has joined")
    assert shop.handled() == {"before", "read", "behind", "later"}


def test_where_it_can_be_unpacked_it_is_handled(shop: Shop) -> None:
    shop.send_packed("LZ4", "LZ4")
    shop.send_packed("ZSTD", "ZSTD")
    child = shop.start()
    shop.wait(lambda: shop.handled() == {"LZ4", "ZSTD"}, "both are done")
    shop.send("later")
    shop.wait(lambda: "later" in shop.handled(), "the client has joined")
    assert child.poll() is None
    assert shop.failures() == []


def test_one_that_comes_while_processes_run_ends_some_of_them_and_is_kept(shop: Shop) -> None:
    shop.without_packages()
    supervisor = shop.start(processes=2)
    shop.send("first")
    shop.wait(lambda: "first" in shop.handled(), "it runs")
    id_ = shop.send_packed("packed-LZ4", "LZ4")
    shop.wait(lambda: [row.message_id for row in shop.failures()] == [id_], "it is kept")
    for n in range(3):
        shop.send(f"after-{n}")
    shop.wait(lambda: shop.handled() == {"first", *(f"after-{n}" for n in range(3))}, "the group goes on")
    assert supervisor.poll() is None
    assert shop.printed().count("(signal 6)") <= 4


@pytest.mark.parametrize(("wanted", "other"), [("created", "cancelled"), ("Aa", "BB")], ids=["plain", "hash_alike"])
def test_a_packed_message_of_a_tag_that_is_not_wanted_is_let_be(shop: Shop, wanted: str, other: str) -> None:
    """The broker compares hashes, and "Aa" has that of "BB": the library gets both, and unpacks before it looks at tags."""
    shop.without_packages()
    shop.tag = wanted
    shop.send_packed("other", "LZ4", tag=other)
    shop.send("mine", tag=wanted)
    child = shop.start()
    shop.wait(lambda: shop.handled() == {"mine"}, "it goes on")
    shop.send("later", tag=wanted)
    shop.wait(lambda: shop.handled() == {"mine", "later"}, "the client has joined")
    assert child.poll() is None
    assert shop.failures() == []


def damaged(place: Place, body: bytes, *, tag: str = "t") -> None:
    """Send what says that it is packed, and is nothing."""
    fields = {"producerGroup": "walls", "topic": place.topic, "defaultTopic": "TBW102", "defaultTopicQueueNums": 4}
    fields |= {"queueId": 0, "sysFlag": 1, "bornTimestamp": 1, "flag": 0, "properties": f"KEYS\1b a\2TAGS\1{tag}\2"}
    with place.server.admin() as remoting:
        remoting.demand(10, fields | {"reconsumeTimes": 0, "unitMode": "false", "batch": "false"}, body)


@pytest.mark.parametrize("ordered", [False, True], ids=["concurrent", "orderly"])
def test_leaving_before_the_library_has_joined_loses_nothing(rocketmq: RocketMQ, ordered: bool) -> None:
    place = Place(rocketmq, queues=1)
    wanted = [Subscription(place.topic, ordered=ordered)]
    fix_starting_points(Admin([place.server.name_server]), Names(), place.group, wanted)
    place.send(b"0", ordering_key="one", properties={"city": "Köln"})
    damaged(place, b"not packed at all")
    place.send(b"2", ordering_key="one")
    consumers = place.transport().subscribe(place.group, wanted)
    [first] = consumers[0].receive(8, timedelta(seconds=20))
    assert (first.message.body, first.message.ordering_key) == (b"0", "one")
    assert dict(first.message.properties) == {"city": "Köln"}
    leave(consumers)
    consumers = place.transport().subscribe(place.group, wanted)
    try:
        got = take(consumers[0], 3)
        assert [delivery.message.body for delivery in got] == [b"0", b"not packed at all", b"2"]
        assert [delivery.unread is None for delivery in got] == [True, False, True]
        assert got[0].message.message_id == first.message.message_id
        assert (got[1].message.key, got[1].message.tag) == ("a b", "t")
        assert (got[1].message.unread, dict(got[1].message.properties)) == ("zlib", {})
    finally:
        leave(consumers)


def test_of_two_tags_of_one_hash_only_the_wanted_one_is_handed_out(rocketmq: RocketMQ) -> None:
    place = Place(rocketmq, queues=1)
    wanted = [Subscription(place.topic, ("Aa",))]
    fix_starting_points(Admin([place.server.name_server]), Names(), place.group, wanted)
    place.send(b"0", tag="BB")
    damaged(place, b"not packed at all", tag="BB")
    place.send(b"2", tag="Aa")
    damaged(place, b"nor this", tag="Aa")
    damaged(place, b"nor that", tag="BB")
    consumers = place.transport().subscribe(place.group, wanted)
    try:
        place.send(b"5", tag="BB")
        place.send(b"6", tag="Aa")
        assert [delivery.message.body for delivery in take(consumers[0], 3)] == [b"2", b"nor this", b"6"]
    finally:
        leave(consumers)
