"""A handler that leaves the transaction it was given: nothing is acknowledged, nothing is kept, nothing leaks into the pool.

Each misuse stands between two effects. It is tried as written, and again with every error it raises swallowed, for a
handler that hides an error must not be able to hide what it did. Afterwards a stranger takes the connection from the pool
(there is only one) and commits: of the refused attempt nothing may appear then either.
"""

import asyncio
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event, insert, select, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from exactly_once import ConfigurationError, Outcome, Retry
from exactly_once.database.probe import claims_twice
from tests.integration.shop import DIALECTS, EFFECT, GROUP, ONE_TRY, ONLY, STOCK, Do, Shop, on, order, put
from tests.integration.threads import Turn, in_thread
from tests.integration.ways import WAYS, Way, mariadb_procedures
from tests.services.mariadb import MYSQLD

pytestmark = [pytest.mark.nightly(meet=2), pytest.mark.usefixtures("shop")]


@dataclass(frozen=True)
class Misuse:
    """One way to leave the transaction, and words the error must have for whoever reads it."""

    name: str
    do: Callable[[Session], object]
    says: str = "The handler"
    on: tuple[str, ...] = DIALECTS


def sends(statement: str, keyword: str | None = None, on: tuple[str, ...] = DIALECTS) -> Misuse:
    """A statement sent as text, refused by its first words."""
    keyword = keyword or statement.split()[0].upper()
    return Misuse(statement, lambda session: session.execute(text(statement)), f"The handler sent {keyword}", on)


def _with_session(session: Session) -> None:
    with session:
        put(session, "inside")


COMMIT = "called commit()"
LEFT = "left the transaction it was given"
MARIADB = ("mariadb",)

REFUSED = [
    Misuse("session.commit", lambda s: s.commit(), COMMIT),
    Misuse("connection.commit", lambda s: s.connection().commit(), COMMIT),
    Misuse("session.get_transaction().commit", lambda s: s.get_transaction().commit(), COMMIT),  # type: ignore[union-attr]
    Misuse(
        "connection.get_transaction().commit",
        lambda s: s.connection().get_transaction().commit(),  # type: ignore[union-attr]
        COMMIT,
    ),
    Misuse("session.commit twice", lambda s: suppressed(s.commit) or s.commit(), COMMIT),  # type: ignore[func-returns-value,redundant-expr]
    Misuse("session.rollback", lambda s: s.rollback(), LEFT),
    Misuse("connection.rollback", lambda s: s.connection().rollback(), LEFT),
    Misuse("connection.close", lambda s: s.connection().close(), "close"),
    Misuse("session.close", lambda s: s.close(), LEFT),
    Misuse("session.reset", lambda s: s.reset(), LEFT),
    Misuse("session.invalidate", lambda s: s.invalidate()),
    Misuse("with session", _with_session, LEFT),
    Misuse("exec_driver_sql", lambda s: s.connection().exec_driver_sql("COMMIT"), "sent COMMIT"),
    sends("COMMIT"),
    sends("commit"),
    sends("  Commit  Work"),
    sends("COMMIT AND CHAIN"),
    sends("; COMMIT", "COMMIT"),
    sends("-- the order is done\nCOMMIT", "COMMIT"),
    sends("/* done */ /* really */ commit", "COMMIT"),
    sends("SELECT 1; COMMIT", "COMMIT"),
    sends("INSERT INTO stock VALUES (1, 1); SELECT ';''' || \"--;\"; -- ;\n ROLLBACK", "ROLLBACK"),
    sends("ROLLBACK"),
    sends("rollback and chain"),
    sends("BEGIN"),
    sends("begin transaction"),
    sends("START TRANSACTION"),
    sends("END"),
    sends("ABORT"),
    sends("prepare transaction 'x'", "PREPARE TRANSACTION"),
    sends("TRUNCATE TABLE stock", on=MARIADB),
    sends("alter table stock add column x int", on=MARIADB),
    sends("CREATE TABLE more (id int)", on=MARIADB),
    sends("DROP TABLE stock", on=MARIADB),
    sends("LOCK TABLES stock WRITE", on=MARIADB),
    sends("# why not\nRENAME TABLE stock TO stocks", "RENAME", on=MARIADB),
    sends("GRANT SELECT ON *.* TO nobody", on=MARIADB),
    sends("SET autocommit = 1", "SET autocommit", on=MARIADB),
    sends("SET @a = 1, @@session.autocommit = 1", "SET autocommit", on=MARIADB),
    sends("SET STATEMENT max_statement_time = 1 FOR COMMIT", "COMMIT", on=MARIADB),
    sends("/*! COMMIT */", "COMMIT", on=MARIADB),
    sends("SELECT '\\'; COMMIT; SELECT '1'", "COMMIT", on=("postgres", "sqlite")),
    sends("SELECT E'\\''; COMMIT; SELECT '1'", "COMMIT", on=("postgres",)),
]


