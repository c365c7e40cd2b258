"""Prints progress during the run (bars on a terminal, plain lines elsewhere), and both ledgers at the end."""

import os
import sys
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Final, Self

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from examples.demo.ledger import Ledger, Line, Sample, lines
from examples.demo.orders import Stream

__all__ = ["NAMES", "Progress", "closing", "opening"]

LINE_EVERY_S: Final = 3.0
NAMES: Final = {
    "sql": "a table in PostgreSQL",
    "rocketmq": "RocketMQ 5 over gRPC",
    "rocketmq4": "RocketMQ, remoting protocol",
}

# without a terminal rich assumes 80 columns, and truncates numbers
_console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)


def opening(stream: Stream, transport: str) -> None:
    """Print what is going to happen."""
    _console.out(
        f"{stream.truth.orders:,} orders in {len(stream.messages):,} messages ({stream.duplicates:,} duplicates,"
        f" {stream.resends:,} resends under new ids),\n"
        f"carried by {NAMES[transport]}. Two shops receive all of them, with two processes each,\n"
        "which are killed with SIGKILL while they work. One runs on exactly_once; the naive one does SELECT, then INSERT.\n"
    )


class Progress:
    """The progress of the run.

    Args:
        stream: The messages that are sent.
        kills: How many kills there will be.
    """

    def __init__(self, stream: Stream, kills: int) -> None:
        self._messages, self._orders, self._kills = len(stream.messages), stream.truth.orders, kills
        self._bars: Bars | None = None
        self._said_at = 0.0
        if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
            self._bars = Bars(
                TextColumn("{task.description:<14}"),
                BarColumn(bar_width=40),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                console=_console,
            )
            totals = {"messages sent": self._messages, "exactly_once": self._orders, "naive": self._orders}
            self._tasks = [self._bars.add_task(name, total=total, note="") for name, total in totals.items()]
            self._tasks.append(self._bars.add_task("SIGKILLs", total=kills, note=""))

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def show(self, sent: int, sample: Sample, kills: int) -> None:
        """Show the present progress."""
        ours, naive = sample.ours, sample.naive
        if self._bars is not None:
            values = (sent, ours.orders, naive.orders, kills)
            notes = ("", f"{ours.doubled()} doubled", f"{naive.doubled()} doubled", "")
            for task, value, note in zip(self._tasks, values, notes, strict=True):
                self._bars.update(task, completed=value, note=note)
        elif monotonic() - self._said_at >= LINE_EVERY_S:
            self._said_at = monotonic()
            _console.out(
                f"{sample.at_s:5.1f} s  sent {sent:5,}  killed {kills:2}/{self._kills}"
                f"  exactly_once: {ours.orders:5,} orders, {ours.doubled()} doubled"
                f"  naive: {naive.orders:5,} orders, {naive.doubled():3} doubled"
            )


def closing(stream: Stream, ours: Ledger, naive: Ledger, *, kills: int, picture: Path, right: bool) -> None:
    """Print both ledgers beside each other, and what they say."""
    table = Table(box=box.SIMPLE_HEAD, title=f"Two ledgers after {kills} SIGKILLs", title_justify="left")
    table.add_column("", no_wrap=True)
    for heading in ("truth", "exactly_once", "off by", "naive", "off by"):
        table.add_column(heading, justify="right")
    for mine, theirs in zip(lines(ours, stream.truth), lines(naive, stream.truth), strict=True):
        row = (mine.what, mine.shown(mine.true), mine.shown(mine.found), _off(mine))
        table.add_row(*row, theirs.shown(theirs.found), _off(theirs))
    table.add_section()
    for what, mine_count, their_count in (
        ("orders done twice or more", ours.repeated, naive.repeated),
        ("orders lost", ours.lost(stream.truth), naive.lost(stream.truth)),
    ):
        table.add_row(what, "0", f"{mine_count:,}", _mark(mine_count), f"{their_count:,}", _mark(their_count))
    _console.print(table)
    if right:
        _console.print("[bold green]exactly_once is right to the unit.[/]", end=" ")
    else:
        _console.print("[bold red]exactly_once is WRONG: this must not happen, please report it.[/]", end=" ")
    if naive.right(stream.truth):
        _console.print("The hand-written consumer was lucky in this run.")
    else:
        _console.print(
            f"The hand-written consumer took {(naive.cents - stream.truth.cents) / 100:,.2f} too much from its customers."
        )
    _console.out(f"The picture: {picture}")


def _off(line: Line) -> str:
    return "[green]0[/]" if not line.difference else f"[bold red]{line.shown(line.difference, signed=True)}[/]"


def _mark(count: int) -> str:
    return "[green]0[/]" if not count else f"[bold red]+{count:,}[/]"
