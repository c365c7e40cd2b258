"""A program's hooks that prepare its connections and sessions hold wherever our rows are written, and nothing passes them by.

The kind: a role that has the rights is taken when a transaction begins, a tenant is named in the session, a connection is tidied
when it comes back to the pool.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from exactly_once import ExactlyOnce, Outcome, Retry
from exactly_once.testing.databases import DatabaseServer
from tests.integration.shop import COLOURS, GROUP, Shop, order, put, shops
from tests.integration.ways import ALONE, IN_A_STEP, UNDER_A_LEASE, WAYS, Way

pytestmark = pytest.mark.nightly(meet=2)

THREE = Retry(immediate=0, delays=[0.01], max_attempts=3)
RIGHTS, LOGIN = "exactly_once_test_rights", "exactly_once_test_login"


@contextmanager
def login_without_rights(admin: Engine) -> Iterator[None]:
    """A login that owns nothing, and may take a role that has the rights."""
    with admin.connect() as connection:
        for name, more in ((RIGHTS, "NOLOGIN"), (LOGIN, "LOGIN NOINHERIT PASSWORD 'x'")):
            connection.execute(text(f"CREATE ROLE {name} {more}"))
        connection.execute(text(f"GRANT {RIGHTS} TO {LOGIN}"))
        for what in ("TABLES", "SEQUENCES"):
            connection.execute(text(f"GRANT ALL ON ALL {what} IN SCHEMA public TO {RIGHTS}"))
    try:
        yield
    finally:
        with admin.connect() as connection:
            for name in (RIGHTS, LOGIN):
                connection.execute(text(f"DROP OWNED BY {name}"))
                connection.execute(text(f"DROP ROLE {name}"))


def test_a_role_that_a_hook_takes_is_there_where_a_failure_is_written(eo_server: DatabaseServer) -> None:
    url = eo_server.create()
    admin = create_engine(url, isolation_level="AUTOCOMMIT")
    engine = create_engine(make_url(url).set(username=LOGIN, password="x"))
    made = sessionmaker(engine)

    @event.listens_for(made, "after_begin")
    def with_rights(session: Session, transaction: object, connection: Any) -> None:
        connection.exec_driver_sql(f"SET LOCAL ROLE {RIGHTS}")

    eo = ExactlyOnce(made, group=GROUP, schema="public")

    @eo.handler("orders", key="no", name="handler", retry=THREE)
    def fails(session: Session) -> None:
        raise ValueError("no")

    with login_without_rights(admin):
        try:
            ends = [eo.process(order(attempt=attempt)) for attempt in (1, 2, 3)]
            assert ends == [Outcome.FAILED, Outcome.FAILED, Outcome.DEAD]
        finally:
            engine.dispose()
    admin.dispose()
    eo_server.drop(url)


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("way", [ALONE, UNDER_A_LEASE, IN_A_STEP], ids=str)
@pytest.mark.parametrize("of", ["engine", "session"])
def test_what_a_hook_names_is_named_on_the_connection_that_the_handler_gets(
    request: pytest.FixtureRequest, way: Way, colour: str, of: str
) -> None:
    """Other code left a limit in the pool with which no transaction of ours can begin."""
    for shop in shops(request, "mariadb", colour):
        target: Any = Session
        if of == "engine":
            target = shop.async_engine.sync_engine if shop.is_async else shop.engine
        name = "begin" if of == "engine" else "after_begin"

        def names(*given: Any) -> None:
            given[-1].exec_driver_sql("SET @tenant = 'seven'")

        def do(session: Session, no: Any) -> None:
            session.execute(text("INSERT INTO effect (text) SELECT COALESCE(@tenant, 'nobody')"))

        way.handles(shop, do, retry=Retry(immediate=0, max_attempts=9))
        event.listen(target, name, names)
        try:
            assert way.deliver(shop, [order(0)]) == [Outcome.PROCESSED]
            for no in (1, 2, 3):
                left(shop, "SET SESSION max_statement_time = 0.00001")
                way.attempted(shop, [order(no)])
        finally:
            event.remove(target, name, names)
        assert set(shop.effects()) == {"seven"}


def left(shop: Shop, statement: str) -> None:
    """Other code of the program changes the session and gives it back."""
    if shop.is_async:
        shop.await_(aleft(shop, statement))
        return
    raw = shop.engine.raw_connection()
    raw.cursor().execute(statement)
    raw.close()


async def aleft(shop: Shop, statement: str) -> None:
    async with shop.async_engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        await connection.exec_driver_sql(statement)


CHANGES = {
    "postgres": (
        "SET search_path TO public",
        "SAVEPOINT a;SET LOCAL statement_timeout = 5;!SELECT pg_sleep(0.05);ROLLBACK TO a",
    ),
    "mariadb": ("SET @user = 7", "!SET STATEMENT max_statement_time = 0.01 FOR SELECT SLEEP(0.05) FROM effect"),
}


@pytest.mark.parametrize(
    ("dialect", "statements"), [(dialect, each) for dialect, some in CHANGES.items() for each in some]
)
@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("way", [ALONE, UNDER_A_LEASE, IN_A_STEP], ids=str)
def test_a_hook_that_tidies_what_comes_back_finds_a_connection(
    request: pytest.FixtureRequest, way: Way, colour: str, dialect: str, statements: str
) -> None:
    """SQLAlchemy gives it none where a connection was closed at once; what the hook raised then kept a place of the pool."""
    for shop in shops(request, dialect, colour, pool_size=2, options={"pool_timeout": 1}):
        engine = shop.async_engine.sync_engine if shop.is_async else shop.engine
        with shop.outside.begin() as connection:
            connection.execute(text("INSERT INTO effect (text) VALUES ('0')"))

        @event.listens_for(engine, "checkin")
        def tidies(dbapi: Any, record: object) -> None:
            dbapi.cursor().close()

        def do(session: Session, no: Any) -> None:
            for statement in statements.split(";"):
                try:
                    session.execute(text(statement.removeprefix("!")))
                except DBAPIError:
                    assert statement.startswith("!")
            put(session, str(no))

        way.handles(shop, do)
        assert [way.deliver(shop, [order(no)]) for no in range(4)] == [[Outcome.PROCESSED]] * 4
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("dialect", ["postgres", "mariadb"])
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("on", ["after_begin", "after_rollback", "after_soft_rollback", "after_transaction_end"])
@pytest.mark.parametrize("connections", [2, 4])
def test_a_hook_that_writes_in_a_session_of_its_own_lets_our_look_for_a_connection_end(
    request: pytest.FixtureRequest, way: Way, dialect: str, colour: str, on: str, connections: int
) -> None:
    """An audit's: it has each new connection of the pool before us, and no connection was ever the one looked for."""
    made: list[int] = []
    for shop in shops(request, dialect, colour, pool_size=connections, options={"pool_timeout": 5}):

        class Mine(Session):
            pass

        engine: Any = shop.async_engine.sync_engine if shop.is_async else shop.engine
        shop.fresh_eo(
            sessionmaker(shop.engine, class_=Mine), async_sessionmaker(shop.async_engine, sync_session_class=Mine)
        )

        @event.listens_for(engine, "connect")
        def counts(dbapi: Any, record: object) -> None:
            made.append(1)
            assert len(made) < 60, "made one connection after the other"

        @event.listens_for(Mine, on)
        def audits(session: Session, *given: object) -> None:
            with Session(engine) as own:  # noqa: B023
                put(own, "audit")
                own.commit()

        shop.borrow()  # other code of the program had the pool before the first claim
        way.handles(shop, lambda session, no: put(session, str(no)), retry=THREE)
        assert way.deliver(shop, [order(1), order(2)]) == [Outcome.PROCESSED] * 2
        assert way.deliver(shop, [order(1, attempt=2), order(2, attempt=2)]) == [Outcome.DUPLICATE] * 2
        assert [effect for effect in sorted(shop.effects()) if effect in "12"] == ["1", "2"]
        assert shop.failures() == []