def suppressed(call: Callable[[], object]) -> None:
    with suppress(Exception):
        call()


def between(misuse: Callable[[Session], object], *, swallow: bool) -> Do:
    """An effect, the misuse, another effect; swallowing what they raise, if so."""

    def plain(session: Session) -> None:
        put(session, "before")
        misuse(session)
        put(session, "after")

    def swallowing(session: Session) -> None:
        put(session, "before")
        suppressed(lambda: misuse(session))
        suppressed(lambda: put(session, "after"))

    return swallowing if swallow else plain


can_be_said = pytest.mark.where(lambda ground, misuse, **_: ground[0] in misuse.on)
swallowed = pytest.mark.parametrize("swallow", [False, True], ids=["raised", "swallowed"])


@swallowed
@pytest.mark.parametrize("misuse", REFUSED, ids=lambda misuse: misuse.name.strip())
@can_be_said
def test_leaving_the_transaction_is_refused_and_keeps_nothing(shop: Shop, misuse: Misuse, swallow: bool) -> None:
    shop.handles(between(misuse.do, swallow=swallow))
    assert shop.process(order()) is Outcome.FAILED
    failure = shop.failure()
    assert (failure.state, failure.attempts) == ("retrying", 1)
    assert failure.error_class in ("Misuse", "ResourceClosedError")  # SQLAlchemy's own word on a closed connection
    assert misuse.says in failure.error_text
    shop.assert_kept(claims=[])


@pytest.mark.parametrize("misuse", REFUSED[:12], ids=lambda misuse: misuse.name)
def test_leaving_it_as_the_last_thing_is_refused_too(shop: Shop, misuse: Misuse) -> None:
    def do(session: Session) -> None:
        put(session, "before")
        suppressed(lambda: misuse.do(session))

    shop.handles(do)
    assert shop.process(order()) is Outcome.FAILED
    assert misuse.says in shop.failure().error_text
    shop.assert_kept(claims=[])


def test_after_a_refusal_the_message_runs_once_when_the_line_is_gone(shop: Shop) -> None:
    wrong = [True]

    def do(session: Session) -> None:
        put(session, "effect")
        if wrong:
            session.commit()

    shop.handles(do)
    assert shop.process(order()) is Outcome.FAILED
    wrong.clear()
    assert shop.process(order(attempt=2)) is Outcome.PROCESSED
    assert shop.process(order(attempt=3)) is Outcome.DUPLICATE
    assert shop.failure().state == "resolved"
    shop.assert_kept("effect", claims=["A-1"])


def test_the_text_says_which_line_to_delete(shop: Shop) -> None:
    shop.handles(lambda session: session.commit())
    shop.process(order())
    text = shop.failure().error_text
    assert "Delete that line: the transaction is committed for you" in text
    assert re.search(r"\(at watched/test_misuse\.py:\d+ in <lambda>\)", text)


