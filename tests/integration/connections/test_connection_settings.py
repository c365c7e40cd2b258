"""What a handler sets on its connection reaches neither our statements nor another message.

The kind: something was learnt about a connection, or is taken for granted of it, and a handler has had it since: how durable its
COMMIT is, which schema or database a name means, which characters it speaks, whose rights it has. Our own rows go where they
always go, a COMMIT that is answered is on disk, and the next handler finds the connection as if it were new.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from sqlalchemy import Boolean, Engine, MetaData, Table, cast, create_engine, event, func, inspect, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from exactly_once import ConfigurationError, ExactlyOnce, Outcome
from exactly_once.database.schema import tables
from exactly_once.testing.databases import DatabaseServer
from exactly_once.testing.postgres import EmbeddedPostgres
from tests.integration.grounds import ground_on
from tests.integration.outside import column, run
from tests.integration.shop import COLOURS, GROUP, Shop, order, put
from tests.integration.ways import ALONE, IN_A_BATCH, UNDER_A_LEASE, WAYS, Way, mariadb_procedures, one_by_one
from tests.services.mariadb import MYSQLD
from tests.waiting import until

pytestmark = pytest.mark.nightly(meet=2)

P, D, F = Outcome.PROCESSED, Outcome.DUPLICATE, Outcome.FAILED
each_way = pytest.mark.parametrize("way", WAYS, ids=str)
some_ways = pytest.mark.parametrize("way", [ALONE, IN_A_BATCH, UNDER_A_LEASE], ids=str)

AT_COMMIT = (
    "CREATE TABLE at_commit (id serial PRIMARY KEY, durable text, role text, path text)",
    (
        "CREATE FUNCTION public.note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " INSERT INTO public.at_commit (durable, role, path) VALUES"
        " (current_setting('synchronous_commit'), current_user, current_setting('search_path')); RETURN NULL; END $$"
    ),
    (
        "CREATE CONSTRAINT TRIGGER note AFTER INSERT ON effect DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION public.note()"
    ),
    "GRANT INSERT ON at_commit TO PUBLIC",
    "GRANT USAGE ON SEQUENCE at_commit_id_seq TO PUBLIC",
)


@pytest.fixture(params=COLOURS)
def postgres(request: pytest.FixtureRequest) -> Iterator[Shop]:
    """A shop whose effects note, when they are committed, what was in force then."""
    for shop in ground_on(request, "postgres", request.param):
        run(shop, *AT_COMMIT)
        yield shop


@pytest.fixture(params=COLOURS)
def mariadb(request: pytest.FixtureRequest) -> Iterator[Shop]:
    yield from ground_on(request, "mariadb", request.param)


def durable(shop: Shop) -> list[str]:
    """What `synchronous_commit` was when each effect was committed."""
    return column(shop, "SELECT durable FROM public.at_commit ORDER BY id")


def sends(*statements: str) -> Callable[[Session], None]:
    def do(session: Session) -> None:
        for statement in statements:
            session.execute(text(statement))

    return do


def first_then(first: Callable[[Session], object], then: Callable[[Session], object] | None = None) -> Any:
    """A handler that does something with message 1, before its effect, and maybe something else with the others."""

    def do(session: Session, no: Any) -> None:
        if no == 1:
            first(session)
        elif then is not None:
            then(session)
        put(session, str(no))

    return do


# -- durability --------------------------------------------------------------------------------------------------------

OFF = {
    "SET": "SET synchronous_commit = off",
    "SET SESSION": "SET SESSION synchronous_commit TO 'off'",
    "SET LOCAL": "SET LOCAL synchronous_commit = off",
    "set_config": "SELECT set_config('synchronous_commit', 'off', false)",
    "set_config, local": "SELECT set_config('synchronous_commit', 'off', true)",
}


@each_way
@pytest.mark.parametrize("off", OFF)
def test_no_commit_of_a_message_is_asynchronous_whatever_its_handler_or_an_earlier_one_set(
    postgres: Shop, way: Way, off: str
) -> None:
    way.handles(postgres, first_then(sends(OFF[off])))
    assert one_by_one(postgres, way, [1, 2]) == [P, P]
    assert way.deliver(postgres, [order(no) for no in (3, 4)]) == [P, P]
    assert durable(postgres) == ["on"] * 4


def test_one_of_a_group_sets_it_and_the_groups_commit_is_durable(postgres: Shop) -> None:
    IN_A_BATCH.handles(postgres, first_then(sends(OFF["SET LOCAL"])))
    assert IN_A_BATCH.deliver(postgres, [order(no) for no in (1, 2, 3)]) == [P] * 3
    assert durable(postgres) == ["on"] * 3


@some_ways
@pytest.mark.parametrize("stays", ["remote_apply", "remote_write", "local", "on"])
def test_what_is_stronger_or_was_chosen_with_care_stays(postgres: Shop, way: Way, stays: str) -> None:
    way.handles(postgres, first_then(sends(f"SET LOCAL synchronous_commit = '{stays}'")))
    assert one_by_one(postgres, way, [1, 2]) == [P, P]
    assert durable(postgres) == [stays, "on"]


@each_way
@pytest.mark.parametrize(
    "off", ["PERFORM set_config('synchronous_commit', 'off', true)", "SET LOCAL synchronous_commit = off"]
)
@pytest.mark.parametrize("deferred", ["DEFERRED", "IMMEDIATE"])
def test_a_trigger_that_waits_for_commit_has_the_last_word_on_durability(
    postgres: Shop, way: Way, off: str, deferred: str
) -> None:
    """The limit: PostgreSQL runs it in COMMIT, behind all that we can send. Claim and effects are lost together, or kept."""
    run(
        postgres,
        f"CREATE FUNCTION public.loses() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {off}; RETURN NULL; END $$",
        # the first of two in the alphabet; the other notes what is in force then
        f"CREATE CONSTRAINT TRIGGER loses AFTER INSERT ON effect DEFERRABLE INITIALLY {deferred}"
        " FOR EACH ROW EXECUTE FUNCTION public.loses()",
    )
    way.handles(postgres, first_then(lambda session: None))
    assert one_by_one(postgres, way, [1, 2]) == [P, P]
    assert durable(postgres) == ["off" if deferred == "DEFERRED" else "on"] * 2
    assert one_by_one(postgres, way, [1, 2]) == [D, D]
    assert (sorted(postgres.effects()), sorted(postgres.claims())) == (["1", "2"], ["1", "2"])
    # it ends with its transaction: the next one is durable unless it meets the trigger, too
    run(postgres, "DROP TRIGGER loses ON effect")
    assert one_by_one(postgres, way, [3]) == [P]
    assert durable(postgres)[2:] == ["on"]


@pytest.mark.parametrize("way", [ALONE, UNDER_A_LEASE], ids=str)
@pytest.mark.parametrize("colour", COLOURS)
def test_the_server_turns_it_off_while_connections_are_open(
    own_postgres: EmbeddedPostgres, way: Way, colour: str
) -> None:
    server = DatabaseServer(own_postgres.url, source="url")
    url = server.create().render_as_string(hide_password=False)
    with Shop("postgres", colour, url, pool_size=3, options={"pool_use_lifo": True}) as shop:
        run(shop, *AT_COMMIT)
        way.handles(shop, first_then(lambda session: None))
        assert one_by_one(shop, way, [1]) == [P]
        admin = create_engine(own_postgres.url, isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            connection.exec_driver_sql("ALTER SYSTEM SET synchronous_commit = off")
            connection.exec_driver_sql("SELECT pg_reload_conf()")
            until(lambda: column(shop, "SHOW synchronous_commit") == ["off"], "the server has read its settings")
        assert one_by_one(shop, way, [2, 3]) == [P, P]
        assert way.deliver(shop, [order(no) for no in (4, 5)]) == [P, P]
        assert durable(shop) == ["on"] * 5
        admin.dispose()
    server.close()


# -- what it speaks ------------------------------------------------------------------------------------------------------

SPOKEN = {
    "SET LOCAL": "SET LOCAL client_encoding = 'LATIN1'",
    "SET": "SET client_encoding = 'GBK'",
    "set_config": "SELECT set_config('client_encoding', 'LATIN1', true)",
    "SQL_ASCII": "SET LOCAL client_encoding = 'SQL_ASCII'",
}


@each_way
@pytest.mark.parametrize("spoken", SPOKEN)
def test_a_key_beyond_ascii_is_found_again_whatever_its_handler_speaks(postgres: Shop, way: Way, spoken: str) -> None:
    """Also where it has failed before, and its failure is closed with its effects."""
    failing = ["中-1"]

    def do(session: Session, no: Any) -> None:
        session.execute(text(SPOKEN[spoken]))
        put(session, "effect")
        if no in failing:
            failing.remove(no)
            raise ZeroDivisionError
        assert session.execute(text("SHOW client_encoding")).scalar_one() != "UTF8"

    way.handles(postgres, do)
    assert one_by_one(postgres, way, ["ä-1", "中-1", "ä-1", "中-1", "中-1"]) == [P, F, D, P, D]
    assert (postgres.effects(), sorted(postgres.claims())) == (["effect"] * 2, ["ä-1", "中-1"])
    assert postgres.failure().state == "resolved"


@pytest.mark.parametrize("colour", COLOURS)
def test_what_runs_with_commit_finds_the_encoding_that_the_handler_has_set(
    request: pytest.FixtureRequest, colour: str
) -> None:
    for shop in ground_on(request, "postgres", colour):
        run(shop, *AT_COMMIT)
        run(
            shop,
            "CREATE OR REPLACE FUNCTION public.note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " INSERT INTO public.at_commit (durable) VALUES (current_setting('client_encoding')); RETURN NULL; END $$",
        )
        UNDER_A_LEASE.handles(shop, first_then(sends(SPOKEN["SET LOCAL"])))
        assert one_by_one(shop, UNDER_A_LEASE, [1, 2]) == [P, P]
        assert durable(shop) == ["LATIN1", "UTF8"]


# -- locks of the session ----------------------------------------------------------------------------------------------

LOCKS = {
    "postgres": ("SELECT pg_advisory_lock(7)", "SELECT pg_try_advisory_lock(7)"),
    "postgres, if free": ("SELECT 1 WHERE pg_try_advisory_lock(7)", "SELECT pg_try_advisory_lock(7)"),
    "mariadb": ("SELECT GET_LOCK('seven', 0)", "SELECT GET_LOCK('seven', 0)"),
}


@each_way
@pytest.mark.parametrize("lock", LOCKS)
@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
@pytest.mark.parametrize("colour", COLOURS)
def test_a_lock_that_a_handler_took_for_its_session_is_let_go_of_when_it_ends(
    request: pytest.FixtureRequest, way: Way, lock: str, fails: bool, colour: str
) -> None:
    """It outlives the transaction, and an idle connection of the pool would hold it: the next message waits for ever."""
    takes, asks = LOCKS[lock]
    for shop in ground_on(request, lock.split(",")[0], colour):

        def do(session: Session, no: Any) -> None:
            session.execute(text(takes)).all()
            put(session, str(no))
            if fails:
                raise ZeroDivisionError

        way.handles(shop, do)
        assert one_by_one(shop, way, [1]) == [F if fails else P]
        until(partial(_free, shop, asks), "the lock is free")


OWN = {
    "postgres": (
        "SELECT pg_advisory_lock_shared(4711)",
        "SELECT pg_try_advisory_lock(4711)",
        "SELECT pg_advisory_unlock_all()",
        False,
    ),
    "mariadb": ("SELECT GET_LOCK('alive', 0)", "SELECT IS_FREE_LOCK('alive')", "SELECT 1", 0),
}


@each_way
@pytest.mark.parametrize("lock", OWN)
@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
@pytest.mark.parametrize("colour", COLOURS)
def test_a_lock_that_the_program_took_as_the_connection_was_made_stays_beside_a_handlers_own(
    request: pytest.FixtureRequest, way: Way, lock: str, fails: bool, colour: str
) -> None:
    """Such as "this program lives", which a migration waits for."""
    own, asks, lets_go, held = OWN[lock]
    for shop in ground_on(request, lock, colour):

        def connected(dbapi: Any, record: Any) -> None:
            cursor = dbapi.cursor()
            cursor.execute(own)
            cursor.fetchall()
            cursor.close()
            dbapi.commit()

        for engine in (shop.engine, shop.async_engine.sync_engine):
            event.listen(engine, "connect", connected)

        def do(session: Session, no: Any) -> None:
            if no == 2:
                session.execute(text(LOCKS[lock][0])).all()
            put(session, str(no))
            if no == 2 and fails:
                raise ZeroDivisionError

        def is_free() -> Any:
            with shop.outside.connect() as outside:  # noqa: B023
                (free,) = outside.execute(text(asks)).one()
                outside.execute(text(lets_go))
                return free

        way.handles(shop, do)
        for no, expected in ((1, P), (2, F if fails else P), (3, P)):
            assert one_by_one(shop, way, [no]) == [expected]
            # behind the second the connection is closed; the next one takes the lock again
            assert no == 2 or is_free() == held


@pytest.mark.parametrize("colour", COLOURS)
def test_a_lock_does_not_hide_what_else_a_handler_changed_in_its_session(
    request: pytest.FixtureRequest, colour: str
) -> None:
    for shop in ground_on(request, "postgres", colour):
        run(shop, "CREATE SCHEMA other", "CREATE TABLE other.effect (id serial PRIMARY KEY, text varchar(300))")
        ALONE.handles(shop, first_then(sends("SET search_path TO other", LOCKS["postgres"][0])))
        assert one_by_one(shop, ALONE, [1, 2]) == [P, P]
        assert "2" in shop.effects()
        assert _free(shop, LOCKS["postgres"][1])


def _free(shop: Shop, asks: str) -> bool:
    return column(shop, asks) in ([True], [1])


# -- which tables are ours ---------------------------------------------------------------------------------------------


def with_another_schema(shop: Shop, *, ours: bool) -> None:
    """A schema of a tenant's, with effects, and with tables of our names if so."""
    run(shop, "CREATE SCHEMA other", "CREATE TABLE other.effect (id serial PRIMARY KEY, text varchar(300) NOT NULL)")
    if ours:
        tables("other").metadata.create_all(shop.outside)


