"""MariaDB: a login has its rights by a default role, and a handler takes its tenant's for its own statements (SET ROLE).

What is written in our name goes with the rights that the login began with, as on PostgreSQL; and the handler's role is its own
again behind it.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

from exactly_once import Outcome, Retry
from tests.integration.outside import run
from tests.integration.shop import COLOURS, Shop, order, shops
from tests.integration.ways import ALONE, IN_A_BATCH, UNDER_A_LEASE, WAYS, Way, one_by_one

P, D, F = Outcome.PROCESSED, Outcome.DUPLICATE, Outcome.FAILED
each_way = pytest.mark.parametrize("way", WAYS, ids=str)


@pytest.fixture(params=COLOURS)
def roles(request: pytest.FixtureRequest) -> Iterator[Shop]:
    """A shop whose login may do nothing but by the role that it begins with; the tenant's may write effects alone."""
    for shop in shops(request, "mariadb", request.param, pool_size=3):
        database = shop.engine.url.database
        login, app, tenant = (f"{name}_{str(database)[-8:]}" for name in ("login", "app", "tenant"))
        run(
            shop,
            f"CREATE ROLE {app}",
            f"CREATE ROLE {tenant}",
            f"GRANT ALL ON `{database}`.* TO {app}",
            f"GRANT SELECT, INSERT ON `{database}`.effect TO {tenant}",
            f"CREATE USER {login}@'%%' IDENTIFIED BY 'x'",
            f"GRANT {app} TO {login}@'%%'",
            f"GRANT {tenant} TO {login}@'%%'",
            f"SET DEFAULT ROLE {app} FOR {login}@'%%'",
        )
        url = shop.engine.url.set(username=login, password="x")
        one, two = create_engine(url), create_async_engine(url.set(drivername="mysql+asyncmy"))
        shop.fresh_eo(one, two)
        yield shop
        one.dispose()
        shop.await_(two.dispose())
        run(shop, f"DROP USER {login}@'%%'", f"DROP ROLE {app}", f"DROP ROLE {tenant}")


def takes_its_tenants(shop: Shop, session: Session, no: Any) -> None:
    tenant = f"tenant_{str(shop.engine.url.database)[-8:]}"
    session.execute(text(f"SET ROLE {tenant}"))
    session.execute(
        text(f"INSERT INTO `{shop.engine.url.database}`.effect (text) VALUES (CONCAT(:no, CURRENT_ROLE()))"),
        {"no": f"{no} as "},
    )


def effects(shop: Shop) -> list[str]:
    return sorted(each.partition(" ")[0] for each in shop.effects())


@each_way
def test_a_handler_that_takes_its_tenants_role_is_processed_once(roles: Shop, way: Way) -> None:
    bad = {3}

    def do(session: Session, no: Any) -> None:
        if no != 9:
            takes_its_tenants(roles, session, no)
        if no in bad:
            raise ZeroDivisionError

    way.handles(roles, do, retry=Retry(immediate=0, max_attempts=5))
    assert one_by_one(roles, way, [9, 1, 9, 1, 3]) == [P, P, D, D, F]
    bad.clear()
    # its failure is settled in the handler's transaction, in our name too
    assert one_by_one(roles, way, [3, 3]) == [P, D]
    assert [failure.state for failure in roles.failures()] == ["resolved"]
    assert effects(roles) == ["1", "3"]


@each_way
def test_messages_that_meet_under_a_tenants_role_are_each_processed(roles: Shop, way: Way) -> None:
    way.handles(roles, lambda session, no: takes_its_tenants(roles, session, no), retry=Retry(immediate=0))
    assert way.deliver(roles, [order(str(no)) for no in range(5)]) == [P] * 5
    assert way.deliver(roles, [order(str(no)) for no in range(5)]) == [D] * 5
    assert effects(roles) == [str(no) for no in range(5)]


@pytest.mark.parametrize("way", [ALONE, IN_A_BATCH, UNDER_A_LEASE], ids=str)
def test_a_commit_hidden_behind_a_tenants_role_is_seen(roles: Shop, way: Way) -> None:
    """The claim's transaction is over: what asks for it goes on in another role, and its answer is the same."""
    database = roles.engine.url.database
    run(
        roles,
        f"CREATE PROCEDURE `{database}`.commits() MODIFIES SQL DATA BEGIN COMMIT; END",
        f"GRANT EXECUTE ON PROCEDURE `{database}`.commits TO tenant_{str(database)[-8:]}",
    )

    def do(session: Session, no: Any) -> None:
        takes_its_tenants(roles, session, no)
        session.execute(text(f"CALL `{database}`.commits()"))
        session.execute(text(f"INSERT INTO `{database}`.effect (text) VALUES ('behind')"))

    way.handles(roles, do, retry=Retry(immediate=0, max_attempts=5))
    ends = one_by_one(roles, way, [1, 1])
    assert P not in ends
    assert [failure.state for failure in roles.failures()] == ["broken"]
    assert effects(roles) == ["1"]


def test_a_denial_comes_when_the_statement_before_it_is_done(roles: Shop) -> None:
    """So a COMMIT that is sent again behind a denial has had its witness: the savepoint was there, and is released."""
    database = roles.engine.url.database
    with roles.eo.stores["default"].engine.connect() as connection:
        connection.exec_driver_sql("SAVEPOINT witness")
        connection.exec_driver_sql(f"SET ROLE tenant_{str(database)[-8:]}")
        with pytest.raises(DBAPIError, match="1142"):
            connection.exec_driver_sql(
                "BEGIN NOT ATOMIC RELEASE SAVEPOINT witness;"
                f" UPDATE `{database}`.message_idempotent SET status = 1; COMMIT; END"
            )
        with pytest.raises(DBAPIError, match="1305"):
            connection.exec_driver_sql("RELEASE SAVEPOINT witness")
