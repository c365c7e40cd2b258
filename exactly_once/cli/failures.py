"""`exactly-once failures`: what failed and why, and an operator's decision about it."""

import getpass
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from shlex import quote
from typing import Annotated, Any

import typer
from sqlalchemy import Connection, Row

from exactly_once.app import ExactlyOnce
from exactly_once.cli.recorded import Progressing
from exactly_once.cli.reference import application, one_store, repeated
from exactly_once.database.dialects.contract import ErrorKind
from exactly_once.database.schema import Tables
from exactly_once.database.store import Store
from exactly_once.errors import ConfigurationError
from exactly_once.failures import decisions, in_parts
from exactly_once.failures.decisions import Chosen
from exactly_once.failures.in_parts import Database, Part
from exactly_once.failures.states import OPEN
from exactly_once.wording.text import escaped, json_line

__all__ = ["app"]

app = typer.Typer(help="Messages that failed.", no_args_is_help=True, add_completion=False, rich_markup_mode=None)

_BODY_CHARACTERS = 2000
_NAMED = 20

AppOption = Annotated[
    str | None, typer.Option("--app", "-a", metavar="MODULE:NAME", help="Else group and database from the settings.")
]
GroupOption = Annotated[str | None, typer.Option("--group", "-g", help="The consumer group; else as the settings say.")]
DatabaseOption = Annotated[
    str | None, typer.Option("--database", "-d", metavar="NAME", help="One of several databases.")
]
Ids = Annotated[list[str] | None, typer.Argument(metavar="[ID]...")]
Handler = Annotated[str | None, typer.Option("--handler", help="Only this handler's.")]
ErrorClass = Annotated[str | None, typer.Option("--error-class", help="Only with this error, such as TimeoutError.")]
Key = Annotated[str | None, typer.Option("--key", help="Only of this business key.")]
Overdue = Annotated[
    bool, typer.Option("--overdue", help="Only those the broker was to bring again, and has not for 13 hours.")
]
State = Annotated[list[str] | None, typer.Option("--state", help="Only in this state; may be repeated.")]
All = Annotated[bool, typer.Option("--all", help="All that the other options leave.")]
Reason = Annotated[str | None, typer.Option("--reason", help="Why; kept with the message.")]


@contextmanager
def _on(reference: str | None, group: str | None, database: str | None) -> Iterator[tuple[Connection, Tables, str]]:
    store, name = _store(reference, group, database)
    with store.engine.begin() as connection:
        yield connection, store.tables, name


def _store(reference: str | None, group: str | None, database: str | None) -> tuple[Store, str]:
    eo = application(reference) if reference else ExactlyOnce()
    return one_store(eo, database), group or eo.group


@app.command("list")
def list_(
    handler: Handler = None,
    error_class: ErrorClass = None,
    key: Key = None,
    overdue: Overdue = False,
    state: State = None,
    limit: Annotated[int, typer.Option("--limit", min=1)] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    app: AppOption = None,
    group: GroupOption = None,
    database: DatabaseOption = None,
) -> None:
    """List what is not settled, newest first."""
    with _on(app, group, database) as (connection, tables, name):
        chosen = _chosen(name, (), handler, error_class, key, overdue, state)
        rows = decisions.listed(connection, tables, chosen, limit=limit)
        total = decisions.count(connection, tables, chosen)
        late = decisions.count(connection, tables, replace(chosen, overdue=True))
        others = () if total else decisions.other_groups(connection, tables, name, most=_NAMED)
    if as_json:
        for row in rows:
            typer.echo(json_line({name: _plain(value) for name, value in row._asdict().items()}))
        return
    if sys.stdout.isatty():
        _table(rows)
    else:
        for row in rows:
            typer.echo("\t".join(_columns(row)))
    typer.echo(f"{len(rows)} of {total} failure(s) of group {name}", err=True)
    if others:
        typer.echo(
            f"There are no rows of group {escaped(name)!r}; there are: {', '.join(map(escaped, others))}", err=True
        )
    if late:
        typer.echo(
            f"{late} of them overdue: the broker was to bring them again, and has not for 13 hours or longer. Another program of"
            " the group did them, or no worker ran, or the broker gave up. See which, then: exactly-once failures discard"
            " --overdue (they were done), or requeue --overdue (they were not)",
            err=True,
        )


