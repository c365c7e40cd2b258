"""A filter of the application's raises on what this package logs: printed on stderr, and nothing else is changed by it.

As one that adds the id of a web request to each record (`record.request_id = flask.g.request_id`) raises where no request is: in
a worker's threads, in the one that renews leases. What was being done there would be left in the middle.
"""

import logging
import time
from collections.abc import Iterator
from datetime import timedelta
from itertools import count
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from exactly_once import Lease, Outcome
from tests.integration.failing import THREE
from tests.integration.outages.test_unreached import TokenServiceAway, guarded
from tests.integration.shop import COLOURS, DIALECTS, ONE_TRY, Shop, order, put, shops
from tests.integration.threads import Turn, in_thread
from tests.integration.ways import ALONE
from tests.services.redis import Redis
from tests.waiting import until

pytestmark = [pytest.mark.nightly(meet=2), pytest.mark.usefixtures("filtered")]

P, IN_PROGRESS = Outcome.PROCESSED, Outcome.IN_PROGRESS
_names = count(1)


class OfARequest(logging.Filter):
    """Adds what is there in a web request alone."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.startswith("exactly_once"):
            raise RuntimeError("Working outside of request context.")
        return True


@pytest.fixture
def filtered() -> Iterator[None]:
    handler = logging.StreamHandler()
    handler.addFilter(OfARequest())
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


@pytest.fixture(params=[(dialect, colour) for dialect in DIALECTS for colour in COLOURS], ids="-".join)
def own(request: pytest.FixtureRequest) -> Iterator[Shop]:
    """A shop of this test alone, whose engines it may listen to."""
    yield from shops(request, *request.param, pool_size=3)


class Row:
    """What a handler returns beside its work."""


@pytest.mark.parametrize("batch", [None, 100])
def test_a_warning_of_what_a_handler_returned_fails_no_message(own: Shop, batch: int | None) -> None:
    options: dict[str, Any] = {"key": "no", "retry": ONE_TRY, "batch": batch}
    if own.is_async:

        @own.eo.handler("orders", name=f"returns-{next(_names)}", **options)
        async def awaited(session: AsyncSession) -> Any:
            await session.run_sync(put, "done")
            return Row()
    else:

        @own.eo.handler("orders", name=f"returns-{next(_names)}", **options)
        def plain(session: Session) -> Any:
            put(session, "done")
            return Row()

    assert own.process(order(1)) is P
    assert own.effects() == ["done"]
    assert own.failures() == []


@pytest.mark.parametrize("batch", [None, 10])
def test_a_worker_forgets_no_message_as_it_tells_of_an_outage(own: Shop, batch: int | None) -> None:
    door = guarded(own)
    own.fresh_eo(own.engine, own.async_engine)
    own.handles(lambda session: put(session, "x"), retry=THREE, batch=batch)
    url = f"memory://told-{next(_names)}"
    with (
        own.eo.worker(url, concurrency=2, drain_timeout=timedelta(seconds=1)) as worker,
        own.eo.producer(url) as producer,
    ):
        producer.send(order(0))
        until(lambda: own.effects() == ["x"], "the first is handled")
        door.closes(TokenServiceAway)
        producer.send_all([order(1), order(2)])
        until(lambda: worker.counts.held >= 1, "the outage holds a message")
        door.closes(None)
        until(lambda: len(own.effects()) == 3, "all are handled")
    assert own.failures() == []


@pytest.mark.parametrize("own", [("sqlite", colour) for colour in COLOURS], ids="-".join, indirect=True)
def test_a_lease_is_renewed_although_an_outage_could_not_be_told(own: Shop, own_redis: Redis) -> None:
    """The thread that renews ended: the next run took over a message whose first run went on."""
    runs: list[object] = []
    renewed, ended = Turn(), Turn()

    def do(session: Session, no: Any) -> None:
        runs.append(no)
        own_redis.tell("REPLICAOF", "127.0.0.1", "1")  # it refuses writes, for less than the lease
        time.sleep(1.2)
        own_redis.tell("REPLICAOF", "NO", "ONE")
        time.sleep(2.5)  # past the end of a lease that is not renewed
        renewed.come()
        ended.wait()
        put(session, str(no))

    ALONE.handles(own, do, guard=Lease(timedelta(seconds=3), store=own_redis.url))
    with Shop(own.dialect, own.colour, own.url, pool_size=3) as other:
        ALONE.handles(other, do, guard=Lease(timedelta(seconds=3), store=own_redis.url))
        first: list[Outcome] = []
        with in_thread(lambda: first.append(own.process(order(1)))):
            renewed.wait()
            try:
                assert other.process(order(1)) is IN_PROGRESS
            finally:
                ended.come()
    assert first == [P]
    assert len(runs) == 1