def rows_of(shop: Shop, table: Table) -> int:
    with shop.outside.connect() as connection:
        return len(connection.execute(select(table)).all())


def nothing_of_ours_in(shop: Shop, place: str) -> None:
    other = MetaData()
    with shop.outside.connect() as connection:
        for name in inspect(connection).get_table_names(schema=place):
            if name.startswith("message_"):
                there = connection.execute(select(Table(name, other, schema=place, autoload_with=connection))).all()
                assert not there, f"a row of ours is in {place}.{name}"


@each_way
@pytest.mark.parametrize("ours", [True, False], ids=["our tables there too", "no such tables there"])
@pytest.mark.parametrize(
    "path",
    [
        "SET search_path TO other",
        "SET search_path = other, public",
        "SELECT set_config('search_path', 'other', false)",
        "SET SCHEMA 'other'",
    ],
)
# one spelling is enough in the other ways
@pytest.mark.where(lambda way, path, **_: way in (ALONE, UNDER_A_LEASE) or path == "SET search_path TO other")
def test_a_search_path_that_a_handler_set_moves_no_claim(postgres: Shop, way: Way, ours: bool, path: str) -> None:
    with_another_schema(postgres, ours=ours)
    seen: list[Any] = []
    way.handles(
        postgres,
        first_then(sends(path), lambda session: seen.append(session.execute(text("SHOW search_path")).scalar_one())),
    )
    assert one_by_one(postgres, way, [1, 2]) == [P, P]
    assert one_by_one(postgres, way, [1, 2]) == [D, D]
    assert way.deliver(postgres, [order(no) for no in (3, 4, 1)]) == [P, P, D]
    assert postgres.claims() == ["1", "2", "3", "4"]
    nothing_of_ours_in(postgres, "other")
    if path.startswith("SET"):  # a function's doing is seen by nobody; it moves nothing of ours all the same
        assert set(seen) == {'"$user", public'}, "the next handler found the path of the first"


