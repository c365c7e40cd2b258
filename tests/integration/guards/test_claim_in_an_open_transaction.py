"""`eo.claim` where the caller's transaction is none, or is thrown away by the server in the midst of the claim.

The kind: what stands around the claim is not what was seen once. A connection that was fine is in AUTOCOMMIT now, so the claim
would stand although its work failed; or the server undoes the whole transaction, the caller's earlier work included, where it
mostly undoes one statement: then nothing but a rollback may follow, or the later half is committed alone.
"""

import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from exactly_once import ConfigurationError, ExactlyOnce, InProgress, Lease, Message, Outcome
from tests.integration.shop import EFFECT, GROUP, STOCK, Shop, on, order, put
from tests.integration.threads import Turn, in_thread
from tests.integration.ways import in_session

SECOND = timedelta(seconds=1)


@pytest.fixture
def eo() -> ExactlyOnce:
    """It needs a group and nothing else: the claim goes where the session goes."""
    return ExactlyOnce(group=GROUP)


# -- AUTOCOMMIT, on a connection that was used before ------------------------------------------------------------------


def claims_in_autocommit(shop: Shop, eo: ExactlyOnce, how: str) -> Any:
    """Claim a key, and fail with the work, in a session whose connection commits each statement by itself."""
    options = {"isolation_level": "AUTOCOMMIT"}

    def do(session: Session) -> None:
        if how == "session.connection":
            session.connection(execution_options=options)
        eo.claim(session, "handler", "A-1")
        raise ZeroDivisionError

    async def awaited() -> None:
        engine = shop.async_engine
        bind = engine.execution_options(**options) if how == "engine" else engine
        async with AsyncSession(bind) as session, session.begin():
            await session.run_sync(do)

    if shop.is_async:
        return shop.await_(awaited())
    bind = shop.engine.execution_options(**options) if how == "engine" else shop.engine
    with Session(bind) as session, session.begin():
        do(session)
    return None


def first_claims(shop: Shop, eo: ExactlyOnce) -> None:
    """The connection, of which there is one, is known from here on."""
    assert in_session(shop, lambda session: eo.claim(session, "handler", "A-0"))


@pytest.mark.parametrize("how", ["session.connection", "engine"])
@pytest.mark.parametrize("used_before", [False, True])
def test_a_claim_on_a_connection_in_autocommit_is_refused(
    shop: Shop, eo: ExactlyOnce, how: str, used_before: bool
) -> None:
    if used_before:
        first_claims(shop, eo)
    with pytest.raises(ConfigurationError, match=r"AUTOCOMMIT|isolation_level="):
        claims_in_autocommit(shop, eo, how)
    assert "A-1" not in shop.claims()
    assert in_session(shop, lambda session: eo.claim(session, "handler", "A-1"))


@pytest.mark.parametrize("batch", [None, 100])
def test_a_handlers_engine_in_autocommit_is_refused_although_its_connection_was_seen_without(
    shop: Shop, batch: int | None
) -> None:
    """Two engines share a pool: one in AUTOCOMMIT for maintenance, say."""
    more: dict[str, Any] = {} if batch is None else {"batch": batch}
    shop.handles(lambda session: put(session, "done"), **more)
    assert shop.process(order("A-0")) is Outcome.PROCESSED
    options = {"isolation_level": "AUTOCOMMIT"}
    shop.fresh_eo(
        sessionmaker(shop.engine.execution_options(**options)),
        async_sessionmaker(shop.async_engine.execution_options(**options)),
    )

    def fails(session: Session) -> None:
        put(session, "failed")
        raise ZeroDivisionError

    shop.handles(fails, **more)
    with pytest.raises(ConfigurationError, match=r"AUTOCOMMIT|isolation_level="):
        shop.process(order("A-1"))
    assert (shop.claims(), shop.effects()) == (["A-0"], ["done"])


# -- a claim that costs the caller their transaction -------------------------------------------------------------------


def nothing_but_a_rollback(shop: Shop, claims: Callable[[Session], object], *, may_be_done: bool = False) -> None:
    """Earlier work, a claim that costs the transaction, and a caller who goes on as if nothing had happened."""
    told: list[object] = []

    def do(session: Session) -> None:
        put(session, "earlier")
        try:
            told.append(claims(session))
        except InProgress:
            told.append(InProgress)
        refused = 0
        try:
            put(session, "later")
        except Exception:
            refused += 1
        assert refused, "a statement behind the loss was sent, in another transaction"
        session.commit()

    with pytest.raises(Exception) as raised:
        in_session(shop, do)
    assert not isinstance(raised.value, AssertionError), raised.value
    assert told in ([[InProgress], [False]] if may_be_done else [[InProgress]]), raised.value
    assert [effect for effect in shop.effects() if effect in ("earlier", "later")] == []
    shop.borrow()


def test_a_wait_that_ends_costs_the_whole_transaction_and_only_a_rollback_is_possible(
    strict: Shop, eo: ExactlyOnce
) -> None:
    with Session(strict.outside) as other:
        assert eo.claim(other, "handler", "A-1")
        nothing_but_a_rollback(strict, lambda session: eo.claim(session, "handler", "A-1", claim_wait=SECOND))
    assert strict.claims() == []


