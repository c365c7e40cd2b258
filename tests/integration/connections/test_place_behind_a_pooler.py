"""Where our tables are, learnt through a pooler whose connections to the server somebody has had."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import psycopg
import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.orm import Session

from exactly_once import ExactlyOnce, Message, Outcome
from exactly_once.alembic import ready
from exactly_once.cli.command import main
from exactly_once.errors import ConfigurationError
from tests.integration.connections.test_pooler import SERVER_CONNECTIONS, behind, configure  # noqa: F401
from tests.services.pgbouncer import PgBouncer

TENANT = "tenant_of_a_pooler"


@pytest.fixture
def shared(behind: PgBouncer) -> Iterator[PgBouncer]:  # noqa: F811
    """A pooler whose database has a tenant with claims of its own, in the schema that its role finds first."""
    direct = behind.direct  # type: ignore[attr-defined]
    with direct.begin() as connection:
        connection.execute(text(f"CREATE ROLE {TENANT}"))
        connection.execute(text(f"CREATE SCHEMA {TENANT}"))
        connection.execute(text(f"CREATE TABLE {TENANT}.message_idempotent (LIKE message_idempotent INCLUDING ALL)"))
        connection.execute(text(f"GRANT USAGE ON SCHEMA {TENANT} TO {TENANT}"))
    yield behind
    with direct.begin() as connection:
        connection.execute(text(f"DROP OWNED BY {TENANT}"))
        connection.execute(text(f"DROP ROLE {TENANT}"))


def left(pooler: PgBouncer, statement: str) -> None:
    """Have a stranger leave a setting in each of the pooler's connections to the server."""
    with ExitStack() as stack:
        for _ in range(SERVER_CONNECTIONS):
            url = pooler.url.replace("+psycopg", "")
            stack.enter_context(psycopg.connect(url, prepare_threshold=None)).execute(statement)


def by_process(database: Any) -> Callable[[], bool]:
    """Say of one message whether it was processed, by a program that was just started."""
    eo = ExactlyOnce(database, group="pooled")

    @eo.handler("orders", key="no", name="handler")
    def handler(session: Session, body: dict[str, Any]) -> None:
        session.execute(text("INSERT INTO public.ledger_0 (no, kind) VALUES (:no, 0)"), body)

    def ran() -> bool:
        end = eo.process(Message("orders", b'{"no": 1}'))
        assert end in (Outcome.PROCESSED, Outcome.DUPLICATE)
        return end is Outcome.PROCESSED

    return ran


def by_claim(database: Any) -> Callable[[], bool]:
    """The same through door 1."""
    engine = create_engine(database)
    eo = ExactlyOnce(group="pooled")

    def ran() -> bool:
        with Session(engine) as session, session.begin():
            return eo.claim(session, "handler", "1")

    return ran


@pytest.mark.parametrize("program", [by_process, by_claim])
@pytest.mark.parametrize(
    "statement",
    [f"SET search_path = {TENANT}", f"SET search_path = {TENANT}, public", f"SET ROLE {TENANT}"],
    ids=["path", "path of both", "role"],
)
def test_a_path_that_a_stranger_left_is_not_where_our_tables_are(
    shared: PgBouncer, program: Callable[[Any], Callable[[], bool]], statement: str
) -> None:
    assert program(shared.url)()
    left(shared, statement)
    started = program(shared.url)
    # by the first of them the role shows a schema of its own name, which "$user" is
    if statement.startswith("SET ROLE"):
        eo = ExactlyOnce(shared.url, group="pooled")
        assert eo.stores["default"].tables.idempotent.schema == "public"
    else:
        assert not started()


@pytest.mark.parametrize("program", [by_process, by_claim])
@pytest.mark.parametrize("whose", ["database", "role"])
def test_a_path_that_sessions_begin_with_is_where_our_tables_are(
    shared: PgBouncer, program: Callable[[Any], Callable[[], bool]], whose: str
) -> None:
    user = shared.direct.url.username  # type: ignore[attr-defined]
    with shared.direct.begin() as connection:  # type: ignore[attr-defined]
        connection.execute(text("CREATE SCHEMA shop"))
        for name in (
            connection.execute(text("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")).scalars().all()
        ):
            if name.startswith(("message_", "exactly_once")):
                connection.execute(text(f"ALTER TABLE public.{name} SET SCHEMA shop"))
        if whose == "role":
            connection.execute(
                text(
                    f'ALTER ROLE "{user}" IN DATABASE "{shared.direct.url.database}"'  # type: ignore[attr-defined]
                    " SET search_path = shop, public"
                )
            )
    if whose == "role":
        configure(shared, "work_mem = '5MB'")  # the pooler's connections are made anew
    else:
        configure(shared, "search_path = shop, public")
    assert program(shared.url)()
    left(shared, f"SET search_path = {TENANT}")
    assert not program(shared.url)()


def test_a_path_that_a_listener_of_the_program_sets_may_name_our_tables_too(shared: PgBouncer) -> None:
    engine = create_engine(shared.url)

    @event.listens_for(engine, "connect")
    def path(dbapi: Any, record: Any) -> None:
        dbapi.execute(f"SET search_path = {TENANT}")
        dbapi.commit()

    eo = ExactlyOnce(engine, group="pooled")
    # which of the two it means nobody can say: the listener, or what sessions begin with
    with pytest.raises(ConfigurationError, match="Several schemas"):
        _ = eo.stores["default"].tables
    engine.dispose()


def test_a_worker_starts_and_the_tables_are_looked_at_behind_a_path_that_a_stranger_left(
    shared: PgBouncer, capsys: pytest.CaptureFixture[str]
) -> None:
    left(shared, f"SET search_path = {TENANT}")
    assert ready.problem(ExactlyOnce(shared.url, group="pooled").stores["default"]) is None
    for command in ("upgrade", "check"):
        with pytest.raises(SystemExit) as ended:
            main(["db", command, "--database", shared.url])
        assert ended.value.code == 0, capsys.readouterr().err
    with shared.direct.connect() as connection:  # type: ignore[attr-defined]
        made = text("SELECT count(*) FROM pg_tables WHERE schemaname = :tenant")
        assert connection.execute(made, {"tenant": TENANT}).scalar_one() == 1
