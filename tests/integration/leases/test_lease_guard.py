"""Handlers under a lease, on each database and in each colour: what runs, what is kept, what is refused."""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, event, insert, select, update
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, SessionTransaction, sessionmaker

from exactly_once import AsyncSteps, ExactlyOnce, Lease, LeaseLost, Message, Outcome, Reject, Retry, Steps
from exactly_once.database.server_clock import utcnow
from exactly_once.failures.decisions import Chosen, requeue
from exactly_once.guards.lease import contract as leases
from exactly_once.guards.lease.ledger import RESULT_BYTES
from exactly_once.testing import bound
from tests.integration.shop import COLOURS, DIALECTS, EFFECT, GROUP, ONE_TRY, Shop, order, put, shops
from tests.waiting import until

LEASE = Lease(timedelta(seconds=30))
GROUNDS = [(dialect, colour) for dialect in DIALECTS for colour in COLOURS]


@pytest.fixture(scope="module", params=GROUNDS, ids=[f"{dialect}-{colour}" for dialect, colour in GROUNDS])
def ground(request: pytest.FixtureRequest) -> Iterator[Shop]:
    """A shop whose handlers have room for a step's connection beside their own."""
    yield from shops(request, *request.param, pool_size=3)


def handles(shop: Shop, do: Callable[..., object], **more: Any) -> None:
    """Register do(session, step, transaction) under a lease; step and transaction are the steps', made synchronous."""
    from sqlalchemy.util import await_only, greenlet_spawn

    options: dict[str, Any] = {"name": "handler", "key": "no", "retry": ONE_TRY, "guard": LEASE} | more
    if shop.is_async:

        @shop.eo.handler("orders", **options)
        async def awaited(session: AsyncSession, steps: AsyncSteps) -> None:
            def run(name: str, call: Callable[[str], Any], **how: Any) -> Any:
                async def acall(key: str) -> Any:
                    return await greenlet_spawn(call, key)

                return await_only(steps.run(name, acall, **how))

            def transaction(name: str, work: Callable[[Session], Any], **how: Any) -> Any:
                return await_only(steps.transaction(name, lambda inner: inner.run_sync(work), **how))

            await session.run_sync(lambda sync: do(sync, run, transaction))
    else:

        @shop.eo.handler("orders", **options)
        def plain(session: Session, steps: Steps) -> None:
            do(session, steps.run, steps.transaction)


def claim_of(shop: Shop) -> Any:
    (row,) = shop.rows(shop.tables.idempotent)
    return row


def end_lease(shop: Shop) -> None:
    """Let the lease run out, as if the machine had stood still."""
    t = shop.tables.idempotent
    with shop.outside.begin() as connection:
        connection.execute(update(t).values(lease_until=utcnow(-1)))


def test_a_message_is_processed_once(shop: Shop) -> None:
    handles(shop, lambda session, step, transaction: put(session, "done"))
    assert [shop.process(order()) for _ in range(3)] == [Outcome.PROCESSED, Outcome.DUPLICATE, Outcome.DUPLICATE]
    assert shop.effects() == ["done"]
    assert claim_of(shop).status == 1
    shop.borrow()


def test_a_handler_that_uses_no_session_is_completed_all_the_same(shop: Shop) -> None:
    ran: list[int] = []
    handles(shop, lambda session, step, transaction: ran.append(1))
    assert [shop.process(order()) for _ in range(2)] == [Outcome.PROCESSED, Outcome.DUPLICATE]
    assert ran == [1]


def test_no_connection_is_in_use_before_the_first_statement(shop: Shop) -> None:
    used: list[int] = []
    pool: Any = (shop.async_engine if shop.is_async else shop.engine).pool

    def do(session: Session, step: Any, transaction: Any) -> None:
        used.append(pool.checkedout())
        put(session, "done")
        used.append(pool.checkedout())

    handles(shop, do)
    assert shop.process(order()) is Outcome.PROCESSED
    assert used == [0, 1]


