"""What a person decides about a failed message holds, on each dialect: what runs again, what never does, who said so."""

import json
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, String, event, func, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from exactly_once import ConfigurationError, ExactlyOnce, Message, Outcome, Reject, Retry
from exactly_once.database.schema import tables
from exactly_once.failures import decisions
from exactly_once.failures.decisions import Chosen
from exactly_once.operations.rename import rename_rows

GROUP = "deciding"
ONCE = Retry(immediate=0, delays=[0.1], max_attempts=1)


class Base(DeclarativeBase):
    pass


class Effect(Base):
    __tablename__ = "deciding_effect"
    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[str] = mapped_column(String(64))


class World:
    """A database, a handler that does as `mood` says, and what a person types."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.mood = "reject"
        self.eo = ExactlyOnce(engine, group=GROUP)
        self.eo.handler("orders", key="no", retry=ONCE, name="reserve")(self.reserve)

    def reserve(self, session: Session, order: dict[str, Any]) -> None:
        if self.mood == "reject":
            raise Reject("unknown product")
        session.add(Effect(number=order["no"]))
        if self.mood == "commit":
            session.flush()
            # the driver's own commit passes every event by: it is noticed only afterwards
            session.connection().connection.dbapi_connection.commit()

    def feed(self, number: str, amount: int = 1) -> Outcome:
        return self.eo.process(
            Message("orders", json.dumps({"no": number, "amount": amount}).encode(), message_id=number)
        )

    def pump(self) -> None:
        with self.eo.worker("memory://deciding") as worker:
            worker.drain()

    def effects(self) -> int:
        with Session(self.engine) as session:
            return session.scalar(select(func.count()).select_from(Effect)) or 0

    def failures(self) -> list[Any]:
        t = tables().failure
        with self.engine.connect() as connection:
            return list(connection.execute(select(t).order_by(t.c.id)))

    def claims(self) -> dict[str, str]:
        t = tables().idempotent
        with self.engine.connect() as connection:
            return {row.business_key: row.owner for row in connection.execute(select(t))}

    def requeue(self, *ids: int, rate: float | None = None, **narrow: Any) -> decisions.Requeued:
        with self.engine.begin() as connection:
            chosen = Chosen(group=GROUP, ids=ids, **narrow)
            return decisions.requeue(connection, tables(), chosen, by="anna", why="mended", per_second=rate)

    def discard(self, *ids: int, **narrow: Any) -> int:
        with self.engine.begin() as connection:
            chosen = Chosen(group=GROUP, ids=ids, **narrow)
            return decisions.discard(connection, tables(), chosen, by="anna", why="paid by hand")


@pytest.fixture
def world(database: Engine) -> World:
    Base.metadata.create_all(database)
    return World(database)


def test_a_requeued_dead_letter_runs_once_and_says_who_let_it(world: World) -> None:
    assert world.feed("A") is Outcome.DEAD
    world.mood = "well"
    assert world.requeue().count == 1
    world.pump()
    (row,) = world.failures()
    assert (row.state, row.decided_by, row.decided_why) == ("resolved", "anna", "mended")
    assert row.decided_at is not None
    assert world.effects() == 1


def test_a_requeued_broken_one_runs_again_for_its_claim_is_taken_back(world: World) -> None:
    world.mood = "commit"
    assert world.feed("A") is Outcome.DEAD
    (row,) = world.failures()
    assert row.state == "broken"
    assert world.effects() == 1
    with world.engine.begin() as connection:  # the person undoes what it committed, and mends the handler
        connection.execute(text("DELETE FROM deciding_effect"))
    world.mood = "well"
    done = world.requeue(row.id)
    assert (done.count, done.broken) == (1, 1)
    world.pump()
    assert world.effects() == 1, "with its claim still there it would have passed for a duplicate, and be lost"
    assert world.failures()[0].state == "resolved"


def test_broken_ones_are_left_alone_unless_they_are_named(world: World) -> None:
    world.mood = "commit"
    world.feed("A")
    world.mood = "reject"
    world.feed("B")
    done = world.requeue()
    assert (done.count, done.left_out) == (1, 1)
    assert [row.state for row in world.failures()] == ["broken", "requeued"]
    assert world.requeue(states=("broken",)).broken == 1


def test_a_claim_made_on_another_path_after_the_break_is_not_taken_back(world: World) -> None:
    world.mood = "commit"
    world.feed("A")
    with world.engine.begin() as connection:  # as if the handler had rolled its claim back, and committed the rest
        connection.execute(text("DELETE FROM message_idempotent"))
    world.mood = "well"
    assert world.feed("A") is Outcome.PROCESSED
    before = world.effects()
    assert world.requeue(states=("broken",)).count == 1
    world.pump()
    assert world.effects() == before, "it was processed already"


def test_a_discarded_one_does_not_run_when_another_copy_comes(world: World) -> None:
    world.feed("A")
    assert world.discard() == 1
    world.mood = "well"
    assert world.feed("A") is Outcome.DUPLICATE
    world.pump()
    assert world.effects() == 0
    assert world.claims() == {"A": "discarded"}
    (row,) = world.failures()
    assert (row.state, row.next_attempt_at, row.decided_by, row.decided_why) == (
        "discarded",
        None,
        "anna",
        "paid by hand",
    )


def test_discarding_writes_claim_and_decision_together_or_not_at_all(world: World) -> None:
    world.feed("A")

    class CutError(Exception):
        pass

    def cut(connection: Connection, cursor: Any, statement: str, *rest: Any) -> None:
        if statement.startswith("UPDATE"):
            raise CutError

    event.listen(world.engine, "before_cursor_execute", cut)
    with pytest.raises(CutError):
        world.discard()
    event.remove(world.engine, "before_cursor_execute", cut)
    assert world.claims() == {}
    assert world.failures()[0].state == "dead"


def test_discarding_what_was_consumed_meanwhile_keeps_that_claim(world: World) -> None:
    world.feed("A")
    world.mood = "well"
    assert world.feed("A", amount=2) is Outcome.PROCESSED
    owner = world.claims()["A"]
    assert world.discard() == 1
    assert world.claims() == {"A": owner}


def test_a_rate_spreads_the_times_by_the_servers_clock_oldest_first(world: World) -> None:
    for number in "ABC":
        world.feed(number)
    assert world.requeue(rate=0.5).count == 3
    due = [row.next_attempt_at for row in world.failures()]
    assert [round((later - due[0]).total_seconds()) for later in due] == [0, 2, 4]


def test_choosing_narrows_by_id_handler_error_key_and_state(world: World) -> None:
    for number in "ABC":
        world.feed(number)
    first = world.failures()[0].id

    def found(**narrow: Any) -> int:
        with world.engine.connect() as connection:
            return decisions.count(connection, tables(), Chosen(group=GROUP, **narrow))

    assert found() == 3
    assert found(ids=[first]) == 1
    assert found(key="B") == 1
    assert found(handler="reserve", error_class="Reject", states=("dead",)) == 3
    assert found(handler="other") == found(error_class="KeyError") == found(states=("waiting",)) == 0
    with pytest.raises(ConfigurationError, match=r"'ded'.*Did you mean 'dead'"):
        found(states=("ded",))


def test_what_is_settled_is_not_requeued(world: World) -> None:
    world.feed("A")
    world.discard()
    with pytest.raises(ConfigurationError, match="discarded"):
        world.requeue(states=("discarded",))


def test_a_rename_moves_every_row_or_none(world: World) -> None:
    world.feed("A")
    world.mood = "well"
    world.feed("B")
    with world.engine.begin() as connection:
        moved = rename_rows(connection, tables(), GROUP, "reserve", "reserve_stock")
    assert moved == {"message_idempotent": 1, "message_step": 0, "message_failure": 1}
    world.feed("B")  # under the old name once more
    with pytest.raises(ConfigurationError, match="nothing was renamed"), world.engine.begin() as connection:
        rename_rows(connection, tables(), GROUP, "reserve", "reserve_stock")


def test_a_rename_of_keys_that_ran_under_both_names_names_them_and_the_row_to_delete(world: World) -> None:
    world.mood = "well"
    for number in ("R-1", "R-2", "it's"):
        world.feed(number)
    with world.engine.begin() as connection:
        rename_rows(connection, tables(), GROUP, "reserve", "reserve_stock")
    for number in ("R-1", "it's", "R-4"):
        world.feed(number)
    with pytest.raises(ConfigurationError) as refused, world.engine.begin() as connection:
        rename_rows(connection, tables(), GROUP, "reserve", "reserve_stock")
    said = str(refused.value)
    assert said.startswith(
        "2 key(s) have rows of both 'reserve' and 'reserve_stock' in message_idempotent: R-1, it's. Each was run twice, once"
        " under either name, and nothing was renamed. Undo what one of the two runs did. Then delete the row of the old name, and"
        " type the command again; the row of the new name keeps the key from running:\n"
    )
    statements = said.splitlines()[1:]
    assert len(statements) == 2
    with world.engine.begin() as connection:
        for statement in statements:
            assert connection.execute(text(statement)).rowcount == 1
        moved = rename_rows(connection, tables(), GROUP, "reserve", "reserve_stock")
    assert moved["message_idempotent"] == 1
    assert sorted(world.claims()) == ["R-1", "R-2", "R-4", "it's"]


def test_times_are_the_servers_and_not_this_machines(world: World) -> None:
    world.feed("A")
    world.requeue()
    with world.engine.connect() as connection:
        from exactly_once.database.server_clock import utcnow

        now = connection.execute(select(utcnow())).scalar_one()
    (row,) = world.failures()
    assert 0 <= (now - row.next_attempt_at).total_seconds() < 60
