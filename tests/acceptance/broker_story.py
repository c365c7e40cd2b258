"""From a real broker to rows in a real PostgreSQL, with the broker killed on the way; instanced for both RocketMQ clients."""

import json
import threading
import time
from itertools import count

import pytest
from sqlalchemy import create_engine, insert, text
from sqlalchemy.orm import Session

from exactly_once import ExactlyOnce, Message, Reject, Retry
from tests.acceptance.orders import Reservation, ledger, open_shop, take
from tests.services.rocketmq import RocketMQ
from tests.waiting import until

PATIENCE_S = 120.0
MORE_THAN_A_PULL = 32  # messages that either client brings at once
_numbers = count(1)


class Shop:
    """One application on a topic and a group of its own."""

    def __init__(self, database: str, topic: str, group: str) -> None:
        self.database, self.topic = database, topic
        engine = create_engine(database)
        open_shop(engine)
        engine.dispose()
        self.eo = eo = ExactlyOnce(database, group=group)
        failed: set[str] = set()

        @eo.handler(topic, tag="created", key="order_no", retry=Retry(immediate=0, delays=[0.5], max_attempts=8))
        def reserve(session: Session, order: dict[str, str]) -> None:
            session.add(Reservation(order_no=order["order_no"]))
            session.execute(take())
            if order["order_no"].endswith("3") and order["order_no"] not in failed:
                failed.add(order["order_no"])
                raise ValueError("fails once, after it has written")
            if order["order_no"].startswith("reject"):
                raise Reject("never")

    def send(self, url: str, orders: list[str], *, tag: str = "created") -> None:
        with self.eo.producer(url) as producer:
            producer.send_all(
                [Message(self.topic, json.dumps({"order_no": no}).encode(), tag=tag, key=no) for no in orders]
            )

    def ask(self, statement: str) -> list[tuple[object, ...]]:
        engine = create_engine(self.database)
        with engine.connect() as connection:
            rows = [tuple(row) for row in connection.execute(text(statement))]
        engine.dispose()
        return rows

    def ledger(self) -> tuple[list[str], int]:
        engine = create_engine(self.database)
        found = ledger(engine)
        engine.dispose()
        return found