def test_what_fails_is_rolled_back_let_go_of_and_run_again_as_attempt_2(shop: Shop) -> None:
    attempts: list[int] = []

    def do(session: Session, step: Any, transaction: Any) -> None:
        put(session, "try")
        attempts.append(len(attempts) + 1)
        if len(attempts) == 1:
            raise ValueError("no")

    handles(shop, do)
    assert shop.process(order()) is Outcome.FAILED
    row = claim_of(shop)
    assert (row.status, row.token, row.lease_until) == (0, None, None)
    assert shop.process(order(attempt=2)) is Outcome.PROCESSED
    assert shop.effects() == ["try"]
    assert claim_of(shop).retry_times == 1
    assert shop.failure().state == "resolved"
    shop.borrow()


def test_a_finished_step_is_not_repeated_and_its_result_is_what_was_stored(shop: Shop) -> None:
    calls: list[str] = []
    seen: list[Any] = []

    def do(session: Session, step: Any, transaction: Any) -> None:
        seen.append(step("lock", lambda key: (calls.append(key), {"hold": (1, 2)})[1]))
        seen.append(transaction("create", lambda inner: (put(inner, "created"), 7)[1]))
        if len(seen) == 2:
            raise ValueError("after the steps")
        put(session, "shipped")

    handles(shop, do)
    assert shop.process(order()) is Outcome.FAILED
    assert shop.effects() == ["created"]
    assert shop.process(order(attempt=2)) is Outcome.PROCESSED
    assert seen == [{"hold": [1, 2]}, 7] * 2
    assert len(calls) == 1
    assert len(calls[0]) == 40
    assert shop.effects() == ["created", "shipped"]
    shop.borrow()


def test_the_key_of_a_step_is_the_same_on_every_attempt_and_another_for_another_message(shop: Shop) -> None:
    keys: list[str] = []
    handles(shop, lambda session, step, transaction: step("a", lambda key: keys.append(key) or 1 / 0))
    for message in (order(), order(attempt=2), order("A-2")):
        shop.process(message)
    assert keys[0] == keys[1] != keys[2]


def test_a_crashed_at_most_once_step_parks_the_message_with_its_name(shop: Shop) -> None:
    def do(session: Session, step: Any, transaction: Any) -> None:
        step("charge", lambda key: 1 / 0, at_most_once=True)

    handles(shop, do)
    assert shop.process(order()) is Outcome.FAILED
    assert shop.process(order(attempt=2)) is Outcome.DEAD
    failure = shop.failure()
    assert (failure.state, failure.error_class) == ("dead", "StepError")
    assert "'charge' was begun by attempt 1" in failure.error_text
    assert "exactly-once steps resolve A-1 charge" in failure.error_text


BAD: dict[str, tuple[Callable[..., object], str]] = {
    "not JSON": (lambda session, step, transaction: step("ship", lambda key: object()), "cannot be stored as JSON"),
    "a key that is no text": (
        lambda session, step, transaction: step("ship", lambda key: {1: "a", "1": "b"}),
        "cannot be stored as JSON and read back (TypeError)",
    ),
    "not a number": (lambda session, step, transaction: step("ship", lambda key: float("nan")), "cannot be stored"),
    "twice": (
        lambda session, step, transaction: (step("ship", lambda key: 1), step("ship", lambda key: 1)),
        "used twice in one run",
    ),
    "in one another": (
        lambda session, step, transaction: step("ship", lambda key: step("inner", lambda key: 1)),
        "one step at a time",
    ),
    "empty name": (lambda session, step, transaction: step("", lambda key: 1), "at least one character"),
    "long name": (lambda session, step, transaction: step("x" * 65, lambda key: 1), "at most 64"),
    "swallowed": (
        lambda session, step, transaction: _swallow(lambda: step("ship", lambda key: object())),
        "cannot be stored as JSON",
    ),
}


def _swallow(do: Callable[[], object]) -> None:
    with suppress(Exception):
        do()


UNKEPT: dict[str, Callable[[Session], object]] = {
    "not JSON": lambda inner: inner.execute(insert(EFFECT).values(text="reserved")),
    "too large": lambda inner: (put(inner, "reserved"), "x" * RESULT_BYTES)[1],
}


