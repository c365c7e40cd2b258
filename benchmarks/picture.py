"""Draws every figure with a target as an SVG: its median, the range over the rounds, and the target.

Ratios up to two are on one axis that begins at zero. Larger ratios are below it, on a logarithmic axis.
"""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from math import ceil, log10
from typing import Final

from benchmarks.measure import Figure

__all__ = ["picture"]

WIDTH: Final = 960
LEFT, RIGHT = 400, 840
ROW: Final = 46
TOP: Final = 112
GAP: Final = 70
MOST: Final = 2.0
INK, FAINT, GRID = "#1c2430", "#6b7686", "#e3e7ed"
GOOD, BAD = "#0f8a6d", "#d1443c"
FONT: Final = "system-ui, 'Segoe UI', Helvetica, Arial, sans-serif"


def picture(figures: Sequence[Figure], about: Mapping[str, str]) -> str:
    """Return the picture as text."""
    shown = [figure for figure in figures if figure.target is not None and figure.rounds]
    large = [figure for figure in shown if figure.least and (figure.target or 0) >= MOST]
    small = [figure for figure in shown if figure not in large]
    parts = [
        _text(40, 44, "What it costs, as ratios of two things measured in turn", size=20, weight=600, colour=INK),
        _text(40, 68, f"{about.get('machine', '')}; PostgreSQL {about.get('postgresql', '')}, fsync on", size=13),
    ]
    bottom = TOP
    if small:
        most = min(max([1.2, *(max(figure.rounds) for figure in small)]), MOST)
        ticks = [n / 4 for n in range(int(most * 4) + 1)]
        bottom = _panel(parts, bottom, small, ticks, lambda value: min(value, most) / most)
    if large:
        decades = ceil(log10(max(max(*figure.rounds, figure.target or 0) for figure in large)))
        ticks = [step * 10.0**decade for decade in range(decades) for step in (1, 2, 5)] + [10.0**decades]
        bottom = _panel(parts, bottom, large, ticks, lambda value: log10(max(value, 1.0)) / decades)
    parts.append(
        _text(
            40,
            bottom - 18,
            "dot: median; band: all rounds; mark: target, its flag points to where it is reached",
            size=12,
        )
    )
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom}" width="{WIDTH}" height="{bottom}"'
        f' font-family="{FONT}">\n<rect width="{WIDTH}" height="{bottom}" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


def _panel(
    parts: list[str], top: int, figures: Sequence[Figure], ticks: Sequence[float], place: Callable[[float], float]
) -> int:
    """Draw figures on one axis, and return where the next part may begin. `place` maps a ratio to a place from 0 to 1."""

    def x(value: float) -> float:
        return LEFT + place(value) * (RIGHT - LEFT)

    bottom = top + ROW * len(figures)
    for tick in ticks:
        weight = 1.4 if tick == 1 else 0.8
        parts.append(_line(x(tick), top - 14, x(tick), bottom, "#b9c1cc" if tick == 1 else GRID, weight))
        parts.append(_text(x(tick), bottom + 20, f"{tick:g}", size=12, anchor="middle"))
    for number, figure in enumerate(figures):
        y = top + ROW * number + 14
        colour = GOOD if figure.reached else BAD
        assert figure.target is not None
        parts.append(_text(LEFT - 16, y, figure.name, size=13, anchor="end", colour=INK, weight=600))
        parts.append(_text(LEFT - 16, y + 15, figure.what, size=11, anchor="end"))
        parts.append(_line(x(min(figure.rounds)), y, x(max(figure.rounds)), y, colour, 6, opacity=0.25, round_=True))
        target = x(figure.target)
        arrow = -1 if not figure.least else 1
        parts.append(_line(target, y - 12, target, y + 12, INK, 2))
        parts.append(
            f'<polygon points="{target:.1f},{y - 12} {target + 6 * arrow:.1f},{y - 9} {target:.1f},{y - 6}" fill="{INK}"/>'
        )
        parts.append(f'<circle cx="{x(figure.ratio):.1f}" cy="{y}" r="6" fill="{colour}"/>')
        parts.append(_text(RIGHT + 20, y + 5, f"{figure.ratio:.2f}", size=15, colour=colour, weight=600))
    return bottom + GAP


def _text(
    x: float, y: float, text: str, *, size: int, colour: str = FAINT, weight: int = 400, anchor: str = "start"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" fill="{colour}"'
        f' text-anchor="{anchor}">{escape(text)}</text>'
    )


def _line(
    x1: float, y1: float, x2: float, y2: float, colour: str, width: float, *, opacity: float = 1, round_: bool = False
) -> str:
    cap = ' stroke-linecap="round"' if round_ else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}"'
        f' stroke-opacity="{opacity}"{cap}/>'
    )
