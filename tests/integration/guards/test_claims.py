"""The claim under competition, at every isolation level, and what is a duplicate: one run, whoever comes at the same time."""

import asyncio
import subprocess
import sys
from ast import literal_eval
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from threading import Barrier
from time import monotonic
from typing import Any

import pytest
from sqlalchemy import Engine, NullPool, create_engine, event, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from exactly_once import ConfigurationError, ExactlyOnce, Outcome, Retry, Transaction
from exactly_once.alembic import ready
from exactly_once.claim import ClaimRow
from exactly_once.database.dialects.registry import dialect_for
from exactly_once.database.schema import CONSUMED, UNFINISHED
from tests.integration.shop import COLOURS, DIALECTS, GROUP, ONLY, STOCK, Shop, count_statements, order, put, shops
from tests.integration.threads import Turn, in_thread
from tests.services.mariadb import MYSQLD
from tests.waiting import until

QUICK = Transaction(claim_wait=timedelta(seconds=0.3))
PATIENT = Transaction(claim_wait=timedelta(seconds=20))
_BUSY_S = {"sqlite": {"connect_args": {"timeout": 1}}}


def effect(session: Session) -> None:
    put(session, "effect")


@pytest.fixture(
    scope="module",
    params=[(dialect, colour) for dialect in DIALECTS for colour in COLOURS],
    ids=[f"{dialect}-{colour}" for dialect in DIALECTS for colour in COLOURS],
)
def wide_ground(request: pytest.FixtureRequest) -> Iterator[Shop]:
    dialect, colour = request.param
    yield from shops(request, dialect, colour, pool_size=8)


@pytest.fixture
def wide(wide_ground: Shop) -> Shop:
    """A shop with a connection for each of eight deliveries at once."""
    wide_ground.clear()
    return wide_ground


def waiting(shop: Shop) -> int:
    """How many transactions wait for a lock of another."""
    if shop.dialect == "sqlite":
        return 1  # nobody can see it there
    look = {
        "postgres": "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        " AND datname = current_database()",
        # not innodb_trx: it shows what it last found to whoever asks again within 0.1 s, so a waiter may never appear
        "mariadb": "SHOW GLOBAL STATUS LIKE 'Innodb_row_lock_current_waits'",
    }[shop.dialect]
    with shop.outside.connect() as connection:
        return int(connection.execute(text(look)).one()[-1])


# -- at the same moment ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", ["commit", "rollback"])
def test_a_copy_waits_for_the_run_under_way_and_its_end_decides(wide: Shop, ends: str) -> None:
    wide.handles(effect, guard=PATIENT)
    held = Turn()

    def other() -> None:
        with Session(wide.outside) as session:
            assert wide.eo.claim(session, "handler", "A-1", payload=order().body)
            put(session, "other")
            held.come()
            until(lambda: waiting(wide), "a waiting copy")
            getattr(session, ends)()

    with in_thread(other):
        held.wait()
        outcome = wide.process(order())
    expected = (Outcome.DUPLICATE, ["other"]) if ends == "commit" else (Outcome.PROCESSED, ["effect"])
    assert (outcome, wide.effects()) == expected
    assert wide.failures() == []


def test_it_waits_no_longer_than_claim_wait_and_that_is_no_failure(wide: Shop) -> None:
    wide.handles(effect, guard=QUICK)
    busy = Shop(wide.dialect, wide.colour, wide.url, options=_BUSY_S.get(wide.dialect, {}))
    busy.handles(effect, guard=QUICK)
    with busy, Session(wide.outside) as session:
        assert wide.eo.claim(session, "handler", "A-1")
        began = monotonic()
        outcome = busy.process(order())
        took = monotonic() - began
    # SQLite's lock is the whole database's: it says nothing of this key, and is waited for by holding the message
    assert outcome is (Outcome.WAITING if wide.dialect == "sqlite" else Outcome.IN_PROGRESS)
    assert 0.25 < took < 10
    assert not outcome.acknowledge
    assert wide.failures() == []
    assert wide.process(order()) is Outcome.PROCESSED


