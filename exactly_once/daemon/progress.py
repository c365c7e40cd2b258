"""Shows how far a worker is: a live line on a terminal, else a log line, at most once a second and only after a change.

Reads counts and nothing else; a failure with its key is logged where it happens, by `processing.processor`. Called only by the
command line's `run`. It has a thread of its own.
"""

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from threading import Event, Thread
from time import monotonic
from typing import TYPE_CHECKING, Final, TextIO

from exactly_once.outcome import Outcome
from exactly_once.wording.steady_log import steady
from exactly_once.worker.worker import Counts

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text

__all__ = ["Progress", "fields", "is_terminal"]

EVERY: Final = timedelta(seconds=1)
_REDRAW_S: Final = 0.25
_FAILURES: Final = (Outcome.FAILED.value, Outcome.DEAD.value)

_log = steady("exactly_once.progress")


def is_terminal(stream: TextIO) -> bool:
    """Whether a person watches: a terminal, and neither NO_COLOR (no-color.org) nor CI is set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and not os.environ.get("CI")


def fields(counts: Counts) -> dict[str, int | str]:
    """Return the fields of a log line: outcomes by name, with `_` for blanks. Outcomes that never happened are left out.

    Example:
        >>> from exactly_once.worker.worker import Counts
        >>> fields(Counts(received=3, acked=2, redelivered=0, given_back=0, in_hand=1, held=0, outages=(),
        ...               outcomes={"processed": 2, "not mine": 0}))
        {'processed': 2, 'in_hand': 1, 'received': 3, 'acked': 2, 'redelivered': 0}
    """
    said: dict[str, int | str] = {name.replace(" ", "_"): n for name, n in counts.outcomes.items() if n}
    said |= {"in_hand": counts.in_hand}
    if counts.held or counts.outages:
        said |= {"held": counts.held, "no_answer_from": ",".join(counts.outages)}
    said |= {"received": counts.received, "acked": counts.acked, "redelivered": counts.redelivered}
    if counts.given_back:
        said |= {"given_back": counts.given_back}
    return said


class Progress:
    """Shows counts from `start` (or `with`) to `stop`.

    Args:
        read: Returns the present counts: `lambda: worker.counts`.
        stream: Where a person would watch, if it is a terminal.
        every: The least time between two log lines.

    Example:
        with Progress(lambda: worker.counts):
            run_until_signal(worker)
    """

    def __init__(self, read: Callable[[], Counts], *, stream: TextIO | None = None, every: timedelta = EVERY) -> None:
        self._read, self._stream, self._every = read, stream or sys.stderr, every.total_seconds()
        self._over = Event()
        self._began = monotonic()
        self._thread = Thread(
            target=self._draw if is_terminal(self._stream) else self._write, daemon=True, name="progress"
        )

    def start(self) -> None:
        """Begin to show."""
        self._began = monotonic()
        self._thread.start()

    def stop(self) -> None:
        """Show the last state and end. Idempotent."""
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join(5.0)

    def __enter__(self) -> "Progress":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _write(self) -> None:
        """Write log lines: key=value in the text, and the same as `record.exactly_once` for JSON logging."""
        last: dict[str, int | str] = {}
        done, at = 0, self._began
        over = False
        while not over:
            over = self._over.wait(self._every)
            counts = self._read()
            if (said := fields(counts)) == last:
                continue
            now, last = monotonic(), said
            line = said | {"per_second": round((counts.acked - done) / max(now - at, 0.001))}
            done, at = counts.acked, now
            text = " ".join(f"{name}={value}" for name, value in line.items())
            _log.info("%s", text, extra={"exactly_once": line})

    def _draw(self) -> None:
        from rich.console import Console
        from rich.live import Live

        done, at = 0, self._began
        rate = 0.0
        # What the program logs or prints meanwhile goes above the line, because rich sees it.
        with Live(console=Console(file=self._stream), auto_refresh=False, transient=False) as live:
            over = False
            while not over:
                over = self._over.wait(_REDRAW_S)
                counts, now = self._read(), monotonic()
                if now - at >= 1.0 or over:
                    rate, done, at = (counts.acked - done) / max(now - at, 0.001), counts.acked, now
                self._show(live, counts, rate)

    def _show(self, live: "Live", counts: Counts, rate: float) -> None:
        live.update(_line(counts, rate), refresh=True)


def _line(counts: Counts, rate: float) -> "Text":
    from rich.text import Text

    outcomes = counts.outcomes
    failures = sum(outcomes.get(name, 0) for name in _FAILURES)
    line = Text.assemble(
        (f"{outcomes.get(Outcome.PROCESSED.value, 0):,}", "bold green"),
        " processed  ",
        (f"{rate:,.0f}", "bold"),
        "/s  ",
        f"{outcomes.get(Outcome.DUPLICATE.value, 0):,} duplicates  ",
        (f"{failures:,} failures", "bold red" if failures else ""),
        f"  {counts.in_hand:,} in hand",
    )
    if counts.outages:
        line.append(f"  no answer from {', '.join(counts.outages)}: {counts.held:,} held", "bold yellow")
    if counts.given_back:
        line.append(f"  {counts.given_back:,} given back", "yellow")
    return line
