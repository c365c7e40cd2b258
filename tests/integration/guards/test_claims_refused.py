"""The table of claims refuses every claim, for a reason that is no message's: nothing runs, is counted or kept as dead.

A right that was taken away, a column of somebody's without a default, a CHECK, a trigger that raises or that writes to a table
which is gone. Where only the values of one message are refused, that one is counted as ever, and the others run.
"""

from collections.abc import Iterator
from datetime import timedelta
from itertools import count
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine

from exactly_once import ExactlyOnce, Outcome, Retry
from tests.integration.outside import run
from tests.integration.shop import COLOURS, DIALECTS, GROUP, Shop, order, put, shops
from tests.integration.ways import ALONE, IN_A_BATCH, UNDER_A_LEASE, Way, each_way
from tests.waiting import until

pytestmark = pytest.mark.nightly(meet=2)
P, F, DEAD, WAITING = Outcome.PROCESSED, Outcome.FAILED, Outcome.DEAD, Outcome.WAITING
THREE = Retry(immediate=0, delays=[0.01], max_attempts=3)
_names = count(1)
TABLE = "message_idempotent"

# for each server: what somebody does to our table, and how it is mended
_PG_TRIGGER = (
    "CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {does}; RETURN NEW; END $$",
    f"CREATE TRIGGER audit BEFORE INSERT ON {TABLE} FOR EACH ROW EXECUTE FUNCTION audit()",
)
_PG_MENDED = (f"DROP TRIGGER audit ON {TABLE}", "DROP FUNCTION audit()")
BREAKS: dict[str, dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "postgres": {
        "column": (
            (
                f"ALTER TABLE {TABLE} ADD COLUMN tenant int",
                f"UPDATE {TABLE} SET tenant = 0",
                f"ALTER TABLE {TABLE} ALTER tenant SET NOT NULL",
            ),
            (f"ALTER TABLE {TABLE} DROP COLUMN tenant",),
        ),
        "check": (
            (f"ALTER TABLE {TABLE} ADD CONSTRAINT other CHECK (consumer_group = 'another') NOT VALID",),
            (f"ALTER TABLE {TABLE} DROP CONSTRAINT other",),
        ),
        "trigger raises": (tuple(s.replace("{does}", "RAISE EXCEPTION 'not today'") for s in _PG_TRIGGER), _PG_MENDED),
        "trigger's table is gone": (
            tuple(s.replace("{does}", "INSERT INTO audit_2026_12 VALUES (1)") for s in _PG_TRIGGER),
            _PG_MENDED,
        ),
    },
    "mariadb": {
        "column": (
            (f"ALTER TABLE {TABLE} ADD COLUMN tenant INT NOT NULL",),
            (f"ALTER TABLE {TABLE} DROP COLUMN tenant",),
        ),
        "trigger raises": (
            (
                f"CREATE TRIGGER audit BEFORE INSERT ON {TABLE} FOR EACH ROW SIGNAL SQLSTATE '45000'"  # noqa: ISC004
                " SET MESSAGE_TEXT = 'not today'",
            ),
            ("DROP TRIGGER audit",),
        ),
        "trigger's table is gone": (
            (f"CREATE TRIGGER audit AFTER INSERT ON {TABLE} FOR EACH ROW INSERT INTO audit_2026_12 VALUES (1)",),
            ("DROP TRIGGER audit",),
        ),
    },
    "sqlite": {
        "trigger raises": (
            (f"CREATE TRIGGER audit BEFORE INSERT ON {TABLE} BEGIN SELECT RAISE(ABORT, 'not today'); END",),
            ("DROP TRIGGER audit",),
        ),
        "trigger's table is gone": (
            (f"CREATE TRIGGER audit AFTER INSERT ON {TABLE} BEGIN INSERT INTO audit_2026_12 VALUES (1); END",),
            ("DROP TRIGGER audit",),
        ),
    },
}
each_break = [(dialect, what) for dialect, breaks in BREAKS.items() for what in breaks]


@pytest.fixture(params=[(dialect, colour) for dialect in DIALECTS for colour in COLOURS], ids="-".join)
def own(request: pytest.FixtureRequest) -> Iterator[Shop]:
    """A shop of this test alone, whose tables it may change."""
    yield from shops(request, *request.param, pool_size=3)


def counts_nothing(shop: Shop, way: Way, broken: tuple[str, ...], mended: tuple[str, ...]) -> None:
    """While the table is broken each delivery waits; afterwards the same messages run."""
    way.handles(shop, lambda session, no: put(session, str(no)), retry=THREE)
    assert way.attempted(shop, [order(0)]) == [P]
    run(shop, *broken)
    ends = [e for n in (1, 2, 3) for e in way.attempted(shop, [order(1, attempt=n), order(2, attempt=n)])]
    assert ends == [WAITING] * 6
    assert shop.failures() == []
    run(shop, *mended)
    assert way.attempted(shop, [order(1, attempt=4), order(2, attempt=4)]) == [P, P]
    assert shop.effects() == ["0", "1", "2"]


@each_way
@pytest.mark.parametrize(("dialect", "what"), each_break, ids=str)
@pytest.mark.parametrize("colour", COLOURS)
def test_a_table_that_takes_no_claims_blames_no_message(
    request: pytest.FixtureRequest, dialect: str, colour: str, what: str, way: Way, caplog: pytest.LogCaptureFixture
) -> None:
    for shop in shops(request, dialect, colour, pool_size=3):
        counts_nothing(shop, way, *BREAKS[dialect][what])
        assert "takes no claims" in caplog.text
        assert "db upgrade" not in caplog.text, "the table is there: it is somebody else's that is not"