def test_after_such_a_rollback_the_key_can_be_claimed(strict: Shop, eo: ExactlyOnce) -> None:
    def claims(session: Session) -> bool:
        put(session, "earlier")
        try:
            return eo.claim(session, "handler", "A-1", claim_wait=SECOND)
        except InProgress:
            session.rollback()
            return False

    async def awaited() -> bool:
        async with AsyncSession(strict.async_engine) as session:
            claimed: bool = await session.run_sync(claims)
            if claimed:
                await session.commit()
            return claimed

    def once() -> bool:
        if strict.is_async:
            claimed: bool = strict.await_(awaited())
            return claimed
        with Session(strict.engine) as session:
            claimed = claims(session)
            if claimed:
                session.commit()
            return claimed

    with Session(strict.outside) as other:
        assert eo.claim(other, "handler", "A-1")
        assert not once()
    assert once()
    assert (strict.effects(), strict.claims()) == (["earlier"], ["A-1"])


def test_a_key_that_was_consumed_after_the_callers_snapshot_is_done_or_in_progress(
    strict: Shop, eo: ExactlyOnce
) -> None:
    """1020: under snapshot isolation the server refuses to see what was committed since, and throws the transaction away."""

    def claims(session: Session) -> bool:
        session.execute(select(EFFECT)).all()  # the snapshot
        with Session(strict.outside) as other, other.begin():
            assert eo.claim(other, "handler", "A-1")
        return eo.claim(session, "handler", "A-1", claim_wait=SECOND)

    told: list[object] = []

    def do(session: Session) -> None:
        session.execute(select(EFFECT)).all()
        put(session, "earlier")
        try:
            told.append(claims(session))
        except InProgress:
            told.append(InProgress)
        with suppress(Exception):
            put(session, "later")

    error: BaseException | None = None
    try:
        in_session(strict, do)
    except Exception as raised:
        error = raised
    assert told in ([InProgress], [False]), error
    there = [effect for effect in strict.effects() if effect in ("earlier", "later")]
    # all of the caller's transaction, or nothing of it: never the later half alone
    assert there in ([], ["earlier", "later"]), there
    assert strict.claims() == ["A-1"]
    strict.borrow()


def test_a_claim_that_is_the_victim_of_a_deadlock_allows_a_rollback_and_no_more(shop: Shop, eo: ExactlyOnce) -> None:
    if shop.dialect == "sqlite":
        pytest.skip("SQLite has one writer")
    _is_the_victim(shop, eo)


def test_the_same_where_the_server_undoes_more_than_a_statement(strict: Shop, eo: ExactlyOnce) -> None:
    _is_the_victim(strict, eo)


def _is_the_victim(shop: Shop, eo: ExactlyOnce) -> None:
    with shop.outside.begin() as connection:
        connection.execute(insert(STOCK), [{"item": 1, "amount": 0}])
    ours, theirs = Turn(), Turn()

    def take(session: Any) -> None:
        session.execute(update(STOCK).where(STOCK.c.item == 1).values(amount=STOCK.c.amount + 1))

    def other() -> None:
        with Session(shop.outside) as session, session.begin():
            if shop.dialect == "postgres":
                session.execute(text("SET LOCAL deadlock_timeout = '60s'"))  # the claim is to notice it, and die
            session.execute(insert(STOCK), [{"item": item, "amount": 0} for item in range(100, 400)])
            assert eo.claim(session, "handler", "A-1")
            theirs.come()
            ours.wait()
            take(session)
            threading.Event().wait(0.2)

    def claims(session: Session) -> bool:
        theirs.wait()
        take(session)
        ours.come()
        threading.Event().wait(0.3)  # until the other waits for us; too early, and it proves less
        return eo.claim(session, "handler", "A-1", claim_wait=timedelta(seconds=10))

    with in_thread(other):
        if shop.dialect == "postgres":
            # inside a savepoint: the claim alone is undone, and the lock it waited for is freed only with our own work
            told: list[object] = []

            def do(session: Session) -> None:
                put(session, "earlier")
                with pytest.raises(InProgress):
                    claims(session)
                told.append(InProgress)

            in_session(shop, do)
            assert told == [InProgress]
            assert shop.effects() == ["earlier"]
        else:
            nothing_but_a_rollback(shop, claims, may_be_done=True)


# -- a claim inside a savepoint ------------------------------------------------------------------------------------------


def _in_begin_nested(session: Session, work: Callable[[], bool]) -> bool:
    with session.begin_nested():
        return work()


def _in_two(session: Session, work: Callable[[], bool]) -> bool:
    with session.begin_nested(), session.begin_nested():
        return work()


def _in_text(session: Session, work: Callable[[], bool]) -> bool:
    session.execute(text("SAVEPOINT mine"))
    won = work()
    session.execute(text("-- done\nrelease savepoint mine"))
    return won


def _on_the_connection(session: Session, work: Callable[[], bool]) -> bool:
    with session.connection().begin_nested():
        return work()


