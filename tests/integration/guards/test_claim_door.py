"""`eo.claim` in a transaction that is the caller's: its refusals leave the caller's earlier work alone."""

from datetime import timedelta
from time import monotonic
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from exactly_once import ConfigurationError, ExactlyOnce, InProgress, Outcome, PayloadConflict
from exactly_once.errors import BadKey, Misuse
from tests.integration.shop import COLOURS, GROUP, STOCK, Shop, on, order, put, shops
from tests.integration.ways import ALONE, in_session

QUICK = timedelta(milliseconds=200)


@pytest.fixture
def eo() -> ExactlyOnce:
    """It needs a group and nothing else: the claim goes where the session goes."""
    return ExactlyOnce(group=GROUP)


def test_true_the_first_time_and_false_once_it_is_committed(shop: Shop, eo: ExactlyOnce) -> None:
    def once(session: Session) -> bool:
        first = eo.claim(session, "handler", "A-1")
        if first:
            put(session, "effect")
        return first

    assert [in_session(shop, once) for _ in range(3)] == [True, False, False]
    shop.assert_kept("effect", claims=["A-1"])


def test_a_claim_that_was_rolled_back_is_open_again(shop: Shop, eo: ExactlyOnce) -> None:
    def fails(session: Session) -> None:
        assert eo.claim(session, "handler", "A-1")
        put(session, "effect")
        raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            in_session(shop, fails)
    shop.assert_kept(claims=[])


def test_earlier_work_in_the_transaction_stands_or_falls_with_the_caller(shop: Shop, eo: ExactlyOnce) -> None:
    def do(session: Session) -> list[bool]:
        put(session, "earlier")
        answers = [eo.claim(session, "handler", "A-1"), eo.claim(session, "handler", "A-1")]
        put(session, "later")
        return answers

    assert in_session(shop, do) == [True, False]
    assert in_session(shop, do) == [False, False]
    shop.assert_kept("earlier", "later", "earlier", "later", claims=["A-1"])


def test_in_progress_is_raised_in_time_and_earlier_work_survives_it(shop: Shop, eo: ExactlyOnce) -> None:
    if shop.dialect == "sqlite":
        pytest.skip("one writer: earlier work there keeps the other one out")
    waited: list[float] = []

    def do(session: Session) -> None:
        put(session, "earlier")
        began = monotonic()
        with pytest.raises(InProgress, match="may still fail"):
            eo.claim(session, "handler", "A-1", claim_wait=QUICK)
        waited.append(monotonic() - began)
        put(session, "later")

    with Session(shop.outside) as other:
        assert eo.claim(other, "handler", "A-1")
        in_session(shop, do)
        other.rollback()
    assert 0.15 < waited[0] < 10
    shop.assert_kept("earlier", "later", claims=[])


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_winner_the_transaction_cannot_see_is_in_progress(
    request: pytest.FixtureRequest, eo: ExactlyOnce, level: str
) -> None:
    for shop in shops(request, "postgres", "sync", options={"isolation_level": level}):

        def do(session: Session, shop: Shop = shop) -> None:
            put(session, "earlier")  # from here on this transaction sees nothing that is newer
            with Session(shop.outside) as other:
                assert eo.claim(other, "handler", "A-1")
                other.commit()
            with pytest.raises(InProgress):
                eo.claim(session, "handler", "A-1")
            put(session, "later")

        in_session(shop, do)
        assert in_session(shop, lambda session: eo.claim(session, "handler", "A-1")) is False
        shop.assert_kept("earlier", "later", claims=["A-1"])


def test_another_payload_is_said_and_earlier_work_survives_it(shop: Shop, eo: ExactlyOnce) -> None:
    def claim(session: Session, payload: bytes | None) -> bool:
        put(session, "earlier")
        return eo.claim(session, "handler", "A-1", payload=payload)

    assert in_session(shop, lambda session: claim(session, b'{"no": 1, "n": 1}'))
    assert in_session(shop, lambda session: claim(session, b'{"n":1,"no":1}')) is False

    def conflicting(session: Session) -> None:
        with pytest.raises(PayloadConflict, match="What differs: n"):
            claim(session, b'{"no": 1, "n": 2}')

    in_session(shop, conflicting)
    shop.assert_kept("earlier", "earlier", "earlier", claims=["A-1"])


