"""A person decides about many failures, or about one that a worker is running at that moment, on each dialect."""

import json
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from threading import Event, Thread
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, create_engine, event, insert, select, text, update
from sqlalchemy.orm import Session
from typer.testing import CliRunner

from exactly_once import ExactlyOnce, Lease, Message, Outcome, Reject, Retry
from exactly_once.cli.failures import app as command
from exactly_once.database.schema import tables
from exactly_once.database.server_clock import utcnow
from exactly_once.failures import decisions, in_parts
from exactly_once.failures.decisions import Chosen
from exactly_once.failures.in_parts import Database, Part
from exactly_once.failures.store import FailureStore
from exactly_once.outcome import Ack
from exactly_once.processing.processor import Processor, Result
from exactly_once.transports.contract import Features
from tests.integration.threads import Turn, in_thread
from tests.waiting import until

GROUP = "decisions"
MANY = 450  # three parts
EVERY = Chosen(group=GROUP)


class World:
    """A database, and a handler that rejects, or waits in its transaction until it may go on."""

    def __init__(self, engine: Engine, guard: Lease | None = None) -> None:
        self.engine = engine
        self.rejects = True
        self.there, self.may_go_on = Turn(), Event()
        self.eo = ExactlyOnce(engine, group=GROUP)
        once = Retry(immediate=0, max_attempts=1)
        self.eo.handler("orders", key="no", retry=once, name="reserve", guard=guard)(self.reserve)
        self.store = next(iter(self.eo.stores.values()))
        self.database = Database(
            engine.begin, tables(), lambda error: self.store.dialect.error_kind(error).name == "TRANSIENT"
        )

    def reserve(self, session: Session, order: dict[str, Any]) -> None:
        if self.rejects:
            raise Reject("unknown product")
        self.there.come()
        assert self.may_go_on.wait(30)

    def feed(self, number: str, attempt: int = 1) -> Outcome:
        body = json.dumps({"no": number}).encode()
        return self.eo.process(Message("orders", body, message_id=number, attempt=attempt))

    def pump(self, number: str) -> Result:
        """As the pump brings it, which is the one to bring it again."""
        delivering = Processor(self.eo.plans[0], self.store, GROUP, leases=self.eo.leases)
        message = Message("orders", json.dumps({"no": number}).encode(), message_id=number)
        return delivering.run(message, Features(redelivers=False, counts_attempts=False), pumped=True)

    def stuff(self, count: int, body: bytes = b"{}") -> None:
        """Write dead letters, as so many failed messages would have."""
        common = {
            "consumer_group": GROUP,
            "handler": "reserve",
            "fingerprint": b"f",
            "topic": "orders",
            "body": body,
            "properties": "{}",
            "error_class": "Reject",
            "error_text": "no",
            "attempts": 1,
            "state": "dead",
        }
        keys = [f"K{number:05}" for number in range(count)]
        with self.engine.begin() as connection:
            moment = connection.execute(select(utcnow())).scalar_one()
            times = {"first_failed_at": moment, "last_failed_at": moment}
            connection.execute(
                insert(tables().failure),
                [common | times | {"failure_key": f"k:{key}", "business_key": key} for key in keys],
            )

    def begun(self, decide: Callable[..., Iterator[Part]], chosen: Chosen = EVERY, **more: Any) -> Iterator[Part]:
        with self.engine.begin() as connection:
            ids = decisions.ids(connection, tables(), chosen)
        return decide(self.database, chosen, ids, by="anna", why="why not", **more)

    def discard(self) -> Part:
        return sum(self.begun(in_parts.discard), Part())

    def rows(self) -> Sequence[Any]:
        with self.engine.connect() as connection:
            t = tables().failure
            return connection.execute(select(t.c.id, t.c.state, t.c.next_attempt_at).order_by(t.c.id)).all()

    def claims(self) -> dict[str, str]:
        t = tables().idempotent
        with self.engine.connect() as connection:
            return {row.business_key: row.owner for row in connection.execute(select(t.c.business_key, t.c.owner))}

    def waiting(self) -> bool:
        """Whether somebody waits for somebody else's lock."""
        look = {
            "postgresql": "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            " AND datname = current_database()",
            # not innodb_trx: it shows what it last found to whoever asks again within 0.1 s
            "mysql": "SHOW GLOBAL STATUS LIKE 'Innodb_row_lock_current_waits'",
        }[self.engine.dialect.name]
        with self.engine.connect() as connection:
            return int(connection.execute(text(look)).one()[-1]) > 0