@on("postgres")  # elsewhere an error undoes its own statement, and no more
def test_a_swallowed_error_is_told_as_such_also_of_a_message_that_failed_before(shop: Shop) -> None:
    shop.handles(lambda session: suppressed(lambda: session.execute(text("SELECT no_such_column"))))
    for attempt in (1, 2):
        shop.process(order(attempt=attempt))
        assert shop.failure().attempts == attempt
        assert "swallowed a database error" in shop.failure().error_text


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_begin_is_told_as_a_mistake_of_the_handler_and_not_run_again(shop: Shop, way: Way) -> None:
    """Also where the transaction begins with the first statement, which comes behind it."""

    runs: list[str] = []

    def begins(session: Session, no: object) -> None:
        runs.append("run")
        with session.begin():
            put(session, "effect")

    way.handles(shop, begins)
    assert way.deliver(shop, [order()]) == [Outcome.DEAD]
    failure = shop.failure()
    assert (failure.error_class, failure.state, failure.attempts) == ("Misuse", "dead", 1)
    assert "Take the line with session.begin() away" in failure.error_text
    assert f"test_misuse.py:{begins.__code__.co_firstlineno + 2} in begins" in failure.error_text
    assert runs == ["run"], "it would end so each time"
    assert shop.effects() == []


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_code_that_begins_where_nothing_is_begun_nests_in_each_way(shop: Shop, way: Way) -> None:
    """As many repositories have it. Under a lease nothing was begun, and its end was told as commit()."""

    def inner(session: Session) -> Any:
        return session.begin_nested() if session.in_transaction() else session.begin()

    def do(session: Session, no: object) -> None:
        with inner(session):
            put(session, f"{no} a")
        with suppress(KeyError), inner(session):
            put(session, "undone")
            raise KeyError
        with inner(session):
            put(session, f"{no} b")

    way.handles(shop, do)
    assert way.deliver(shop, [order(1), order(2)]) == [Outcome.PROCESSED] * 2
    assert sorted(shop.effects()) == ["1 a", "1 b", "2 a", "2 b"]


# -- async sessions have the same verbs, awaited -----------------------------------------------------------------------


async def _async_with(session: AsyncSession) -> None:
    async with session:
        pass


def _rolls_back(session: Session) -> None:
    session.rollback()


def _closes(session: Session) -> None:
    session.close()


def _in_a_block(session: Session) -> None:
    with session:
        pass


def _rolls_its_connection_back(session: Session) -> None:
    session.connection().rollback()


@swallowed
@pytest.mark.parametrize("leaves", [_rolls_back, _closes, _in_a_block, _rolls_its_connection_back])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_line_that_left_the_transaction_is_named(
    shop: Shop, way: Way, leaves: Callable[[Session], None], swallow: bool
) -> None:
    """One word of four is the handler's, and which line it is on the text does not tell."""
    way.handles(shop, lambda session, no: between(leaves, swallow=swallow)(session))
    assert way.deliver(shop, [order(1)]) == [Outcome.FAILED]
    told = shop.failure().error_text
    assert LEFT in told
    assert told.endswith(f" (at watched/test_misuse.py:{leaves.__code__.co_firstlineno + 1} in {leaves.__name__})")


@swallowed
@on(colour="async")
def test_the_line_that_left_an_async_session_is_named(shop: Shop, swallow: bool) -> None:
    @shop.eo.handler("orders", key="no", retry=ONE_TRY)
    async def reserve(session: AsyncSession) -> None:
        await session.execute(insert(EFFECT).values(text="before"))
        await session.rollback()
        try:
            await session.execute(insert(EFFECT).values(text="after"))
        except Exception:
            if not swallow:
                raise

    assert shop.process(order()) is Outcome.FAILED
    line = reserve.__code__.co_firstlineno + 3
    assert shop.failure().error_text.endswith(f" (at watched/test_misuse.py:{line} in reserve)")


async def _connection_commit(session: AsyncSession) -> None:
    await (await session.connection()).commit()


@swallowed
@pytest.mark.parametrize(
    ("leave", "says"),
    [
        pytest.param(lambda s: s.commit(), COMMIT, id="commit"),
        pytest.param(_connection_commit, COMMIT, id="connection.commit"),
        pytest.param(lambda s: s.rollback(), LEFT, id="rollback"),
        pytest.param(lambda s: s.close(), LEFT, id="close"),
        pytest.param(lambda s: s.reset(), LEFT, id="reset"),
        pytest.param(lambda s: s.invalidate(), "The handler", id="invalidate"),
        pytest.param(_async_with, LEFT, id="async with session"),
        pytest.param(lambda s: s.execute(text("COMMIT")), "sent COMMIT", id="COMMIT"),
    ],
)
@on(colour="async")
def test_leaving_an_async_session_is_refused(shop: Shop, leave: Any, says: str, swallow: bool) -> None:

    @shop.eo.handler("orders", key="no", retry=ONE_TRY)
    async def reserve(session: AsyncSession) -> None:
        await session.execute(insert(EFFECT).values(text="before"))
        try:
            await leave(session)
            await session.execute(insert(EFFECT).values(text="after"))
        except Exception:
            if not swallow:
                raise

    assert shop.process(order()) is Outcome.FAILED
    assert says in shop.failure().error_text
    shop.assert_kept(claims=[])