def test_eight_copies_in_eight_threads_run_once(wide: Shop) -> None:
    if wide.is_async:
        pytest.skip("threads are for plain handlers")
    wide.handles(effect, guard=PATIENT)
    for round_ in range(5):
        barrier = Barrier(8)

        def copy(_: int, round_: int = round_, barrier: Barrier = barrier) -> Outcome:
            barrier.wait(30)
            return wide.process(order(round_))

        with ThreadPoolExecutor(8) as pool:
            outcomes = Counter(pool.map(copy, range(8)))
        assert outcomes[Outcome.PROCESSED] == 1, outcomes
        # InnoDB may call two who wait for one key a deadlock when the first rolls back; then it is in progress
        assert set(outcomes) <= {Outcome.PROCESSED, Outcome.DUPLICATE, Outcome.IN_PROGRESS}
    assert wide.effects() == ["effect"] * 5
    assert wide.failures() == []


def test_eight_copies_on_one_loop_run_once(wide: Shop) -> None:
    if not wide.is_async:
        pytest.skip("loops are for async handlers")
    if wide.dialect == "sqlite":
        pytest.skip("one writer")

    @wide.eo.handler("orders", key="no", guard=PATIENT)
    async def reserve(session: AsyncSession) -> None:
        await session.run_sync(effect)
        await asyncio.sleep(0)

    async def copies() -> list[Outcome]:
        return await asyncio.gather(*(wide.eo.aprocess(order()) for _ in range(8)))

    outcomes = Counter(wide.await_(copies()))
    assert outcomes[Outcome.PROCESSED] == 1
    assert wide.effects() == ["effect"]


def test_two_processes_with_the_same_messages_run_each_once(wide: Shop) -> None:
    if wide.is_async:
        pytest.skip("told once")
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.integration.guards.claim_child", wide.url, "40"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    ended = []
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    for child in children:
        said, _ = child.communicate(timeout=100)
        ended.append(literal_eval(said))
    assert sum(outcomes.get("processed", 0) for outcomes in ended) == 40, ended
    assert {kind for outcomes in ended for kind in outcomes} <= {"processed", "duplicate"}
    assert sorted(wide.effects(), key=int) == [str(no) for no in range(40)]


# -- isolation levels --------------------------------------------------------------------------------------------------


@pytest.fixture(
    scope="module",
    params=[
        (dialect, colour, level)
        for dialect in ("postgres", "mariadb")
        for colour in COLOURS
        for level in ("READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE")
    ],
    ids=lambda param: "-".join(param).replace(" ", "_"),
)
def strict_ground(request: pytest.FixtureRequest) -> Iterator[Shop]:
    dialect, colour, level = request.param
    yield from shops(request, dialect, colour, pool_size=2, options={"isolation_level": level})


def test_at_every_isolation_level_a_copy_is_a_duplicate(strict_ground: Shop) -> None:
    strict_ground.clear()
    test_a_copy_waits_for_the_run_under_way_and_its_end_decides(strict_ground, "commit")
    assert strict_ground.process(order()) is Outcome.DUPLICATE
    strict_ground.clear()
    test_a_copy_waits_for_the_run_under_way_and_its_end_decides(strict_ground, "rollback")
    assert strict_ground.process(order()) is Outcome.DUPLICATE


def test_the_level_asked_for_is_the_one_the_handler_runs_at(strict_ground: Shop) -> None:
    strict_ground.clear()
    level: list[Any] = []
    show = {
        "postgres": "SHOW transaction_isolation",
        "mariadb": "SHOW VARIABLES WHERE Variable_name IN ('tx_isolation', 'transaction_isolation')",
    }[strict_ground.dialect]
    strict_ground.handles(lambda session: level.append(session.execute(text(show)).one()[-1]))
    assert strict_ground.process(order()) is Outcome.PROCESSED
    wanted = strict_ground.options["isolation_level"]
    assert level[0].upper().replace("-", " ") == wanted


# -- what the claim leaves behind --------------------------------------------------------------------------------------


def _shows(shop: Shop, what: str) -> list[Any]:
    seen: list[Any] = []
    shop.handles(lambda session: seen.append(session.execute(text(what)).scalar()))
    assert shop.process(order()) is Outcome.PROCESSED
    return seen


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("setting", ["7s", "0"])
def test_the_handler_finds_the_users_lock_timeout_again(
    request: pytest.FixtureRequest, colour: str, setting: str
) -> None:
    options = {"connect_args": {"options": f"-c lock_timeout={setting}"}}
    for shop in shops(request, "postgres", colour, options=options):
        assert _shows(shop, "SHOW lock_timeout") == [setting]
        # and so does everything later on that connection
        if not shop.is_async:
            with shop.engine.connect() as connection:
                assert connection.execute(text("SHOW lock_timeout")).scalar() == setting


