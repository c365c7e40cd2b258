"""The ways a handler's work can run: alone, in a batch, as a list, under a lease, in a step; each told alike by a test.

A test says what is done with a session for one message; `Way.handles` registers a handler that does it, `Way.deliver` brings
messages as that way does (those of a batch together), `requeued` is a person's decision, `accounted` what must hold of each
message in the end, whichever way it went.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from exactly_once import AsyncSteps, Lease, Message, Outcome, Steps
from exactly_once.failures.decisions import Chosen, requeue
from tests.integration.batches import told
from tests.integration.shop import GROUP, ONE_TRY, Shop, order

LEASE = Lease(timedelta(seconds=30))

Do = Callable[[Session, Any], object]
"""What is done for a message: given its session and its number."""


@dataclass(frozen=True)
class Way:
    """One way for a handler's work to run."""

    name: str
    lease: bool = False
    together: bool = False

    def __str__(self) -> str:
        return self.name

    def handles(self, shop: Shop, do: Do, **more: Any) -> None:
        """Register the handler."""
        options: dict[str, Any] = {"name": "handler", "key": "no", "retry": ONE_TRY}
        options |= ({"guard": LEASE} if self.lease else {}) | more
        if self is IN_A_BATCH:
            options |= {"batch": 100}
        register = _async if shop.is_async else _sync
        register(self, shop, do, options)

    def deliver(self, shop: Shop, messages: Sequence[Message]) -> list[Outcome]:
        """Bring these, together where messages share a transaction."""
        if self.together and messages:
            return [each.outcome for each in told(shop, messages).results]
        return [shop.process(message) for message in messages]

    def attempted(self, shop: Shop, messages: Sequence[Message]) -> list[Outcome | BaseException]:
        """The same where what the handler raises may come out: it is a message's end, too."""
        if self.together and messages:
            try:
                found = told(shop, messages).results
                return [each if isinstance(each, BaseException) else each.outcome for each in found]
            except BaseException as error:
                return [error] * len(messages)
        ends: list[Outcome | BaseException] = []
        for message in messages:
            try:
                ends.append(shop.process(message))
            except BaseException as error:
                ends.append(error)
        return ends


ALONE = Way("alone")
IN_A_BATCH = Way("in a batch", together=True)
IN_A_LIST = Way("in a list", together=True)
UNDER_A_LEASE = Way("under a lease", lease=True)
IN_A_STEP = Way("in a step", lease=True)
WAYS = (ALONE, IN_A_BATCH, IN_A_LIST, UNDER_A_LEASE, IN_A_STEP)


def _sync(way: Way, shop: Shop, do: Do, options: dict[str, Any]) -> None:
    if way is IN_A_LIST:

        @shop.eo.batch_handler("orders", **options)
        def in_a_list(session: Session, bodies: list[dict[str, Any]]) -> None:
            for body in bodies:
                do(session, body["no"])
    elif way is IN_A_STEP:

        @shop.eo.handler("orders", **options)
        def in_a_step(body: dict[str, Any], steps: Steps) -> None:
            steps.transaction("step", lambda session: do(session, body["no"]))
    else:

        @shop.eo.handler("orders", **options)
        def plain(session: Session, body: dict[str, Any]) -> None:
            do(session, body["no"])


def _async(way: Way, shop: Shop, do: Do, options: dict[str, Any]) -> None:
    if way is IN_A_LIST:

        @shop.eo.batch_handler("orders", **options)
        async def in_a_list(session: AsyncSession, bodies: list[dict[str, Any]]) -> None:
            for body in bodies:
                await session.run_sync(do, body["no"])
    elif way is IN_A_STEP:

        @shop.eo.handler("orders", **options)
        async def in_a_step(body: dict[str, Any], steps: AsyncSteps) -> None:
            def step(session: AsyncSession) -> Any:
                return session.run_sync(do, body["no"])

            await steps.transaction("step", step)
    else:

        @shop.eo.handler("orders", **options)
        async def awaited(session: AsyncSession, body: dict[str, Any]) -> None:
            await session.run_sync(do, body["no"])