# -- what can only be noticed afterwards -------------------------------------------------------------------------------


def _driver(session: Session) -> Any:
    return session.connection().connection.dbapi_connection


def _cursor(session: Session, statement: str) -> None:
    cursor = _driver(session).cursor()
    cursor.execute(statement)
    cursor.close()


BEHIND = [
    Misuse("driver.commit", lambda s: _driver(s).commit()),
    Misuse("pool's connection.commit", lambda s: s.connection().connection.commit()),
    Misuse("driver's cursor COMMIT", lambda s: _cursor(s, "COMMIT")),
    Misuse("CALL a procedure that commits", lambda s: s.execute(text("CALL commits()")), on=MARIADB),
    Misuse("EXECUTE IMMEDIATE", lambda s: s.execute(text("EXECUTE IMMEDIATE 'COMMIT'")), on=() if MYSQLD else MARIADB),
    Misuse("CALL that answers", lambda s: s.execute(text("CALL commits_and_selects()")).all(), on=MARIADB),
]


@swallowed
@pytest.mark.parametrize("misuse", BEHIND, ids=lambda misuse: misuse.name)
@can_be_said
def test_a_commit_that_got_through_is_parked_for_a_person(shop: Shop, misuse: Misuse, swallow: bool) -> None:
    if shop.dialect == "mariadb":
        mariadb_procedures(shop, commits="() BEGIN COMMIT; END", commits_and_selects="() BEGIN COMMIT; SELECT 1; END")
    shop.handles(between(misuse.do, swallow=swallow))
    assert shop.process(order()) is Outcome.DEAD
    failure = shop.failure()
    assert (failure.state, failure.error_class) == ("broken", "Misuse")
    assert "behind SQLAlchemy's back" in failure.error_text
    shop.assert_kept("before", claims=["A-1"])


@on("mariadb")  # no statement of PostgreSQL's or SQLite's does it unnoticed
def test_the_statement_that_committed_is_named(shop: Shop) -> None:
    if MYSQLD:
        pytest.skip("MySQL has no EXECUTE IMMEDIATE")
    (misuse,) = (each for each in BEHIND if each.name == "EXECUTE IMMEDIATE")
    shop.handles(misuse.do)
    assert shop.process(order()) is Outcome.DEAD
    assert "The last statement through SQLAlchemy: EXECUTE IMMEDIATE 'COMMIT'" in shop.failure().error_text


def test_a_copy_of_a_broken_message_does_not_close_its_row(shop: Shop) -> None:
    shop.handles(between(lambda s: _driver(s).commit(), swallow=False))
    assert shop.process(order()) is Outcome.DEAD
    assert shop.process(order(attempt=2)) is Outcome.DUPLICATE  # its acknowledgement was lost
    assert shop.failure().state == "broken"


@swallowed
@pytest.mark.parametrize(
    "leave",
    [
        pytest.param(lambda s: _driver(s).rollback(), id="driver.rollback"),
        pytest.param(lambda s: s.connection().connection.rollback(), id="pool's connection.rollback"),
        pytest.param(lambda s: _cursor(s, "ROLLBACK"), id="driver's cursor ROLLBACK"),
    ],
)
def test_a_rollback_behind_our_back_never_keeps_effects_without_their_claim(
    shop: Shop, leave: Callable[[Session], object], swallow: bool
) -> None:
    shop.handles(between(leave, swallow=swallow))
    assert shop.process(order()) is not Outcome.PROCESSED
    assert shop.failure().state == "broken"
    # nobody saw what was committed since: the claim is written with the failure, and keeps copies away
    shop.assert_kept(claims=["A-1"])


@on("mariadb")  # its SET autocommit commits by itself
def test_a_connection_left_in_autocommit_is_not_used_again(shop: Shop) -> None:
    if MYSQLD:
        pytest.skip("MySQL has no EXECUTE IMMEDIATE")
    runs: list[str] = []

    def do(session: Session) -> None:
        put(session, "before")
        runs.append("run")
        if len(runs) == 1:
            session.execute(text("EXECUTE IMMEDIATE 'SET autocommit = 1'"))  # refused where it can be read

    shop.handles(do)
    assert shop.process(order("A-1")) is Outcome.DEAD
    assert shop.process(order("A-2")) is Outcome.PROCESSED
    shop.assert_kept("before", "before", claims=["A-1", "A-2"])