@pytest.mark.parametrize("way", [ALONE, UNDER_A_LEASE], ids=str)
def test_a_failure_is_kept_in_the_same_schema(postgres: Shop, way: Way) -> None:
    with_another_schema(postgres, ours=True)

    def fails(session: Session) -> None:
        session.execute(text("SET search_path TO other"))
        raise ZeroDivisionError

    failing = [True]
    way.handles(postgres, first_then(lambda session: fails(session) if failing else None))
    assert one_by_one(postgres, way, [1]) == [F]
    assert postgres.failure().state == "retrying"
    failing.clear()
    assert way.deliver(postgres, [order(1, attempt=2)]) == [P]
    assert postgres.failure().state == "resolved"
    nothing_of_ours_in(postgres, "other")


@each_way
@pytest.mark.parametrize("ours", [True, False], ids=["our tables there too", "no such tables there"])
def test_another_database_that_a_handler_uses_moves_no_claim(
    request: pytest.FixtureRequest, mariadb: Shop, way: Way, ours: bool
) -> None:
    server: DatabaseServer = request.getfixturevalue("mariadb_server")
    other = server.create(upgraded=ours)
    name = str(other.database)
    seen: list[Any] = []
    try:
        run(mariadb, f"CREATE TABLE {name}.effect (id INT AUTO_INCREMENT PRIMARY KEY, text VARCHAR(300)) ENGINE=InnoDB")
        way.handles(
            mariadb,
            first_then(
                sends(f"USE {name}"),
                lambda session: seen.append(session.execute(text("SELECT DATABASE()")).scalar_one()),
            ),
        )
        assert one_by_one(mariadb, way, [1, 2]) == [P, P]
        assert one_by_one(mariadb, way, [1, 2]) == [D, D]
        assert way.deliver(mariadb, [order(no) for no in (3, 4, 1)]) == [P, P, D]
        assert mariadb.claims() == ["1", "2", "3", "4"]
        if ours:
            nothing_of_ours_in(mariadb, name)
        assert set(seen) == {mariadb.engine.url.database}, "the next handler found the database of the first"
    finally:
        mariadb.await_(mariadb.async_engine.dispose())
        mariadb.engine.dispose()
        server.drop(other)


