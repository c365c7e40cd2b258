"""A step is given what it cannot call, or is not awaited: the message is kept at once, the text says what ran.

The kind: `steps.run("charge", charge())` in place of a function, one that takes no key, an `async def` one in a plain handler or
a plain one in an async handler, and a call of AsyncSteps without `await`. Red before: an `at_most_once` step was said to have
begun, and another was called again at each try.
"""

import asyncio
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from exactly_once import AsyncSteps, Outcome, Retry, StepError, Steps
from tests.integration.shop import COLOURS, DIALECTS, Shop, on, order, put, shops
from tests.integration.ways import LEASE

pytestmark = [pytest.mark.nightly(meet=2), pytest.mark.filterwarnings("error::RuntimeWarning")]

TRIES = Retry(immediate=2)


@pytest.fixture(
    scope="module",
    params=[(dialect, colour) for dialect in DIALECTS for colour in COLOURS],
    ids=[f"{dialect}-{colour}" for dialect in DIALECTS for colour in COLOURS],
)
def ground(request: pytest.FixtureRequest) -> Iterator[Shop]:
    yield from shops(request, *request.param, pool_size=3)


def _calls(charge: Callable[[str], Any], key: str) -> Any:
    """Nothing tells, before it is called, that what it returns is to be awaited."""
    return charge(key)


def handles(shop: Shop, ask: Callable[[Any], Any]) -> list[int]:
    """Register a handler that asks for steps so, and then writes "end"; return the attempts it made."""
    ran: list[int] = []
    options: dict[str, Any] = {"name": "handler", "key": "no", "retry": TRIES, "guard": LEASE}
    if shop.is_async:

        @shop.eo.handler("orders", **options)
        async def awaited(session: AsyncSession, steps: AsyncSteps) -> None:
            ran.append(steps.attempt)
            await ask(steps)
            await session.run_sync(put, "end")
    else:

        @shop.eo.handler("orders", **options)
        def plain(session: Session, steps: Steps) -> None:
            ran.append(steps.attempt)
            ask(steps)
            put(session, "end")

    return ran


def is_kept(shop: Shop, ran: list[int], *words: str) -> str:
    """Kept for a person at the first try, with these words; nothing is recorded of the step, and nothing was committed."""
    assert shop.process(order()) is Outcome.DEAD
    assert len(ran) == 1
    failure = shop.failure()
    assert (failure.state, failure.error_class) == ("dead", "StepError")
    for word in ("The step 'charge'", *words):
        assert word in failure.error_text
    assert shop.effects() == []
    return str(failure.error_text)


REQUEUE = "exactly-once failures requeue --key A-1"


@pytest.mark.parametrize("at_most_once", [False, True])
@pytest.mark.parametrize("given", [{"receipt": 1}, None, "R-1"], ids=["a dict", "None", "a text"])
def test_a_call_in_place_of_a_function_is_named(shop: Shop, given: Any, at_most_once: bool) -> None:
    kind = "None" if given is None else type(given).__name__
    ran = handles(shop, lambda steps: steps.run("charge", given, at_most_once=at_most_once))
    is_kept(
        shop, ran, f"what a call returned ({kind})", "ran already, outside the step", "Write `lambda key: ...`", REQUEUE
    )
    assert shop.rows(shop.tables.step) == []


def test_a_call_in_place_of_a_transactions_work_is_named(shop: Shop) -> None:
    ran = handles(shop, lambda steps: steps.transaction("charge", 7))
    is_kept(shop, ran, "what a call returned (int)", "Write `lambda session: ...`", REQUEUE)
    assert shop.rows(shop.tables.step) == []


@pytest.mark.parametrize("kind", ["run", "transaction"])
def test_a_function_that_takes_no_argument_is_named(shop: Shop, kind: str) -> None:
    ran = handles(shop, lambda steps: getattr(steps, kind)("charge", lambda: 5))
    argument = {"run": "the idempotency key", "transaction": "a session"}[kind]
    is_kept(shop, ran, f"with one argument, {argument}", "nothing ran", REQUEUE)
    assert shop.rows(shop.tables.step) == []


def test_a_name_behind_its_function_is_named(shop: Shop) -> None:
    ran = handles(shop, lambda steps: steps.run(lambda key: 5, "charge"))
    assert shop.process(order()) is Outcome.DEAD
    assert len(ran) == 1
    assert "the name comes first" in shop.failure().error_text


