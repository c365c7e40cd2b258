"""A failed message that its broker never brings again is seen, and a person settles it; nothing else is touched.

So it is in a group that is shared with other programs: a Java listener does the message, and writes nothing in our tables.
"""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, select, text, update
from sqlalchemy.orm import Session

from exactly_once import ExactlyOnce, Message, Outcome, Reject, Retry
from exactly_once.cli.command import main
from exactly_once.database.schema import tables
from exactly_once.database.server_clock import utcnow
from exactly_once.doctor.looking import Finding, Mark, examine

GROUP = "shared"
ROOT = Path(__file__).parents[3]


class Shop:
    """A group with a message that the broker brings again soon, one that is due from here, a dead one, and an overdue one."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.ran: list[str] = []
        self.eo = ExactlyOnce(engine, group=GROUP)
        self.eo.handler("orders", key="no", retry=Retry(immediate=0, delays=[5.0], max_attempts=5), name="reserve")(
            self.reserve
        )

    def reserve(self, session: Session, order: dict[str, Any]) -> None:
        self.ran.append(order["no"])
        if order["no"] == "dead":
            raise Reject("never")
        if order["no"] != "java":
            raise ValueError("not today")

    def feed(self, number: str) -> Outcome:
        return self.eo.process(Message("orders", json.dumps({"no": number}).encode(), message_id=number))

    def four(self) -> None:
        for number in ("soon", "due", "dead", "overdue"):
            self.feed(number)
        t = tables().failure
        long_ago = utcnow(-timedelta(hours=13, minutes=1).total_seconds())
        with self.engine.begin() as connection:
            old = update(t).values(last_failed_at=long_ago)
            connection.execute(old.where(t.c.business_key.in_(("due", "dead", "overdue"))))
            connection.execute(update(t).where(t.c.business_key == "due").values(next_attempt_at=utcnow(60.0)))
            before = update(t).where(t.c.business_key == "soon")
            connection.execute(before.values(last_failed_at=utcnow(-timedelta(hours=12, minutes=59).total_seconds())))

    def states(self) -> dict[str, str]:
        t = tables().failure
        with self.engine.connect() as connection:
            return {row.business_key: row.state for row in connection.execute(select(t))}


@pytest.fixture
def shop(database: Engine) -> Shop:
    return Shop(database)


@pytest.fixture
def settings(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> Shop:
    monkeypatch.setenv("EXACTLY_ONCE_GROUP", GROUP)
    monkeypatch.setenv("EXACTLY_ONCE_DATABASE", shop.engine.url.render_as_string(hide_password=False))
    return shop


def typed(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    out, err = capsys.readouterr()
    assert not ended.value.code, err
    return out, err


def test_an_overdue_failure_is_shown_apart_from_those_that_will_come_again(
    settings: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    settings.four()
    out, err = typed(capsys, "failures", "list")
    marked = {line.split("\t")[3]: line.split("\t")[5] for line in out.splitlines()}
    alone, _ = typed(capsys, "failures", "list", "--overdue")
    rows, _ = typed(capsys, "failures", "list", "--json")
    told = {row["business_key"]: row["overdue"] for row in map(json.loads, rows.splitlines())}
    assert (marked["overdue"], marked["soon"], marked["dead"]) == ("overdue", "", "")
    assert "1 of them overdue" in err
    assert [line.split("\t")[3] for line in alone.splitlines()] == ["overdue"]
    assert told == {"overdue": True, "soon": False, "dead": False, "due": False}


def test_discard_of_the_overdue_settles_them_alone_and_a_late_copy_does_not_run(
    settings: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    settings.four()
    typed(capsys, "failures", "discard", "--overdue", "--reason", "the Java listener did it")
    settings.ran.clear()
    assert settings.states() == {"soon": "retrying", "due": "retrying", "dead": "dead", "overdue": "discarded"}
    assert settings.feed("overdue").acknowledge
    assert settings.ran == []


def test_requeue_of_the_overdue_runs_them_alone(settings: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    settings.four()
    typed(capsys, "failures", "requeue", "--overdue", "--reason", "nobody did it")
    assert settings.states() == {"soon": "retrying", "due": "retrying", "dead": "dead", "overdue": "requeued"}


def test_what_waits_for_a_person_is_not_overdue_and_no_discard_of_the_overdue_takes_it(
    settings: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its COMMIT was never answered, five times over: it may not have been done, and no broker is to bring it again."""
    settings.four()
    settings.feed("kept")
    settings.feed("without body")
    t = tables().failure
    long_ago = {"state": "waiting", "last_failed_at": utcnow(-timedelta(hours=14).total_seconds())}
    with settings.engine.begin() as connection:
        connection.execute(update(t).where(t.c.business_key.in_(("kept", "without body"))).values(long_ago))
        # what the database did not take stays with its broker
        no_body = update(t).where(t.c.business_key == "without body").values(body=None, properties="null")
        connection.execute(no_body)
    alone, _ = typed(capsys, "failures", "list", "--overdue")
    rows, _ = typed(capsys, "failures", "list", "--json")
    typed(capsys, "failures", "discard", "--overdue", "--reason", "the Java listener did it")
    assert {line.split("\t")[3] for line in alone.splitlines()} == {"overdue", "without body"}
    assert {row["business_key"] for row in map(json.loads, rows.splitlines()) if row["overdue"]} == {
        *("overdue", "without body"),
    }
    assert settings.states()["kept"] == "waiting"


def test_doctor_counts_the_overdue(shop: Shop) -> None:
    def about() -> list[Finding]:
        return [finding for finding in examine(shop.eo, None) if "--overdue" in finding.text]

    before = about()
    shop.four()
    [after] = about()
    assert before == []
    assert after.mark is Mark.WARN
    assert "1 failed message(s)" in after.text


def test_a_claim_that_a_java_listener_wrote_as_the_page_says_is_a_duplicate_and_closes_what_had_failed(
    shop: Shop,
) -> None:
    page = (ROOT / "docs" / "how-to" / "java-listeners.md").read_text()
    postgresql, mysql = (block.partition("```")[0] for block in page.split("```sql\n")[1:3])
    of = {"postgresql": postgresql, "sqlite": postgresql.replace("''", "x''")}  # there '' is a text and no bytes
    statement = of.get(shop.engine.dialect.name, mysql)
    shop.feed("failed")
    shop.feed("dead")
    assert shop.states() == {"failed": "retrying", "dead": "dead"}
    with shop.engine.begin() as connection:
        for number in ("java", "failed", "dead"):
            values = {"group": GROUP, "handler": "reserve", "key": number}
            assert connection.execute(text(statement), values).rowcount == 1
    assert shop.feed("java") is Outcome.DUPLICATE
    assert shop.ran == ["failed", "dead"]
    with shop.eo.worker("memory://shared") as worker:  # its pump looks first at what was done on another path
        worker.drain()
    assert shop.states() == {"failed": "resolved", "dead": "dead"}, (
        "it may be another payload's, and is a person's to decide"
    )
    assert shop.ran == ["failed", "dead"]