@pytest.mark.parametrize("door", ["process", "claim"])
@pytest.mark.parametrize("dialect", ["postgres", "mariadb"])
def test_the_place_of_our_tables_is_no_tenants_that_a_checkout_listener_names(
    request: pytest.FixtureRequest, dialect: str, door: str
) -> None:
    """Which tenant came first differs between processes: one key was taken in the tables of each."""
    for shop in ground_on(request, dialect, "sync"):
        server: DatabaseServer = request.getfixturevalue(f"{'eo' if dialect == 'postgres' else dialect}_server")
        others = [server.create() for _ in "ab"] if dialect == "mariadb" else []
        tenants = [str(url.database) for url in others] or ["a", "b"]
        if dialect == "postgres":
            names = ("message_idempotent", "message_failure")
            run(shop, *(f"CREATE SCHEMA {tenant}" for tenant in tenants))
            run(shop, *(f"CREATE TABLE {t}.{name} (LIKE {name} INCLUDING ALL)" for t in tenants for name in names))
        names_it = "SET search_path TO {}, public" if dialect == "postgres" else "USE {}"
        ends: list[object] = []
        try:
            for first in tenants:  # as two processes that have begun with another tenant's message each
                engine, now = create_engine(shop.url), [first]
                event.listen(
                    engine, "checkout", lambda dbapi, *_, now=now, names=names_it: _sent(dbapi, names.format(now[0]))
                )
                eo = ExactlyOnce(engine, group=GROUP)
                eo.handler("orders", name="handler", key="no")(_nothing)
                for tenant, no in ((first, f"{first}-1"), (tenants[0], "7")):
                    now[0] = tenant
                    if door == "process":
                        ends.append(eo.process(order(no)))
                    else:
                        with Session(engine) as session, session.begin():
                            ends.append(P if eo.claim(session, "handler", no) else D)
                engine.dispose()
            assert ends == [P, P, P, D]
            assert len(shop.claims()) == 3
        finally:
            for url in others:
                server.drop(url)


