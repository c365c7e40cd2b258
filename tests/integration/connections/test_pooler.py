"""Behind a pooler of transactions nothing belongs to a session: no name of a statement, no setting, no lock.

The pooler is PgBouncer, with fewer connections to the server than the program has to it, so that each of them is lent to
many. A stranger's program shares them: it finds what we leave behind.
"""

import asyncio
import json
import os
import random
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from time import monotonic
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, Engine, NullPool, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from exactly_once import ExactlyOnce, Lease, Message, Outcome, Retry, Steps, alembic
from exactly_once.alembic.lock import schema_lock
from exactly_once.claim import ClaimRow
from exactly_once.cli.command import main
from exactly_once.database.connections.pooler import LINK
from exactly_once.database.store import Store
from exactly_once.doctor.looking import Finding, Mark, examine
from exactly_once.errors import ConfigurationError
from exactly_once.failures.failure import Failure
from exactly_once.failures.policy import Decision, Park
from exactly_once.failures.store import FailureStore
from exactly_once.guards.lease.stores import sql_leases
from exactly_once.testing.databases import DatabaseServer
from exactly_once.transports.sql.database import Database as QueueDatabase
from tests.integration.shop import COLOURS
from tests.services.need import require
from tests.services.pgbouncer import PgBouncer

KINDS = 4  # alone, one that fails now and then, under a lease, in groups
KEYS = 320  # of each kind; every fourth comes twice
SERVER_CONNECTIONS = 4
# seen by a stranger: what a session says otherwise than the server's configuration, and statements kept by name
LEFT = """
    SELECT name || '=' || setting FROM pg_settings WHERE source = 'session'
    UNION ALL SELECT 'statement ' || name FROM pg_prepared_statements
    UNION ALL SELECT 'lock ' || objid FROM pg_locks WHERE locktype = 'advisory'
"""


@pytest.fixture
def behind(eo_server: DatabaseServer) -> Iterator[PgBouncer]:
    """A pooler before a fresh database with our tables and a ledger for each kind of message."""
    from tests.services import pgbouncer

    require(pgbouncer)
    url = eo_server.create()
    direct = create_engine(url, poolclass=NullPool)
    with direct.begin() as connection:
        for kind in range(KINDS):
            connection.execute(text(f"CREATE TABLE ledger_{kind} (no integer NOT NULL, kind integer NOT NULL)"))
    with PgBouncer(url.render_as_string(hide_password=False), server_connections=SERVER_CONNECTIONS) as pooler:
        pooler.direct = direct  # type: ignore[attr-defined]
        yield pooler
    eo_server.drop(url)


def url_of(pooler: PgBouncer) -> str:
    return pooler.url


def sync_engine_of(pooler: PgBouncer) -> Engine:
    return create_engine(pooler.url, pool_size=12)


def async_engine_of(pooler: PgBouncer) -> AsyncEngine:
    return create_async_engine(pooler.url, pool_size=12)


def used_engine_of(pooler: PgBouncer) -> Engine:
    """One whose connections were made before we are given it."""
    engine = create_engine(pooler.url, pool_size=12)
    with ExitStack() as stack:
        for _ in range(SERVER_CONNECTIONS):
            stack.enter_context(engine.connect()).execute(text("SELECT 1"))
    return engine


def ours(database: Any, colour: str, **more: Any) -> ExactlyOnce:
    """A program with a handler of each kind, whose statements differ in the table alone."""
    eo = ExactlyOnce(database, group="pooled", **more)

    def effect(session: Session, kind: int, no: int) -> None:
        session.execute(text(f"INSERT INTO ledger_{kind} (no, kind) VALUES (:no, :kind)"), {"no": no, "kind": kind})
        found = session.execute(text(f"SELECT kind FROM ledger_{kind} WHERE no = :no"), {"no": no}).scalars().all()
        assert found == [kind]
        if kind == 1 and no % 10 == 0:
            raise ValueError("every tenth of this kind is bad")

    special: dict[int, dict[str, Any]] = {2: {"guard": Lease(timedelta(seconds=30))}, 3: {"batch": 20}}
    for kind in range(KINDS):
        options: dict[str, Any] = {
            "key": "no",
            "name": f"kind-{kind}",
            "retry": Retry(immediate=0, max_attempts=1),
        } | special.get(kind, {})
        if colour == "async":

            @eo.handler(f"kind-{kind}", **options)
            async def awaited(session: AsyncSession, order: dict[str, Any]) -> None:
                await session.run_sync(effect, order["kind"], order["no"])
        else:

            @eo.handler(f"kind-{kind}", **options)
            def plain(session: Session, order: dict[str, Any]) -> None:
                effect(session, order["kind"], order["no"])

    return eo


