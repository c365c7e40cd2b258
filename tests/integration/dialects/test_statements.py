"""Every statement we send, as text, per dialect: a change shows as a diff. EXACTLY_ONCE_TEST_APPROVE=1 writes the files anew."""

import os
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.orm import Session

from exactly_once import Message
from exactly_once.claim import ClaimRow, StepRow
from exactly_once.database.dialects import mysql, mysql_batch, mysql_wire, sqlite
from exactly_once.database.dialects.postgresql import PostgreSQL
from exactly_once.database.schema import tables
from exactly_once.database.server_clock import utcnow
from exactly_once.database.store import Store
from exactly_once.errors import Reject
from exactly_once.failures.due import DueFailures
from exactly_once.failures.failure import Failure
from exactly_once.failures.policy import ByBroker, ByPump, Park
from exactly_once.failures.store import FailureStore
from exactly_once.guards.lease.contract import HeldLease
from exactly_once.guards.lease.sql import SqlLeases
from tests.integration.shop import GROUP, Shop, order, shops

APPROVED = Path(__file__).parent / "approved"


def approve(name: str, sections: dict[str, list[str]]) -> None:
    """Compare with the approved text, or write it where that is asked for."""
    text = "\n\n".join(f"-- {title}\n" + "\n".join(statements) for title, statements in sections.items()) + "\n"
    file = APPROVED / f"{name}.txt"
    if os.environ.get("EXACTLY_ONCE_TEST_APPROVE"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert file.exists(), f"{file} is not there; EXACTLY_ONCE_TEST_APPROVE=1 writes it"
    assert text == file.read_text(), f"statements differ from {file}; EXACTLY_ONCE_TEST_APPROVE=1 writes it anew"


def claim_texts(dialect: str) -> dict[str, list[str]]:
    """The texts that go below SQLAlchemy, as the dialect's module has them."""
    if dialect == "postgres":
        from exactly_once.database.dialects import postgresql, postgresql_batch, postgresql_settings

        return {
            "look": [postgresql.LOOK],
            "bound, in a transaction of our own": list(postgresql_settings.BOUND),
            "bound, in one that is open": list(postgresql_settings.BOUND_IN_OPEN),
            "claim": [postgresql.CLAIM],
            "claim, prepared": [postgresql.EXECUTE],
            "known": [postgresql.KNOWN],
            "with COMMIT": [postgresql_settings.DURABLE],
            "around a statement of ours in a handler's transaction": list(postgresql_settings.IN_OUR_NAME),
            "the same where the handler took another user for its session": list(postgresql_settings.AS_OUR_USER),
            "where the application sets a role anew: asked with BEGIN": [postgresql_settings.OWN_ROLE],
            "claim of a batch": [postgresql_batch.CLAIM],
            "known of a batch": [postgresql_batch.KNOWN],
        }
    if dialect == "mariadb":
        of_group = {
            "claim of a batch": [mysql_batch.CLAIM, mysql_batch.ROW],
            "known of a batch": [mysql_batch.KNOWN, mysql.KEY],
        }
        single = {
            "prepare": [mysql.PREPARE],
            "bound": [mysql_wire.BOUND],
            "claim": [mysql.CLAIM],
            "known": [mysql.KNOWN],
        }
        ends = {
            "with COMMIT": [mysql.FINISH, mysql.FINISH_MANY],
            "a transaction under a lease": [mysql.TRACE, mysql.UNTRACE, mysql.TRACE_STANDS],
            "what is put right and looked at with the claim": [mysql.RIGHT, mysql.LOGGED, mysql.LOGS],
            "what each commit changes": [mysql.COMMITS, *mysql.READ.values()],
        }
        return single | ends | of_group
    witness = {"behind our BEGIN": [sqlite.SAVEPOINT], "with COMMIT": [sqlite.RELEASE]}
    return {"begin": [sqlite.BEGIN], "claim": [sqlite.CLAIM], "known": [sqlite.KNOWN]} | witness


def recorded(engine: Engine, do: Callable[[], object]) -> list[str]:
    """What is sent through SQLAlchemy meanwhile, each text once, in order."""
    sent: list[str] = []

    def keep(connection: Connection, statement: str) -> None:
        # tables are named with their database there, which has another name in each run
        text = statement.replace(f"{connection.engine.url.database}.", "shop.")
        if text not in sent:
            sent.append(text)

    def seen(connection: Connection, cursor: Any, statement: str, *_: Any) -> None:
        keep(connection, statement)

    real = PostgreSQL.in_our_name

    def in_our_name(self: PostgreSQL, connection: Connection, statement: Any, values: Any) -> int:
        keep(connection, str(statement.compile(dialect=connection.dialect)))
        return real(self, connection, statement, values)

    PostgreSQL.in_our_name = in_our_name  # type: ignore[method-assign]
    event.listen(engine, "before_cursor_execute", seen)
    try:
        do()
    finally:
        event.remove(engine, "before_cursor_execute", seen)
        PostgreSQL.in_our_name = real  # type: ignore[method-assign]
    return sent


@pytest.mark.parametrize("dialect", ["postgres", "mariadb", "sqlite"])
def test_the_statements_are_the_approved_ones(request: pytest.FixtureRequest, dialect: str) -> None:
    sections = claim_texts(dialect)
    for shop in shops(request, dialect, "sync"):
        sections |= failure_statements(shop)
        sections |= lease_statements(shop)
    approve(dialect, sections)


def test_the_scripts_are_the_approved_ones() -> None:
    from exactly_once.guards.lease import scripts

    approve("redis", {name.lower(): [getattr(scripts, name).strip()] for name in sorted(scripts.__all__)})


def lease_statements(shop: Shop) -> dict[str, list[str]]:
    """Each change of a lease, in the order of its life."""
    name = {"postgres": "postgresql", "mariadb": "mysql"}.get(shop.dialect, shop.dialect)
    module = import_module(f"exactly_once.database.dialects.{name}_lease")
    texts = {f"lease: {each.lower()}": [getattr(module, each)] for each in module.__all__ if each.isupper()}
    store = Store("default", shop.url)
    leases = SqlLeases(store.name, store.engine, store.dialect, lambda: store.tables)
    row = ClaimRow(GROUP, "handler", "L-1", b"\x01")

    def held(token: str) -> HeldLease:
        seen = leases.claim(row, token, timedelta(seconds=30), also=row.fingerprint, steps=True)
        assert seen.won
        return HeldLease(row, token, seen.attempt, timedelta(seconds=30), seen.steps)

    one = held("one")
    verbs: dict[str, Callable[[], object]] = {
        "lease: record a step": lambda: leases.record(one, StepRow("a", 0, True, b"1")),
        "lease: record a beginning": lambda: leases.record(one, StepRow("b", 1, False, None)),
        "lease: record its end": lambda: leases.record(one, StepRow("b", 1, True, b"1"), begun=True),
        "lease: record what another run has recorded": lambda: leases.record(
            replace(one, token="other"), StepRow("b", 1, True, b"1"), begun=True
        ),
        "lease: renew": lambda: leases.renew([one]),
        "lease: renew what is lost": lambda: leases.renew([one, replace(one, token="lost")]),
        "lease: release": lambda: leases.release(one),
        "lease: look from outside": lambda: leases.look(row),
        "lease: resolve": lambda: leases.resolve(row, "b", b"2"),
        "lease: resolve what has no record": lambda: leases.resolve(row, "c", b"2"),
        "lease: look for a step in this database": lambda: leases.finished(row, "b"),
        "lease: the handlers of a key": lambda: leases.handlers(GROUP, "L-1"),
    }
    made = {title: recorded(store.engine, do) for title, do in verbs.items()}
    two = held("two")
    made["lease: complete"] = recorded(store.engine, lambda: leases.complete(two))
    with Session(store.engine) as session:
        made["lease: clear"] = recorded(store.engine, lambda: leases.clear_in(session.connection(), row))
    store.close()
    return texts | made


def failure_statements(shop: Shop) -> dict[str, list[str]]:
    opened = Store("default", shop.url)
    store, pumped = FailureStore(lambda: opened.tables), DueFailures(lambda: opened.tables)
    done = ClaimRow(GROUP, "handler", "A-1", b"\x01", "id-A-1")
    failure = Failure(GROUP, "handler", "A-1", b"\x01", order(ordering_key="a"), Reject("no"))
    behind = Failure(GROUP, "handler", "A-2", b"\x01", order(ordering_key="a"), Reject("no"))
    engine = create_engine(shop.url)

    def in_session(do: Callable[[Session], object]) -> Callable[[], None]:
        def run() -> None:
            with Session(engine) as session:
                do(session)
                session.rollback()

        return run

    def in_connection(do: Callable[[Connection], object]) -> Callable[[], None]:
        def run() -> None:
            with engine.begin() as connection:
                do(connection)

        return run

    def take(connection: Connection) -> None:
        pumped.take(
            connection, GROUP, ["handler", "other"], ["other"], ["other"], limit=16, lease=timedelta(seconds=60)
        )

    sections = {
        "record the first failure": in_session(lambda s: store.record(s, failure, lambda n: ByPump(timedelta(0)))),
        "record another, for the broker": in_session(
            lambda s: store.record(s, failure, lambda n: ByBroker(timedelta(0)))
        ),
        "record the last": in_session(lambda s: store.record(s, failure, lambda n: Park("dead", "no"))),
        "resolve": in_session(lambda s: store.resolve(s, opened.dialect, done, "id-A-1")),
        "resolve, ordered": in_session(lambda s: store.resolve(s, opened.dialect, done, "id-A-1", (7,))),
        "blocked": in_session(lambda s: store.order_position(s, failure, after_dead_wait=True, is_its_own=bool)),
        "blocked, going on behind dead ones": in_session(
            lambda s: store.order_position(s, failure, after_dead_wait=False, is_its_own=bool)
        ),
        "blocked behind another": in_session(
            lambda s: store.order_position(s, behind, after_dead_wait=True, is_its_own=bool)
        ),
        "make one due": in_session(lambda s: store.record(s, _due(), lambda n: ByPump(timedelta(0)))),
        "take": in_connection(take),
        "sweep": lambda: pumped.sweep(engine.begin, GROUP),
    }
    with shop.outside.begin() as connection:  # so that the sweep finds something
        claimed = {"consumer_group": GROUP, "handler": "handler", "business_key": "A-1", "status": 1}
        connection.execute(
            tables()
            .idempotent.insert()
            .values(**claimed, fingerprint=b"\x01", created_at=utcnow(), consumed_at=utcnow())
        )
    made = {title: recorded(engine, do) for title, do in sections.items()}
    engine.dispose()
    opened.close()
    return made


def _due() -> Failure:
    return Failure(GROUP, "handler", "A-2", b"\x01", Message("orders", b"{}"), Reject("no"))


def test_the_claim_of_postgresql_is_one_round_trip() -> None:
    from exactly_once.database.dialects import postgresql

    assert postgresql.CLAIM.count("INSERT INTO") == 1
    assert "ON CONFLICT (consumer_group, handler, business_key) DO NOTHING" in postgresql.CLAIM