@on(colour="sync")
@pytest.mark.parametrize("at_most_once", [False, True])
@pytest.mark.parametrize("how", ["async def", "lambda"])
def test_an_async_function_in_a_plain_handler_is_named(shop: Shop, how: str, at_most_once: bool) -> None:
    async def charge(key: str) -> int:
        return 5

    call: Any = charge if how == "async def" else partial(_calls, charge)
    ran = handles(shop, lambda steps: steps.run("charge", call, at_most_once=at_most_once))
    text = is_kept(shop, ran, "nothing of it ran", "ask for AsyncSteps", REQUEUE)
    if how == "lambda" and at_most_once:  # it was called before anybody could know
        assert "exactly-once steps resolve A-1 charge --handler handler --result JSON" in text
    else:
        assert shop.rows(shop.tables.step) == []


@on(colour="sync")
def test_an_async_work_in_a_plain_handler_is_rolled_back(shop: Shop) -> None:
    async def work(session: Session) -> None: ...

    ran = handles(
        shop, lambda steps: steps.transaction("charge", lambda session: (put(session, "work"), work(session))[1])
    )
    is_kept(shop, ran, "nothing of it ran", "ask for AsyncSteps", "rolled back", REQUEUE)


@on(colour="async")
def test_a_plain_function_in_an_async_handler_is_not_called_twice(shop: Shop) -> None:
    calls: list[str] = []
    ran = handles(shop, lambda steps: steps.run("charge", calls.append))
    is_kept(shop, ran, "no awaitable (None)", "It was run", "steps resolve A-1 charge --handler handler --unrecorded")
    assert len(calls) == 1


@on(colour="async")
def test_a_plain_work_in_an_async_handler_is_rolled_back(shop: Shop) -> None:
    ran = handles(shop, lambda steps: steps.transaction("charge", lambda session: 7))
    is_kept(shop, ran, "no awaitable (int)", "rolled back", REQUEUE)


@on(colour="async")
def test_what_an_async_function_returned_is_named_and_did_not_run(shop: Shop) -> None:
    calls: list[str] = []

    async def charge() -> None:
        calls.append("charge")

    ran = handles(shop, lambda steps: steps.run("charge", charge()))
    is_kept(shop, ran, "what an `async def` function returned", "nothing of it ran", REQUEUE)
    assert calls == []


@on(colour="async")
@pytest.mark.parametrize("kind", ["run", "transaction"])
@pytest.mark.parametrize("how", ["forgotten", "a task that has not begun"])
def test_a_step_without_await_is_named_and_never_runs(shop: Shop, how: str, kind: str) -> None:
    calls: list[Any] = []
    tasks: list[asyncio.Task[Any]] = []

    async def charge(given: Any) -> int:
        calls.append(given)
        return 5

    async def ask(steps: AsyncSteps) -> None:
        asked = getattr(steps, kind)("charge", charge)
        if how != "forgotten":
            tasks.append(asyncio.create_task(asked))

    if how == "forgotten":
        ran = handles(shop, ask)
    else:
        ran = []

        @shop.eo.handler("orders", name="handler", key="no", retry=TRIES, guard=LEASE)
        async def handler(steps: AsyncSteps) -> None:
            ran.append(steps.attempt)
            await ask(steps)

    is_kept(shop, ran, "was asked for without `await`: nothing of it ran", "Write `await` in front of it", REQUEUE)

    async def ended() -> None:
        await asyncio.gather(*tasks, return_exceptions=True)

    shop.await_(ended())
    assert calls == []
    assert shop.rows(shop.tables.step) == []


@on(colour="async")
def test_steps_that_are_awaited_late_run_as_ever(shop: Shop) -> None:
    async def charge(key: str) -> int:
        return 5

    async def ask(steps: AsyncSteps) -> None:
        asked = steps.run("charge", charge)
        assert await asyncio.create_task(steps.run("lock", charge)) == 5
        assert await asked == 5

    handles(shop, ask)
    assert shop.process(order()) is Outcome.PROCESSED
    assert shop.effects() == ["end"]


@pytest.mark.parametrize("kind", ["run", "transaction"])
@pytest.mark.parametrize("ends", ["returns", "raises"])
def test_a_step_that_is_asked_for_behind_the_handler_never_runs(shop: Shop, kind: str, ends: str) -> None:
    """By a thread or a task of its own. Red before: it called the service, and then spoke of another run."""
    kept: list[Any] = []
    calls: list[Any] = []

    def keeps(steps: Any) -> Any:
        kept.append(steps)
        if ends == "raises":
            raise ValueError("no")
        return asyncio.sleep(0) if shop.is_async else None

    handles(shop, keeps)
    assert shop.process(order()) is (Outcome.PROCESSED if ends == "returns" else Outcome.FAILED)

    async def awaited() -> None:
        async def call(given: Any) -> None:
            calls.append(given)

        await getattr(kept[0], kind)("late", call)

    with pytest.raises(StepError, match="'late' was asked for after its handler had ended: nothing of it ran"):
        shop.await_(awaited()) if shop.is_async else getattr(kept[0], kind)("late", calls.append)
    assert calls == []
    assert shop.rows(shop.tables.step) == []