@pytest.mark.parametrize("case", UNKEPT)
def test_a_transaction_step_whose_result_cannot_be_kept_is_rolled_back_and_runs_again_once_mended(
    shop: Shop, case: str
) -> None:
    """Nothing of it happened: a result written down for it by hand would leave it undone for good."""
    work: list[Callable[[Session], object]] = [UNKEPT[case]]
    handles(shop, lambda session, step, transaction: transaction("reserve", work[0]))
    assert shop.process(order()) is Outcome.DEAD
    assert shop.effects() == []
    told = shop.failure().error_text
    assert "was rolled back" in told
    assert "exactly-once failures requeue --key A-1" in told
    assert "resolve" not in told
    work[0] = lambda inner: put(inner, "reserved")
    with shop.outside.begin() as connection:
        chosen = Chosen(group=GROUP, ids=[shop.failure().id])
        assert requeue(connection, shop.tables, chosen, by="me", why=None, per_second=None).count == 1
    assert shop.process(order(attempt=2)) is Outcome.PROCESSED
    assert shop.effects() == ["reserved"]


@pytest.mark.parametrize("case", BAD)
def test_a_step_that_cannot_be_recorded_parks_the_message_and_names_it(shop: Shop, case: str) -> None:
    do, text = BAD[case]

    def with_effect(session: Session, step: Any, transaction: Any) -> None:
        put(session, "effect")
        do(session, step, transaction)

    handles(shop, with_effect if shop.dialect != "sqlite" else do)
    assert shop.process(order()) is Outcome.DEAD
    assert text in shop.failure().error_text
    assert shop.effects() == []
    shop.borrow()


CHANGED: dict[str, list[str]] = {
    "swapped": ["b", "a"],
    "inserted": ["a", "new", "b"],
    "left out": ["a"],
    "renamed": ["a", "c"],
}


@pytest.mark.parametrize("case", CHANGED)
def test_steps_that_were_changed_between_releases_park_the_message(shop: Shop, case: str) -> None:
    names, calls = ["a", "b"], []

    def do(session: Session, step: Any, transaction: Any) -> None:
        for name in names:
            step(name, lambda key, name=name: calls.append(name))
        if names == ["a", "b"]:
            raise ValueError("no")

    handles(shop, do)
    assert shop.process(order()) is Outcome.FAILED
    names, calls = CHANGED[case], []
    assert shop.process(order(attempt=2)) is Outcome.DEAD
    assert calls == []
    assert "The step '" in shop.failure().error_text
    shop.borrow()


def taken_over(shop: Shop) -> Outcome:
    """Another process runs the message meanwhile, after the lease ran out; here, in the midst of the first one's handler."""
    other = ExactlyOnce(shop.outside, group=GROUP)

    @other.handler("orders", name="handler", key="no", guard=LEASE)
    def second(session: Session) -> None:
        put(session, "second")

    assert (
        other.process(order("another")) is Outcome.PROCESSED
    )  # connected: the first one's renewal is not to be in time
    with shop.outside.begin() as connection:
        # by its id: a delete that reads all rows would wait for those of the first one's open transaction
        (made,) = connection.execute(select(EFFECT.c.id).where(EFFECT.c.text == "second")).scalars()
        connection.execute(EFFECT.delete().where(EFFECT.c.id == made))
    for _ in range(20):  # the first one's renewal may come between the two
        end_lease(shop)
        if (outcome := other.process(order())) is not Outcome.IN_PROGRESS:
            break
    return outcome


def test_a_zombies_commit_changes_nothing_after_the_takeover(shop: Shop) -> None:
    outcomes: list[Outcome] = []

    def first(session: Session, step: Any, transaction: Any) -> None:
        outcomes.append(taken_over(shop))
        put(session, "first")

    handles(shop, first)
    assert shop.process(order()) is Outcome.IN_PROGRESS
    assert outcomes == [Outcome.PROCESSED]
    assert shop.effects() == ["second"]
    assert shop.failures() == []
    shop.borrow()