def _columns(row: Row[Any]) -> list[str]:
    return [
        str(row.id),
        row.state,
        escaped(row.handler),
        escaped(row.business_key or row.message_id or "", 60),
        str(row.attempts),
        ("overdue" if row.overdue else "")
        if row.next_attempt_at is None
        else f"{row.next_attempt_at:%Y-%m-%d %H:%M:%S}",
        f"{row.last_failed_at:%Y-%m-%d %H:%M:%S}",
        escaped(f"{row.error_class}: {row.error_text}", 120),
    ]


def _table(rows: Any) -> None:
    from rich.console import Console
    from rich.table import Table as Sheet
    from rich.text import Text

    sheet = Sheet("id", "state", "handler", "key", "attempts", "next try", "last failed", "why", box=None)
    for row in rows:
        sheet.add_row(*(Text(column) for column in _columns(row)))
    Console().print(sheet)


@app.command()
def show(
    id_: Annotated[str, typer.Argument(metavar="ID")],
    raw: Annotated[
        bool, typer.Option("--raw", help="Write the body's bytes to standard output, and nothing else.")
    ] = False,
    app: AppOption = None,
    group: GroupOption = None,
    database: DatabaseOption = None,
) -> None:
    """Show one failure with its whole message."""
    again = repeated(app, group, database)
    (number,) = _numbers([id_], "list", again)
    with _on(app, group, database) as (connection, tables, name):
        row = decisions.shown(connection, tables, name, number)
    if row is None:
        typer.echo(f"Group {name} has no failure {number}. Type: exactly-once failures list{again}", err=True)
        raise SystemExit(1)
    if raw:
        sys.stdout.buffer.write(row.body or b"")
        sys.stdout.buffer.flush()
        return
    for column, value in row._asdict().items():
        if column == "body":
            text = "(none)" if value is None else escaped(value.decode("utf-8", "backslashreplace"), _BODY_CHARACTERS)
            typer.echo(f"{column} ({0 if value is None else len(value)} bytes): {text}")
        elif value is not None:
            typer.echo(f"{column}: {escaped(str(_plain(value)), _BODY_CHARACTERS)}")
    if row.state in ("dead", "broken") or (
        row.state == "waiting" and row.next_attempt_at is None and row.properties != "null"  # else its broker has it
    ):
        first = "; before a requeue, undo what its handler has committed" if row.state == "broken" else ""
        typer.echo(
            f"It waits for you{first}. Type: exactly-once failures requeue {number}{again}\n"
            f"or: exactly-once failures discard {number} --reason '...'{again}",
            err=True,
        )


@app.command()
def requeue(
    ids: Ids = None,
    handler: Handler = None,
    error_class: ErrorClass = None,
    key: Key = None,
    overdue: Overdue = False,
    state: State = None,
    every: All = False,
    rate: Annotated[
        float | None, typer.Option("--rate", metavar="PER_SECOND", help="So many fall due each second.")
    ] = None,
    reason: Reason = None,
    app: AppOption = None,
    group: GroupOption = None,
    database: DatabaseOption = None,
) -> None:
    """Let a running worker try them again, under the same claims: a message that was processed meanwhile is a duplicate.

    A broken message (its handler committed outside of our transaction) is requeued only by id or --state broken.
    It then runs like a new message: first undo what its handler has committed.
    """
    if rate is not None and not rate > 0:  # also not NaN
        raise ConfigurationError("--rate is a number above zero, of messages a second.")
    again = repeated(app, group, database)
    numbers = _numbers(ids or (), "requeue", again)
    _named(ids, handler, error_class, key, overdue, state, every)
    store, name = _store(app, group, database)
    chosen = _chosen(name, numbers, handler, error_class, key, overdue, state)
    decide = partial(in_parts.requeue, by=_who(), why=reason, per_second=rate)
    done = _carried_out(store, chosen, decide, "requeued")
    if done.left_out:
        typer.echo(
            f"{done.left_out} broken one(s) left as they are: part of their effects is committed. Look at each: exactly-once"
            " failures list --state broken",
            err=True,
        )
    if done.broken:
        typer.echo(
            f"{done.broken} of them broken: what their handler committed before stays, and comes again. Undo it before a"
            " worker runs them, or discard them.",
            err=True,
        )
    _said(done, "requeued", "; a running worker tries them when they are due", again)


@app.command()
def discard(
    ids: Ids = None,
    handler: Handler = None,
    error_class: ErrorClass = None,
    key: Key = None,
    overdue: Overdue = False,
    state: State = None,
    every: All = False,
    reason: Reason = None,
    app: AppOption = None,
    group: GroupOption = None,
    database: DatabaseOption = None,
) -> None:
    """Settle them for good: neither they nor another copy of them will run."""
    again = repeated(app, group, database)
    numbers = _numbers(ids or (), "discard", again)
    _named(ids, handler, error_class, key, overdue, state, every)
    store, name = _store(app, group, database)
    chosen = _chosen(name, numbers, handler, error_class, key, overdue, state)
    done = _carried_out(store, chosen, partial(in_parts.discard, by=_who(), why=reason), "discarded")
    _said(done, "discarded", "; their keys count as consumed", again)