def _nothing(session: Session) -> None: ...


def _sent(dbapi: Any, statement: str) -> None:
    dbapi.cursor().execute(statement)
    dbapi.commit()


def with_path(shop: Shop, path: str) -> tuple[Engine, Any]:
    more: dict[str, Any] = {"connect_args": {"options": f"-c search_path={path}"}}
    return create_engine(shop.url, **more), create_async_engine(shop.async_engine.url, **more)


@pytest.mark.parametrize("door", ["process", "claim"])
def test_two_schemas_of_the_path_that_hold_claims_are_refused_until_one_is_named(postgres: Shop, door: str) -> None:
    with_another_schema(postgres, ours=True)
    engines = with_path(postgres, "other,public")
    for schema in ("other", "public"):
        eo = ExactlyOnce(postgres.outside, group=GROUP, schema=schema)
        with Session(postgres.outside) as session, session.begin():
            assert eo.claim(session, "handler", f"old {schema}")
    postgres.fresh_eo(*engines)
    ALONE.handles(postgres, first_then(lambda session: None))

    def begin() -> object:
        if door == "process":
            return postgres.process(order(1))
        with Session(engines[0]) as session, session.begin():
            return postgres.eo.claim(session, "handler", "new")

    with pytest.raises(ConfigurationError, match="schema="):
        begin()
    postgres.fresh_eo(*engines, schema="public")
    ALONE.handles(postgres, first_then(lambda session: None))
    assert begin() in (P, True)
    assert len(postgres.claims()) == 2
    postgres.await_(engines[1].dispose())
    engines[0].dispose()


@each_way
@pytest.mark.parametrize("where", ["engine", "session"])
def test_a_schema_translate_map_of_the_users_does_not_move_our_statements(postgres: Shop, way: Way, where: str) -> None:
    with_another_schema(postgres, ours=True)
    moved = {"schema_translate_map": {None: "other"}}
    if where == "engine":
        postgres.fresh_eo(
            sessionmaker(postgres.engine.execution_options(**moved)),
            async_sessionmaker(postgres.async_engine.execution_options(**moved)),
        )
    failing = [True]

    def do(session: Session, no: Any) -> None:
        if where == "session":
            session.connection().execution_options(**moved)
        put(session, str(no))
        if failing and no == 1:
            raise ZeroDivisionError

    way.handles(postgres, do)
    assert way.deliver(postgres, [order(no) for no in (1, 2)]) == [F, P]
    failing.clear()
    assert way.deliver(postgres, [order(1, attempt=2)]) == [P]
    assert postgres.failure().state == "resolved"
    assert postgres.claims() == ["1", "2"]
    nothing_of_ours_in(postgres, "other")
    assert sorted(column(postgres, "SELECT text FROM other.effect")) == ["1", "2"], "the user's own tables are moved"


# -- characters --------------------------------------------------------------------------------------------------------


@each_way
@pytest.mark.parametrize("encoding", ["SET client_encoding = 'LATIN1'", "SET NAMES 'LATIN1'"])
def test_another_client_encoding_stores_no_key_otherwise(postgres: Shop, way: Way, encoding: str) -> None:
    way.handles(postgres, first_then(sends(encoding)))
    assert one_by_one(postgres, way, [1, "ä-1", "ö-2"]) == [P, P, P]
    assert postgres.claims() == sorted(["1", "ä-1", "ö-2"])
    elsewhere(postgres, way, ["ä-1", "ö-2"])
    assert postgres.effects() == ["1", "ä-1", "ö-2"]


@each_way
def test_set_names_on_mariadb_stores_no_key_otherwise(mariadb: Shop, way: Way) -> None:
    way.handles(mariadb, first_then(sends("SET NAMES latin1")))
    assert one_by_one(mariadb, way, [1, "ä-1", "ö-2"]) == [P, P, P]
    assert mariadb.claims() == sorted(["1", "ä-1", "ö-2"])
    elsewhere(mariadb, way, ["ä-1", "ö-2"])
    assert mariadb.effects() == ["1", "ä-1", "ö-2"]


def elsewhere(shop: Shop, way: Way, keys: list[str]) -> None:
    """Copies over connections that no handler had."""
    fresh = create_engine(shop.url)
    fresh_async = create_async_engine(shop.async_engine.url)
    shop.fresh_eo(fresh, fresh_async)
    way.handles(shop, first_then(lambda session: None))
    assert one_by_one(shop, way, keys) == [D] * len(keys)
    shop.await_(fresh_async.dispose())
    fresh.dispose()


# -- roles and paths of one transaction --------------------------------------------------------------------------------