@pytest.mark.parametrize("kind", ["step", "transaction", "swallowed", "raises"])
def test_nothing_that_a_zombie_does_later_is_recorded(shop: Shop, kind: str) -> None:
    def first(session: Session, step: Any, transaction: Any) -> None:
        assert taken_over(shop) is Outcome.PROCESSED
        match kind:
            case "transaction":
                transaction("late", lambda inner: put(inner, "late"))
            case "step":
                step("late", lambda key: 1)
            case "swallowed":
                _swallow(lambda: step("late", lambda key: 1))
            case _:
                raise ValueError("a failure of a run that does not count")

    handles(shop, first)
    assert shop.process(order()) is Outcome.IN_PROGRESS
    assert shop.effects() == ["second"]
    assert shop.rows(shop.tables.step) == []
    assert shop.failures() == []
    shop.borrow()


def test_another_payload_under_a_known_key_is_parked(shop: Shop) -> None:
    handles(shop, lambda session, step, transaction: put(session, "done"))
    assert shop.process(order()) is Outcome.PROCESSED
    other = Message("orders", json.dumps({"no": "A-1", "more": 1}).encode())
    assert shop.process(other) is Outcome.DEAD
    assert shop.failure().error_class == "PayloadConflict"


def test_a_handler_may_not_commit(shop: Shop) -> None:
    def do(session: Session, step: Any, transaction: Any) -> None:
        put(session, "effect")
        session.commit()

    handles(shop, do)
    assert shop.process(order()) is Outcome.FAILED
    assert shop.failure().error_class == "Misuse"
    assert shop.effects() == []
    shop.borrow()


def test_a_step_in_a_transaction_may_not_commit_by_itself(shop: Shop) -> None:
    def work(inner: Session) -> None:
        put(inner, "effect")
        inner.commit()

    handles(shop, lambda session, step, transaction: transaction("create", work))
    assert shop.process(order()) is Outcome.FAILED
    assert shop.effects() == []
    assert shop.rows(shop.tables.step) == []
    shop.borrow()


def test_a_rejected_message_is_parked_and_its_finished_steps_are_kept(shop: Shop) -> None:
    def do(session: Session, step: Any, transaction: Any) -> None:
        step("lock", lambda key: 1)
        raise Reject("out of stock")

    handles(shop, do)
    assert shop.process(order()) is Outcome.DEAD
    assert [row.step for row in shop.rows(shop.tables.step)] == ["lock"]


def test_a_handler_reads_what_it_wrote_and_its_own_steps_results(shop: Shop) -> None:
    def do(session: Session, step: Any, transaction: Any) -> None:
        transaction("create", lambda inner: put(inner, "created"))
        assert [row.text for row in session.execute(select(EFFECT))] == ["created"]

    handles(shop, do)
    assert shop.process(order()) is Outcome.PROCESSED


def test_a_handler_that_was_under_a_lease_goes_on_under_the_transaction_guard(shop: Shop) -> None:
    def fails(session: Session, step: Any, transaction: Any) -> None:
        raise ValueError("no")

    handles(shop, fails)
    for no in ("A-1", "A-2"):
        assert shop.process(order(no)) is Outcome.FAILED
    t = shop.tables.idempotent
    with shop.outside.begin() as connection:  # one whose process still runs
        running = update(t).where(t.c.business_key == "A-2").values(token="t", lease_until=utcnow(60))
        connection.execute(running)
    shop.fresh_eo()
    shop.handles(lambda session: put(session, "done"), retry=ONE_TRY)
    assert shop.process(order(attempt=2)) is Outcome.PROCESSED
    assert shop.process(order(attempt=3)) is Outcome.DUPLICATE
    assert shop.process(order("A-2", attempt=2)) is Outcome.IN_PROGRESS
    assert shop.effects() == ["done"]
    shop.borrow()