def driver_of(session: Session) -> Any:
    """The driver's connection, as a handler gets at it: psycopg's own, PyMySQL's, or what SQLAlchemy makes of an async one."""
    return session.connection().connection.dbapi_connection


def cancel_this_task() -> None:
    """As if the loop's owner had cancelled the task the handler runs in: it is told at its next await, which is here."""

    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await_only(asyncio.sleep(0))


def requeued(shop: Shop, ids: Sequence[int]) -> None:
    """A person lets these failures run again."""
    with shop.outside.begin() as connection:
        chosen = Chosen(group=GROUP, ids=ids)
        assert requeue(connection, shop.tables, chosen, by="me", why=None, per_second=None).count == len(ids)


def accounted(shop: Shop, numbers: Sequence[Any], *, effects_of_each: Sequence[str], extra: Sequence[str] = ()) -> None:
    """Each message either had all its effects, each once, or a person is told that it is broken; none had one twice.

    Args:
        shop: Where.
        numbers: Of the messages.
        effects_of_each: What each does, behind its number.
        extra: Effects that are there beside these.
    """
    there = Counter(shop.effects())
    broken = {row.business_key for row in shop.failures() if row.state == "broken"}
    claims = set(shop.claims())
    twice = {effect for effect, times in there.items() if times > 1} - set(extra)
    assert not twice, f"effects that happened more than once: {twice}"
    for number in map(str, numbers):
        done = [there[f"{number} {effect}"] for effect in effects_of_each]
        if number in broken:
            continue
        assert all(done), f"message {number} is acknowledged with {done} of its effects, and nobody is told"
        assert number in claims, f"message {number} has its effects and no claim: a copy would run again"


def mariadb_procedures(shop: Shop, **bodies: str) -> None:
    """Make these procedures; `staging` is a table they may empty."""
    with shop.outside.begin() as connection:
        connection.execute(text("CREATE TABLE IF NOT EXISTS staging (id INT) ENGINE=InnoDB"))
        for name, body in bodies.items():
            make_anew(connection, f"CREATE PROCEDURE {name} {body}")


def make_anew(connection: Connection, creates: str) -> None:
    """Make a procedure or a function in place of the one there is; MySQL knows no CREATE OR REPLACE."""
    _, kind, named, *_ = creates.split()
    connection.execute(text(f"DROP {kind} IF EXISTS {named.split('(')[0]}"))
    connection.execute(text(creates))


def one_by_one(shop: Shop, way: Way, numbers: list[Any]) -> list[Outcome]:
    """Each in a transaction of its own; in a group where that is another code, with one more of its kind."""
    return [outcome for no in numbers for outcome in way.deliver(shop, [order(no)])]


each_way = pytest.mark.parametrize("way", WAYS, ids=str)


by_itself = pytest.mark.parametrize("way", [ALONE, UNDER_A_LEASE, IN_A_STEP], ids=str)


def thrice(shop: Shop, way: Way, no: Any = 1) -> list[Outcome | BaseException]:
    """Deliver a message three times."""
    return [end for attempt in (1, 2, 3) for end in way.attempted(shop, [order(no, attempt=attempt)])]


def in_session(shop: Shop, do: Callable[[Session], object]) -> Any:
    """Do this in a session of the shop's colour, and commit; what it raises leaves the session rolled back."""

    async def awaited() -> Any:
        async with AsyncSession(shop.async_engine) as session, session.begin():
            return await session.run_sync(do)

    if shop.is_async:
        return shop.await_(awaited())
    with Session(shop.engine) as session, session.begin():
        return do(session)


def sends(session: Session, statement: str) -> None:
    """On the driver's own cursor, past SQLAlchemy."""
    cursor = driver_of(session).cursor()
    cursor.execute(statement)
    cursor.close()