@pytest.fixture
def tenants(postgres: Shop) -> Iterator[Shop]:
    """A role that may write effects, and nothing of ours; a schema of its own."""
    with_another_schema(postgres, ours=True)
    run(
        postgres,
        "CREATE ROLE tenant NOLOGIN",
        "GRANT INSERT, SELECT ON effect TO tenant",
        "GRANT USAGE ON SEQUENCE effect_id_seq TO tenant",
        "GRANT USAGE ON SCHEMA other TO tenant",
    )
    yield postgres
    run(postgres, "DROP OWNED BY tenant", "DROP ROLE tenant")


AS_TENANT = {
    "role": "SET LOCAL ROLE tenant",
    "role by set_config": "SELECT set_config('role', 'tenant', true)",
    "role by the session's user": "SET LOCAL SESSION AUTHORIZATION tenant",
    "path": "SET LOCAL search_path TO other, public",
    "path without our tables": "SET LOCAL search_path TO pg_catalog",
}


@each_way
@pytest.mark.parametrize("tenant", AS_TENANT)
def test_a_message_that_failed_under_a_tenants_role_or_path_succeeds_at_its_next_try(
    tenants: Shop, way: Way, tenant: str
) -> None:
    failing = [True]

    def do(session: Session, no: Any) -> None:
        session.execute(text(AS_TENANT[tenant]))
        session.execute(text("INSERT INTO public.effect (text) VALUES (:text)"), {"text": str(no)})
        if failing and no == 1:
            raise ZeroDivisionError

    way.handles(tenants, do)
    assert way.deliver(tenants, [order(no) for no in (1, 2)]) == [F, P]
    failing.clear()
    assert way.deliver(tenants, [order(1, attempt=2)]) == [P]
    assert tenants.failure().state == "resolved"
    assert way.deliver(tenants, [order(no, attempt=3) for no in (1, 2)]) == [D, D]
    nothing_of_ours_in(tenants, "other")
    # what the handler set is in force when its deferred triggers run, at COMMIT
    roles = set(column(tenants, "SELECT role FROM public.at_commit"))
    paths = set(column(tenants, "SELECT path FROM public.at_commit"))
    if tenant.startswith("role"):
        assert roles == {"tenant"}
    else:
        assert paths == {AS_TENANT[tenant].partition(" TO ")[2]}


@pytest.mark.parametrize("way", [ALONE, UNDER_A_LEASE], ids=str)
def test_a_role_that_a_handler_set_for_the_session_is_not_the_next_ones(tenants: Shop, way: Way) -> None:
    seen: list[Any] = []
    way.handles(
        tenants,
        first_then(
            sends("SET ROLE tenant"),
            lambda session: seen.append(session.execute(text("SELECT current_user")).scalar_one()),
        ),
    )
    assert one_by_one(tenants, way, [1, 2]) == [P, P]
    assert seen == [tenants.engine.url.username]


# -- what else a session keeps -----------------------------------------------------------------------------------------