def _behind_earlier_work(session: Session, work: Callable[[], bool]) -> bool:
    put(session, "earlier")
    with session.begin_nested():
        return work()


SAVEPOINTS = {
    "begin_nested": _in_begin_nested,
    "two of them": _in_two,
    "text": _in_text,
    "connection.begin_nested": _on_the_connection,
    "behind earlier work": _behind_earlier_work,
}


@pytest.mark.parametrize("savepoint", SAVEPOINTS)
def test_a_claim_inside_a_savepoint_stands_or_falls_with_the_callers_transaction(
    shop: Shop, eo: ExactlyOnce, savepoint: str
) -> None:
    """SQLite's driver sends no BEGIN before a SAVEPOINT, so RELEASE of the first one is a COMMIT."""

    def do(session: Session, *, fails: bool) -> bool:
        won = SAVEPOINTS[savepoint](session, lambda: eo.claim(session, "handler", "A-1"))
        if fails:
            raise ZeroDivisionError
        put(session, "effect")
        return won

    with Shop(shop.dialect, shop.colour, shop.url) as fresh:  # its engines have never seen a claim
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                in_session(fresh, lambda session: do(session, fails=True))
            assert fresh.claims() == []
        assert in_session(fresh, lambda session: do(session, fails=False))
        assert fresh.effects()[-1] == "effect"
        assert fresh.claims() == ["A-1"]
        fresh.borrow()


def test_a_savepoint_that_is_rolled_back_takes_its_claim_along_and_nothing_else(shop: Shop, eo: ExactlyOnce) -> None:
    def do(session: Session) -> None:
        with session.begin_nested():
            assert eo.claim(session, "handler", "A-1")
            put(session, "kept")
        with suppress(ZeroDivisionError), session.begin_nested():
            assert eo.claim(session, "handler", "A-2")
            put(session, "undone")
            raise ZeroDivisionError
        with session.begin_nested():
            assert eo.claim(session, "handler", "A-3")

    in_session(shop, do)
    shop.assert_kept("kept", claims=["A-1", "A-3"])


def test_behind_that_transaction_savepoints_are_the_callers_again(shop: Shop, eo: ExactlyOnce) -> None:
    def claims(session: Session) -> None:
        with session.begin_nested():
            assert eo.claim(session, "handler", "A-1")

    sent: list[str] = []

    def works(session: Session) -> None:
        put(session, "before")
        session.execute(text("SAVEPOINT mine"))
        put(session, "within")
        session.execute(text("RELEASE SAVEPOINT mine"))
        try:
            session.execute(text("ROLLBACK TO SAVEPOINT mine"))
        except Exception as error:
            sent.append(type(error).__name__)
            raise

    in_session(shop, claims)
    with pytest.raises(Exception, match=r"mine"):
        in_session(shop, works)
    assert sent
    shop.assert_kept(claims=["A-1"])


@on("postgres")
def test_a_job_that_set_its_session_and_sets_it_back_has_nothing_put_into_a_later_one(
    shop: Shop, eo: ExactlyOnce
) -> None:
    """A connection that is fresh from the server is the caller's from then on: what one claim finds, the next need not."""
    shown = "SELECT current_setting('lock_timeout')"

    def job(connection: Connection) -> None:
        connection.exec_driver_sql("SET lock_timeout = '1s'")
        connection.commit()
        with Session(bind=connection) as session, session.begin():
            assert eo.claim(session, "job", "1")
            assert session.execute(text(shown)).scalar_one() == "1s"
        connection.exec_driver_sql("RESET lock_timeout")
        connection.commit()

    def request(session: Session) -> Any:
        assert eo.claim(session, "request", "1")
        return session.execute(text(shown)).scalar_one()

    async def ajob(fresh: Shop) -> None:
        async with fresh.async_engine.connect() as connection:
            await connection.run_sync(job)

    with Shop(shop.dialect, shop.colour, shop.url) as fresh:
        if fresh.is_async:
            fresh.await_(ajob(fresh))
        else:
            with fresh.engine.connect() as connection:
                job(connection)
        assert in_session(fresh, request) == "0"


def test_a_handlers_first_statement_in_a_savepoint_stands_or_falls_with_its_message(shop: Shop) -> None:
    """In a handler BEGIN is ours, and first, also where its transaction begins with the session's first use."""
    for name, guard in (("alone", None), ("leased", Lease(timedelta(seconds=30)))):
        fails = [True]

        def do(session: Session, fails: list[bool] = fails, name: str = name) -> None:
            with session.begin_nested():
                shop.eo.claim(session, f"part of {name}", "A-1")
                put(session, name)
            if fails:
                raise ZeroDivisionError

        shop.handles(do, topic=name, name=name, **({} if guard is None else {"guard": guard}))
        message = Message(name, order().body, message_id=f"id-{name}")
        assert shop.process(message) is Outcome.FAILED
        assert shop.effects().count(name) == 0
        fails.clear()
        assert shop.process(message) is Outcome.PROCESSED
        assert shop.effects().count(name) == 1
    assert shop.claims() == ["A-1"] * 4
    shop.borrow()