def test_the_handlers_lock_waits_are_the_users(shop: Shop) -> None:
    if shop.dialect == "mariadb" and MYSQLD:
        pytest.skip("MySQL bounds no single statement: the claim's bound is the session's")
    what = {
        "postgres": "SHOW lock_timeout",
        "mariadb": "SELECT @@innodb_lock_wait_timeout",
        "sqlite": "PRAGMA busy_timeout",
    }[shop.dialect]
    with shop.outside.connect() as connection:
        usual = connection.execute(text(what)).scalar()
    assert _shows(shop, what) == [usual]


@pytest.mark.parametrize("colour", COLOURS)
def test_acknowledged_commits_are_durable_although_the_session_says_otherwise(
    request: pytest.FixtureRequest, colour: str
) -> None:
    options = {"connect_args": {"options": "-c synchronous_commit=off"}}
    for shop in shops(request, "postgres", colour, options=options):
        assert _shows(shop, "SHOW synchronous_commit") == ["on"]
        if not shop.is_async:
            with shop.engine.connect() as connection:  # for our transaction alone
                assert connection.execute(text("SHOW synchronous_commit")).scalar() == "off"


def test_a_lock_timeout_of_the_handlers_own_is_retried_and_not_in_progress(wide: Shop) -> None:
    if wide.dialect != "postgres":
        pytest.skip("whole seconds elsewhere")
    runs: list[int] = []

    def do(session: Session) -> None:
        runs.append(1)
        session.execute(text("SET LOCAL lock_timeout = '50ms'"))
        session.execute(update(STOCK).values(amount=1))

    wide.handles(do, retry=Retry(immediate=0))
    with wide.outside.begin() as connection:
        connection.execute(insert(STOCK).values(item=1, amount=0))
    with wide.outside.begin() as connection:
        connection.execute(update(STOCK).values(amount=2))
        assert wide.process(order()) is Outcome.FAILED
    assert len(runs) > 2  # at once, in fresh transactions; then it is counted once
    assert wide.failure().attempts == 1
    assert wide.process(order()) is Outcome.PROCESSED


def test_a_processed_message_costs_the_handlers_own_statements_and_no_more(shop: Shop) -> None:
    shop.handles(effect)
    assert shop.process(order("warm")) is Outcome.PROCESSED
    engine: Engine = shop.async_engine.sync_engine if shop.is_async else shop.engine
    sent = count_statements(engine)
    assert shop.process(order()) is Outcome.PROCESSED
    assert len(sent) == 1, sent


# -- keys --------------------------------------------------------------------------------------------------------------

KEYS: list[object] = [
    "a", "A", "a ", "a  ", " a", "\ta", "a\n", "á", "a\N{COMBINING ACUTE ACCENT}", "\N{FULLWIDTH LATIN SMALL LETTER A}",
    "ß", "ss", "SS", "\N{PARTY POPPER}", "\N{CONFETTI BALL}", "'", "''", '"', "\\", "\\\\", "\\'", "%", "%%", "%s", "%(a)s",
    "{key}", "{}", ":a", "$1", "?", "--", "/*", ";", "\\x61", "\\0", "\x01", "\x7f", "\ufeff", "\u200b", "\uffff", "12", "012",
    "-12", "x" * 255, "x" * 254, "\N{PARTY POPPER}" * 63, ["a", "b"], ["a,b"], ["a", "b,c"], ["a,b", "c"], "[]", "null",
]  # fmt: skip


def test_keys_are_kept_apart_byte_by_byte(shop: Shop) -> None:
    from exactly_once import keys

    def key_of(message: Any) -> str:
        from json import loads

        no = loads(message.body)["no"]
        return str(no) if not isinstance(no, list) else "|".join(no)

    shop.handles(effect, key=(keys.call(key_of)))
    wanted = {key_of(order(key)) for key in KEYS}
    assert len(wanted) >= len(KEYS) - 2
    for key in sorted(wanted):
        assert shop.process(order(key)) is Outcome.PROCESSED, repr(key)
    for key in sorted(wanted):
        assert shop.process(order(key)) is Outcome.DUPLICATE, repr(key)
    assert shop.claims() == sorted(wanted)
    assert len(shop.effects()) == len(wanted)