def test_a_session_that_takes_over_what_a_lease_left_has_what_its_hooks_set_up(shop: Shop) -> None:
    """The old row is cleared away in a transaction that a hook of the session's begins like any other, such as for a tenant."""

    def fails(session: Session, step: Any, transaction: Any) -> None:
        raise ValueError("no")

    handles(shop, fails)
    assert shop.process(order()) is Outcome.FAILED

    class Theirs(Session):
        pass

    def hook(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
        connection.execute(insert(EFFECT).values(text="hook"))

    event.listen(Theirs, "after_begin", hook)
    shop.fresh_eo(
        sessionmaker(shop.engine, class_=Theirs), async_sessionmaker(shop.async_engine, sync_session_class=Theirs)
    )

    def do(session: Session) -> None:
        assert "hook" in session.scalars(select(EFFECT.c.text)).all()
        put(session, "done")

    shop.handles(do, retry=ONE_TRY)
    assert shop.process(order(attempt=2)) is Outcome.PROCESSED, shop.failures()
    assert {"hook", "done"} == set(shop.effects())
    shop.borrow()


def test_once_the_renewal_has_learnt_that_the_lease_is_lost_the_session_refuses(shop: Shop) -> None:
    raised: list[BaseException] = []

    def do(session: Session, step: Any, transaction: Any) -> None:
        if shop.dialect != "sqlite":  # there the other run would wait for this one's transaction
            put(session, "first")
        assert taken_over(shop) is Outcome.PROCESSED
        renewal = next(iter(shop.eo.leases._renewals.values()))
        until(lambda: not renewal._due)  # it has asked, and was told
        try:
            session.execute(select(EFFECT.c.id))
        except LeaseLost as error:  # swallowed, which changes nothing
            raised.append(error)

    handles(shop, do, guard=Lease(timedelta(seconds=1)))
    assert shop.process(order()) is Outcome.IN_PROGRESS
    (error,) = raised
    assert "another run has the message (this was attempt 1)" in str(error)
    assert shop.effects() == ["second"]
    shop.borrow()


def test_a_run_that_stood_still_past_its_lease_begins_no_other_step(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its renewal has not woken yet, so nobody has told it; the clock it looks at says that it should ask."""
    calls: list[str] = []

    def do(session: Session, step: Any, transaction: Any) -> None:
        step("before", lambda key: calls.append("before"))
        assert taken_over(shop) is Outcome.PROCESSED
        now = leases.clock()
        monkeypatch.setattr(leases, "clock", lambda: now + 60)
        step("after", lambda key: calls.append("after"))

    handles(shop, do)
    assert shop.process(order()) is Outcome.IN_PROGRESS
    assert calls == ["before"]


def test_each_database_that_is_bound_renews_its_own_leases(shop: Shop) -> None:
    if shop.is_async:
        pytest.skip("bound() is told an engine for threads")
    handles(shop, lambda session, step, transaction: put(session, "done"))
    assert shop.process(order()) is Outcome.PROCESSED
    first = shop.eo.leases
    with bound(shop.eo, shop.outside):
        assert shop.process(order("A-2")) is Outcome.PROCESSED
        assert shop.eo.leases is not first


def test_what_parks_a_message_is_not_tried_again_at_once(shop: Shop) -> None:
    attempts: list[int] = []

    def do(session: Session, step: Any, transaction: Any) -> None:
        attempts.append(1)
        step("ship", lambda key: object())

    handles(shop, do, retry=Retry(immediate=2))
    assert shop.process(order()) is Outcome.DEAD
    assert attempts == [1]


def test_another_copy_of_a_broken_message_does_not_run_and_requeue_takes_the_claim_back(shop: Shop) -> None:
    runs: list[int] = []

    def do(session: Session, step: Any, transaction: Any) -> None:
        runs.append(1)
        put(session, "half")
        driver = session.connection().connection.dbapi_connection
        if len(runs) == 1:
            driver.commit()

    handles(shop, do)
    assert shop.process(order()) is Outcome.DEAD
    assert shop.failure().state == "broken"
    assert shop.process(order()) is Outcome.DUPLICATE
    with shop.outside.begin() as connection:
        requeue(
            connection, shop.tables, Chosen(group=GROUP, ids=[shop.failure().id]), by="me", why=None, per_second=None
        )
    assert shop.process(order()) is Outcome.PROCESSED
    assert len(runs) == 2
