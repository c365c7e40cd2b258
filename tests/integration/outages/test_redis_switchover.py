"""A planned switchover of Redis: its address leads to another server, and the old one takes no writes but keeps its connections.

So do a load balancer, a service of Kubernetes and the endpoint of a managed Redis: nothing tells the clients. What the old server
answers on a connection of the pool says nothing of the server that the address leads to now.
"""

from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from exactly_once import AsyncSteps, ExactlyOnce, Lease, Retry, Steps
from exactly_once.redis.connection import RedisConnection
from tests.integration.shop import COLOURS, GROUP, Shop, order, put, shops
from tests.services.proxy import Proxy
from tests.services.redis import Redis
from tests.waiting import until

TAKES_NO_WRITES = {
    "a replica": lambda old, new: old.tell("REPLICAOF", "127.0.0.1", new.port),
    "full": lambda old, new: old.tell("CONFIG", "SET", "maxmemory", "1"),
}


@pytest.fixture
def old() -> Iterator[Redis]:
    with Redis() as started:
        yield started


@pytest.fixture
def new() -> Iterator[Redis]:
    with Redis() as started:
        yield started


def switch(proxy: Proxy, old: Redis, new: Redis, how: str) -> None:
    """As an operator does: the new one has the data of the old one."""
    new.tell("REPLICAOF", "127.0.0.1", old.port)
    until(lambda: new.tell("INFO", "replication").get("master_link_status") == "up", "the new one has the data")
    new.tell("REPLICAOF", "NO", "ONE")
    proxy.lead_to(new.url)
    TAKES_NO_WRITES[how](old, new)


def handles(shop: Shop, lease: Lease, calls: Counter[int]) -> None:
    options: dict[str, Any] = {"name": "handler", "key": "no", "guard": lease, "retry": Retry(immediate=0)}

    def call(no: int) -> int:
        calls[no] += 1
        return no

    if shop.is_async:

        @shop.eo.handler("orders", **options)
        async def awaited(body: dict[str, Any], steps: AsyncSteps, session: AsyncSession) -> None:
            async def acall(key: str) -> int:
                return call(body["no"])

            await steps.run("call", acall)
            await session.run_sync(put, str(body["no"]))
    else:

        @shop.eo.handler("orders", **options)
        def plain(body: dict[str, Any], steps: Steps, session: Session) -> None:
            steps.run("call", lambda key: call(body["no"]))
            put(session, str(body["no"]))


@pytest.mark.parametrize("how", TAKES_NO_WRITES)
@pytest.mark.parametrize("colour", COLOURS)
def test_messages_go_on_at_the_new_one(
    request: pytest.FixtureRequest, old: Redis, new: Redis, colour: str, how: str
) -> None:
    for shop in shops(request, "postgres", colour, pool_size=4):
        with Proxy(old.url) as proxy:
            calls: Counter[int] = Counter()
            shop.eo = ExactlyOnce(shop.url, group=GROUP)
            handles(shop, Lease(timedelta(seconds=30), store=proxy.url), calls)
            url = f"memory://switchover-{colour}-{how.replace(' ', '-')}"
            with shop.eo.worker(url, concurrency=4) as worker, shop.eo.producer(url) as producer:
                producer.send_all([order(no) for no in range(8)])
                until(lambda worker=worker: worker.counts.acked == 8, "the first are done")
                switch(proxy, old, new, how)
                producer.send_all([order(no) for no in range(8, 28)])
                until(lambda worker=worker: worker.counts.acked == 28, "the others are done")
                assert worker.counts.redelivered == 0
            assert sorted(shop.effects(), key=int) == [str(no) for no in range(28)]
            assert shop.failures() == []
            assert calls == dict.fromkeys(range(28), 1)


@pytest.mark.parametrize("how", TAKES_NO_WRITES)
def test_whoever_asks_next_reaches_the_new_one(old: Redis, new: Redis, how: str) -> None:
    with Proxy(old.url) as proxy:
        redis = RedisConnection(proxy.url)
        script = redis.script("return redis.call('SET', KEYS[1], ARGV[1])")
        script(["a"], ["1"])
        assert redis.answers()
        switch(proxy, old, new, how)
        script(["a"], ["2"])
        assert redis.answers()
        assert redis.problem() is None
        assert new.tell("GET", "a") == b"2"
        redis.close()


def test_one_that_takes_no_writes_on_a_new_connection_either_is_said_to_be_so(old: Redis, new: Redis) -> None:
    redis = RedisConnection(old.url)
    assert redis.answers()
    old.tell("REPLICAOF", "127.0.0.1", new.port)
    assert not redis.answers()
    assert "also on a new connection" in (redis.problem() or "")
    redis.close()
