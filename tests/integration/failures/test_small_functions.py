"""The small functions of an application, which name a key or a database and read a body: whatever they raise, it is counted.

They run before a message is claimed, where no handler's story would count it.
"""

from collections.abc import Callable
from datetime import timedelta
from itertools import count
from threading import Thread
from typing import Any, NoReturn

import pytest
from pydantic import BaseModel, field_validator
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from exactly_once import ExactlyOnce, Message, Outcome
from tests.integration.failing import Panic
from tests.integration.shop import GROUP, ONE_TRY, Shop, on, order, put
from tests.waiting import until

pytestmark = pytest.mark.nightly(meet=2)

_names = count(1)
RAISED: dict[str, Callable[[], BaseException]] = {
    "Panic": lambda: Panic("attempt to subtract with overflow"),
    "SystemExit": lambda: SystemExit(3),
    "a group of it": lambda: BaseExceptionGroup("g", [SystemExit(3)]),
}
WHERE = ("key", "fingerprint", "body", "route", "batch_order")
_raised = ["Panic"]


def if_bad(message: Message) -> str:
    """A key function, with a message that it does not stand."""
    if message.body == b'{"no": 2}':
        raise RAISED[_raised[0]]()
    return str(message.body)


class Order(BaseModel):
    no: int

    @field_validator("no")
    @classmethod
    def stands(cls, no: int) -> int:
        if no == 2:
            raise RAISED[_raised[0]]()
        return no


def registered(shop: Shop, where: str) -> ExactlyOnce:
    """An application in which that function raises at the second message."""
    more: dict[str, Any] = {"name": "handler", "key": "no", "retry": ONE_TRY}
    if where == "route":

        def route(message: Message) -> str:
            if_bad(message)
            return "one"

        eo = ExactlyOnce({"one": shop.url, "two": shop.url}, group=GROUP, route=route)
    else:
        eo = ExactlyOnce(shop.url, group=GROUP)
        if where != "body":
            more |= {where: if_bad} | ({"batch": 5} if where == "batch_order" else {})
    body: Any = Order if where == "body" else dict[str, Any]
    if shop.is_async:

        async def awaited(session: AsyncSession, body: Any) -> None:
            await session.run_sync(put, str(body.no if isinstance(body, Order) else body["no"]))

        awaited.__annotations__["body"] = body
        eo.handler("orders", **more)(awaited)
    else:

        def plain(session: Session, body: Any) -> None:
            put(session, str(body.no if isinstance(body, Order) else body["no"]))

        plain.__annotations__["body"] = body
        eo.handler("orders", **more)(plain)
    return eo


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("raised", RAISED)
def test_what_they_raise_is_counted_in_a_worker(shop: Shop, where: str, raised: str) -> None:
    _raised[0] = raised
    eo = registered(shop, where)
    url = f"memory://small-{next(_names)}"
    with eo.worker(url, concurrency=2, drain_timeout=timedelta(seconds=2)) as worker:
        with eo.producer(url) as producer:
            producer.send_all([order(no) for no in (1, 2, 3)])
        until(lambda: worker.counts.acked == 3, "all three are acknowledged")
    if where == "batch_order":  # it locks nothing that has a name, and runs all the same
        assert sorted(shop.effects()) == ["1", "2", "3"]
        return
    assert shop.failure().state == "dead"
    assert sorted(shop.effects()) == ["1", "3"]


@pytest.mark.parametrize("where", WHERE[:4])
@on(colour="sync")  # the same functions
def test_they_may_not_exit_but_a_signal_in_the_main_thread_may(shop: Shop, where: str) -> None:
    _raised[0] = "SystemExit"
    eo = registered(shop, where)
    with pytest.raises(SystemExit):
        eo.process(order(2))
    assert shop.failures() == []
    ends: list[Outcome] = []
    thread = Thread(target=lambda: ends.append(eo.process(order(2))))
    thread.start()
    thread.join(20)
    assert ends == [Outcome.DEAD]


def test_an_interrupt_in_them_is_raised_on(shop: Shop) -> None:
    def interrupted(message: Message) -> NoReturn:
        raise KeyboardInterrupt

    shop.handles(lambda session: None, key=interrupted)
    with pytest.raises(KeyboardInterrupt):
        shop.process(order())
    assert shop.failures() == []
