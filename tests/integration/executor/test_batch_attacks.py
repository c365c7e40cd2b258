"""Schedules that broke batches once, found by an attack: what one message does must not be the others' loss."""

import threading
from collections.abc import Callable
from contextlib import suppress
from time import sleep
from typing import Any

import pytest
from sqlalchemy import Integer, create_engine, event, insert, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from exactly_once import ExactlyOnce, Outcome, Retry
from exactly_once.outcome import Ack
from tests.integration.batches import handles, orders, told
from tests.integration.shop import GROUP, ONE_TRY, ONLY, STOCK, Shop, order, put, shops
from tests.services.proxy import Proxy

pytestmark = pytest.mark.nightly(meet=2)

DIALECTS = ("postgres", "mariadb", "sqlite")
SERVERS = DIALECTS[:2]


class Base(DeclarativeBase):
    pass


class Stock(Base):
    __tablename__ = "stock"
    item: Mapped[int] = mapped_column(Integer, primary_key=True)
    amount: Mapped[int]


class Only(Base):
    __tablename__ = "only_one"
    text: Mapped[str] = mapped_column(primary_key=True)


class Effect(Base):
    __tablename__ = "effect"
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    text: Mapped[str]


# -- a COMMIT without an answer ------------------------------------------------------------------------------------------


class Copy:
    """A copy of message 1 in another process, whose claim waits for the group that holds the key."""

    def __init__(self, shop: Shop) -> None:
        eo = ExactlyOnce(create_engine(shop.url), group=GROUP)

        @eo.handler("orders", key="no", name="handler")
        def handler(session: Session, body: dict[str, Any]) -> None:
            put(session, f"copy {body['no']}")

        self._thread = threading.Thread(target=lambda: eo.process(order(1)))
        self.began = False

    def begin(self) -> None:
        if not self.began:
            self.began = True
            self._thread.start()
            sleep(0.5)  # until its claim waits; too early and the test proves less, it does not fail

    def end(self, *_: object) -> None:
        if self.began:
            self._thread.join(10)


def nothing_lost(shop: Shop, ran: Any) -> None:
    effects = shop.effects()
    for number, each in zip((1, 2, 3), ran.results, strict=True):
        if isinstance(each.verdict, Ack):
            assert str(number) in effects or f"copy {number}" in effects, f"{number} is acknowledged and has no effect"


@pytest.mark.parametrize("dialect", SERVERS)
def test_a_copy_of_one_message_that_commits_while_the_group_is_looked_up_says_nothing_of_the_others(
    request: pytest.FixtureRequest, dialect: str
) -> None:
    for shop in shops(request, dialect, "sync"):
        with Proxy(shop.url) as proxy:
            engine = create_engine(proxy.url, pool_size=1)
            shop.fresh_eo(engine)
            copy = Copy(shop)

            def do(session: Session, no: Any, copy: Copy = copy, proxy: Proxy = proxy) -> None:
                put(session, str(no))
                if no == 3:
                    copy.begin()
                    proxy.cut_before_commit()

            handles(shop, do)
            # the look-up needs a new connection, and gets it when the copy has ended
            event.listen(engine, "do_connect", copy.end)
            ran = told(shop, orders(1, 2, 3))
            nothing_lost(shop, ran)
            engine.dispose()


def test_the_same_where_the_server_refused_the_commit(request: pytest.FixtureRequest) -> None:
    for shop in shops(request, "postgres", "sync", pool_size=1):
        with shop.outside.begin() as connection:
            connection.execute(text("CREATE TABLE parent (id int primary key)"))
            connection.execute(text("CREATE TABLE child (id int REFERENCES parent (id) DEFERRABLE INITIALLY DEFERRED)"))
        copy = Copy(shop)

        def do(session: Session, no: Any, copy: Copy = copy) -> None:
            put(session, str(no))
            if no == 3:
                session.execute(text("INSERT INTO child VALUES (1)"))
                copy.begin()

        handles(shop, do)
        event.listen(shop.engine, "checkout", copy.end)
        nothing_lost(shop, told(shop, orders(1, 2, 3)))


# -- what a call leaves behind -------------------------------------------------------------------------------------------


def refresh_for_update(session: Session, body: dict[str, Any]) -> None:
    stock = session.get_one(Stock, 1)
    session.refresh(stock, with_for_update=True)
    stock.amount -= 1


def get_for_update(session: Session, body: dict[str, Any]) -> None:
    session.get_one(Stock, 1, with_for_update=True).amount -= 1


def select_for_update(session: Session, body: dict[str, Any]) -> None:
    session.scalars(select(Stock).where(Stock.item == 1).with_for_update()).one().amount -= 1


def populate_existing(session: Session, body: dict[str, Any]) -> None:
    session.get_one(Stock, 1, populate_existing=True).amount -= 1


def expire_all(session: Session, body: dict[str, Any]) -> None:
    session.expire_all()
    session.get_one(Stock, 1).amount -= 1


