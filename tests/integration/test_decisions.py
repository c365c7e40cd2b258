"""A person decides about many failures, or about one that a worker is running at that moment, on each dialect."""

import json
from collections.abc import Callable, Iterator, Sequence
from threading import Event
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, create_engine, event, insert, select, text
from sqlalchemy.orm import Session
from typer.testing import CliRunner

from exactly_once import ExactlyOnce, Message, Outcome, Reject, Retry
from exactly_once.cli.failures import app as command
from exactly_once.failures import decisions, triage
from exactly_once.failures.decisions import Database, Part
from exactly_once.failures.triage import Chosen
from exactly_once.schema import tables, utcnow
from tests.integration.threads import Turn, in_thread, until

GROUP = "decisions"
MANY = 450  # three parts
EVERY = Chosen(group=GROUP)


class World:
    """A database, and a handler that rejects, or waits in its transaction until it may go on."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.rejects = True
        self.there, self.may_go_on = Turn(), Event()
        self.eo = ExactlyOnce(engine, group=GROUP)
        self.eo.handler("orders", key="no", retry=Retry(immediate=0, max_attempts=1), name="reserve")(self.reserve)
        self.store = next(iter(self.eo.stores.values()))
        self.database = Database(
            engine.begin, tables(), lambda error: self.store.dialect.trouble(error).name == "TRANSIENT"
        )

    def reserve(self, session: Session, order: dict[str, Any]) -> None:
        if self.rejects:
            raise Reject("unknown product")
        self.there.come()
        assert self.may_go_on.wait(30)

    def feed(self, number: str, attempt: int = 1) -> Outcome:
        body = json.dumps({"no": number}).encode()
        return self.eo.process(Message("orders", body, message_id=number, attempt=attempt))

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
            ids = triage.ids(connection, tables(), chosen)
        return decide(self.database, chosen, ids, by="anna", why="why not", **more)

    def discard(self) -> Part:
        return sum(self.begun(decisions.discard), Part())

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
    monkeypatch.setattr(decisions, "_WAIT_S", 1)
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
    parts = list(world.begun(getattr(decisions, decide), **more))
    assert [part.count for part in parts] == [200, 200, 50]
    assert len(commits) == 1 + len(parts)
    assert {row.state for row in world.rows()} == {{"requeue": "requeued", "discard": "discarded"}[decide]}


def test_what_was_decided_before_the_command_was_cut_off_stays(world: World) -> None:
    world.stuff(MANY)
    next(world.begun(decisions.discard))
    assert sum(row.state == "discarded" for row in world.rows()) == 200
    assert world.discard().count == MANY - 200
    assert len(world.claims()) == MANY


def test_a_rate_goes_on_from_part_to_part(world: World) -> None:
    world.stuff(MANY)
    list(world.begun(decisions.requeue, per_second=10))
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
    parts = world.begun(decisions.discard, Chosen(group=GROUP, states=("dead",)))
    assert sum(parts, Part()) == Part(count=2, settled=1)
    assert sorted(world.claims()) == ["K00001", "K00002"]


def test_the_command_says_what_it_left(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = create_engine(postgres_url)
    world = World(engine)
    monkeypatch.setattr(decisions, "_WAIT_S", 1)
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