@pytest.fixture
def world(database: Engine) -> World:
    return World(database)


@pytest.fixture(params=["postgres", "mariadb"])
def locking(request: pytest.FixtureRequest) -> Iterator[World]:
    """On a server that locks rows; SQLite has one writer at a time."""
    engine = create_engine(request.getfixturevalue(f"{request.param}_url"))
    yield World(engine)
    engine.dispose()


@pytest.fixture
def leased(database: Engine) -> World:
    return World(database, Lease(timedelta(seconds=30)))


def test_a_discard_waits_for_the_run_under_way_and_finds_it_processed(locking: World) -> None:
    world = locking
    assert world.feed("A") is Outcome.DEAD
    world.stuff(5)
    world.rejects = False
    outcome: list[Outcome] = []
    decided: list[Part] = []
    with in_thread(lambda: outcome.append(world.feed("A", attempt=2))):
        world.there.wait()
        with in_thread(lambda: decided.append(world.discard())):
            until(world.waiting, "the wait of the discard")
            world.may_go_on.set()
    assert outcome == [Outcome.PROCESSED]
    assert decided == [Part(count=5, settled=1)]
    assert [row.state for row in world.rows()] == ["resolved", *["discarded"] * 5]
    assert world.claims()["A"] != "discarded"


def test_a_discard_leaves_the_one_whose_run_goes_on_and_names_it(
    locking: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = locking
    monkeypatch.setattr(in_parts, "_WAIT_S", 1)
    assert world.feed("A") is Outcome.DEAD
    world.stuff(5)
    world.rejects = False
    outcome: list[Outcome] = []
    with in_thread(lambda: outcome.append(world.feed("A", attempt=2))):
        world.there.wait()
        done = world.discard()
        world.may_go_on.set()
    assert outcome == [Outcome.PROCESSED]
    assert done == Part(count=5, running=(world.rows()[0].id,))


def test_one_that_waits_writes_nothing_over_what_another_run_has_done_meanwhile(
    leased: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two operators requeue one message: it is taken twice, and the second run is told to wait as the first one ends."""
    world = leased
    assert world.feed("A") is Outcome.DEAD
    world.rejects = False
    first: list[Outcome] = []
    record = FailureStore.record

    def late(*given: Any) -> Any:
        world.may_go_on.set()
        until(lambda: first, "the end of the first run")
        return record(*given)

    with in_thread(lambda: first.append(world.pump("A").outcome)):
        world.there.wait()
        monkeypatch.setattr(FailureStore, "record", late)
        second = world.pump("A")
    assert first == [Outcome.PROCESSED]
    assert (second.outcome, second.verdict) == (Outcome.DUPLICATE, Ack())
    assert [row.state for row in world.rows()] == ["resolved"]


def test_one_that_another_copy_has_done_is_not_told_as_discarded(world: World) -> None:
    assert world.feed("A") is Outcome.DEAD
    assert world.feed("B") is Outcome.DEAD
    other = World(world.engine)  # another process: it remembers no failure, so it closes none
    other.rejects = False
    other.may_go_on.set()
    assert other.feed("A") is Outcome.PROCESSED
    with world.engine.begin() as connection:
        connection.execute(
            update(tables().failure).where(tables().failure.c.business_key == "B").values(fingerprint=b"x")
        )
    assert other.feed("B") is Outcome.PROCESSED, "another payload, whose claim says nothing of the one that failed"
    assert world.discard() == Part(count=1, settled=1)
    assert [row.state for row in world.rows()] == ["resolved", "discarded"]


def test_a_run_that_takes_the_key_while_a_discard_looks_is_not_told_as_discarded_and_done(locking: World) -> None:
    world = World(locking.engine, Lease(timedelta(seconds=30)))
    world.stuff(1)
    world.rejects = False
    body = json.dumps({"no": "K00000"}).encode()
    outcome: list[Outcome] = []
    run = Thread(
        target=lambda: outcome.append(world.eo.process(Message("orders", body, message_id="another", attempt=2)))
    )

    def take(connection: Connection, cursor: Any, statement: str, *rest: Any) -> None:
        if statement.startswith("INSERT INTO message_idempotent") and not run.ident:
            run.start()  # between the look for a claim that was begun and the one that is written
            until(lambda: world.there.came or world.waiting(), "the other side, which InnoDB keeps out of the gap")

    event.listen(world.engine, "before_cursor_execute", take)
    decided = world.discard()
    world.may_go_on.set()
    run.join(30)
    assert decided == Part(count=1)
    assert outcome != [Outcome.PROCESSED]
    assert [row.state for row in world.rows()] == ["discarded"]
    assert world.claims() == {"K00000": "discarded"}


def test_a_discard_reads_no_bodies(world: World) -> None:
    world.stuff(3, body=b"x" * 100)
    sent: list[str] = []
    event.listen(world.engine, "before_cursor_execute", lambda c, k, statement, *rest: sent.append(statement))
    assert world.discard() == Part(count=3)
    assert len(world.claims()) == 3
    assert sent
    assert not [statement for statement in sent if "body" in statement or "properties" in statement]


@pytest.mark.parametrize("decide", ["requeue", "discard"])
def test_many_are_decided_in_parts_each_of_which_is_committed(world: World, decide: str) -> None:
    world.stuff(MANY)
    commits: list[Connection] = []
    event.listen(world.engine, "commit", commits.append)
    more = {"per_second": None} if decide == "requeue" else {}
    parts = list(world.begun(getattr(in_parts, decide), **more))
    assert [part.count for part in parts] == [200, 200, 50]
    assert len(commits) == 1 + len(parts)
    assert {row.state for row in world.rows()} == {{"requeue": "requeued", "discard": "discarded"}[decide]}


def test_what_was_decided_before_the_command_was_cut_off_stays(world: World) -> None:
    world.stuff(MANY)
    next(world.begun(in_parts.discard))
    assert sum(row.state == "discarded" for row in world.rows()) == 200
    assert world.discard().count == MANY - 200
    assert len(world.claims()) == MANY


def test_a_rate_goes_on_from_part_to_part(world: World) -> None:
    world.stuff(MANY)
    list(world.begun(in_parts.requeue, per_second=10))
    due = [row.next_attempt_at for row in world.rows()]
    assert [(later - due[0]).total_seconds() for later in due] == pytest.approx(
        [number / 10 for number in range(MANY)], abs=2
    )


def test_one_that_another_person_requeued_first_gets_no_claim(locking: World) -> None:
    world = locking
    world.stuff(3)
    first = world.rows()[0].id
    done: list[bool] = []

    def requeue(connection: Connection, cursor: Any, statement: str, *rest: Any) -> None:
        if statement.startswith("INSERT INTO message_idempotent") and not done:
            done.append(True)  # between the look at the rows and their lock
            with world.engine.begin() as other:
                other.execute(text(f"UPDATE message_failure SET state = 'requeued' WHERE id = {first}"))

    event.listen(world.engine, "before_cursor_execute", requeue)
    parts = world.begun(in_parts.discard, Chosen(group=GROUP, states=("dead",)))
    assert sum(parts, Part()) == Part(count=2, settled=1)
    assert sorted(world.claims()) == ["K00001", "K00002"]


def test_the_command_says_what_it_left(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = create_engine(postgres_url)
    world = World(engine)
    monkeypatch.setattr(in_parts, "_WAIT_S", 1)
    monkeypatch.setenv("EXACTLY_ONCE_DATABASE", postgres_url)
    world.feed("A")
    world.stuff(2)
    world.rejects = False
    with in_thread(lambda: world.feed("A", attempt=2)):
        world.there.wait()
        told = CliRunner().invoke(command, ["discard", "--all", "-g", GROUP])
        world.may_go_on.set()
    engine.dispose()
    assert told.exit_code == 1
    assert "2 discarded; their keys count as consumed" in told.output
    assert f"1 left as they are: a worker is running them now ({world.rows()[0].id})" in told.output