def test_failures_of_such_keys_are_kept_apart_too(shop: Shop) -> None:
    def do(session: Session) -> None:
        raise ValueError

    shop.handles(do)
    wanted = sorted({key for key in KEYS if isinstance(key, str)})
    for key in wanted:
        assert shop.process(order(key)) is Outcome.FAILED
    assert sorted(row.business_key for row in shop.failures()) == wanted


def test_a_number_and_its_text_are_one_key(shop: Shop) -> None:
    shop.handles(effect, fingerprint=None)
    assert [shop.process(order(no)) for no in (12, "12")] == [Outcome.PROCESSED, Outcome.DUPLICATE]


def test_batches_and_handlers_are_kept_apart_byte_by_byte(shop: Shop) -> None:
    for group in ("shop", "Shop", "shöp", "sh'op", "sh\\op"):
        for name in ("handler", "Handler", "handler "):
            shop.fresh_eo(group=group)
            shop.handles(effect, name=name)
            outcomes = [shop.process(order()) for _ in range(2)]
            assert outcomes == [Outcome.PROCESSED, Outcome.DUPLICATE], (group, name)
    assert len(shop.effects()) == 15


# -- only our primary key makes a duplicate ----------------------------------------------------------------------------


def test_a_unique_violation_of_the_handlers_own_is_a_failure(shop: Shop) -> None:
    with shop.outside.begin() as connection:
        connection.execute(insert(ONLY).values(text="one"))

    def do(session: Session) -> None:
        put(session, "effect")
        session.execute(insert(ONLY).values(text="one"))

    shop.handles(do, retry=Retry(immediate=0))
    assert shop.process(order()) is Outcome.FAILED
    assert shop.failure().error_class == "IntegrityError"
    with shop.outside.begin() as connection:
        connection.execute(ONLY.delete())
    assert shop.process(order(attempt=2)) is Outcome.PROCESSED
    shop.assert_kept("effect", claims=["A-1"])


def test_a_violation_of_our_key_by_the_handler_itself_is_a_failure(shop: Shop) -> None:
    def do(session: Session) -> None:
        claims = shop.tables.idempotent
        session.execute(insert(claims).from_select(list(claims.c.keys()), select(claims)))

    shop.handles(do, retry=Retry(immediate=0))
    assert shop.process(order()) is Outcome.FAILED
    assert shop.failure().error_class == "IntegrityError"
    shop.assert_kept(claims=[])


def violates_at_commit(shop: Shop) -> None:
    with shop.outside.begin() as connection:
        connection.execute(
            text("CREATE TABLE deferred (n int, CONSTRAINT one UNIQUE (n) DEFERRABLE INITIALLY DEFERRED)")
        )
    wrong = [True]

    def do(session: Session) -> None:
        put(session, "effect")
        for _ in range(2 if wrong else 1):
            session.execute(text("INSERT INTO deferred VALUES (1)"))

    shop.handles(do, retry=Retry(immediate=0))
    assert shop.process(order()) is Outcome.FAILED
    assert shop.failure().error_class == "IntegrityError"
    assert (shop.effects(), shop.claims()) == ([], [])
    wrong.clear()
    assert shop.process(order(attempt=2)) is Outcome.PROCESSED
    shop.assert_kept("effect", claims=["A-1"])
    with shop.outside.begin() as connection:
        connection.execute(text("DROP TABLE deferred"))


def test_a_violation_found_at_commit_is_a_failure_and_not_unknown(shop: Shop) -> None:
    if shop.dialect != "postgres":
        pytest.skip("only PostgreSQL defers unique constraints")
    violates_at_commit(shop)


@pytest.mark.parametrize("colour", COLOURS)
def test_errors_are_known_on_a_server_that_speaks_german(german_postgres_url: str, colour: str) -> None:
    with Shop("postgres", colour, german_postgres_url, pool_size=2) as shop:
        with shop.outside.connect() as connection, pytest.raises(Exception, match="Division durch Null"):
            connection.execute(text("SELECT 1 / 0"))
        for each in (
            test_a_unique_violation_of_the_handlers_own_is_a_failure,
            violates_at_commit,
            test_it_waits_no_longer_than_claim_wait_and_that_is_no_failure,
            lambda shop: test_a_copy_waits_for_the_run_under_way_and_its_end_decides(shop, "commit"),
        ):
            shop.clear()
            each(shop)


# -- fingerprints ------------------------------------------------------------------------------------------------------


