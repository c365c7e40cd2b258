"""`exactly-once doctor`: what is right, what is wrong, and what to type."""

import sys
from typing import Annotated

import typer

from exactly_once.cli.reference import TransportOption, application
from exactly_once.doctor.looking import Mark, examine

__all__ = ["command"]

_COLOURS = {Mark.OK: "green", Mark.WARN: "yellow", Mark.FAIL: "red"}


def command(
    app: Annotated[str, typer.Option("--app", "-a", metavar="MODULE:NAME", help="The application: shop.consumers:eo")],
    transport: TransportOption = None,
) -> None:
    """Check database, driver, durability, broker and handlers, and say what to do. Exits 1 if anything must be repaired."""
    eo = application(app)
    broker = eo.transport(transport) if transport or eo.config.transport.value else None
    worst = 0
    for finding in examine(eo, broker):
        worst += finding.mark is Mark.FAIL
        label = f"{finding.mark.value:<4}"
        typer.echo(f"{typer.style(label, fg=_COLOURS[finding.mark]) if sys.stdout.isatty() else label}  {finding.text}")
    if worst:
        raise SystemExit(1)