class BrokerStory:
    """What must hold over any broker; subclasses give `url` and make topics and groups."""

    def url(self, server: RocketMQ) -> str:
        raise NotImplementedError

    def group(self, server: RocketMQ, name: str) -> None:
        raise NotImplementedError

    @pytest.fixture
    def shop(self, rocketmq: RocketMQ, postgres_url: str) -> Shop:
        number = next(_numbers)
        topic, group = f"story-{type(self).__name__}-{number}", f"story-group-{type(self).__name__}-{number}"
        rocketmq.create_topic(topic)
        self.group(rocketmq, group)
        return Shop(postgres_url, topic, group)

    def test_duplicates_failures_and_dead_letters_end_as_they_must(self, rocketmq: RocketMQ, shop: Shop) -> None:
        url = self.url(rocketmq)
        orders = [f"o-{number:03}" for number in range(100)]
        with shop.eo.worker(url, concurrency=4) as worker:
            shop.send(url, orders + orders[:40])
            shop.send(url, ["reject-1"])
            shop.send(url, ["other"], tag="cancelled")
            until(lambda: shop.ledger()[0] == orders, lambda: (len(shop.ledger()[0]), worker.counts))
            until(
                lambda: (
                    shop.ask("SELECT count(*) FROM message_failure WHERE state NOT IN ('resolved', 'dead')") == [(0,)]
                ),
                lambda: shop.ask("SELECT state, handler, error_text FROM message_failure"),
            )
            until(lambda: worker.counts.in_hand == 0, lambda: worker.counts)
        assert shop.ledger() == (orders, 100)
        assert shop.ask("SELECT business_key, state FROM message_failure WHERE state = 'dead'") == [
            ("reject-1", "dead")
        ]
        kept = shop.ask("SELECT convert_from(body, 'UTF8'), tag, message_key FROM message_failure WHERE state = 'dead'")
        assert kept == [('{"order_no": "reject-1"}', "created", "reject-1")]

    def test_a_handler_of_lists_gets_more_than_one_pull_brings_and_a_poison_blocks_nobody(
        self, rocketmq: RocketMQ, shop: Shop
    ) -> None:
        url, sent, sizes = self.url(rocketmq), threading.Event(), [0]
        lists = ExactlyOnce(shop.database, group=shop.eo.group)

        @lists.batch_handler(shop.topic, key="order_no", batch=100)
        def reserve_all(session: Session, orders: list[dict[str, str]]) -> None:
            assert sent.wait(PATIENCE_S)
            sizes.append(len(orders))
            session.execute(insert(Reservation), orders)
            session.execute(take(len(orders)))
            if any(order["order_no"].startswith("poison") for order in orders):
                raise Reject("never")

        orders = [f"o-{number:03}" for number in range(600)]
        with lists.worker(url, concurrency=1) as worker:
            # RocketMQ 4's client works a pulled list off one by one: only one message a pull is one more in hand
            for number, order in enumerate(orders[:60], 1):
                shop.send(url, [order])
                until(lambda number=number: worker.counts.in_hand == number, lambda: worker.counts)
            shop.send(url, [*orders[60:300], "poison", *orders[300:], *orders[:200]])
            sent.set()
            until(lambda: worker.counts.acked >= 801, lambda: (len(shop.ledger()[0]), worker.counts, sizes))
        assert shop.ledger() == (orders, 600)
        assert shop.ask("SELECT business_key, state FROM message_failure") == [("poison", "dead")]
        assert max(sizes) > MORE_THAN_A_PULL, sizes

    def test_a_broker_killed_while_polling_loses_and_doubles_nothing(self, rocketmq: RocketMQ, shop: Shop) -> None:
        url = self.url(rocketmq)
        before, after = [f"a-{number:03}" for number in range(150)], [f"b-{number:03}" for number in range(50)]
        with shop.eo.worker(url, concurrency=4) as worker:
            shop.send(url, before * 2)
            until(lambda: worker.counts.outcomes["processed"] > 30, lambda: worker.counts)
            rocketmq.kill()
            rocketmq.start()
            rocketmq.wait_for_route(shop.topic)
            # the proxy asks the name server by itself, and later
            check = shop.eo.transport(url).check
            until(lambda: not check(shop.eo.group, shop.eo.subscriptions()), lambda: check(shop.eo.group, ()))
            shop.send(url, after * 2)
            wanted = sorted(before + after)
            until(lambda: shop.ledger()[0] == wanted, lambda: (len(shop.ledger()[0]), worker.counts))
        assert shop.ledger() == (wanted, len(wanted))

    def test_a_broker_that_is_down_at_start_is_waited_for(self, rocketmq: RocketMQ, shop: Shop) -> None:
        url = self.url(rocketmq)
        shop.send(url, ["first"])
        rocketmq.kill()
        serving = shop.eo.worker(url, concurrency=2)
        starting = threading.Thread(target=serving.start)
        starting.start()
        try:
            time.sleep(3)
            assert starting.is_alive(), "it waits"
            rocketmq.start()
            rocketmq.wait_for_route(shop.topic)
            # the proxy asks the name server by itself, and later
            check = shop.eo.transport(url).check
            until(lambda: not check(shop.eo.group, shop.eo.subscriptions()), lambda: check(shop.eo.group, ()))
            starting.join(60)
            assert not starting.is_alive()
            until(lambda: shop.ledger()[0] == ["first"], lambda: serving.counts)
        finally:
            serving.stop()
        assert shop.ledger() == (["first"], 1)

    def test_an_unknown_topic_is_refused_with_the_command_that_makes_it(
        self, rocketmq: RocketMQ, postgres_url: str
    ) -> None:
        shop = Shop(postgres_url, "story-not-there", "story-group-not-there")
        with pytest.raises(Exception, match="mqadmin updateTopic"):
            shop.eo.worker(self.url(rocketmq)).start()
