"""What stands before we come: an engine that was used already, a table of ours that was altered, rows of an older version."""

from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import create_engine, insert, text
from sqlalchemy.orm import Session, sessionmaker

from exactly_once import ConfigurationError, ExactlyOnce, Outcome, alembic
from exactly_once.doctor.looking import examine
from tests.integration.guards.forking import Forked
from tests.integration.shop import GROUP, Shop, order, put, shops
from tests.integration.ways import ALONE, requeued

PID = {"postgres": "SELECT pg_backend_pid()", "mariadb": "SELECT CONNECTION_ID()"}


@pytest.mark.parametrize("owner", ["never had one", "lost it in a downgrade"])
def test_a_broken_message_from_before_the_second_version_is_not_lost_when_it_is_requeued(
    shop: Shop, owner: str
) -> None:
    """As the upgrade from the first version leaves it: claim_owner is NULL, and the claim stands."""
    ran: list[Any] = []

    def do(session: Session, no: Any) -> None:
        ran.append(no)
        put(session, str(no))

    ALONE.handles(shop, do)
    assert shop.process(order(1)) is Outcome.PROCESSED
    (claim,) = shop.rows(shop.tables.idempotent)
    fingerprint = claim.fingerprint
    with shop.outside.begin() as connection:
        connection.exec_driver_sql("DELETE FROM effect")
        now = datetime.now(UTC)
        connection.execute(
            insert(shop.tables.failure).values(
                consumer_group=GROUP, handler="handler", failure_key="k:1", fingerprint=fingerprint, business_key="1",
                topic="orders", body=order(1).body, properties="{}", message_id="id-1", error_class="Misuse",
                error_text="", attempts=1, first_failed_at=now, last_failed_at=now, state="broken",
                claim_owner=None if owner == "never had one" else claim.owner,
            )
        )  # fmt: skip
    if owner != "never had one":
        shop.engine.dispose()
        alembic.downgrade(shop.url, version=1)
        alembic.upgrade(shop.url)
    ran.clear()
    requeued(shop, [shop.failure().id])
    outcome = shop.process(order(1, attempt=2))
    row = shop.failure()
    assert ran == [1] or row.state in ("broken", "dead"), f"nothing ran, {outcome}, and nobody is told: {row.state}"


def test_a_table_of_ours_that_is_not_logged_is_named_by_the_doctor(postgres_url: str) -> None:
    """After a crash the server empties it, with all claims."""
    with create_engine(postgres_url).begin() as connection:
        connection.exec_driver_sql("ALTER TABLE message_idempotent SET UNLOGGED")
    eo = ExactlyOnce(postgres_url, group=GROUP)

    @eo.handler("orders", key="no", name="handler")
    def handler(session: Session) -> None: ...

    said = " ".join(str(each) for each in examine(eo, None))
    assert "UNLOGGED" in said.upper()


def test_a_sessionmaker_that_begins_nothing_by_itself_is_refused(shop: Shop) -> None:
    eo = ExactlyOnce(sessionmaker(shop.engine, autobegin=False), group=GROUP)

    @eo.handler("orders", key="no", name="handler")
    def handler(session: Session) -> None: ...

    with pytest.raises(ConfigurationError, match="autobegin"):
        eo.process(order(1))


@pytest.mark.parametrize("dialect", ["postgres", "mariadb"])
@pytest.mark.parametrize("door", ["process", "claim"])
def test_a_child_has_no_connection_of_an_engine_that_its_parent_gave_us_and_used_by_itself(
    request: pytest.FixtureRequest, dialect: str, door: str
) -> None:
    """The program looks at its database at import, and gives us the engine; nothing was processed before the fork.

    Two processes on one connection take each other's answers: that of a COMMIT, too.
    """
    for shop in shops(request, dialect, "sync", pool_size=3):
        with shop.engine.begin() as connection:
            parents = connection.execute(text(PID[dialect])).scalar_one()
        seen: list[Any] = []

        def look(session: Session, seen: list[Any] = seen) -> None:
            seen.append(session.execute(text(PID[dialect])).scalar_one())

        ALONE.handles(shop, lambda session, no: look(session))

        def child(shop: Shop = shop, seen: list[Any] = seen) -> Any:
            if door == "process":
                shop.eo.process(order("child"))
            else:
                with Session(shop.engine) as session, session.begin():
                    assert shop.eo.claim(session, "handler", "child")
                    look(session)
            return seen[0]

        assert Forked(child).result() != parents, "the child speaks over its parent's connection"
