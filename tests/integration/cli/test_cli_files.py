"""Recorded messages from a file: in order where a handler asks for it, in bounded memory, and nothing passed over in silence."""

import base64
import io
import json
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from exactly_once import ExactlyOnce, Message, Retry, keys
from exactly_once.cli.command import main

seen: list[Any] = []
eo = ExactlyOnce(group="files")


@eo.handler("orders", key="no", ordered=True, retry=Retry(immediate=0, delays=[60], max_attempts=3))
def in_order(session: Session, order: dict[str, Any], message: Message) -> None:
    # the earlier ones of a key are the slower ones: side by side, the later ones would overtake them
    time.sleep(0.02 * (3 - order["no"] % 4))
    if order.get("fails"):
        raise ValueError("not today")
    seen.append((message.ordering_key, order["no"]))


@eo.handler("notes", key=keys.message_key(), retry=Retry(immediate=0, delays=[60]))
async def note(session: AsyncSession, message: Message) -> None:
    seen.append(message)


@eo.handler("blocks", key="no")
def block(session: Session, order: dict[str, Any]) -> None:
    seen.append(order["no"])
    barrier.wait(20)


barrier = threading.Barrier(3)


class Typed:
    """The command, typed in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._patch, self._capsys = monkeypatch, capsys
        self.out = self.err = ""

    def __call__(self, *arguments: str, stdin: str | None = None) -> int:
        if stdin is not None:
            self._patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8"))
        with pytest.raises(SystemExit) as exited:
            main(arguments)
        self.out, self.err = self._capsys.readouterr()
        return exited.value.code if isinstance(exited.value.code, int) else 0


@pytest.fixture
def typed(sqlite_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Typed]:
    monkeypatch.setenv("EXACTLY_ONCE_DATABASE", sqlite_url)
    from exactly_once.testing import bound

    seen.clear()
    with bound(eo, sqlite_url):
        yield Typed(monkeypatch, capsys)


APP = f"{__name__}:eo"


def lines(*messages: dict[str, Any]) -> str:
    return "".join(json.dumps(message) + "\n" for message in messages)


def test_an_ordered_handlers_messages_keep_the_files_order_key_by_key(typed: Typed) -> None:
    messages = [
        {"topic": "orders", "ordering_key": key, "body": {"no": number * 4 + place}}
        for number in range(4)
        for place, key in enumerate("ab")
    ]
    assert typed("process", "-", "--app", APP, "-c", "8", stdin=lines(*messages)) == 0
    assert typed.out == "8 processed\n"
    for key in "ab":
        assert [no for ordering, no in seen if ordering == key] == sorted(
            no for ordering, no in seen if ordering == key
        )


def test_behind_a_failed_message_its_ordering_key_waits_and_the_command_says_so(typed: Typed) -> None:
    failing = {"topic": "orders", "ordering_key": "a", "body": {"no": 3, "fails": True}}
    behind = {"topic": "orders", "ordering_key": "a", "body": {"no": 7}}
    other = {"topic": "orders", "ordering_key": "b", "body": {"no": 11}}
    assert typed("process", "-", "--app", APP, stdin=lines(failing, behind, other)) == 1
    assert typed.out.startswith("1 processed, 1 failed, 1 waiting")
    assert "exactly-once failures list" in typed.out
    assert seen == [("b", 11)]


def test_messages_without_order_run_side_by_side(typed: Typed, postgres_url: str) -> None:
    from exactly_once.testing import bound

    # three in the handler at once, or the barrier breaks; not on SQLite, which has one writer
    with bound(eo, postgres_url):
        messages = [{"topic": "blocks", "body": {"no": number}} for number in range(3)]
        assert typed("process", "-", "--app", APP, "-c", "3", stdin=lines(*messages)) == 0
    assert sorted(seen) == [0, 1, 2]


def test_an_async_handler_gets_every_part_of_a_line(typed: Typed) -> None:
    line = {
        "topic": "notes",
        "body_base64": base64.b64encode(b"\x00\xff").decode(),
        "tag": "t",
        "key": "k",
        "ordering_key": "o",
        "properties": {"shop": "eu"},
        "message_id": "id-1",
        "born_at": "2026-01-31T12:00:00+01:00",
    }
    assert typed("process", "-", "--app", APP, stdin=lines(line)) == 0, typed.err
    (message,) = seen
    assert (message.topic, message.body, message.tag, message.key) == ("notes", b"\x00\xff", "t", "k")
    assert (message.ordering_key, message.properties, message.message_id) == ("o", {"shop": "eu"}, "id-1")
    assert message.born_at.isoformat() == "2026-01-31T11:00:00+00:00"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"topic": "notes", "boddy": 1}', "Did you mean 'body'"),
        ('{"body": 1}', "--topic"),
        ('{"topic": "notes", "body_base64": "!"}', "base64"),
        ('{"topic": "notes", "tag": 7}', '"tag" is a text'),
        ('{"topic": "notes", "properties": {"a": 1}}', "object of texts"),
        ('{"topic": "notes", "born_at": "2026-01-31T12:00:00"}', "time zone"),
        ("\x00\x1b[31m", "not JSON"),
    ],
)
def test_a_bad_line_is_named_with_its_number_and_the_rest_goes_on(typed: Typed, line: str, says: str) -> None:
    good = lines({"topic": "notes", "key": "1"})
    assert typed("process", "-", "--app", APP, stdin=good + line + "\n\n" + lines({"topic": "notes", "key": "2"})) == 1
    assert "line 2: " in typed.err
    assert says in typed.err
    assert "\x1b" not in typed.err
    assert typed.out.startswith("2 processed")


def test_a_file_of_millions_of_bad_lines_is_counted_and_not_kept(typed: Typed) -> None:
    assert typed("process", "-", "--app", APP, stdin="bad\n" * 500) == 1
    assert "... and 480 more" in typed.err


def test_a_missing_table_is_refused_before_the_first_line(typed: Typed, sqlite_url: str) -> None:
    engine = create_engine(sqlite_url)
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE exactly_once_version"))
    engine.dispose()
    assert typed("process", "-", "--app", APP, stdin=lines({"topic": "notes", "key": "1"})) == 2
    assert "exactly-once db upgrade" in typed.err
    assert seen == []


def test_sending_a_file_names_each_line_that_was_not_sent(typed: Typed, sqlite_url: str) -> None:
    recorded = (
        lines({"topic": "notes", "body": "text"})
        + "bad\n"
        + lines({"topic": "n" * 300}, {"topic": "notes", "body": {"a": 1}})
    )
    assert typed("send", "-", "-t", "sql://", stdin=recorded) == 1
    assert len(typed.out.splitlines()) == 2, "a receipt for each that was"
    assert "line 2: not sent" in typed.err
    assert "line 3: not sent" in typed.err
    assert "2 sent, 2 not" in typed.err
    engine = create_engine(sqlite_url)
    with engine.connect() as connection:
        assert sorted(connection.execute(text("SELECT body FROM message_queue")).scalars()) == [b"text", b'{"a": 1}']
    engine.dispose()


def test_one_message_is_sent_with_all_that_was_said_of_it(typed: Typed, sqlite_url: str) -> None:
    code = typed(
        "send", "-t", "sql://", "--topic", "notes", "--body", "ja", "--tag", "t", "--key", "k", "--ordering-key", "o",
        "--property", "a=b=c", "--delay", "60",
    )  # fmt: skip
    assert code == 0, typed.err
    engine = create_engine(sqlite_url)
    with engine.connect() as connection:
        (row,) = connection.execute(text("SELECT tag, message_key, ordering_key, body, properties FROM message_queue"))
    engine.dispose()
    assert tuple(row[:4]) == ("t", "k", "o", b"ja")
    assert json.loads(row[4]) == {"a": "b=c"}


def test_a_renamed_handler_that_had_no_rows_is_said(typed: Typed) -> None:
    assert typed("handlers", "rename", "nobody", "somebody", "--app", APP) == 1
    assert "nothing was renamed" in typed.err


def test_what_no_handler_takes_is_told_with_its_line(typed: Typed) -> None:
    note = {"topic": "notes", "key": "1"}
    assert typed("process", "-", "--app", APP, stdin=lines(note, {"topic": "note", "key": "2"})) == 1
    assert typed.out.startswith("1 processed, 1 not mine")
    assert (
        "line 2: no handler takes topic note. Did you mean 'notes'? It was passed over. Handlers take: blocks, notes, orders."
        in typed.err
    )
