"""What fails in tests of failures, how often it is tried, and deliveries of brokers with given features."""

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.util import greenlet_spawn

from exactly_once import ExactlyOnce, Message, Retry
from exactly_once.executor.fanout import combine
from exactly_once.outcome import Result
from exactly_once.transports.contract import Features
from tests.integration.shop import GROUP, Shop

THREE = Retry(immediate=0, delays=[0.01], max_attempts=3)


class Panic(BaseException):
    """As a Rust extension raises it."""


BROKER = Features(redelivers=True, counts_attempts=True, max_attempts=5, ordered=True)


UNSAFE = Features(redelivers=False, counts_attempts=False)


def deliver(shop: Shop, message: Message, features: Features) -> Result:
    """Tell the handlers of a delivery from a broker with these features, as the worker does."""
    found = shop.eo._router.matching(message)

    def run() -> Result:
        return combine([each.run(message, features) for each in found])

    if shop.is_async:
        told: Result = shop.await_(greenlet_spawn(run))
        return told
    return run()


@contextmanager
def own_engines(shop: Shop) -> Iterator[ExactlyOnce]:
    """Let the shop's application make its engines: a worker's loop is not the one the shop's async engine belongs to."""
    shop.eo = ExactlyOnce(shop.url, group=GROUP)
    try:
        yield shop.eo
    finally:
        shop.eo._store_binding.close()


def states(shop: Shop) -> list[str]:
    return [row.state for row in shop.failures()]
