"""Draws the two ledgers over the run, as an SVG: no plotting library, nothing fetched, readable in any browser.

It has three parts: the reservations of both shops against the true number of orders, with a mark for every SIGKILL; what each
shop has doubled or lost at each moment; and, at the end, how far each product's stock is from the truth. Decides nothing. Called
by `run` with the samples.
"""

from collections.abc import Callable, Sequence
from html import escape
from typing import Final

from examples.demo.ledger import Ledger, Sample
from examples.demo.orders import PRODUCTS, STOCK, Stream

__all__ = ["Picture"]

WIDTH: Final = 1080
HEIGHT: Final = 760
INK, FAINT, GRID, PAPER = "#1c2430", "#6b7686", "#e3e7ed", "#ffffff"
OURS, NAIVE, TRUE = "#0f8a6d", "#d1443c", "#9aa4b2"
FONT: Final = "system-ui, 'Segoe UI', Helvetica, Arial, sans-serif"

Scale = Callable[[float], float]


class Picture:
    """One run's picture.

    Args:
        stream: The messages that were sent.
        carried_by: The name of the broker, for the heading.
        samples: Both ledgers over the run.
        kills: The time of each kill, and the shop of the killed worker.
        ours: The name of our shop in `kills`.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        carried_by: str,
        samples: Sequence[Sample],
        kills: Sequence[tuple[float, str]],
        ours: str,
    ) -> None:
        self._stream, self._carried_by, self._samples, self._ours = stream, carried_by, samples, ours
        self._kills = kills
        self._end_s = max(samples[-1].at_s, 1.0)
        self._parts: list[str] = []

    def svg(self) -> str:
        """Return the picture as text."""
        self._parts = []
        self._heading()
        self._timeline(left=70, top=132, width=610, height=330)
        self._doubled(left=70, top=540, width=610, height=150)
        self._numbers(left=740, top=132)
        self._stock(left=740, top=540, width=290, height=150)
        body = "\n".join(self._parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
            f' font-family="{FONT}" role="img" aria-label="Two ledgers against the truth">\n'
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{PAPER}"/>\n{body}\n</svg>\n'
        )

    # -- the parts ---------------------------------------------------------------------------------------------------

    def _heading(self) -> None:
        stream = self._stream
        self._text(40, 46, "Same messages, same crashes, two ledgers", size=24, weight=600)
        self._text(
            *(40, 72),
            f"{stream.truth.orders:,} orders in {len(stream.messages):,} messages over {self._carried_by}:"
            f" {stream.duplicates:,} duplicates, {stream.resends} resends, {len(self._kills)} SIGKILLs",
            size=14,
            colour=FAINT,
        )

    def _timeline(self, *, left: float, top: float, width: float, height: float) -> None:
        highest = max(self._stream.truth.orders, *(s.naive.reservations for s in self._samples))
        x, y = self._time(left, width), _scale(0, _round_up(highest), top + height, top)
        self._title(left, top, "Reservations in the database")
        self._legend(left + width - 312, top - 16)
        self._grid(x, y, left, top, width, height, _ticks(_round_up(highest)))
        self._kill_marks(x, top + height)
        self._line([(x(s.at_s), y(s.sent)) for s in self._samples], TRUE, width=2, dashed=True)
        self._line([(x(s.at_s), y(s.naive.reservations)) for s in self._samples], NAIVE)
        self._line([(x(s.at_s), y(s.ours.reservations)) for s in self._samples], OURS)
        right = y(self._stream.truth.orders)
        self._parts.append(
            f'<line x1="{left}" x2="{left + width}" y1="{right:.1f}" y2="{right:.1f}" stroke="{TRUE}"'
            ' stroke-width="1" stroke-dasharray="2 4"/>'
        )

    def _doubled(self, *, left: float, top: float, width: float, height: float) -> None:
        highest = max(10, *(s.naive.doubled() for s in self._samples), *(s.ours.doubled() for s in self._samples))
        x, y = self._time(left, width), _scale(0, _round_up(highest), top + height, top)
        self._title(left, top, "Orders reserved once too often, until then")
        self._grid(x, y, left, top, width, height, _ticks(_round_up(highest), most=4))
        naive = [(x(s.at_s), y(s.naive.doubled())) for s in self._samples]
        area = " ".join(f"{a:.1f},{b:.1f}" for a, b in [(naive[0][0], y(0)), *naive, (naive[-1][0], y(0))])
        self._parts.append(f'<polygon points="{area}" fill="{NAIVE}" fill-opacity="0.14"/>')
        self._line(naive, NAIVE)
        self._line([(x(s.at_s), y(s.ours.doubled())) for s in self._samples], OURS, width=3)
        self._text(
            left + width / 2, top + height + 40, "seconds since the first order", size=12, colour=FAINT, anchor="middle"
        )

    def _numbers(self, *, left: float, top: float) -> None:
        truth, last = self._stream.truth, self._samples[-1]
        self._title(left, top, "The ledgers in the end")
        for offset, (name, colour) in zip((180, 290), (("exactly_once", OURS), ("naive", NAIVE)), strict=True):
            self._text(left + offset, top + 22, name, size=13, weight=600, colour=colour, anchor="end")
        rows: list[tuple[str, str, str, bool, bool]] = []

        def row(what: str, read: Callable[[Ledger], int], true: int, write: Callable[[int], str]) -> None:
            found = read(last.ours), read(last.naive)
            rows.append((what, write(found[0]), write(found[1]), found[0] == true, found[1] == true))

        row("reservations", lambda one: one.reservations, truth.orders, lambda n: f"{n:,}")
        row("doubled", lambda one: one.doubled(), 0, lambda n: f"{n:,}")
        row("lost", lambda one: one.lost(truth), 0, lambda n: f"{n:,}")
        row("money", lambda one: one.cents, truth.cents, lambda n: f"{n / 100:,.2f}")
        row("too much", lambda one: one.cents - truth.cents, 0, lambda n: f"{n / 100:+,.2f}" if n else "0.00")
        sold = STOCK * len(PRODUCTS) - sum(truth.units.values())
        row("units left", lambda one: sum(one.left.values()), sold, lambda n: f"{n:,}")
        for number, (what, ours, naive, ours_right, naive_right) in enumerate(rows):
            y = top + 54 + 34 * number
            self._parts.append(f'<line x1="{left}" x2="{left + 290}" y1="{y - 22}" y2="{y - 22}" stroke="{GRID}"/>')
            self._text(left, y, what, size=13, colour=FAINT)
            self._text(left + 180, y, ours, size=15, anchor="end", colour=INK if ours_right else NAIVE, weight=600)
            self._text(left + 290, y, naive, size=15, anchor="end", colour=INK if naive_right else NAIVE, weight=600)
        y = top + 54 + 34 * len(rows)
        self._parts.append(f'<line x1="{left}" x2="{left + 290}" y1="{y - 22}" y2="{y - 22}" stroke="{GRID}"/>')
        right = last.ours.right(truth)
        said = "exactly_once is right to the unit." if right else "exactly_once is wrong: a bug."
        self._text(left, y + 8, said, size=15, weight=600, colour=OURS if right else NAIVE)
        self._text(left, y + 30, "naive: SELECT whether it was handled,", size=12, colour=FAINT)
        self._text(left, y + 46, "do the work, INSERT the mark.", size=12, colour=FAINT)

    def _stock(self, *, left: float, top: float, width: float, height: float) -> None:
        last, truth = self._samples[-1], self._stream.truth
        self._title(left, top, "Units missing from stock")
        missing = {
            sku: tuple(STOCK - truth.units[sku] - ledger.left[sku] for ledger in (last.ours, last.naive))
            for sku in PRODUCTS
        }
        most = max(1, *(abs(n) for pair in missing.values() for n in pair))
        step = (height + 30) / len(missing)
        start = left + 82
        for number, (sku, (ours, naive)) in enumerate(missing.items()):
            y = top + 4 + step * number
            self._text(start - 10, y + 14, sku, size=12, colour=FAINT, anchor="end")
            for offset, n, colour in ((0, ours, OURS), (10, naive, NAIVE)):
                bar = max(2.0, (width - 82 - 44) * abs(n) / most)
                self._parts.append(
                    f'<rect x="{start}" y="{y + offset:.1f}" width="{bar:.1f}" height="8" rx="2" fill="{colour}"/>'
                )
                self._text(start + bar + 6, y + offset + 8, f"{n:,}", size=10, colour=colour)

    # -- what they are made of ---------------------------------------------------------------------------------------

    def _time(self, left: float, width: float) -> Scale:
        return _scale(0, self._end_s, left, left + width)

    def _title(self, left: float, top: float, text: str) -> None:
        self._text(left, top - 16, text, size=15, weight=600)

    def _legend(self, left: float, y: float) -> None:
        for offset, name, colour in ((0, "true", TRUE), (58, "exactly_once", OURS), (172, "naive", NAIVE)):
            dash = ' stroke-dasharray="5 4"' if colour == TRUE else ""
            self._parts.append(
                f'<line x1="{left + offset}" x2="{left + offset + 18}" y1="{y - 4}" y2="{y - 4}" stroke="{colour}"'
                f' stroke-width="3"{dash}/>'
            )
            self._text(left + offset + 23, y, name, size=12, colour=FAINT)
        self._parts.append(_lightning(left + 240, y - 4, FAINT))
        self._text(left + 250, y, "SIGKILL", size=12, colour=FAINT)

    def _grid(
        self, x: Scale, y: Scale, left: float, top: float, width: float, height: float, ticks: Sequence[float]
    ) -> None:
        for tick in ticks:
            self._parts.append(
                f'<line x1="{left}" x2="{left + width}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="{GRID}"/>'
            )
            self._text(left - 10, y(tick) + 4, f"{tick:,.0f}", size=12, colour=FAINT, anchor="end")
        for tick in _ticks(self._end_s, most=8):
            if tick <= self._end_s:
                self._text(x(tick), top + height + 20, f"{tick:g}", size=12, colour=FAINT, anchor="middle")
        for at_s in sorted({at_s for at_s, _ in self._kills}):
            self._parts.append(
                f'<line x1="{x(at_s):.1f}" x2="{x(at_s):.1f}" y1="{top}" y2="{top + height}" stroke="{FAINT}"'
                ' stroke-width="0.7" stroke-opacity="0.45" stroke-dasharray="1 3"/>'
            )

    def _kill_marks(self, x: Scale, bottom: float) -> None:
        for at_s, side in self._kills:
            colour, y = (OURS, bottom - 22) if side == self._ours else (NAIVE, bottom - 9)
            self._parts.append(_lightning(x(at_s), y, colour))

    def _line(
        self, points: Sequence[tuple[float, float]], colour: str, *, width: float = 2.5, dashed: bool = False
    ) -> None:
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self._parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-linejoin="round"{dash}/>'
        )

    def _text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: int,
        colour: str = INK,
        weight: int = 400,
        anchor: str = "start",
    ) -> None:
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" fill="{colour}"'
            f' text-anchor="{anchor}">{escape(text)}</text>'
        )


def _lightning(x: float, y: float, colour: str) -> str:
    points = ((1, -6), (-4, 1), (0, 1), (-1, 6), (4, -1), (0, -1))
    return f'<polygon points="{" ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in points)}" fill="{colour}"/>'


def _scale(low: float, high: float, at_low: float, at_high: float) -> Scale:
    return lambda value: at_low + (value - low) / (high - low) * (at_high - at_low)


def _ticks(end: float, *, most: int = 6) -> list[float]:
    """Return a few round numbers from 0 to the end."""
    step = _step(end, most)
    return [step * n for n in range(int(end / step) + 1)]


def _round_up(end: float, *, most: int = 6) -> float:
    """Return the end of an axis: a little above the highest value."""
    step = _step(end, most) / 2
    return step * (int(end / step) + 1)


def _step(end: float, most: int) -> float:
    magnitude = 1.0
    while end / magnitude > 10 * most:
        magnitude *= 10
    return next(magnitude * factor for factor in (1, 2, 5, 10) if end / (magnitude * factor) <= most)