KEPT_POSTGRES: dict[str, tuple[str, str, Any]] = {
    "SET": ("SET timezone = 'Asia/Tokyo'", "SELECT current_setting('timezone') = 'Asia/Tokyo'", False),
    "SET, in a comment": ("/* here */ sEt TIME ZONE 'Asia/Tokyo'", "SELECT current_setting('timezone') = 'Asia/Tokyo'", False),
    "SET SESSION CHARACTERISTICS": (
        "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE",
        "SELECT current_setting('transaction_isolation')",
        "read committed",
    ),
    "PREPARE": ("PREPARE mine AS SELECT 1", "SELECT count(*) FROM pg_prepared_statements WHERE name = 'mine'", 0),
    "LISTEN": ("LISTEN orders", "SELECT count(*) FROM pg_listening_channels()", 0),
    "as the second statement": (
        "SELECT 1; SET timezone = 'Asia/Tokyo'", "SELECT current_setting('timezone') = 'Asia/Tokyo'", False
    ),
    "set_config": (
        "SELECT pg_catalog.set_config('timezone', 'Asia/Tokyo', false)",
        "SELECT current_setting('timezone') = 'Asia/Tokyo'", False,
    ),
    "set_config of two": (
        "SELECT set_config('work_mem', '1MB', true), set_config('shop.tenant', 'seven', false)",
        "SELECT coalesce(current_setting('shop.tenant', true), '')", "",
    ),
    "set_config in a block": (
        "DO $$ BEGIN PERFORM set_config('shop.tenant', 'seven', false); END $$",
        "SELECT coalesce(current_setting('shop.tenant', true), '')", "",
    ),
    "SET in a block": (
        "DO $$ BEGIN SET shop.tenant = 7; END $$", "SELECT coalesce(current_setting('shop.tenant', true), '')", ""
    ),
    "SELECT INTO TEMP": ("SELECT 1 AS a INTO TEMP kept", "SELECT count(*) FROM pg_class WHERE relname = 'kept'", 0),
    "WITH ... INTO TEMPORARY": (
        "WITH x AS (SELECT 1 AS a) SELECT a INTO TEMPORARY TABLE kept FROM x",
        "SELECT count(*) FROM pg_class WHERE relname = 'kept'", 0,
    ),
    "SELECT INTO TABLE of pg_temp": (
        "SELECT 1 AS a INTO TABLE pg_temp.kept", "SELECT count(*) FROM pg_class WHERE relname = 'kept'", 0
    ),
    "UPDATE pg_settings": (
        "UPDATE pg_settings SET setting = 'Asia/Tokyo' WHERE name = 'TimeZone'",
        "SELECT current_setting('timezone') = 'Asia/Tokyo'", False,
    ),
    "CREATE TABLE in pg_temp": ("CREATE TABLE pg_temp.kept (a int)", "SELECT count(*) FROM pg_class WHERE relname = 'kept'", 0),
}  # fmt: skip
KEPT_MARIADB: dict[str, tuple[str, str, Any]] = {
    "SET": ("SET sql_mode = ''", "SELECT @@sql_mode = ''", 0),
    "SET SESSION": ("SET SESSION time_zone = '+09:00'", "SELECT @@time_zone = '+09:00'", 0),
    "SET @@": ("SET @@foreign_key_checks = 0", "SELECT @@foreign_key_checks", 1),
    "SET @variable": ("SET @tenant = 7", "SELECT @tenant", None),
    "SELECT INTO @variable": ("SELECT 7 INTO @tenant", "SELECT @tenant", None),
    "@variable :=": ("SELECT @tenant := 7", "SELECT @tenant", None),
    "DO @variable :=": ("DO @tenant := 7", "SELECT @tenant", None),
    "UPDATE @variable :=": ("UPDATE effect SET text = (@tenant := 'seven')", "SELECT @tenant", None),
    "a lock": ("DO GET_LOCK('kept', 0)", "SELECT IS_USED_LOCK('kept') = CONNECTION_ID()", None),
    "GET DIAGNOSTICS": ("GET DIAGNOSTICS @tenant = ROW_COUNT", "SELECT @tenant", None),
    "PREPARE": ("PREPARE mine FROM 'SELECT 1'", "EXECUTE mine", "refused"),
    "SET TRANSACTION": (
        "SET SESSION TRANSACTION ISOLATION LEVEL SERIALIZABLE",
        f"SELECT @@{'transaction_isolation' if MYSQLD else 'tx_isolation'}", "REPEATABLE-READ",
    ),
}  # fmt: skip


@some_ways
@pytest.mark.parametrize("kept", KEPT_POSTGRES)
def test_the_next_handler_on_postgresql_finds_nothing_that_the_first_left(postgres: Shop, way: Way, kept: str) -> None:
    _finds_nothing(postgres, way, *KEPT_POSTGRES[kept])


if not MYSQLD:
    KEPT_MARIADB["EXECUTE IMMEDIATE"] = ("EXECUTE IMMEDIATE 'SET @tenant = 7'", "SELECT @tenant", None)


@some_ways
@pytest.mark.parametrize("kept", KEPT_MARIADB)
def test_the_next_handler_on_mariadb_finds_nothing_that_the_first_left(mariadb: Shop, way: Way, kept: str) -> None:
    _finds_nothing(mariadb, way, *KEPT_MARIADB[kept])


def _finds_nothing(shop: Shop, way: Way, statement: str, look: str, expected: Any) -> None:
    seen: list[Any] = []

    def looks(session: Session) -> None:
        try:
            seen.append(session.execute(text(look)).scalar_one())
        except DBAPIError:
            seen.append("refused")

    way.handles(shop, first_then(lambda session: session.connection().exec_driver_sql(statement), looks))
    assert one_by_one(shop, way, [1, 2, 3]) == [P, P, P]
    assert seen == [expected] * 2
    assert shop.claims() == ["1", "2", "3"]


@some_ways
def test_what_a_call_gives_back_is_not_the_next_handlers(mariadb: Shop, way: Way) -> None:
    mariadb_procedures(mariadb, gives="(OUT a INT) BEGIN SET a = 7; END")
    _finds_nothing(mariadb, way, "CALL gives(@tenant)", "SELECT @tenant", None)


FOR_ONE_TRANSACTION: dict[str, Callable[[], Any]] = {
    "true": lambda: text("SELECT set_config('shop.tenant', :no, true)").bindparams(no="7"),
    "func": lambda: select(func.set_config("shop.tenant", "7", True)),
    "a parameter": lambda: text("SELECT set_config('shop.tenant', '7', :local)").bindparams(local=True),
    "a parameter that is cast": lambda: select(func.set_config("shop.tenant", "7", cast(True, Boolean))),
    "a text": lambda: text("SELECT set_config('shop.tenant', '7', 't')"),
    "a cast": lambda: text("SELECT set_config('shop.tenant', '7', true::boolean)"),
    "with what is filled and dropped": lambda: text(
        "SET LOCAL shop.tenant = 7; CREATE TEMP TABLE IF NOT EXISTS stage (a int) ON COMMIT DROP;"
        " WITH x AS (SELECT 1 AS a) INSERT INTO pg_temp.stage SELECT a FROM x"
    ),
}