# -- errors of the database, swallowed ---------------------------------------------------------------------------------


def _violate(session: Session) -> None:
    session.execute(insert(ONLY).values(text="one"))
    session.execute(insert(ONLY).values(text="one"))


def test_a_swallowed_error_that_aborted_the_transaction_is_a_failure(shop: Shop) -> None:
    def do(session: Session) -> None:
        put(session, "before")
        suppressed(lambda: _violate(session))

    shop.handles(do)
    if shop.dialect == "postgres":
        # COMMIT would be answered with ROLLBACK, without an error, and the message acknowledged with nothing kept
        assert shop.process(order()) is Outcome.FAILED
        assert "swallowed a database error" in shop.failure().error_text
        shop.assert_kept(claims=[])
    else:
        assert shop.process(order()) is Outcome.PROCESSED  # there the statement alone was undone
        shop.assert_kept("before", claims=["A-1"])


def test_a_swallowed_error_inside_a_savepoint_is_fine(shop: Shop) -> None:
    def do(session: Session) -> None:
        put(session, "before")
        with suppress(DBAPIError), session.begin_nested():
            put(session, "undone")
            _violate(session)
        with session.begin_nested():
            put(session, "kept")
        nested = session.begin_nested()
        put(session, "undone too")
        nested.rollback()
        session.begin_nested()  # and never ended
        put(session, "after")

    shop.handles(do)
    assert shop.process(order()) is Outcome.PROCESSED
    assert shop.rows(ONLY) == []
    shop.assert_kept("before", "kept", "after", claims=["A-1"])


def test_a_swallowed_flush_error_is_a_failure(shop: Shop) -> None:
    from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

    class Base(DeclarativeBase):
        pass

    class Only(Base):
        __tablename__ = "only_one"
        text: Mapped[str] = mapped_column(primary_key=True)

    def do(session: Session) -> None:
        put(session, "before")
        session.execute(insert(ONLY).values(text="one"))
        session.add(Only(text="one"))
        suppressed(session.flush)

    shop.handles(do)
    assert shop.process(order()) is Outcome.FAILED
    shop.assert_kept(claims=[])


@swallowed
@on("postgres", "mariadb")  # SQLite has one writer
def test_a_deadlocks_victim_never_keeps_effects_without_their_claim(shop: Shop, swallow: bool) -> None:
    """InnoDB throws the victim's whole transaction away, claim included, and the next statement begins another one."""
    with shop.outside.begin() as connection:
        connection.execute(insert(STOCK), [{"item": item, "amount": 9} for item in (1, 2)])
    handler_has_one, other_has_two = Turn(), Turn()
    runs: list[str] = []

    def take(session: Any, item: int) -> None:
        session.execute(update(STOCK).where(STOCK.c.item == item).values(amount=STOCK.c.amount - 1))

    def other() -> None:
        with shop.outside.begin() as connection:
            if shop.dialect == "postgres":
                connection.execute(text("SET LOCAL deadlock_timeout = '60s'"))  # the handler is to notice it, and die
            for item in range(100, 400):  # the heavier of two is not the victim
                connection.execute(insert(STOCK).values(item=item, amount=0))
            take(connection, 2)
            other_has_two.come()
            handler_has_one.wait()
            take(connection, 1)

    def do(session: Session) -> None:
        runs.append("run")
        put(session, "before")
        if len(runs) == 1:
            other_has_two.wait()
            take(session, 1)
            handler_has_one.come()
            try:
                take(session, 2)
            except DBAPIError:
                if not swallow:
                    raise
        suppressed(lambda: put(session, "after"))

    shop.handles(do)
    with in_thread(other):
        outcome = shop.process(order())
    if shop.dialect == "postgres" and swallow:
        assert (outcome, runs) == (Outcome.FAILED, ["run"])  # the transaction is aborted, and says so
        shop.assert_kept(claims=[])
        return
    # run again at once, in a fresh transaction, within the same delivery; it is no failure of the handler's
    assert (outcome, runs) == (Outcome.PROCESSED, ["run", "run"])
    assert shop.failures() == []
    shop.assert_kept("before", "after", claims=["A-1"])


