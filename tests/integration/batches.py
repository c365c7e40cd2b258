"""Messages of a shop that are handled as one batch, and what became of each."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util import greenlet_spawn

from exactly_once import ExactlyOnce, Message, Outcome
from exactly_once.processing.batch import BatchProcessor
from exactly_once.processing.work import BatchResults
from exactly_once.transports.contract import Features
from tests.integration.shop import GROUP, ONE_TRY, Shop, order, put

FEATURES = Features(redelivers=True, counts_attempts=True, ordered=True)


def handles(shop: Shop, do: Callable[[Session, Any], object], **options: Any) -> None:
    """Register a handler in groups that does this with its session and the message's number."""
    given: dict[str, Any] = {"name": "handler", "key": "no", "retry": ONE_TRY, "batch": 100} | options
    if shop.is_async:

        @shop.eo.handler("orders", **given)
        async def awaited(session: AsyncSession, body: dict[str, Any]) -> None:
            await session.run_sync(do, body["no"])
    else:

        @shop.eo.handler("orders", **given)
        def plain(session: Session, body: dict[str, Any]) -> None:
            do(session, body["no"])


def run_together(shop: Shop, messages: Sequence[Message], features: Features = FEATURES) -> Callable[[], BatchResults]:
    """What runs these as one group, in a thread or a greenlet."""
    (handler,) = shop.eo._router.matching(messages[0])
    assert isinstance(handler, BatchProcessor)
    return partial(handler.run_batch, [handler.member(message, features) for message in messages])


def told(shop: Shop, messages: Sequence[Message], features: Features = FEATURES) -> BatchResults:
    """Run these as one group."""
    run = run_together(shop, messages, features)
    if shop.is_async:
        found: BatchResults = shop.await_(greenlet_spawn(run))
        return found
    return run()


def outcomes(shop: Shop, messages: Sequence[Message]) -> list[Outcome]:
    return [each.outcome for each in told(shop, messages).results]


def orders(*numbers: object, **more: Any) -> list[Message]:
    return [order(number, **more) for number in numbers]


def own_engines(shop: Shop) -> None:
    """Let the application make its engines: a worker's loop is another than the shop's."""
    shop.eo = ExactlyOnce(shop.url, group=GROUP)


def effect(session: Session, number: object) -> None:
    put(session, str(number))