def core_and_orm(session: Session, body: dict[str, Any]) -> None:
    if body["no"] % 2:
        session.execute(STOCK.update().where(STOCK.c.item == 1).values(amount=STOCK.c.amount - 1))
    else:
        session.get_one(Stock, 1).amount -= 1


def run(
    shop: Shop,
    do: Callable[[Session, dict[str, Any]], None],
    numbers: list[int],
    *,
    grouped: bool,
    autoflush: bool = True,
) -> list[Outcome]:
    shop.clear()
    with shop.outside.begin() as connection:
        connection.execute(insert(STOCK), [{"item": 1, "amount": 100}])
        connection.execute(insert(ONLY), [{"text": "taken"}])
    shop.fresh_eo(sessionmaker(shop.engine, autoflush=autoflush))
    more: dict[str, Any] = {"batch": 100} if grouped else {}

    @shop.eo.handler("orders", name="handler", key="no", retry=ONE_TRY, **more)
    def handler(session: Session, body: dict[str, Any]) -> None:
        do(session, body)

    messages = [order(number) for number in numbers]
    if grouped:
        return [each.outcome for each in told(shop, messages).results]
    return [shop.process(message) for message in messages]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("autoflush", [True, False])
@pytest.mark.parametrize(
    "do", [get_for_update, select_for_update, refresh_for_update, populate_existing, expire_all, core_and_orm]
)
def test_what_one_call_changed_survives_the_next(
    request: pytest.FixtureRequest, dialect: str, do: Callable[[Session, dict[str, Any]], None], autoflush: bool
) -> None:
    for shop in shops(request, dialect, "sync"):
        for grouped in (False, True):
            assert run(shop, do, [1, 2, 3, 4], grouped=grouped, autoflush=autoflush) == [Outcome.PROCESSED] * 4
            assert shop.rows(STOCK)[0].amount == 96, f"grouped={grouped}"


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("autoflush", [True, False])
def test_a_call_that_empties_the_session_drops_nothing_of_the_others(
    request: pytest.FixtureRequest, dialect: str, autoflush: bool
) -> None:
    def do(session: Session, body: dict[str, Any]) -> None:
        session.expunge_all()
        session.add(Effect(text=str(body["no"])))

    for shop in shops(request, dialect, "sync"):
        for grouped in (False, True):
            assert run(shop, do, [1, 2, 3], grouped=grouped, autoflush=autoflush) == [Outcome.PROCESSED] * 3
            assert sorted(shop.effects()) == ["1", "2", "3"], f"grouped={grouped}"


@pytest.mark.parametrize("dialect", SERVERS)
def test_a_savepoint_left_open_has_nobody_elses_work_in_it(request: pytest.FixtureRequest, dialect: str) -> None:
    def do(session: Session, body: dict[str, Any]) -> None:
        if body["no"] == 1:
            session.begin_nested()
        session.add(Effect(text=str(body["no"])))
        session.flush()
        if body["no"] == 3:
            session.add(Only(text="taken"))
            with suppress(IntegrityError):
                session.flush()

    for shop in shops(request, dialect, "sync"):
        for grouped in (False, True):
            outcomes = run(shop, do, [1, 2, 3], grouped=grouped)
            assert outcomes == [Outcome.PROCESSED, Outcome.PROCESSED, Outcome.FAILED], f"grouped={grouped}"
            assert sorted(shop.effects()) == ["1", "2"], f"grouped={grouped}"


def test_a_body_that_a_call_changed_is_read_anew_for_the_next_try(request: pytest.FixtureRequest) -> None:
    def do(session: Session, body: dict[str, Any]) -> None:
        body["times"] = body.get("times", 0) + 1
        put(session, f"{body['no']}x{body['times']}")
        if body["no"] == 15:
            raise ValueError("poison, at the end")

    for shop in shops(request, "sqlite", "sync"):
        for grouped in (False, True):
            run(shop, do, list(range(16)), grouped=grouped)
            assert sorted(shop.effects()) == sorted(f"{number}x1" for number in range(15)), f"grouped={grouped}"


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_same_of_a_message_alone_that_is_tried_again_at_once(request: pytest.FixtureRequest, dialect: str) -> None:
    for shop in shops(request, dialect, "sync"):
        shop.fresh_eo(shop.engine)
        calls: list[int] = []

        @shop.eo.handler("orders", name="handler", key="no", retry=Retry(immediate=1))
        def handler(session: Session, body: dict[str, Any], calls: list[int] = calls) -> None:
            body["times"] = body.get("times", 0) + 1
            calls.append(body["times"])
            put(session, f"{body['no']}x{body['times']}")
            if len(calls) == 1:
                raise ValueError("once")

        assert shop.process(order(1)) is Outcome.PROCESSED
        assert (calls, shop.effects()) == ([1, 1], ["1x1"])
