"""What a hand types a little wrong is answered with what happened, what was kept, and the line to type in its place."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, func, select
from sqlalchemy.orm import Session

from exactly_once import ExactlyOnce, Message, Outcome, Reject
from exactly_once.database.schema import tables
from exactly_once.testing import bound
from tests.integration.cli import test_cli_files

eo = ExactlyOnce(group="slips")
APP = f"{__name__}:eo"


@eo.handler("orders", tag="created", key="no")
def reserve(session: Session, order: dict[str, Any]) -> None:
    if order.get("fails"):
        raise Reject("misspelled product")


class Typed(test_cli_files.Typed):
    """The command, typed in this process, on this database."""

    def __init__(self, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        super().__init__(monkeypatch, capsys)
        self.url = url

    def queued(self) -> int:
        engine = create_engine(self.url)
        with engine.connect() as connection:
            found = connection.execute(select(func.count()).select_from(tables().queue)).scalar_one()
        engine.dispose()
        return found


@pytest.fixture
def typed(sqlite_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Typed]:
    monkeypatch.setenv("EXACTLY_ONCE_DATABASE", sqlite_url)
    monkeypatch.delenv("EXACTLY_ONCE_GROUP", raising=False)
    with bound(eo, sqlite_url):
        yield Typed(sqlite_url, monkeypatch, capsys)


# -- files of messages -----------------------------------------------------------------------------------------------

TWO = [{"topic": "orders", "tag": "created", "body": {"no": no}} for no in ("A-1", "A-2")]


@pytest.mark.parametrize(
    "written",
    [
        json.dumps(TWO, indent=2),
        json.dumps(TWO),
        "\ufeff\n " + json.dumps(TWO),
        "[" + ",\n".join(map(json.dumps, TWO)) + "]",
    ],
    ids=["pretty", "in one line", "behind a mark", "an object a line"],
)
@pytest.mark.parametrize("verb", ["send", "process"])
@pytest.mark.parametrize("how", ["file", "stdin"])
def test_an_array_of_json_is_refused_as_a_whole(
    verb: str, how: str, written: str, typed: Typed, tmp_path: Path
) -> None:
    file = tmp_path / "arr.json"
    file.write_text(written, encoding="utf-8")
    named = str(file) if how == "file" else "-"
    more = ["-t", "sql://"] if verb == "send" else ["--app", APP]
    assert typed(verb, named, *more, stdin=None if how == "file" else written) == 2
    assert typed.out == ""
    done = "sent" if verb == "send" else "processed"
    whose = str(file) if how == "file" else "Standard input"
    assert typed.err == (
        f"{whose} is one JSON array; nothing was {done}. Give each message a line of its own:"
        f" jq -c '.[]' {named if how == 'file' else 'FILE'} | exactly-once {verb} - ...\n"
    )
    assert typed.queued() == 0


def test_an_object_over_several_lines_is_refused_as_a_whole(typed: Typed, tmp_path: Path) -> None:
    file = tmp_path / "one.json"
    file.write_text('{\n"topic": "orders", "properties":\n{"topic": "inner"}\n}', encoding="utf-8")
    assert typed("send", str(file), "-t", "sql://") == 2
    assert typed.err == (
        f"{file} has one JSON object over several lines; nothing was sent. Give each message a line of its own:"
        f" jq -c . {file} | exactly-once send - ...\n"
    )
    assert typed.queued() == 0


def test_a_damaged_line_among_good_ones_is_still_named_by_itself(typed: Typed) -> None:
    good = json.dumps(TWO[0])
    assert typed("process", "-", "--app", APP, stdin=f'{{"topic": \n{good}\n') == 1
    assert typed.out == "1 processed\n"
    assert typed.err.startswith("line 1: not JSON")


# -- ids -------------------------------------------------------------------------------------------------------------


def failed(typed: Typed, number: str = "A-2") -> None:
    assert (
        eo.process(Message("orders", json.dumps({"no": number, "fails": True}).encode(), tag="created")) is Outcome.DEAD
    )


@pytest.mark.parametrize("verb", ["requeue", "discard"])
def test_a_key_in_place_of_an_id_is_answered_with_key(verb: str, typed: Typed) -> None:
    failed(typed)
    assert typed("failures", verb, "A-2", "--app", APP) == 2
    assert typed.err == (
        "'A-2' is no id: ids are the numbers in the first column of `exactly-once failures list`. By its business key, type:"
        f" exactly-once failures {verb} --key A-2 --app {APP}\n"
    )
    assert typed("failures", verb, "--key", "A-2", "--app", APP) == 0


@pytest.mark.parametrize("verb", ["requeue", "discard"])
def test_ids_with_commas_are_answered_with_blanks(verb: str, typed: Typed) -> None:
    assert typed("failures", verb, "1,2", "3", "--group", "slips") == 2
    assert typed.err == f"Ids are separated by blanks. Type: exactly-once failures {verb} 1 2 3 --group slips\n"


def test_a_key_that_is_to_be_shown_is_answered_with_the_list_of_its_ids(typed: Typed) -> None:
    failed(typed, "R-9")
    assert typed("failures", "show", "R-9", "--app", APP) == 2
    assert typed.err == (
        "'R-9' is no id: ids are the numbers in the first column of `exactly-once failures list`. By its business key, type:"
        f" exactly-once failures list --key R-9 --app {APP}\n"
    )
    assert typed("failures", "show", "1", "--app", APP) == 0
    assert typed.err == (
        f"It waits for you. Type: exactly-once failures requeue 1 --app {APP}\n"
        f"or: exactly-once failures discard 1 --reason '...' --app {APP}\n"
    )


# -- what was decided already ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["requeue", "discard"])
def test_an_id_that_was_decided_already_says_by_whom_and_why(verb: str, typed: Typed) -> None:
    failed(typed)
    assert typed("failures", "discard", "1", "--reason", "misspelled", "--app", APP) == 0
    assert typed("failures", verb, "1", "--app", APP) == 1
    first, second = typed.err.splitlines()
    done = "requeued" if verb == "requeue" else "discarded"
    assert first.startswith("1 is discarded: on ")
    assert " by " in first
    assert first.endswith(" 'misspelled'.")
    assert second == f"No failure was {done}. Those that wait for you: exactly-once failures list --app {APP}"


def test_an_id_that_is_not_there_says_so(typed: Typed) -> None:
    assert typed("failures", "requeue", "7", "8", "--app", APP) == 1
    assert typed.err.splitlines()[:2] == ["Group slips has no failure 7.", "Group slips has no failure 8."]
    assert typed("failures", "show", "7", "--app", APP) == 1
    assert typed.err == f"Group slips has no failure 7. Type: exactly-once failures list --app {APP}\n"


def test_ids_of_which_one_matches_are_told_of_the_others(typed: Typed) -> None:
    failed(typed)
    assert typed("failures", "requeue", "1", "9", "--app", APP) == 0
    assert typed.out == "1 requeued; a running worker tries them when they are due\n"
    assert typed.err == "Group slips has no failure 9.\n"


# -- the application in the other form -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("handlers", "shop.consumers:eo"), "handlers --app shop.consumers:eo"),
        (("doctor", "consumers:eo"), "doctor --app consumers:eo"),
        (("doctor", "-t", "sql://", "consumers:eo"), "doctor -t sql:// --app consumers:eo"),
        (("failures", "list", "consumers:eo"), "failures list --app consumers:eo"),
        (("failures", "requeue", "consumers:eo", "1"), "failures requeue --app consumers:eo 1"),
        (("process", "arr.jsonl", "consumers:eo"), "process arr.jsonl --app consumers:eo"),
        (("process", "consumers:eo", "arr.jsonl"), "process --app consumers:eo arr.jsonl"),
        (("run", "--app", "consumers:eo"), "run consumers:eo"),
        (("run", "--app=consumers:eo", "-p", "2"), "run consumers:eo -p 2"),
        (("run", "-t", "sql://", "-a", "consumers:eo"), "run -t sql:// consumers:eo"),
    ],
)
def test_the_application_in_the_other_form_is_answered_with_the_line(
    arguments: tuple[str, ...], line: str, typed: Typed
) -> None:
    assert typed(*arguments) == 2
    form = "bare, without --app" if arguments[0] == "run" else "behind --app"
    assert typed.err == f"`{arguments[0]}` takes the application {form}. Type: exactly-once {line}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("handlers", "rename", "shop:old", "shop:new", "--group", "slips"),
        ("failures", "list", "--key", "order:A", "--group", "slips"),
        ("steps", "show", "order:A", "--group", "slips"),
        ("failures", "list", "--app", APP),
    ],
)
def test_what_only_looks_like_one_is_left_alone(arguments: tuple[str, ...], typed: Typed) -> None:
    typed(*arguments)
    assert "takes the application" not in typed.err


@pytest.mark.parametrize("form", ["create_app", "create_app()"])
def test_a_function_in_place_of_an_application_is_answered_with_the_object(
    form: str, typed: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fac_of_slips.py").write_text("def create_app(): ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert typed("handlers", "--app", f"fac_of_slips:{form}") == 2
    assert typed.err == (
        "fac_of_slips:create_app is a function, and no ExactlyOnce object. A command imports, and calls nothing: write at the end"
        " of fac_of_slips `eo = create_app()`, or what of that is the ExactlyOnce, and type fac_of_slips:eo\n"
    )


# -- what no handler takes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ({"topic": "orders"}, "topic orders without a tag."),
        ({"topic": "orders", "tag": "creatd"}, "topic orders with the tag creatd. Did you mean 'created'?"),
        ({"topic": "order", "tag": "created"}, "topic order. Did you mean 'orders'?"),
        ({"topic": "mails"}, "topic mails."),
    ],
)
def test_a_line_that_no_handler_takes_is_named_with_what_handlers_take(
    line: dict[str, Any], what: str, typed: Typed
) -> None:
    written = json.dumps(line | {"body": {"no": "A-1"}})
    assert typed("process", "-", "--app", APP, stdin=f"{json.dumps(TWO[0])}\n{written}\n") == 1
    assert typed.out == "1 processed, 1 not mine\n"
    assert typed.err == f"line 2: no handler takes {what} It was passed over. Handlers take: orders:created.\n"


def test_a_line_with_another_groups_tag_is_counted_alone(typed: Typed) -> None:
    written = json.dumps({"topic": "orders", "tag": "paid", "body": {"no": "A-1"}})
    assert typed("process", "-", "--app", APP, stdin=f"{written}\n") == 0
    assert (typed.out, typed.err) == ("1 not mine\n", "")


def sent(typed: Typed, *more: str) -> None:
    assert typed("send", "-t", "sql://", "--body", '{"no": "A-1"}', *more) == 0


def examined(typed: Typed) -> list[str]:
    typed("doctor", "--app", APP, "-t", "sql://")
    return [line for line in typed.out.splitlines() if "sql://" in line and "message(s)" in line]


def test_doctor_counts_messages_without_a_tag_that_no_handler_takes(typed: Typed) -> None:
    with eo.worker("sql://") as worker:
        sent(typed, "--topic", "orders")
        sent(typed, "--topic", "orders")
        sent(typed, "--topic", "orders", "--tag", "created")
        worker.drain()
    (told,) = examined(typed)
    assert told == (
        "warn  sql://: 2 message(s) of topic orders have no tag, and handlers of group slips take orders:created. Nobody runs"
        " them, and they are deleted after a day. Send them with --tag created"
    )


def test_doctor_counts_messages_of_a_topic_that_looks_like_one_of_ours(typed: Typed) -> None:
    sent(typed, "--topic", "order", "--tag", "created")
    sent(typed, "--topic", "mails", "--tag", "created")  # of another program, which has not run yet
    sent(typed, "--topic", "orders", "--tag", "created")
    assert examined(typed) == [
        "warn  sql://: 1 message(s) of topic 'order' wait for a group, and none has joined it. Did you mean 'orders'?"
    ]


def test_doctor_counts_messages_whose_tag_looks_like_one_of_ours(typed: Typed) -> None:
    with eo.worker("sql://") as worker:
        sent(typed, "--topic", "orders", "--tag", "create")
        worker.drain()
    [told] = examined(typed)
    assert told == (
        "warn  sql://: 1 message(s) of topic orders have the tag 'create', which no handler of group slips takes (they take"
        " orders:created); deleted after a day. Did you mean 'created'?"
    )


def test_doctor_says_nothing_where_all_are_taken(typed: Typed) -> None:
    with eo.worker("sql://") as worker:
        sent(typed, "--topic", "orders", "--tag", "created")
        worker.drain()
    sent(typed, "--topic", "orders", "--tag", "paid")  # another group's, as may be
    assert examined(typed) == []
