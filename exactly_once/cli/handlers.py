"""`exactly-once handlers`: the options of each handler and where they come from; and renaming a handler."""

from typing import Annotated

import typer

from exactly_once.app import ExactlyOnce
from exactly_once.cli.reference import application, usable
from exactly_once.configuration.config import Config
from exactly_once.database.schema import HANDLER_BYTES
from exactly_once.errors import ConfigurationError
from exactly_once.handlers.plan import Plan
from exactly_once.handlers.retry import Retry
from exactly_once.keys import KeyRule, check_name
from exactly_once.operations.rename import rename_leases, rename_rows
from exactly_once.wording.text import escaped

__all__ = ["app"]

app = typer.Typer(help="The handlers.", add_completion=False, rich_markup_mode=None, invoke_without_command=True)

AppOption = Annotated[str | None, typer.Option("--app", "-a", metavar="MODULE:NAME", help="The application.")]


@app.callback(invoke_without_command=True)
def show(context: typer.Context, reference: AppOption = None) -> None:
    """Show the handlers and settings that apply, each with its source; `rename OLD NEW` moves a handler's rows."""
    if context.invoked_subcommand is not None:
        return
    if reference is None:
        typer.echo("Say which application: exactly-once handlers --app shop.consumers:eo", err=True)
        raise SystemExit(2)
    eo = application(reference)
    for plan in eo.plans:
        typer.echo(plan.name)
        for name, value, source in _facts(plan, eo.config):
            typer.echo(f"  {name:<12} {value}   [{source}]")
        for warning in plan.warnings:
            typer.echo(f"  warning      {warning}")
    typer.echo("settings")
    for name in (
        "database",
        "transport",
        "redis",
        "group",
        "schema",
        "pooler",
        "imports",
        "concurrency",
        "processes",
        "drain_timeout",
        "health",
    ):
        setting = getattr(eo.config, name)
        typer.echo(f"  {name:<14} {setting.shown}   [{setting.source}]")


def _facts(plan: Plan, config: Config) -> list[tuple[str, str, str]]:
    changed = config.handlers.get(plan.name)

    def source(name: str) -> str:
        return changed.source if changed is not None and getattr(changed, name) is not None else "code"

    retry = plan.retry
    told = (
        _told(retry) if isinstance(retry, Retry) else "; ".join(f"{c.__name__}: {_told(r)}" for c, r in retry.items())
    )
    order = f"by ordering key, behind a dead one: {plan.after_dead}" if plan.ordered else "none"
    return [
        ("topic", plan.topic, source("topic")),
        ("tags", ", ".join(plan.tags) or "(all)", source("tag")),
        ("key", _parts(plan.key), "code"),
        ("fingerprint", _compared(plan), "code"),
        ("guard", plan.guard.told, "code"),
        ("retry", told, source("retry")),
        ("order", order, "code"),
        ("transaction", _shared(plan), "code"),
        ("concurrency", str(plan.concurrency or "(the worker's)"), source("concurrency")),
        ("runs in", "an event loop" if plan.is_async else "a thread", "code"),
    ]


def _parts(rule: KeyRule) -> str:
    return ", ".join(str(getattr(part, "text", part)) for part in rule.parts)


def _shared(plan: Plan) -> str:
    """How many messages share one transaction."""
    if plan.batch is None:
        return "one message"
    what = "in one call" if plan.in_lists else "each a call"
    order = f"in the order of {_parts(plan.batch_order)}" if plan.batch_order is not None else "as they came"
    wait = plan.linger.total_seconds() * 1000
    return f"up to {plan.batch:,} messages, {what}, {order}, the first waits {wait:g} ms for more"


def _compared(plan: Plan) -> str:
    """What two copies of one event must agree on."""
    rule = plan.fingerprint
    if rule.paths:
        return ", ".join(path.text for path in rule.paths)
    return "nothing" if not rule.tag else "the whole body" if rule.needs_json else "what its function returns"


def _told(retry: Retry) -> str:
    delays = ", ".join(f"{retry.delay(number + 1).total_seconds():g}" for number in range(len(retry.delays)))
    return f"{retry.immediate} at once, then after {delays} s, {retry.max_attempts} attempts"


@app.command()
def rename(
    old: Annotated[str, typer.Argument(help="The name its rows have.")],
    new: Annotated[str, typer.Argument(help="The name the code has now.")],
    reference: AppOption = None,
    group: Annotated[str | None, typer.Option("--group", "-g", help="Else as the settings say.")] = None,
) -> None:
    """Give a handler's claims, steps and failures to its new name, in one transaction. Stop its workers first.

    Without this, a renamed handler would process again every message that it has processed.
    """
    check_name(new, HANDLER_BYTES, "handler")
    eo = application(reference) if reference else ExactlyOnce()
    if old == new:
        raise ConfigurationError(f"The old and the new name are both '{escaped(old)}'.")
    for store in eo.stores.values():
        usable(store)
    some = 0
    for store in eo.stores.values():  # one transaction for each database; after an error, a second run moves the rest
        with store.engine.begin() as connection:
            moved = rename_rows(connection, store.tables, group or eo.group, old, new)
        some += sum(moved.values())
        typer.echo(f"{store.name}: " + ", ".join(f"{count} rows of {table}" for table, count in moved.items()))
    if reference:
        _ = eo.plans  # so that it is known where their leases are
        for name, moved_there in rename_leases(eo.leases, group or eo.group, old, new):
            some += moved_there
            typer.echo(f"{name}: {moved_there} leases")
    else:
        typer.echo("Leases in Redis or in another database are renamed with --app MODULE:NAME only.", err=True)
    if not some:
        typer.echo(
            f"Group {group or eo.group} has no rows of a handler '{escaped(old)}': nothing was renamed.", err=True
        )
        raise SystemExit(1)