def test_the_same_payload_written_differently_is_a_duplicate(shop: Shop) -> None:
    from exactly_once import Message

    shop.handles(effect)
    assert shop.process(Message("orders", b'{"no": 1, "sku": "x", "n": 1.0}')) is Outcome.PROCESSED
    assert shop.process(Message("orders", b'{ "sku":"\\u0078",\n"n": 1.0, "no":1 }')) is Outcome.DUPLICATE
    assert shop.failures() == []


def test_another_payload_under_a_known_key_is_a_dead_letter_that_names_the_difference(shop: Shop) -> None:
    from exactly_once import Message

    shop.handles(effect)
    assert shop.process(Message("orders", b'{"no": 1, "sku": "x", "n": 1}')) is Outcome.PROCESSED
    assert shop.process(Message("orders", b'{"no": 1, "sku": "x", "n": 2}', message_id="2")) is Outcome.DEAD
    failure = shop.failure()
    assert (failure.state, failure.error_class) == ("dead", "PayloadConflict")
    assert "Different: n." in failure.error_text
    assert "fingerprint=['no', 'sku']" in failure.error_text
    shop.assert_kept("effect", claims=["1"])


def test_after_another_fingerprint_setting_copies_are_duplicates_not_compared(shop: Shop) -> None:
    from exactly_once import Message

    shop.handles(effect)
    assert shop.process(Message("orders", b'{"no": 1, "at": 1}')) is Outcome.PROCESSED
    for setting in (["no"], None, lambda message: b"other"):
        shop.fresh_eo()
        shop.handles(effect, fingerprint=setting)
        assert shop.process(Message("orders", b'{"no": 1, "at": 2}')) is Outcome.DUPLICATE
    assert shop.failures() == []


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_an_engine_in_autocommit_is_refused_and_nothing_runs(shop: Shop) -> None:
    runs: list[int] = []
    autocommit = create_engine(shop.url, isolation_level="AUTOCOMMIT")
    async_autocommit = create_async_engine(shop.async_engine.url, isolation_level="AUTOCOMMIT")
    shop.fresh_eo(autocommit, async_autocommit)
    shop.handles(lambda session: runs.append(1))
    with pytest.raises(ConfigurationError, match=r"isolation_level"):
        shop.process(order())
    assert (runs, shop.claims(), shop.failures()) == ([], [], [])
    if not shop.is_async:
        with pytest.raises(ConfigurationError, match=r"isolation_level"):
            ready.problem(shop.eo.stores["default"])  # what a worker looks at before it starts
    autocommit.dispose()
    shop.await_(async_autocommit.dispose())


def test_sessions_that_cannot_commit_once_are_refused_with_what_to_do(shop: Shop) -> None:
    def refused(database: Any, match: str) -> None:
        eo = ExactlyOnce(database, group=GROUP)
        with pytest.raises(ConfigurationError, match=match):
            _ = eo.stores

    refused(sessionmaker(shop.engine, twophase=True), "twophase=True")
    refused(sessionmaker(shop.engine, binds={object: shop.engine}), "binds=.*route=")
    refused(sessionmaker(), r"sessionmaker\(engine\)")
    refused(async_sessionmaker(shop.async_engine, twophase=True), "twophase=True")
    refused(async_sessionmaker(shop.async_engine, binds={object: shop.async_engine}), "binds=")


def test_a_pool_that_resets_nothing_is_refused_unless_a_listener_does_or_it_closes(shop: Shop) -> None:
    """Other code's half transaction would be in the transaction of a message, and be committed with it."""

    def stores_of(*databases: Any) -> Any:
        return ExactlyOnce(*databases[:1], async_database=databases[1], group=GROUP).stores

    none: dict[str, Any] = {"pool_reset_on_return": None}
    engine, async_engine = create_engine(shop.url, **none), create_async_engine(shop.async_engine.url, **none)
    for refused in (
        (engine, None),
        (sessionmaker(engine), None),
        (None, async_engine),
        (shop.engine, async_sessionmaker(async_engine)),
    ):
        with pytest.raises(ConfigurationError, match="Take pool_reset_on_return out"):
            stores_of(*refused)
    assert stores_of(create_engine(shop.url, poolclass=NullPool, **none), None)
    event.listen(engine, "reset", lambda dbapi, record, state: None if state.terminate_only else dbapi.rollback())
    assert stores_of(engine, None)
    assert stores_of(sessionmaker(engine), None)