@swallowed
@on("sqlite")
def test_sqlites_on_conflict_rollback_keeps_nothing(shop: Shop, swallow: bool) -> None:

    def violate(session: Session) -> None:
        session.execute(text("INSERT INTO only_one VALUES ('one')"))
        session.execute(text("INSERT OR ROLLBACK INTO only_one VALUES ('one')"))

    def do(session: Session) -> None:
        between(violate, swallow=swallow)(session)
        if swallow:
            suppressed(lambda: session.execute(select(STOCK)).all())

    shop.handles(do)
    assert shop.process(order()) is Outcome.FAILED
    assert shop.failure().state == "retrying"  # nothing was committed: a retry is right
    shop.assert_kept(claims=[])


@on("sqlite")
def test_a_rollback_of_sqlites_that_was_swallowed_last_is_no_commit(shop: Shop) -> None:

    def do(session: Session) -> None:
        put(session, "effect")
        session.execute(text("INSERT INTO only_one VALUES ('one')"))
        suppressed(lambda: session.execute(text("INSERT OR ROLLBACK INTO only_one VALUES ('one')")))

    shop.handles(do)
    for attempt in (1, 2):  # the second writes to the failure row in the same transaction
        assert shop.process(order(attempt=attempt)) is Outcome.FAILED
        assert shop.failure().state == "retrying"
    shop.assert_kept(claims=[])


# -- DDL ---------------------------------------------------------------------------------------------------------------


def test_temporary_tables_are_fine(shop: Shop) -> None:
    def do(session: Session) -> None:
        session.execute(text("CREATE TEMPORARY TABLE scratch (id int)"))
        session.execute(text("INSERT INTO scratch VALUES (1)"))
        put(session, "effect")
        session.execute(text("DROP TEMPORARY TABLE scratch" if shop.dialect == "mariadb" else "DROP TABLE scratch"))

    shop.handles(do)
    assert shop.process(order()) is Outcome.PROCESSED
    shop.assert_kept("effect", claims=["A-1"])


@on("postgres", "sqlite")  # elsewhere DDL commits by itself, and is refused
def test_ddl_is_part_of_the_transaction_where_the_server_makes_it_so(shop: Shop) -> None:

    def do(session: Session) -> None:
        put(session, "effect")
        session.execute(text("CREATE TABLE more (id int)"))
        raise ValueError

    shop.handles(do)
    assert shop.process(order()) is Outcome.FAILED
    with shop.outside.connect() as connection:
        assert not connection.dialect.has_table(connection, "more")
    shop.assert_kept(claims=[])


# -- a second connection -----------------------------------------------------------------------------------------------


@swallowed
def test_a_session_that_routes_to_a_second_connection_fails(shop: Shop, swallow: bool) -> None:
    second: Engine = create_engine(shop.url, pool_size=1, max_overflow=0)
    async_second = create_async_engine(shop.async_engine.url, pool_size=1, max_overflow=0)

    class Routing(Session):
        def get_bind(self, mapper: Any = None, *, clause: Any = None, **more: Any) -> Any:
            if getattr(clause, "table", None) is ONLY:
                return async_second.sync_engine if shop.is_async else second
            return shop.async_engine.sync_engine if shop.is_async else shop.engine

    shop.fresh_eo(
        sessionmaker(shop.engine, class_=Routing),
        async_sessionmaker(shop.async_engine, sync_session_class=Routing),
    )
    shop.handles(between(lambda session: session.execute(insert(ONLY).values(text="other")), swallow=swallow))
    assert shop.process(order()) is Outcome.FAILED
    assert "second connection" in shop.failure().error_text
    assert shop.rows(ONLY) == []
    assert second.pool.checkedout() == async_second.pool.checkedout() == 0  # type: ignore[attr-defined]
    shop.await_(async_second.dispose())
    second.dispose()
    shop.assert_kept(claims=[])


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_session_whose_engine_is_another_than_the_stores_fails_and_writes_nothing_there(shop: Shop, way: Way) -> None:
    """An engine for each tenant: the claim went to the tenant's database, and the failure row to the other one."""
    tenants: Engine = create_engine(shop.url, pool_size=1, max_overflow=0)
    async_tenants = create_async_engine(shop.async_engine.url, pool_size=1, max_overflow=0)
    sent: list[str] = []
    chosen = [True]
    for engine in (tenants, async_tenants.sync_engine):
        event.listen(engine, "before_cursor_execute", lambda *args: sent.append(args[2]))

    class OfATenant(Session):
        def get_bind(self, mapper: Any = None, **more: Any) -> Any:
            if chosen:
                return async_tenants.sync_engine if shop.is_async else tenants
            return shop.async_engine.sync_engine if shop.is_async else shop.engine

    shop.fresh_eo(
        sessionmaker(shop.engine, class_=OfATenant),
        async_sessionmaker(shop.async_engine, sync_session_class=OfATenant),
    )
    way.handles(shop, lambda session, no: put(session, str(no)))
    assert way.deliver(shop, [order(1)]) == [Outcome.FAILED]
    assert way.deliver(shop, [order(1, attempt=2)]) == [Outcome.FAILED]
    assert "get_bind() chose" in shop.failure().error_text
    assert shop.failure().attempts == 2
    if not shop.is_async:  # a worker claims with sessions of threads, before it begins
        with pytest.raises(ConfigurationError, match="get_bind"):
            claims_twice(shop.eo.stores["default"].dialect, shop.eo.stores["default"].open, GROUP)
    assert (sent, shop.effects()) == ([], [])
    chosen.clear()
    assert way.deliver(shop, [order(1, attempt=3)]) == [Outcome.PROCESSED]
    assert tenants.pool.checkedout() == async_tenants.pool.checkedout() == 0  # type: ignore[attr-defined]
    shop.await_(async_tenants.dispose())
    tenants.dispose()
    assert shop.effects() == ["1"]