def test_without_a_payload_nothing_is_compared(shop: Shop, eo: ExactlyOnce) -> None:
    assert in_session(shop, lambda session: eo.claim(session, "handler", "A-1"))
    assert in_session(shop, lambda session: eo.claim(session, "handler", "A-1", payload=b'{"no": 2}')) is False


def test_keys_are_what_they_are_at_the_other_doors(shop: Shop, eo: ExactlyOnce) -> None:
    assert in_session(shop, lambda session: eo.claim(session, "handler", ("created", 12)))
    assert in_session(shop, lambda session: eo.claim(session, "handler", ("created", "12"))) is False
    assert in_session(shop, lambda session: eo.claim(session, "handler", 12))
    assert in_session(shop, lambda session: eo.claim(session, "Handler", "12"))
    assert shop.claims() == sorted(['["created","12"]', "12", "12"])
    for bad in ("", "x" * 256, None, True, 1.5, "a\0", ("a", "")):
        with pytest.raises(BadKey):
            in_session(shop, lambda session, bad=bad: eo.claim(session, "handler", bad))  # type: ignore[misc]


def test_a_claim_made_here_is_a_duplicate_at_door_two(shop: Shop) -> None:
    shop.handles(lambda session: put(session, "effect"))
    assert in_session(shop, lambda session: shop.eo.claim(session, "handler", "A-1", payload=order().body))
    assert shop.process(order()) is Outcome.DUPLICATE
    shop.assert_kept(claims=["A-1"])


def test_a_handler_may_claim_for_its_parts(shop: Shop) -> None:
    def do(session: Session) -> None:
        for part in ("stock", "stock", "prize"):
            if shop.eo.claim(session, part, "A-1"):
                put(session, part)

    shop.handles(do)
    assert shop.process(order()) is Outcome.PROCESSED
    shop.assert_kept("stock", "prize", claims=["A-1"] * 3)


@pytest.mark.parametrize("colour", ["sync", "async"])
def test_the_callers_own_lock_timeout_is_left_alone(
    request: pytest.FixtureRequest, eo: ExactlyOnce, colour: str
) -> None:
    def shown(session: Session) -> list[object]:
        session.execute(text("SET LOCAL lock_timeout = '3s'"))
        seen = []
        with Session(shop.outside) as other:
            assert eo.claim(other, "handler", "held")
            with pytest.raises(InProgress):
                eo.claim(session, "handler", "held", claim_wait=QUICK)
            other.rollback()
        seen.append(session.execute(text("SHOW lock_timeout")).scalar())
        eo.claim(session, "handler", "A-1")
        seen.append(session.execute(text("SHOW lock_timeout")).scalar())
        return seen

    for shop in shops(request, "postgres", colour):
        assert in_session(shop, shown) == ["3s", "3s"]


def test_the_tables_may_live_in_a_schema_of_their_own(request: pytest.FixtureRequest) -> None:
    from exactly_once.alembic import upgrade

    name = "Idempotent messages"
    for shop in shops(request, "postgres", "sync", pool_size=2):
        with shop.outside.begin() as connection:
            connection.execute(text(f'CREATE SCHEMA "{name}"'))
            upgrade(connection, schema=name)
        eo = ExactlyOnce(shop.engine, group=GROUP, schema=name)
        claimed = [in_session(shop, lambda session, eo=eo: eo.claim(session, "handler", "A-1")) for _ in range(2)]  # type: ignore[misc]
        assert claimed == [True, False]

        @eo.handler("orders", key="no")
        def reserve(session: Session) -> None:
            put(session, "effect")

        assert [eo.process(order("A-2")) for _ in range(2)] == [Outcome.PROCESSED, Outcome.DUPLICATE]
        assert shop.claims() == []
        with shop.outside.connect() as connection:
            assert connection.execute(text(f'SELECT count(*) FROM "{name}".message_idempotent')).scalar() == 2


def test_what_is_no_session_is_refused_with_what_to_type(shop: Shop, eo: ExactlyOnce) -> None:
    with pytest.raises(ConfigurationError, match="run_sync"):
        eo.claim(AsyncSession(shop.async_engine), "handler", "A-1")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="Session"):
        eo.claim(shop.engine, "handler", "A-1")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"session = scoped\(\).*run_sync"):
        eo.claim(async_scoped_session(async_sessionmaker(shop.async_engine), lambda: 1), "handler", "A-1")  # type: ignore[arg-type]