def messages() -> list[Message]:
    """1,600 of all kinds, mixed: 320 keys of each kind, and 80 of them once more."""
    bodies = [(kind, no % KEYS) for kind in range(KINDS) for no in range(KEYS + KEYS // 4)]
    random.Random(7).shuffle(bodies)
    return [Message(f"kind-{kind}", json.dumps({"kind": kind, "no": no}).encode()) for kind, no in bodies]


def processed(eo: ExactlyOnce, colour: str, given: Sequence[Message]) -> Counter[Outcome]:
    """Eight at a time through door 2."""
    if colour == "sync":
        with ThreadPoolExecutor(8) as pool:
            return Counter(pool.map(eo.process, given))

    async def all_() -> Counter[Outcome]:
        turn = asyncio.Semaphore(8)

        async def one(message: Message) -> Outcome:
            async with turn:
                return await eo.aprocess(message)

        found = Counter(await asyncio.gather(*map(one, given)))
        await next(iter(eo.stores.values())).async_engine.dispose()
        return found

    return asyncio.run(all_())


def assert_right(pooler: PgBouncer) -> None:
    """Each key's effect is in its own ledger once; and a stranger finds nothing of ours on any server connection."""
    with pooler.direct.connect() as connection:  # type: ignore[attr-defined]
        for kind in range(KINDS):
            rows = connection.execute(text(f"SELECT no, kind FROM ledger_{kind} ORDER BY no")).all()
            wanted = [no for no in range(KEYS) if kind != 1 or no % 10]
            assert [tuple(row) for row in rows] == [(no, kind) for no in wanted]
        claims = connection.execute(text("SELECT count(*) FROM message_idempotent WHERE status = 1")).scalar_one()
        failures = connection.execute(text("SELECT handler, count(*) FROM message_failure GROUP BY handler")).all()
        assert claims == KINDS * KEYS - KEYS // 10
        assert [tuple(row) for row in failures] == [("kind-1", KEYS // 10)]
    assert left_behind(pooler) == []


def left_behind(pooler: PgBouncer, connections: int = SERVER_CONNECTIONS) -> list[str]:
    """What a stranger who is lent every connection of the pooler at once finds on them."""
    found: dict[int, list[str]] = {}
    with ExitStack() as stack:
        for _ in range(connections):
            stranger = stack.enter_context(psycopg.connect(pooler.url.replace("+psycopg", ""), prepare_threshold=None))
            row = stranger.execute("SELECT pg_backend_pid()").fetchone()
            assert row is not None
            found[row[0]] = [each for (each,) in stranger.execute(LEFT).fetchall()]
    assert len(found) == connections
    return [each for every in found.values() for each in every]


@pytest.mark.nightly(meet=1)
@pytest.mark.parametrize(
    ("given", "colour"),
    [
        (given, colour)
        for given in (url_of, sync_engine_of, async_engine_of, used_engine_of)
        for colour in COLOURS
        # the sync engine is derived from the async one, as from the URL
        if (given, colour) != (async_engine_of, "sync")
    ],
)
def test_of_1600_mixed_messages_each_takes_effect_in_its_own_table_and_nothing_is_left_behind(
    behind: PgBouncer, colour: str, given: Callable[[PgBouncer], Any]
) -> None:
    eo = ours(given(behind), colour)
    every = messages()
    outcomes = processed(eo, colour, every)
    assert set(outcomes) <= {Outcome.PROCESSED, Outcome.DUPLICATE, Outcome.IN_PROGRESS, Outcome.DEAD}, outcomes
    assert outcomes[Outcome.PROCESSED] == KINDS * KEYS - KEYS // 10, outcomes
    assert_right(behind)


@pytest.mark.parametrize("colour", COLOURS)
def test_a_queue_in_a_table_behind_a_pooler_hands_each_message_to_its_handler(behind: PgBouncer, colour: str) -> None:
    eo = ours(behind.url, colour)
    with eo.worker("sql://", concurrency=8) as worker:
        with eo.producer("sql://") as producer:
            every = messages()
            for start in range(0, len(every), 50):
                producer.send_all(every[start : start + 50])
        outcomes = worker.drain(timedelta(seconds=120))
    assert outcomes["processed"] == KINDS * KEYS - KEYS // 10, outcomes
    assert_right(behind)
    with behind.direct.connect() as connection:  # type: ignore[attr-defined]
        assert connection.execute(text("SELECT count(*) FROM message_queue")).scalar_one() == 0


# -- the schema's way in ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", ["postgresql+psycopg", "postgresql+psycopg_async"])
def test_the_tables_are_made_and_looked_at_through_a_pooler_whose_connections_have_a_strangers_statements(
    eo_server: DatabaseServer, driver: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.services import pgbouncer

    require(pgbouncer)
    behind = eo_server.create(upgraded=False)
    with PgBouncer(behind.render_as_string(hide_password=False), server_connections=2) as pooler:
        with ExitStack() as stack:
            for _ in range(2):
                stranger = stack.enter_context(
                    psycopg.connect(pooler.url.replace("+psycopg", ""), prepare_threshold=None)
                )
                for number in range(20):
                    stranger.execute(f"PREPARE _pg3_{number} AS SELECT {number}")
        url = pooler.url.replace("postgresql+psycopg", driver)
        for command in ("upgrade", "upgrade", "check"):
            with pytest.raises(SystemExit) as ended:
                main(["db", command, "--database", url])
            assert ended.value.code == 0, capsys.readouterr().err
        engine = create_engine(pooler.url)
        for _ in range(4):
            alembic.upgrade(engine)
            alembic.downgrade(engine, version=0)
        with engine.connect() as connection:
            for _ in range(8):
                alembic.upgrade(connection)
                connection.commit()
                assert alembic.check(connection) is None
        engine.dispose()
        assert "idle_in_transaction_session_timeout" not in "".join(left_behind(pooler, 2))
    eo_server.drop(behind)


# -- what is set, and for how long --------------------------------------------------------------------------------------------

ASKED = "SELECT current_setting('idle_in_transaction_session_timeout'), current_setting('synchronous_commit')"


def told_in_transactions(eo: ExactlyOnce, url: str) -> dict[str, tuple[str, str]]:
    """What holds in each kind of transaction that we begin: a handler's, one under a lease, a group's, the queue's, ours."""
    told: dict[str, tuple[str, str]] = {}

    def asked(session: Session | Connection, what: str) -> None:
        told[what] = tuple(session.execute(text(ASKED)).one())  # type: ignore[assignment]

    @eo.handler("alone", key="no", name="alone")
    def alone(session: Session, order: dict[str, Any]) -> None:
        asked(session, "alone")

    @eo.handler("leased", key="no", name="leased", guard=Lease(timedelta(seconds=30)))
    def leased(session: Session, order: dict[str, Any], steps: Steps) -> None:
        steps.run("step", lambda _: 1)
        asked(session, "leased")

    @eo.batch_handler("grouped", key="no", name="grouped")
    def grouped(session: Session, orders: list[dict[str, Any]]) -> None:
        asked(session, "grouped")

    @eo.handler("awaited", key="no", name="awaited")
    async def awaited(session: AsyncSession, order: dict[str, Any]) -> None:
        await session.run_sync(asked, "awaited")

    with eo.worker("sql://") as worker:
        with eo.producer("sql://") as producer:
            for topic in ("alone", "leased", "grouped", "awaited"):
                producer.send(Message(topic, b'{"no": 1}'))
        assert worker.drain()["processed"] == 4
        queue = QueueDatabase(lambda: eo.stores["default"].engine, None)
        with queue.engine.connect() as connection, queue.begun(connection):
            asked(connection, "queue")
        store = eo.stores["default"]
        session, _ = store.open()

        def decide(attempts: int) -> Decision:
            asked(session, "failure")
            return Park("dead", "for a person")

        FailureStore(lambda: store.tables).record(
            session, Failure("pooled", "alone", "A-1", b"", Message("alone", b""), ValueError()), decide
        )
        session.close()

        def look(connection: Connection, *_: Any) -> None:
            told["lease"] = connection.connection.driver_connection.execute(ASKED).fetchone()  # type: ignore[union-attr]

        event.listen(store.engine, "before_cursor_execute", look)
        assert not sql_leases(store).resolve(ClaimRow("pooled", "leased", "A-1", b""), "step", b"1")
        event.remove(store.engine, "before_cursor_execute", look)
    with schema_lock_on(url) as connection:
        asked(connection, "migration")
    return told


@contextmanager
def schema_lock_on(url: str) -> Iterator[Connection]:
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection, schema_lock(connection, None):
        yield connection


KINDS_OF_TRANSACTIONS = ("alone", "leased", "grouped", "awaited", "queue", "failure", "lease", "migration")


@pytest.mark.parametrize(("own", "held"), [("0", "10min"), ("20min", "10min"), ("5s", "5s")])
@pytest.mark.parametrize("pooled", [False, True])
def test_a_transaction_left_open_is_bounded_and_never_looser_than_the_server_says(
    behind: PgBouncer, pooled: bool, own: str, held: str
) -> None:
    configure(behind, f"idle_in_transaction_session_timeout = '{own}'")
    url = behind.url if pooled else direct_url(behind)
    told = told_in_transactions(ExactlyOnce(url, group="pooled"), url)
    assert {what: idle for what, (idle, _) in told.items()} == dict.fromkeys(KINDS_OF_TRANSACTIONS, held)
    assert left_behind(behind) == []


def test_a_strangers_settings_are_not_those_of_our_transactions(behind: PgBouncer) -> None:
    with ExitStack() as stack:
        for _ in range(SERVER_CONNECTIONS):
            stranger = stack.enter_context(psycopg.connect(behind.url.replace("+psycopg", ""), prepare_threshold=None))
            stranger.execute("SET synchronous_commit = off")
            stranger.execute("SET lock_timeout = '7s'")
            stranger.execute("SET idle_in_transaction_session_timeout = '3h'")
    eo = ExactlyOnce(behind.url, group="pooled")
    waits: list[str] = []

    @eo.handler("waits", key="no", name="waits")
    def asks(session: Session, order: dict[str, Any]) -> None:
        waits.append(session.execute(text("SHOW lock_timeout")).scalar_one())

    assert eo.process(Message("waits", b'{"no": 1}')) is Outcome.PROCESSED
    told = told_in_transactions(eo, behind.url)
    told.pop("migration")  # an hour more or less of a connection that is used once
    assert told == dict.fromkeys(KINDS_OF_TRANSACTIONS[:-1], ("10min", "on"))
    assert waits == ["0"]


def test_a_server_that_commits_without_waiting_is_made_to_wait_behind_a_pooler_too(behind: PgBouncer) -> None:
    configure(behind, "synchronous_commit = off")
    told = told_in_transactions(ExactlyOnce(behind.url, group="pooled"), behind.url)
    assert {what: durable for what, (_, durable) in told.items() if what != "migration"} == dict.fromkeys(
        KINDS_OF_TRANSACTIONS[:-1], "on"
    )


def test_an_engine_of_the_callers_keeps_its_own_bound(behind: PgBouncer) -> None:
    for group, url in (("pooled", behind.url), ("direct", direct_url(behind))):
        engine = create_engine(url)
        eo = ExactlyOnce(engine, group=group)
        seen: list[str] = []

        @eo.handler("alone", key="no", name="alone")
        def alone(session: Session, order: dict[str, Any], seen: list[str] = seen) -> None:
            seen.append(session.execute(text("SHOW idle_in_transaction_session_timeout")).scalar_one())

        assert eo.process(Message("alone", b'{"no": 1}')) is Outcome.PROCESSED
        assert seen == ["0"]
        engine.dispose()


def test_a_connection_of_the_queue_that_died_is_made_anew_behind_a_pooler(behind: PgBouncer) -> None:
    eo = ExactlyOnce(behind.url, group="pooled")
    queue = QueueDatabase(lambda: eo.stores["default"].engine, None)
    with eo.stores["default"].engine.connect() as connection:
        dbapi: Any = connection.connection.dbapi_connection
    shutdown(dbapi.pgconn.socket)
    with pytest.raises(DBAPIError) as error, queue.engine.connect() as connection, queue.begun(connection):
        pass
    assert error.value.connection_invalidated
    with queue.engine.connect() as connection, queue.begun(connection):
        assert connection.execute(text("SELECT 1")).scalar_one() == 1


# -- how it is known, and said ------------------------------------------------------------------------------------------------


def direct_url(pooler: PgBouncer) -> str:
    return pooler.direct.url.render_as_string(hide_password=False)  # type: ignore[attr-defined, no-any-return]


def configure(pooler: PgBouncer, setting: str) -> None:
    """Have the server say this in every session of this database, and the pooler make its connections anew."""
    name = pooler.direct.url.database  # type: ignore[attr-defined]
    with pooler.direct.connect() as connection:  # type: ignore[attr-defined]
        connection.execute(text(f'ALTER DATABASE "{name}" SET {setting}'))
        connection.commit()
        connection.execute(
            text(
                "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        )
    # until the pooler has seen them end, it may lend one of them
    until = monotonic() + 30
    while True:
        try:
            return used_engine_of(pooler).dispose()
        except DBAPIError:
            assert monotonic() < until


def shutdown(descriptor: int) -> None:
    """End a connection below the driver, as a network does."""
    with socket.socket(fileno=os.dup(descriptor)) as end:
        end.shutdown(socket.SHUT_RDWR)


def names_on(engine: Any) -> int:
    """How many statements psycopg and we keep by name on one connection, after a statement was run often."""
    with engine.connect() as connection:
        for _ in range(10):
            connection.execute(text("SELECT 1"))
        found = connection.execute(text("SELECT count(*) FROM pg_prepared_statements")).scalar_one()
    return int(found)


def claimed(eo: ExactlyOnce) -> ExactlyOnce:
    """The same, after a message through each of its engines' connections."""
    eo.handler("orders", key="no", name="reserve")(lambda_handler)
    assert eo.process(Message("orders", b'{"no": 1}')) is Outcome.PROCESSED
    return eo


def lambda_handler(session: Session, order: dict[str, Any]) -> None:
    session.execute(text("SELECT 1"))


def test_a_pooler_of_sessions_is_seen_like_any_other(postgres_url: str) -> None:
    with PgBouncer(postgres_url, server_connections=8, mode="session") as pooler:
        eo = claimed(ExactlyOnce(pooler.url, group="sessions"))
        engine = eo.stores["default"].engine
        with engine.connect() as connection:
            assert connection.info[LINK].pooled
        assert names_on(engine) == 0
        eo.stores["default"].close()


def test_without_a_pooler_statements_are_prepared_as_ever(postgres_url: str) -> None:
    eo = claimed(ExactlyOnce(postgres_url, group="direct"))
    engine = eo.stores["default"].engine
    with engine.connect() as connection:
        assert not connection.info[LINK].pooled
        assert connection.info[LINK].settings == b""
    assert names_on(engine) >= 2


@pytest.mark.parametrize("given", ["url", "engine", "used engine"])
def test_a_pooler_that_cannot_be_seen_is_said_to_be_there(postgres_url: str, given: str) -> None:
    # straight to the server, whose process id is that of the connection's start: what other poolers look like
    database: Any = postgres_url if given == "url" else create_engine(postgres_url, pool_size=1)
    if given == "used engine":
        with database.connect() as connection:
            connection.execute(text("SELECT 1"))
    eo = claimed(ExactlyOnce(database, group="hidden", pooler=True))
    assert names_on(eo.stores["default"].engine) == 0
    with Session(eo.stores["default"].engine) as session:
        assert session.execute(text("SELECT setting FROM pg_settings WHERE source = 'session'")).all() == []


def test_a_pooler_that_cannot_be_seen_is_said_by_the_environment(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXACTLY_ONCE_POOLER", "true")
    eo = claimed(ExactlyOnce(postgres_url, group="hidden"))
    assert names_on(eo.stores["default"].engine) == 0


def test_a_claim_on_a_session_of_the_callers_finds_out_by_itself(behind: PgBouncer, postgres_url: str) -> None:
    eo = ExactlyOnce(group="door-1")
    hidden = ExactlyOnce(group="door-1", pooler=True)
    for program, url in ((eo, behind.url), (hidden, postgres_url)):
        engine = create_engine(url, pool_size=1)
        with Session(engine) as session:
            assert program.claim(session, "reserve", "A-1")
            session.commit()
        assert names_on(engine) == 0
        engine.dispose()


@pytest.mark.parametrize(("said", "prepared"), [("none", False), ("None", False), ("0", True), ("100", False)])
def test_a_url_says_when_psycopg_prepares(postgres_url: str, said: str, prepared: bool) -> None:
    url = make_url(postgres_url).update_query_dict({"prepare_threshold": said})
    store = Store("default", url)
    assert bool(names_on(store.engine)) is prepared
    store.close()
    assert alembic.current(url) == alembic.head()


def test_a_url_that_says_it_wrong_is_told_so(postgres_url: str) -> None:
    url = make_url(postgres_url).update_query_dict({"prepare_threshold": "never"})
    with pytest.raises(ConfigurationError, match="prepare_threshold=never in the database URL is not understood"):
        _ = Store("default", url).engine


@pytest.mark.parametrize("colour", COLOURS)
def test_the_doctor_names_the_pooler_and_has_nothing_to_mend_in_it(behind: PgBouncer, colour: str) -> None:
    found = looked_at(ours(behind.url, colour))
    assert [each for each in found if each.mark is Mark.FAIL] == []
    told = "\n".join(each.text for each in found)
    assert "a pooler is before the server: no statement is prepared" in told
    assert "idle_in_transaction_session_timeout" not in told
    assert left_behind(behind) == []


def test_the_doctor_says_that_it_sees_none_and_how_to_say_that_there_is_one(
    postgres_url: str, behind: PgBouncer
) -> None:
    told = "\n".join(each.text for each in looked_at(ours(postgres_url, "sync")))
    assert "no pooler is seen before the server. Is there one? export EXACTLY_ONCE_POOLER=true" in told
    told = "\n".join(each.text for each in looked_at(ours(postgres_url, "sync", pooler=True)))
    assert "EXACTLY_ONCE_POOLER says that a pooler is before the server" in told


def looked_at(eo: ExactlyOnce) -> list[Finding]:
    return list(examine(eo, eo.transport("sql://")))


@pytest.mark.parametrize("guard", ["transaction", "lease"])
def test_a_user_whose_sessions_begin_in_another_role_writes_failures_and_steps(
    eo_server: DatabaseServer, guard: str
) -> None:
    """ALTER ROLE ... SET role, as for the users that Vault makes: the rights are that role's alone."""
    from tests.services import pgbouncer

    require(pgbouncer)
    url = eo_server.create()
    user, owner = f"{url.database}_user", f"{url.database}_owner"
    admin = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        for statement in (
            f"CREATE ROLE {owner}",
            f"CREATE ROLE {user} LOGIN NOINHERIT PASSWORD 'x'",
            f"GRANT {owner} TO {user}",
            f"ALTER ROLE {user} SET role = '{owner}'",
            f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {owner}",
            f"GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {owner}",
        ):
            connection.execute(text(statement))
    given = make_url(url).set(username=user, password="x").render_as_string(hide_password=False)
    try:
        with PgBouncer(given, server_connections=2) as pooler:
            engine, bad = create_engine(pooler.url), [True]
            eo = ExactlyOnce(engine, group="shop")

            def fails() -> None:
                if bad:
                    raise ZeroDivisionError

            options: dict[str, Any] = {"name": "handler", "key": "no", "retry": Retry(immediate=0, delays=[0.01])}
            if guard == "lease":

                @eo.handler("orders", guard=Lease(timedelta(seconds=30)), **options)
                def stepwise(steps: Steps) -> None:
                    steps.run("first", lambda key: 1)
                    fails()
            else:

                @eo.handler("orders", **options)
                def plain(session: Session) -> None:
                    session.execute(text("SELECT 1"))
                    fails()

            message = Message("orders", b'{"no": 1}', message_id="id-1")
            assert eo.process(message) is Outcome.FAILED
            bad.clear()
            assert eo.process(replace(message, attempt=2)) is Outcome.PROCESSED
            with admin.connect() as connection:
                assert connection.execute(text("SELECT error_class, state FROM message_failure")).all() == [
                    ("ZeroDivisionError", "resolved")
                ]
            engine.dispose()
    finally:
        with admin.connect() as connection:
            for role in (user, owner):
                connection.execute(text(f"DROP OWNED BY {role}"))
                connection.execute(text(f"DROP ROLE {role}"))
        admin.dispose()
        eo_server.drop(url)
