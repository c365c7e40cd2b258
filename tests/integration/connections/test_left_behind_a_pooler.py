"""A stranger left some of a pooler's connections to the server so that nothing can be written on them.

Whoever meets one of them throws it away, so each costs a delivery at most, whoever is served by it next.
"""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from exactly_once import ExactlyOnce, Lease, Message, Outcome, Retry, Steps
from tests.integration.connections.test_pooler import SERVER_CONNECTIONS, behind  # noqa: F401
from tests.integration.shop import COLOURS, order
from tests.services.pgbouncer import PgBouncer
from tests.waiting import until

pytestmark = pytest.mark.nightly(meet=2)

READ_ONLY = "SET default_transaction_read_only = on"
GUARDS: dict[str, dict[str, Any]] = {
    "transaction": {},
    "lease": {"guard": Lease(timedelta(seconds=30))},
    "group": {"batch": 10},
}


def left(pooler: PgBouncer, statement: str, many: int) -> None:
    """Have a stranger leave a setting in so many of the pooler's connections to the server."""
    with ExitStack() as stack:
        for _ in range(many):
            url = pooler.url.replace("+psycopg", "")
            stack.enter_context(psycopg.connect(url, prepare_threshold=None)).execute(statement)


def put(session: Session, no: Any) -> None:
    session.execute(text("INSERT INTO public.ledger_0 (no, kind) VALUES (:no, 0)"), {"no": no})


def there(pooler: PgBouncer) -> list[int]:
    with pooler.direct.connect() as connection:  # type: ignore[attr-defined]
        return sorted(connection.execute(text("SELECT no FROM ledger_0")).scalars())


class Program:
    """With a handler that puts the number of its message, and fails where it is told to."""

    def __init__(self, pooler: PgBouncer, guard: str, colour: str) -> None:
        self.eo, self._colour = ExactlyOnce(pooler.url, group="pooled"), colour
        self.bad: set[int] = set()
        self.runner = asyncio.Runner()
        options = {"key": "no", "name": "handler", "retry": Retry(immediate=0, delays=[0.1], max_attempts=5)}

        def do(session: Session, no: int) -> None:
            put(session, no)
            if no in self.bad:
                raise ZeroDivisionError

        if colour == "async":

            @self.eo.handler("orders", **options, **GUARDS[guard])
            async def awaited(session: AsyncSession, body: dict[str, Any]) -> None:
                await session.run_sync(do, body["no"])
        else:

            @self.eo.handler("orders", **options, **GUARDS[guard])
            def plain(session: Session, body: dict[str, Any]) -> None:
                do(session, body["no"])

    def process(self, no: int) -> Outcome:
        message = Message("orders", b'{"no": %d}' % no)
        return self.runner.run(self.eo.aprocess(message)) if self._colour == "async" else self.eo.process(message)


@contextmanager
def program(pooler: PgBouncer, guard: str, colour: str) -> Iterator[Program]:
    made = Program(pooler, guard, colour)
    with made.runner:
        yield made


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("many", [1, SERVER_CONNECTIONS])
def test_each_connection_that_a_stranger_left_read_only_costs_a_delivery_at_most(
    behind: PgBouncer,  # noqa: F811
    guard: str,
    colour: str,
    many: int,
) -> None:
    with program(behind, guard, colour) as shop:
        assert shop.process(1) is Outcome.PROCESSED
        left(behind, READ_ONLY, many)
        ends = [shop.process(2) for _ in range(2 * SERVER_CONNECTIONS)]
        # it may have been processed and not yet told so: then the next one is a duplicate
        assert set(ends[: ends.index(Outcome.DUPLICATE)]) <= {Outcome.WAITING, Outcome.PROCESSED, Outcome.IN_PROGRESS}
        assert ends[SERVER_CONNECTIONS + 1 :] == [Outcome.DUPLICATE] * (SERVER_CONNECTIONS - 1)
        assert [shop.process(no) for no in range(3, 9)] == [Outcome.PROCESSED] * 6
    assert there(behind) == list(range(1, 9))


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("guard", GUARDS)
def test_a_failure_is_written_down_though_a_stranger_left_connections_read_only(
    behind: PgBouncer,  # noqa: F811
    guard: str,
    colour: str,
) -> None:
    with program(behind, guard, colour) as shop:
        assert shop.process(1) is Outcome.PROCESSED
        shop.bad.add(2)
        left(behind, READ_ONLY, SERVER_CONNECTIONS)
        ends = [shop.process(2) for _ in range(2 * SERVER_CONNECTIONS)]
        assert Outcome.FAILED in ends[: SERVER_CONNECTIONS + 1]
        assert set(ends) <= {Outcome.FAILED, Outcome.WAITING, Outcome.DEAD}
        shop.bad.clear()
    assert there(behind) == [1]


