"""What is printed and written: a table, a JSON file and a picture."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.measure import Figure
from benchmarks.picture import picture

__all__ = ["print_figures", "write"]

RESULTS: Final = Path(__file__).with_name("results")


def print_figures(console: Console, figures: Sequence[Figure], about: Mapping[str, str]) -> None:
    """Print the machine and every figure."""
    console.print()
    for name, value in about.items():
        console.print(f"[dim]{name:>22}[/]  {value}")
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("figure")
    table.add_column("ratio of", style="dim")
    for name in ("median", "min - max", "target"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    table.add_column("medians behind it", style="dim")
    for figure in figures:
        behind = "; ".join(f"{name} {value}" for name, value in figure.measured.items())
        told = f"{behind} ({figure.note})" if figure.note and behind else behind or figure.note
        sign = "" if figure.target is None else f"{'>=' if figure.least else '<='} {figure.target:.2f}"
        if figure.skipped:
            table.add_row(figure.name, figure.what, "-", "", sign, "[yellow]skipped[/]", figure.skipped)
            continue
        spread = f"{min(figure.rounds):.2f} - {max(figure.rounds):.2f}" if len(figure.rounds) > 1 else ""
        verdict = {True: "[green]reached[/]", False: "[bold red]missed[/]", None: ""}[figure.reached]
        table.add_row(figure.name, figure.what, f"[bold]{figure.ratio:.2f}[/]", spread, sign, verdict, told)
    console.print(table)


def write(figures: Sequence[Figure], about: Mapping[str, str], *, file: Path | None, quick: bool) -> list[Path]:
    """Write JSON and picture, and return where they are."""
    now = datetime.now(UTC)
    told = {"at": now.isoformat(timespec="seconds"), "quick": quick, "about": dict(about)}
    text = json.dumps({**told, "figures": [figure.as_json() for figure in figures]}, indent=1) + "\n"
    RESULTS.mkdir(exist_ok=True)
    files = [RESULTS / f"{now:%Y%m%d-%H%M%S}.json", RESULTS / "latest.json"]
    if file is not None:
        files.append(file)
    for each in files:
        each.write_text(text, encoding="utf-8")
    drawn = RESULTS / "latest.svg"
    drawn.write_text(picture(figures, about), encoding="utf-8")
    return [*files[1:], drawn]