@some_ways
@pytest.mark.parametrize("sets", FOR_ONE_TRANSACTION)
def test_what_is_set_for_one_transaction_costs_no_connection(postgres: Shop, way: Way, sets: str) -> None:
    """How the rows of a tenant are shown to it alone: each message of such a shop does this."""
    at: set[int] = set()

    def do(session: Session, no: Any) -> None:
        session.execute(FOR_ONE_TRANSACTION[sets]())
        at.add(session.execute(text("SELECT pg_backend_pid()")).scalar_one())
        assert session.execute(text("SELECT current_setting('shop.tenant')")).scalar_one() == "7"

    way.handles(postgres, do)
    assert one_by_one(postgres, way, [1, 2, 3]) == [P, P, P]
    assert len(at) == 1


@some_ways
def test_a_parameter_that_says_for_the_session_is_read(postgres: Shop, way: Way) -> None:
    seen: list[Any] = []
    way.handles(
        postgres,
        first_then(
            lambda session: session.execute(select(func.set_config("shop.tenant", "7", False))),
            lambda session: seen.append(
                session.execute(text("SELECT coalesce(current_setting('shop.tenant', true), '')")).scalar_one()
            ),
        ),
    )
    assert one_by_one(postgres, way, [1, 2]) == [P, P]
    assert seen == [""]


@some_ways
def test_a_parameter_that_is_negated_is_read_as_for_the_session(postgres: Shop, way: Way) -> None:
    seen: list[Any] = []
    sets = text("SELECT set_config('shop.tenant', '7', :keep IS NOT TRUE)").bindparams(keep=True)
    look = text("SELECT coalesce(current_setting('shop.tenant', true), '')")
    way.handles(
        postgres,
        first_then(
            lambda session: session.execute(sets), lambda session: seen.append(session.execute(look).scalar_one())
        ),
    )
    assert one_by_one(postgres, way, [1, 2]) == [P, P]
    assert seen == [""]


@pytest.mark.parametrize("colour", COLOURS)
def test_a_pragma_that_ends_with_the_transaction_costs_no_connection(
    request: pytest.FixtureRequest, colour: str
) -> None:
    seen: list[Any] = []

    def do(session: Session, no: Any) -> None:
        seen.append(session.execute(text("PRAGMA defer_foreign_keys")).scalar_one())
        session.execute(text("PRAGMA defer_foreign_keys = ON"))
        put(session, str(no))

    for shop in ground_on(request, "sqlite", colour):
        ALONE.handles(shop, do)
        assert one_by_one(shop, ALONE, [1]) == [P]
        made: list[object] = []
        for engine in (shop.engine, shop.async_engine.sync_engine):
            event.listen(engine, "connect", lambda *_, made=made: made.append(_))
        assert one_by_one(shop, ALONE, [2, 3, 4]) == [P, P, P]
        assert (seen, made) == ([0] * 4, [])


@pytest.mark.parametrize("colour", COLOURS)
def test_a_temporary_table_of_sqlite_that_is_made_by_its_schema_is_not_the_next_handlers(
    request: pytest.FixtureRequest, colour: str
) -> None:
    for shop in ground_on(request, "sqlite", colour):
        look = "SELECT count(*) FROM sqlite_temp_master"
        _finds_nothing(shop, ALONE, "CREATE TABLE temp.kept (a int)", look, 0)


@pytest.mark.parametrize("way", [ALONE, UNDER_A_LEASE], ids=str)
def test_a_handler_that_fails_leaves_nothing_either(postgres: Shop, way: Way) -> None:
    """A SET is undone with its transaction, LISTEN too; a prepared statement is not."""
    seen: list[Any] = []

    def fails(session: Session) -> None:
        session.execute(text("PREPARE mine AS SELECT 1"))
        raise ZeroDivisionError

    look = "SELECT count(*) FROM pg_prepared_statements WHERE name = 'mine'"
    way.handles(postgres, first_then(fails, lambda session: seen.append(session.execute(text(look)).scalar_one())))
    assert one_by_one(postgres, way, [1, 2]) == [F, P]
    assert seen == [0]


@some_ways
@pytest.mark.parametrize(
    "sets", ["SET timezone = 'Asia/Tokyo'", "RESET timezone", "RESET ALL", "SET timezone TO DEFAULT"]
)
def test_what_the_program_sets_on_its_new_connections_is_there_for_the_next_handler(
    postgres: Shop, way: Way, sets: str
) -> None:
    """A connection is as the program made it, not as the server makes it."""
    for engine in (postgres.engine, postgres.async_engine.sync_engine):

        @event.listens_for(engine, "connect")
        def connected(dbapi: Any, record: Any) -> None:
            cursor = dbapi.cursor()
            cursor.execute("SET timezone = 'Europe/Berlin'")
            cursor.close()
            dbapi.commit()

    look = "SELECT current_setting('timezone')"
    _finds_nothing(postgres, way, sets, look, "Europe/Berlin")