@pytest.mark.parametrize("url", ["memory://", "sql://"])
@pytest.mark.parametrize("guard", GUARDS)
def test_a_worker_goes_on_though_a_stranger_left_connections_read_only(
    behind: PgBouncer,  # noqa: F811
    url: str,
    guard: str,
) -> None:
    name = url if url == "sql://" else f"memory://left-{guard}"
    sender = ExactlyOnce(behind.direct, group="sender")  # type: ignore[attr-defined]
    with program(behind, guard, "sync") as shop:
        by = sender if url == "sql://" else shop.eo
        with shop.eo.worker(name, concurrency=2), by.producer(name) as producer:
            producer.send(order(1))
            until(lambda: there(behind) == [1], "the first has run")
            for no in range(2, 12):
                if no in (2, 6):
                    left(behind, READ_ONLY, 2)
                producer.send(order(no))
            until(lambda: there(behind) == list(range(1, 12)), "all have run")


def test_steps_are_recorded_though_a_stranger_left_connections_read_only(behind: PgBouncer) -> None:  # noqa: F811
    eo = ExactlyOnce(behind.url, group="pooled")
    called: list[str] = []

    @eo.handler("orders", key="no", name="handler", guard=GUARDS["lease"]["guard"], retry=Retry(immediate=0))
    def stepwise(session: Session, steps: Steps, body: dict[str, Any]) -> None:
        for name in ("one", "two"):
            left(behind, READ_ONLY, 2)
            steps.run(name, lambda key, name=name: called.append(name))
        put(session, body["no"])

    ends = [eo.process(Message("orders", b'{"no": 1}')) for _ in range(3 * SERVER_CONNECTIONS)]
    assert ends[-1] is Outcome.DUPLICATE, (ends, called)
    assert there(behind) == [1]


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("what", ["role", "time limit"])
def test_no_claim_fails_by_a_role_or_a_time_limit_that_a_stranger_left(
    behind: PgBouncer,  # noqa: F811
    what: str,
    guard: str,
    colour: str,
) -> None:
    stranger = f"stranger_{behind.direct.url.database[-8:]}"  # type: ignore[attr-defined]
    with behind.direct.begin() as connection:  # type: ignore[attr-defined]
        connection.execute(text(f"CREATE ROLE {stranger}"))
        connection.execute(text(f"GRANT INSERT, SELECT ON ledger_0 TO {stranger}"))
        if what == "time limit":
            # so that each claim takes longer than what was left
            connection.execute(
                text(
                    "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS"
                    " $$ BEGIN PERFORM pg_sleep(0.3); RETURN NEW; END $$"
                )
            )
            connection.execute(
                text(
                    "CREATE TRIGGER slow BEFORE INSERT ON message_idempotent FOR EACH STATEMENT EXECUTE FUNCTION slow()"
                )
            )
    with program(behind, guard, colour) as shop:
        for no in range(1, 4):
            left(
                behind, f"SET ROLE {stranger}" if what == "role" else "SET statement_timeout = 150", SERVER_CONNECTIONS
            )
            # on a machine that is busy what we ask a new connection first meets the limit, too: an outage, and no failure
            end = next(end for end in iter(lambda no=no: shop.process(no), None) if end is not Outcome.WAITING)  # type: ignore[misc]
            assert end is Outcome.PROCESSED
        assert [shop.process(no) for no in (1, 2, 3)] == [Outcome.DUPLICATE] * 3
    assert there(behind) == [1, 2, 3]
    with behind.direct.begin() as connection:  # type: ignore[attr-defined]
        connection.execute(text(f"DROP OWNED BY {stranger}"))
        connection.execute(text(f"DROP ROLE {stranger}"))
