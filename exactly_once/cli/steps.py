"""`exactly-once steps`: what is recorded of a message under a lease, and an operator's answer for a step of unknown result.

Leases in Redis are found through the application (`--app`), which knows where its handlers keep them. Leases in the database
are found also without it.
"""

import json
from collections.abc import Iterator, Sequence
from datetime import timedelta
from shlex import quote
from typing import Annotated, Any

import typer

from exactly_once.app import ExactlyOnce
from exactly_once.claim import ClaimRow, LeaseAnswer, StepRow
from exactly_once.cli.failures import AppOption, DatabaseOption, GroupOption
from exactly_once.cli.reference import application, one_store, repeated
from exactly_once.database.schema import STEP_BYTES
from exactly_once.errors import ConfigurationError
from exactly_once.guards.lease.contract import LeaseStore
from exactly_once.guards.lease.stores import sql_leases
from exactly_once.handlers.plan import Lease
from exactly_once.keys import check_key, check_name
from exactly_once.wording.text import escaped, json_line, listed, probably

__all__ = ["app"]

app = typer.Typer(
    help="The recorded steps of messages.", no_args_is_help=True, add_completion=False, rich_markup_mode=None
)

_RESULT_CHARACTERS = 200

Key = Annotated[str, typer.Argument(metavar="KEY", help="The business key.")]
Handler = Annotated[str | None, typer.Option("--handler", help="Where several handlers have this key.")]


@app.command()
def show(
    key: Key,
    handler: Handler = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a handler, a line each.")] = False,
    app: AppOption = None,
    group: GroupOption = None,
    database: DatabaseOption = None,
) -> None:
    """Show what is recorded of a message: whether it runs, and each of its steps."""
    found = list(_found(key, handler, app, group, database))
    if not found:
        _nothing(key, app)
    for row, _, seen in found:
        if as_json:
            typer.echo(json_line(_plain(row, seen)))
            continue
        typer.echo(f"{escaped(row.handler)}  {escaped(row.key, 255)}  {_state(seen)}")
        for step in seen.steps:
            typer.echo(f"  {step.ordinal}  {escaped(step.name)}  {_told(step)}")


@app.command()
def resolve(
    key: Key,
    step: Annotated[str, typer.Argument(metavar="STEP", help="The step's name.")],
    result: Annotated[str, typer.Option("--result", metavar="JSON", help="What the step returned, as JSON.")],
    unrecorded: Annotated[
        bool, typer.Option("--unrecorded", help="The step ran and has no record at all: add it behind the others.")
    ] = False,
    handler: Handler = None,
    app: AppOption = None,
    group: GroupOption = None,
    database: DatabaseOption = None,
) -> None:
    """Record the result of a step that you have checked on the other side; then requeue the message's failure.

    The next attempt reads this result and does not run the step.
    """
    again = repeated(app, group, database)
    check_name(step, STEP_BYTES, "step")
    stored = _json(result)
    found = list(_found(key, handler, app, group, database))
    if not found:
        _nothing(key, app)
    if len(found) > 1:
        raise ConfigurationError(
            f"Several handlers have the key {escaped(key)!r}: {listed(row.handler for row, _, _ in found)}. Say which:"
            f" --handler {found[0][0].handler}"
        )
    ((row, store, seen),) = found
    known = [each.name for each in seen.steps]
    if step not in known and not unrecorded:
        raise ConfigurationError(
            f"There is no record of a step {escaped(step)!r}.{probably(step, known)} Recorded: {listed(known)}. If it ran and"
            " has no record, add --unrecorded: the handler must ask for it right behind those."
        )
    if not store.resolve(row, step, stored):
        typer.echo(f"Nothing was recorded: {escaped(key)!r} of {row.handler} is {_state(seen)}.", err=True)
        raise SystemExit(1)
    typer.echo(
        f"recorded for {row.handler}. If the message is kept: exactly-once failures requeue --key {quote(key)}{again}"
    )


def _found(
    key: str, handler: str | None, reference: str | None, group: str | None, database: str | None
) -> Iterator[tuple[ClaimRow, LeaseStore, LeaseAnswer]]:
    check_key(key)
    eo = application(reference) if reference else ExactlyOnce()
    store = one_store(eo, database)
    name = group or eo.group
    places: dict[str, LeaseStore] = {}
    in_database = sql_leases(store)
    for each in in_database.handlers(name, key):
        places[each] = in_database
    if reference:
        for plan in eo.plans:
            if isinstance(plan.guard, Lease):
                places[plan.name] = eo.leases.at_rest(plan, store)
    for each, place in places.items():
        row = ClaimRow(name, each, key, b"")
        if (handler is None or handler == each) and (seen := place.look(row)) is not None:
            yield row, place, seen


def _nothing(key: str, reference: str | None) -> None:
    hint = "" if reference else " Leases in Redis are found with --app MODULE:NAME."
    typer.echo(f"Nothing is recorded under the key {escaped(key)!r}.{hint}", err=True)
    raise SystemExit(1)


def _state(seen: LeaseAnswer) -> str:
    if seen.unfinished is not None:
        return f"committed by something else than its own end, attempt {seen.attempt}: for a person (failures list)"
    if seen.consumed:
        return f"consumed, attempt {seen.attempt}"
    if seen.remaining is not None and seen.remaining > timedelta(0):
        return f"running, attempt {seen.attempt}, its lease ends in {seen.remaining.total_seconds():.0f} s"
    return f"not finished, not running, attempt {seen.attempt}"


def _told(step: StepRow) -> str:
    if not step.finished:
        return f"begun by attempt {step.attempt}, no result: whether it happened is not known"
    text = (step.result or b"").decode("utf-8", "backslashreplace")
    return f"finished by attempt {step.attempt}: {escaped(text, _RESULT_CHARACTERS)}"


def _plain(row: ClaimRow, seen: LeaseAnswer) -> dict[str, Any]:
    steps: Sequence[dict[str, Any]] = [
        {
            "name": step.name,
            "finished": step.finished,
            "attempt": step.attempt,
            "result": json.loads(step.result) if step.finished and step.result is not None else None,
        }
        for step in seen.steps
    ]
    left = seen.remaining.total_seconds() if seen.remaining is not None else None
    return {
        "handler": row.handler,
        "key": row.key,
        "consumed": seen.consumed,
        "attempt": seen.attempt,
        "lease_ends_in_s": left,
        "steps": steps,
    }


def _json(text: str) -> bytes:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigurationError(
            f"--result is not JSON ({error}). A text needs its quotes: --result '\"paid\"'; nothing is: --result null"
        ) from None
    return json.dumps(value, separators=(",", ":")).encode()