@on(colour="sync")
def test_a_scoped_session_is_the_session_of_its_scope(shop: Shop, eo: ExactlyOnce) -> None:
    """As `db.session` of Flask-SQLAlchemy is one."""
    scoped = scoped_session(sessionmaker(shop.engine))
    claimed = []
    for _ in range(2):
        claimed.append(eo.claim(scoped, "handler", "A-1"))
        if claimed[-1]:
            scoped.execute(text("SELECT 1"))
            put(scoped(), "effect")
        scoped.commit()
        scoped.remove()
    assert claimed == [True, False]
    shop.assert_kept("effect", claims=["A-1"])


@on(colour="sync")
def test_a_scoped_session_names_the_database_of_its_sessions(shop: Shop) -> None:
    class Theirs(Session):
        pass

    eo = ExactlyOnce(group=GROUP)
    eo.bind(scoped_session(sessionmaker(shop.engine, class_=Theirs)))
    seen: list[type[Session]] = []

    @eo.handler("orders", key="no")
    def reserve(session: Session) -> None:
        seen.append(type(session))

    assert [eo.process(order("A-1")) for _ in range(2)] == [Outcome.PROCESSED, Outcome.DUPLICATE]
    assert [issubclass(each, Theirs) for each in seen] == [True]


class OfAnApplication(Session):
    """As Flask-SQLAlchemy makes it: the engine is known inside an application's context only."""

    def __init__(self, db: object, **options: Any) -> None:
        super().__init__(**options)


NO_DATABASE: dict[str, Any] = {
    "db.session of Flask-SQLAlchemy": scoped_session(sessionmaker(class_=OfAnApplication, db=1)),
    "db of Flask-SQLAlchemy": SimpleNamespace(session=1),
    "a session": Session(),
    "a maker without an engine": async_sessionmaker(),
    "a function that makes sessions": scoped_session(Session),
}


@pytest.mark.parametrize("which", NO_DATABASE)
def test_what_names_no_database_is_told_what_to_give(which: str) -> None:
    eo = ExactlyOnce(group=GROUP)
    eo.bind(NO_DATABASE[which])

    @eo.handler("orders", key="no")
    def reserve(session: Session) -> None: ...

    with pytest.raises(ConfigurationError, match=r"sessionmaker.*app_context\(\): eo.bind\(db.engine\)"):
        eo.process(order("A-1"))


def test_what_is_no_session_is_told_what_to_give(shop: Shop, eo: ExactlyOnce) -> None:
    with shop.engine.connect() as connection:
        for given in (shop.engine, connection, sessionmaker(shop.engine), Session, None):
            with pytest.raises(
                ConfigurationError, match=r"was given an? \w+, not a Session\. .*with Session\(engine\) as session"
            ) as told:
                eo.claim(given, "handler", "A-1")  # type: ignore[arg-type]
            assert "run_sync" not in str(told.value)
    for given in (AsyncSession(shop.async_engine), async_scoped_session(async_sessionmaker(), lambda: 1)):
        with pytest.raises(ConfigurationError, match=r"await session\.run_sync\(eo\.claim, handler, key\)"):
            eo.claim(given, "handler", "A-1")  # type: ignore[arg-type]
    for given in (shop.async_engine, async_sessionmaker(shop.async_engine)):
        with pytest.raises(ConfigurationError, match=r"async with AsyncSession\(engine\) as session"):
            eo.claim(given, "handler", "A-1")  # type: ignore[arg-type]


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("within", ["the caller's transaction", "a handler"])
def test_a_claim_takes_no_row_from_whoever_reads_them_one_by_one(
    request: pytest.FixtureRequest, colour: str, within: str
) -> None:
    """MySQL and MariaDB send one answer at a time: a statement of ours would end the stream, in silence."""
    for shop in shops(request, "mariadb", colour, pool_size=3):
        with shop.outside.begin() as connection:
            connection.execute(insert(STOCK), [{"item": no, "amount": no} for no in range(1, 41)])

        def work(session: Session, no: Any = None, shop: Shop = shop) -> None:
            streamed = {"stream_results": True, "max_row_buffer": 4}
            for (item,) in session.execute(select(STOCK.c.item), execution_options=streamed):
                shop.eo.claim(session, "line", item)

        if within == "a handler":
            ALONE.handles(shop, work)
            assert shop.process(order(1)) is Outcome.FAILED
            assert "still read one by one" in shop.failure().error_text
        else:
            with pytest.raises(Misuse, match="still read one by one"):
                in_session(shop, work)
        assert shop.claims() == []
