"""Behind a pooler of transactions nothing belongs to a session: no name of a statement, no setting, no lock.

The pooler is PgBouncer, with fewer connections to the server than the program has to it, so that each of them is lent to
many. A stranger's program shares them: it finds what we leave behind.
"""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine, NullPool, create_engine, make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from exactly_once import ExactlyOnce, Lease, Message, Outcome, Retry, alembic
from exactly_once.cli import main
from exactly_once.doctor import Finding, Mark, examine
from exactly_once.errors import ConfigurationError
from exactly_once.testing.databases import DatabaseServer
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
    connections = [engine.connect() for _ in range(SERVER_CONNECTIONS)]
    for connection in connections:
        connection.close()
    return engine


def ours(pooler: PgBouncer, database: Any, colour: str, **more: Any) -> ExactlyOnce:
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


def left_behind(pooler: PgBouncer) -> list[str]:
    """What a stranger who is lent every connection of the pooler at once finds on them."""
    found: dict[int, list[str]] = {}
    with ExitStack() as stack:
        for _ in range(SERVER_CONNECTIONS):
            stranger = stack.enter_context(
                psycopg.connect(pooler.url.replace("+psycopg", ""), prepare_threshold=None)
            )
            row = stranger.execute("SELECT pg_backend_pid()").fetchone()
            assert row is not None
            found[row[0]] = [each for (each,) in stranger.execute(LEFT).fetchall()]
    assert len(found) == SERVER_CONNECTIONS
    return [each for every in found.values() for each in every]


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("given", [url_of, sync_engine_of, async_engine_of, used_engine_of])
def test_of_1600_mixed_messages_each_takes_effect_in_its_own_table_and_nothing_is_left_behind(
    behind: PgBouncer, colour: str, given: Callable[[PgBouncer], Any]
) -> None:
    if given is async_engine_of and colour == "sync":
        pytest.skip("the sync engine is derived from it, as from the URL")
    eo = ours(behind, given(behind), colour)
    every = messages()
    outcomes = processed(eo, colour, every)
    assert set(outcomes) <= {Outcome.PROCESSED, Outcome.DUPLICATE, Outcome.IN_PROGRESS, Outcome.DEAD}, outcomes
    assert outcomes[Outcome.PROCESSED] == KINDS * KEYS - KEYS // 10, outcomes
    assert_right(behind)


@pytest.mark.parametrize("colour", COLOURS)
def test_a_queue_in_a_table_behind_a_pooler_hands_each_message_to_its_handler(behind: PgBouncer, colour: str) -> None:
    eo = ours(behind, behind.url, colour)
    with eo.worker("sql://", concurrency=8) as worker:
        with eo.producer("sql://") as producer:
            for message in messages():
                producer.send(message)
        outcomes = worker.drain(timedelta(seconds=120))
    assert outcomes["processed"] == KINDS * KEYS - KEYS // 10, outcomes
    assert_right(behind)
    with behind.direct.connect() as connection:  # type: ignore[attr-defined]
        assert connection.execute(text("SELECT count(*) FROM message_queue")).scalar_one() == 0