class ShopSession(Session):
    """A session with something of the user's own."""

    def put_effect(self) -> None:
        put(self, "effect")


class AsyncShopSession(AsyncSession):
    """The same for asyncio."""

    async def put_effect(self) -> None:
        await self.run_sync(put, "effect")


def wants_its_own_session(shop: Shop, eo: ExactlyOnce) -> None:
    if shop.is_async:

        @eo.handler("orders", key="no")
        async def awaited(session: AsyncShopSession) -> None:
            await session.put_effect()
    else:

        @eo.handler("orders", key="no")
        def plain(session: ShopSession) -> None:
            session.put_effect()


def test_a_handler_gets_the_session_class_it_names(shop: Shop) -> None:
    eo = shop.fresh_eo(
        sessionmaker(shop.engine, class_=ShopSession), async_sessionmaker(shop.async_engine, class_=AsyncShopSession)
    )
    wants_its_own_session(shop, eo)
    assert shop.process(order()) is Outcome.PROCESSED
    assert shop.effects() == ["effect"]


def test_a_session_class_that_the_database_does_not_make_is_refused_before_anything_runs(shop: Shop) -> None:
    wants_its_own_session(shop, shop.eo)
    with pytest.raises(ConfigurationError, match=r"sessionmaker\(engine, class_=(Async)?ShopSession\)"):
        shop.process(order())
    assert (shop.effects(), shop.failures()) == ([], [])


def test_two_session_classes_of_one_name_are_told_apart_by_their_modules(shop: Shop) -> None:
    """SQLModel's are called Session and AsyncSession, too."""
    base: Any = AsyncSession if shop.is_async else Session
    theirs = type(base.__name__, (base,), {"__module__": "sqlmodel.session"})
    eo = shop.fresh_eo(shop.engine, shop.async_engine)

    def plain(session: Any) -> None: ...

    async def awaited(session: Any) -> None: ...

    handler = awaited if shop.is_async else plain
    handler.__annotations__["session"] = theirs
    eo.handler("orders", key="no")(handler)
    name = base.__name__
    with pytest.raises(ConfigurationError) as refused:
        shop.process(order())
    assert f"wants a sqlmodel.session.{name}, and the database 'default' makes sqlalchemy." in str(refused.value)
    assert f"`session: {name}` of SQLAlchemy." in str(refused.value)


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_a_database_in_memory_is_refused(url: str) -> None:
    eo = ExactlyOnce(url, group=GROUP)
    with pytest.raises(ConfigurationError, match="Give it a file"):
        _ = eo.stores["default"].engine


def test_a_driver_nobody_tried_is_refused() -> None:
    engine = create_engine("sqlite+pysqlcipher://:secret@/x.db", module=__import__("sqlite3"))
    eo = ExactlyOnce(engine, group=GROUP)
    with pytest.raises(ConfigurationError, match="sqlite\\+pysqlcipher is not one"):
        _ = eo.stores["default"].dialect


# -- drivers -----------------------------------------------------------------------------------------------------------


def test_the_driver_tells_a_second_claim_from_a_first(shop: Shop) -> None:
    """SQLAlchemy's rowcount does not, with psycopg: a hand-written check takes every duplicate for new."""
    seen: list[bool] = []

    def twice(session: Session) -> None:
        connection = session.connection()
        dbapi, info = connection.connection.dbapi_connection, connection.info
        dialect = dialect_for(connection.engine, lambda: None)
        dialect.prepare(dbapi, info, wait_ms=1000)
        row = ClaimRow("self-check", "handler", "key", b"\x01fingerprint")
        seen.extend(dialect.claim(dbapi, info, row, wait_ms=1000, savepoint=False) for _ in range(2))
        known = dialect.read_claim(dbapi, row, end=True)
        assert known is not None
        # MySQL's and MariaDB's is finished with COMMIT
        status = UNFINISHED if shop.dialect == "mariadb" else CONSUMED
        assert (known.status, known.fingerprint) == (status, b"\x01fingerprint")

    async def async_twice() -> None:
        async with AsyncSession(shop.async_engine) as session:
            await session.run_sync(twice)

    if shop.is_async:
        shop.await_(async_twice())
    else:
        with Session(shop.engine) as session:
            twice(session)
    assert seen == [True, False]
    shop.assert_kept(claims=[])