def _named(ids: Any, *narrow: Any) -> None:
    if not ids and not any(narrow):
        raise ConfigurationError("Say which: ids, --handler, --error-class, --key, --overdue or --state; or --all.")


def _chosen(
    group: str,
    ids: Sequence[int],
    handler: str | None,
    error_class: str | None,
    key: str | None,
    overdue: bool,
    state: list[str] | None,
) -> Chosen:
    return Chosen(
        group=group,
        ids=ids,
        handler=handler,
        error_class=error_class,
        key=key,
        overdue=overdue,
        states=tuple(state or OPEN),
    )


def _carried_out(
    store: Store, chosen: Chosen, decide: Callable[[Database, Chosen, Sequence[int]], Iterator[Part]], what: str
) -> Part:
    """Decide part by part, and show the progress. If it is interrupted, say what was done."""
    database = Database(
        store.engine.begin, store.tables, lambda error: store.dialect.error_kind(error) is ErrorKind.TRANSIENT
    )
    with store.engine.begin() as connection:
        ids = decisions.ids(connection, store.tables, chosen)
        for number in sorted(set(chosen.ids).difference(ids))[:_NAMED]:
            typer.echo(
                _left(number, decisions.shown(connection, store.tables, chosen.group, number), chosen.group), err=True
            )
    done, seen = Part(), 0
    try:
        with Progressing(len(ids), what, "failures") as progress:
            for part in decide(database, chosen, ids):
                done += part
                seen += part.count + part.left_out + part.settled + len(part.running)
                progress.show(seen, done.count)
    except BaseException:
        if done.count:
            typer.echo(
                f"{done.count} of {len(ids)} were {what}, and stay so; the others are as they were. Type the command again"
                " for them.",
                err=True,
            )
        raise
    return done


def _numbers(ids: Sequence[str], verb: str, again: str) -> Sequence[int]:
    """Read ids as they were typed.

    Args:
        ids: Each a number.
        verb: The command to type for a business key.
        again: The options that were typed.
    """
    apart = [part for each in ids for part in each.replace(",", " ").split()]
    for each in apart:
        if not (each.isascii() and each.isdigit()):
            raise ConfigurationError(
                f"{escaped(each, 255)!r} is no id: ids are the numbers in the first column of `exactly-once failures list`. By"
                f" its business key, type: exactly-once failures {verb} --key {quote(each)}{again}"
            )
    if len(apart) != len(ids):
        command = f"exactly-once failures {'show' if verb == 'list' else verb}"
        raise ConfigurationError(f"Ids are separated by blanks. Type: {command} {' '.join(apart)}{again}")
    return [int(each) for each in apart]


def _left(number: int, row: Row[Any] | None, group: str) -> str:
    """Say why an id that was typed is not among the messages to decide about."""
    if row is None:
        return f"Group {group} has no failure {number}."
    if row.state in OPEN:
        return f"{number} is {row.state}; the other options leave it out."
    if row.decided_by is None:
        return f"{number} is {row.state}: its message was processed on another path."
    why = f" {escaped(row.decided_why, 255)!r}" if row.decided_why else ""
    return f"{number} is {row.state}: on {row.decided_at:%Y-%m-%d %H:%M:%S} by {escaped(row.decided_by)}{why}."


def _said(done: Part, what: str, then: str, again: str) -> None:
    if done.settled:
        typer.echo(
            f"{done.settled} left as they are: processed meanwhile, or decided by somebody else, before their turn came.",
            err=True,
        )
    if done.running:
        more = f" and {len(done.running) - _NAMED} more" if len(done.running) > _NAMED else ""
        typer.echo(
            f"{len(done.running)} left as they are: a worker is running them now"
            f" ({', '.join(map(str, done.running[:_NAMED]))}{more}). Type the command again when it has finished.",
            err=True,
        )
    if not (done.count or done.left_out or done.settled or done.running):
        typer.echo(f"No failure was {what}. Those that wait for you: exactly-once failures list{again}", err=True)
        raise SystemExit(1)
    typer.echo(f"{done.count} {what}{then}")
    if not done.count or done.running:
        raise SystemExit(1)


def _who() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        return "unknown"


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    return value.isoformat() if hasattr(value, "isoformat") else value