def test_a_program_that_watches_nobody_may_commit_on_the_same_engine(shop: Shop) -> None:
    shop.handles(lambda session: put(session, "effect"))
    assert shop.process(order()) is Outcome.PROCESSED
    with Session(shop.engine) as session:
        put(session, "own")
        session.commit()
        session.execute(text("SELECT 1"))
        session.rollback()
    shop.assert_kept("effect", "own", claims=["A-1"])


# -- a transaction that may only be read from --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "made", ["SET TRANSACTION READ ONLY", "SELECT set_config('transaction_read_only', 'on', true)"]
)
@pytest.mark.parametrize("way", WAYS, ids=str)
@on("postgres")  # the others refuse it in a transaction, or have no such thing
def test_a_handler_that_makes_its_transaction_read_only_is_told_so(shop: Shop, way: Way, made: str) -> None:
    """What is written with its COMMIT is refused then: that an earlier failure is settled, or a lease."""
    fails, reads_only = [True], [True]

    def do(session: Session, no: object) -> None:
        put(session, f"{no}")
        if reads_only:
            session.execute(text(made))
        if fails:
            raise ZeroDivisionError

    way.handles(shop, do)
    assert way.attempted(shop, [order(3)]) == [Outcome.FAILED]
    fails.clear()
    (end,) = way.attempted(shop, [order(3, attempt=2)])
    assert end is Outcome.FAILED
    assert shop.failure().error_class == "Misuse"
    assert "made its transaction read only" in shop.failure().error_text
    reads_only.clear()
    assert way.attempted(shop, [order(3, attempt=3)]) == [Outcome.PROCESSED]
    shop.assert_kept("3", claims=["3"])


@pytest.mark.parametrize("then", ["returns", "goes on"])
@on("postgres", "mariadb", colour="async")  # a thread is not cancelled, and SQLite has no statement that sleeps
def test_a_statement_given_up_on_a_time_limit_is_told_as_what_it_is(shop: Shop, then: str) -> None:
    """asyncio.timeout around a statement closes its connection: a handler that catches the error has lost all before it."""

    @shop.eo.handler("orders", name="handler", key="no", retry=Retry(immediate=0, max_attempts=1))
    async def handler(session: AsyncSession) -> None:
        await session.run_sync(put, "before")
        with suppress(TimeoutError):
            async with asyncio.timeout(0.1):
                await session.execute(text("SELECT pg_sleep(5)" if shop.dialect == "postgres" else "SELECT SLEEP(5)"))
        if then == "goes on":
            await session.run_sync(put, "after")

    assert shop.process(order()) is Outcome.DEAD
    failure = shop.failure()
    assert failure.error_class == "Misuse"
    assert "given up before its answer came (asyncio.timeout" in failure.error_text
    assert shop.effects() == []
    shop.assert_kept(claims=[])