@pytest.mark.parametrize("way", [ALONE, IN_A_BATCH, UNDER_A_LEASE], ids=str)
@pytest.mark.parametrize(
    ("dialect", "right"),
    [("postgres", "INSERT"), ("postgres", "SELECT"), ("postgres", "UPDATE"), ("mariadb", "INSERT")],
)
@pytest.mark.parametrize("colour", COLOURS)
def test_a_right_that_was_taken_away_blames_no_message(
    request: pytest.FixtureRequest, dialect: str, colour: str, right: str, way: Way
) -> None:
    if right == "UPDATE" and way is not UNDER_A_LEASE:
        pytest.skip("only the claims of leases are changed before the handler runs")
    for shop in shops(request, dialect, colour, pool_size=3):
        role = f"w{next(_names)}"
        database = shop.engine.url.database
        if dialect == "postgres":
            role = f"{role}_{database}"
            rights = (f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}",)
            run(shop, f"CREATE ROLE {role} LOGIN PASSWORD 'w'", f"GRANT USAGE ON SCHEMA public TO {role}", *rights)
            run(shop, f"GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {role}")
            more: dict[str, Any] = {"connect_args": {"options": f"-c role={role}"}}
            engines = (
                create_engine(shop.engine.url, **more),
                create_async_engine(shop.async_engine.url, **more),
            )
            taken = (f"REVOKE {right} ON {TABLE} FROM {role}",)
            given = (f"GRANT {right} ON {TABLE} TO {role}",)
        else:
            user = f"'{role}'"  # from any host
            with shop.outside.begin() as connection:
                names = connection.execute(
                    text("SELECT table_name FROM information_schema.tables WHERE table_schema = DATABASE()")
                ).scalars()
                run(shop, f"DROP USER IF EXISTS {user}", f"CREATE USER {user} IDENTIFIED BY 'w'")
                run(shop, *(f"GRANT ALL ON `{database}`.`{name}` TO {user}" for name in names))
            urls = (shop.engine.url, shop.async_engine.url)
            sync_url, async_url = (url.set(username=role, password="w") for url in urls)
            engines = create_engine(sync_url), create_async_engine(async_url)
            taken = (f"REVOKE {right} ON {TABLE} FROM {user}",)
            given = (f"GRANT {right} ON {TABLE} TO {user}",)
        try:
            shop.fresh_eo(*engines)
            counts_nothing(shop, way, taken, given)
        finally:
            engines[0].dispose()
            shop.await_(engines[1].dispose())
            run(
                shop,
                *((f"DROP OWNED BY {role}", f"DROP ROLE {role}") if dialect == "postgres" else (f"DROP USER {user}",)),
            )


# what refuses the key of one message alone
_ONE: dict[str, str] = {
    "postgres": f"ALTER TABLE {TABLE} ADD CONSTRAINT one CHECK (business_key <> '2')",
    "mariadb": f"ALTER TABLE {TABLE} ADD CONSTRAINT one CHECK (business_key <> '2')",
    "sqlite": f"CREATE TRIGGER one BEFORE INSERT ON {TABLE} WHEN NEW.business_key = '2'"
    " BEGIN SELECT RAISE(ABORT, 'not this one'); END",
}


@each_way
def test_a_message_whose_own_values_are_refused_is_counted_and_the_others_run(own: Shop, way: Way) -> None:
    way.handles(own, lambda session, no: put(session, str(no)), retry=THREE)
    run(own, _ONE[own.dialect])
    ends = [e for n in (1, 2, 3) for e in way.attempted(own, [order(2, attempt=n), order(10 + n)])]
    assert ends == [F, P, F, P, DEAD, P]
    assert (own.failure().business_key, own.failure().attempts) == ("2", 3)
    assert sorted(own.effects()) == ["11", "12", "13"]


@pytest.mark.parametrize("broken", ["trigger raises", "no table"])
@pytest.mark.parametrize("batch", [None, 10])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_worker_holds_what_the_table_refuses_and_spends_no_attempt(
    request: pytest.FixtureRequest, dialect: str, batch: int | None, broken: str
) -> None:
    breaks, mends = (
        BREAKS[dialect][broken]
        if broken != "no table"
        else ((f"ALTER TABLE {TABLE} RENAME TO elsewhere",), (f"ALTER TABLE elsewhere RENAME TO {TABLE}",))
    )
    for shop in shops(request, dialect, "sync", pool_size=3):
        shop.eo = ExactlyOnce(shop.url, group=GROUP)
        attempts = []
        shop.handles(lambda session: put(session, "x"), batch=batch, retry=THREE)
        url = f"memory://claims-refused-{next(_names)}"
        with (
            shop.eo.worker(url, concurrency=2, drain_timeout=timedelta(seconds=2)) as worker,
            shop.eo.producer(url) as producer,
        ):
            producer.send(order(0))
            until(lambda: worker.counts.acked == 1, "the first is processed")
            run(shop, *breaks)
            producer.send_all([order(n) for n in range(1, 4)])
            until(lambda: worker.counts.held, "held")
            attempts.append(worker.counts.redelivered)
            run(shop, *mends)
            until(lambda: worker.counts.acked == 4, "all are processed")
            attempts.append(worker.counts.redelivered)
        assert attempts == [0, 0]
        assert shop.failures() == []
        assert shop.effects() == ["x"] * 4
