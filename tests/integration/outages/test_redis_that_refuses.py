"""A Redis that worked, and refuses us for a while: its password was rotated, or its user's rights were taken. Nobody is to blame.

At the start it is a mistake of the configuration, and told at once. While messages run it is an outage: they are held, no
attempt of the broker's is spent, and a step's record is insisted on for as long as the lease may be ours.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Thread
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from exactly_once import AsyncSteps, ConfigurationError, ExactlyOnce, Lease, Outcome, Retry, Steps
from tests.integration.shop import COLOURS, GROUP, Shop, order, put, shops
from tests.integration.ways import UNDER_A_LEASE
from tests.services.redis import Redis
from tests.waiting import until

THREE = Retry(immediate=0, delays=[0.01], max_attempts=3)
REFUSALS = ("another password", "rights taken")


@pytest.fixture
def redis() -> Iterator[Redis]:
    with Redis(settings={"requirepass": "old"}) as started:
        yield started


@contextmanager
def administrator(redis: Redis) -> Iterator[Any]:
    """A session that stays, whatever becomes of the others' password and rights."""
    client = redis.client()
    connection = client.connection_pool.get_connection()

    def command(*words: str) -> None:
        connection.send_command(*words)
        connection.read_response()

    try:
        yield command
    finally:
        connection.disconnect()
        client.close()


def refuse(command: Callable[..., None], how: str) -> None:
    if how == "another password":
        command("CONFIG", "SET", "requirepass", "new")
    else:
        command("ACL", "SETUSER", "default", "-evalsha", "-eval")
    command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


def allow(command: Callable[..., None], how: str) -> None:
    if how == "another password":
        command("CONFIG", "SET", "requirepass", "old")
    else:
        command("ACL", "SETUSER", "default", "+evalsha", "+eval")


@pytest.mark.parametrize("how", REFUSALS)
@pytest.mark.parametrize("colour", COLOURS)
def test_messages_are_held_and_no_attempt_of_the_broker_is_spent(
    request: pytest.FixtureRequest, redis: Redis, colour: str, how: str
) -> None:
    for shop in shops(request, "postgres", colour, pool_size=3):
        runs: Counter[Any] = Counter()
        shop.eo = ExactlyOnce(shop.url, group=GROUP)

        def do(session: Session, no: Any, runs: Counter[Any] = runs) -> None:
            runs[no] += 1
            put(session, f"{no}")

        UNDER_A_LEASE.handles(shop, do, guard=Lease(timedelta(seconds=2), store=redis.url), retry=THREE)
        url = "sql://?max_attempts=4"
        with (
            administrator(redis) as command,
            shop.eo.worker(url, concurrency=2, drain_timeout=timedelta(seconds=3)) as worker,
            shop.eo.producer(url) as producer,
        ):
            producer.send(order(1))
            until(lambda: worker.counts.acked == 1, "the first is done")
            refuse(command, how)
            producer.send_all([order(no) for no in (2, 3, 4, 5)])
            until(worker.unready, "the outage is seen")
            allow(command, how)
            until(lambda: worker.counts.acked == 5, "the others are done")
            assert worker.counts.redelivered == 0
        assert (shop.failures(), runs) == ([], Counter(range(1, 6)))


@pytest.mark.parametrize("place", ["run", "transaction"])
@pytest.mark.parametrize("colour", COLOURS)
def test_a_step_whose_record_is_refused_for_a_while_is_recorded_and_not_repeated(
    request: pytest.FixtureRequest, redis: Redis, colour: str, place: str
) -> None:
    for shop in shops(request, "postgres", colour, pool_size=3):
        calls: list[Thread] = []
        with administrator(redis) as command:

            def rotated(shop: Shop = shop, calls: list[Thread] = calls, command: Callable[..., None] = command) -> None:
                refuse(command, REFUSALS[0])
                connections = shop.eo._redis_connections
                (one,) = connections._by_url.values()
                asked = Counter[str]()
                said = one._said

                def counted(*words: Any) -> Any:
                    asked["asked"] += 1
                    return said(*words)

                one._said = counted

                def back() -> None:
                    until(lambda: asked["asked"] > 1, "it was refused")
                    allow(command, REFUSALS[0])

                calls.append(Thread(target=back))
                calls[-1].start()

            options: dict[str, Any] = {"name": "handler", "key": "no", "retry": THREE}
            options["guard"] = Lease(timedelta(seconds=30), store=redis.url)
            if shop.is_async:

                @shop.eo.handler("orders", **options)
                async def awaited(steps: AsyncSteps, session: AsyncSession) -> None:
                    async def call(key: str) -> str:
                        rotated()
                        return "paid"

                    async def effect(session: AsyncSession) -> None:
                        rotated()
                        await session.run_sync(put, "by the step")

                    await (steps.run("pay", call) if place == "run" else steps.transaction("pay", effect))
                    await session.run_sync(put, "last")
            else:

                @shop.eo.handler("orders", **options)
                def plain(steps: Steps, session: Session) -> None:
                    def call(key: str) -> str:
                        rotated()
                        return "paid"

                    def effect(session: Session) -> None:
                        rotated()
                        put(session, "by the step")

                    if place == "run":
                        steps.run("pay", call)
                    else:
                        steps.transaction("pay", effect)
                    put(session, "last")

            assert shop.process(order()) is Outcome.PROCESSED
            (thread,) = calls
            thread.join(30)
        assert shop.failures() == []
        assert shop.effects() == (["last"] if place == "run" else ["by the step", "last"])


def test_a_password_that_never_worked_is_told_at_once(request: pytest.FixtureRequest, redis: Redis) -> None:
    for shop in shops(request, "postgres", "sync", pool_size=3):
        wrong = redis.url.replace("old", "new")
        assert wrong != redis.url
        UNDER_A_LEASE.handles(shop, put, guard=Lease(timedelta(seconds=30), store=wrong), retry=THREE)
        with pytest.raises(ConfigurationError, match="cannot be used"):
            shop.process(order())
        with pytest.raises(ConfigurationError, match="cannot be used"), shop.eo.worker("sql://"):
            pass
